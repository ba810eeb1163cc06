"""Candidates of a gallery under a random protection: averages of several draws, and how they are ranked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raypp.metrics.image import in_parts

MIN_STD = 0.5  # gray levels; rounding alone gives 0.29
MAX_COMPONENTS = 256
GRID_SIZE = 4096  # points at which the mean of clipped noise is inverted


@dataclass(frozen=True)
class Candidates:
    """Estimates of the candidates' mean protected images.

    Attributes:
        means: float (M, D), gray levels.
        noise_std: float (D,), standard deviation of one protected image around its mean, gray levels; at least
            ``MIN_STD``.
        num_draws: protected versions per candidate.
    """

    means: Tensor
    noise_std: Tensor
    num_draws: int


def average_draws(draws: Iterable[Iterable[Tensor]], seed: int = 0) -> Candidates:
    """Average the draws of each candidate, and filter the averages if there are two draws or more.

    Args:
        draws: for each batch of candidates, its protected versions (m, D), values 0 to 255.
        seed: seed of the randomized singular value decomposition.
    """
    means, variances = [], []
    for batch in draws:
        num_draws, total, squares = 0, torch.zeros(()), torch.zeros(())
        for draw in batch:  # sums of integers, exact in float32
            num_draws, total, squares = num_draws + 1, total + draw.float(), squares + draw.float().square()
        means.append(total / num_draws)
        variances.append(squares / num_draws - means[-1].square())
    averages = torch.cat(means)
    if num_draws == 1:
        return Candidates(averages, torch.ones_like(averages[0]), 1)
    variance = torch.cat(variances).mean(0) * num_draws / (num_draws - 1)
    noise_std = variance.clamp_min(MIN_STD**2).sqrt()
    return Candidates(_wiener_filter(averages, noise_std, num_draws, seed), noise_std, num_draws)


def _wiener_filter(averages: Tensor, noise_std: Tensor, num_draws: int, seed: int) -> Tensor:
    """Shrink each principal component of averages (M, D) by its share of signal.

    The noise of an average has the variance ``noise_std**2 / num_draws`` at each value. The components after the first
    ``MAX_COMPONENTS`` share one factor.
    """
    center = averages.mean(0)
    scaled = (averages - center) / noise_std
    num, size = scaled.shape
    rank = min(MAX_COMPONENTS, num, size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, singular_values, components = torch.svd_lowrank(scaled, rank, niter=2)
    variances = singular_values.square() / num
    rest = (scaled.square().sum() / num - variances.sum()).clamp_min(0) / max(1, size - rank)

    def share_of_signal(variance: Tensor) -> Tensor:
        return (variance - 1 / num_draws).clamp_min(0) / variance.clamp_min(1e-12)

    common = share_of_signal(rest)
    projected = (scaled @ components) * (share_of_signal(variances) - common)
    filtered: Tensor = center + (common * scaled + projected @ components.t()) * noise_std
    return filtered


class CandidateScores(Protocol):
    """Ranks candidates for protected images."""

    def rank(self, protected: Tensor) -> Tensor:
        """Return scores float64 (n, M) of values (n, D), 0 to 255; the largest marks the most probable candidate."""


class DistanceScores:
    """Minus half the squared distance to the candidates' means, in units of the noise at each value."""

    def __init__(self, candidates: Candidates) -> None:
        self._noise_std = candidates.noise_std
        self._scaled = (candidates.means - 128) / self._noise_std

    def rank(self, protected: Tensor) -> Tensor:
        values = (protected.double() - 128) / self._noise_std
        parts = (part.double() for part in in_parts(self._scaled))
        return torch.cat([values @ part.t() - part.square().sum(1) / 2 for part in parts], dim=1)


class LikelihoodScores:
    """Log-likelihoods under Gaussian noise of a stated standard deviation, clipped to [0, 255] and rounded.

    A value of 0 has the probability of all noise that is clipped to it, and so has 255. Constants that are equal for
    all candidates are left out.

    Args:
        candidates: their means include the effect of clipping, which is inverted.
        noise_std: gray levels.
    """

    def __init__(self, candidates: Candidates, noise_std: float) -> None:
        means = _unclipped(candidates.means, noise_std)
        # The mean of an unknown original has noise too, and rounding adds 1/12.
        variance = noise_std**2 * (1 + 1 / candidates.num_draws) + 1 / 12
        centered = means - 128
        self._linear = centered / variance
        self._quadratic = centered.square() / (2 * variance)
        self._at_0: Tensor = torch.special.log_ndtr((0.5 - means) / variance**0.5)
        self._at_255: Tensor = torch.special.log_ndtr((means - 254.5) / variance**0.5)

    def rank(self, protected: Tensor) -> Tensor:
        at_0, at_255 = (protected == 0).double(), (protected == 255).double()
        inside = 1 - at_0 - at_255
        factors = (inside * (protected.double() - 128), -inside, at_0, at_255)
        weights = (self._linear, self._quadratic, self._at_0, self._at_255)
        columns = [
            torch.stack([factor @ part.double().t() for factor, part in zip(factors, parts, strict=True)]).sum(0)
            for parts in zip(*map(in_parts, weights), strict=True)
        ]
        return torch.cat(columns, dim=1)


def _unclipped(means: Tensor, noise_std: float) -> Tensor:
    """Return the means of Gaussian noise whose means after clipping to [0, 255] are ``means``."""
    normal = torch.distributions.Normal(0.0, 1.0)
    grid = torch.linspace(-4 * noise_std, 255 + 4 * noise_std, GRID_SIZE, dtype=torch.float64)
    low, high = -grid / noise_std, (255 - grid) / noise_std
    density = normal.log_prob(high).exp() - normal.log_prob(low).exp()
    clipped = 255 * (1 - normal.cdf(high)) + grid * (normal.cdf(high) - normal.cdf(low)) - noise_std * density
    indices = torch.bucketize(means, clipped.to(means)).clamp_max(GRID_SIZE - 1)
    unclipped: Tensor = grid.to(means)[indices]
    return unclipped
