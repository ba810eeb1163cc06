"""PSNR and SSIM are scikit-image's, image by image; intervals are Wilson's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # an optimizer's first step imports it, for seconds
from conftest import few_examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raypp.attacks.base import AttackerKnowledge
from raypp.attacks.target import Target
from raypp.data import loader
from raypp.evaluation import baselines as baseline_module
from raypp.evaluation.baselines import BASELINE_MATCHER, baselines
from raypp.evaluation.evaluate import evaluate
from raypp.evaluation.scorecard import score_images
from raypp.metrics import image
from raypp.metrics.image import (
    ALEXNET,
    edge_correlation,
    edge_maps,
    load_lpips,
    lpips,
    lpips_features,
    psnr,
    ssim,
    ssim_invariant,
    ssim_lab,
    use_backend,
)
from raypp.metrics.matchers import build_matchers
from raypp.metrics.retrieval import flatten_pixels, reidentify
from raypp.metrics.statistics import bootstrap_interval, wilson_interval
from raypp.protections.learned import Learned
from raypp.protections.plain import Plain

Array = np.ndarray


def reference(a: Array, b: Array) -> tuple[list[float], list[float]]:
    """PSNR and SSIM (Wang's form) of float images (N, C, H, W), one by one."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    similarity = [
        structural_similarity(
            x,
            y,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]
    ratio = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b, strict=True)]
    return ratio, similarity


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Pairs of 8-bit images: noise, noisy flat images and gradients, and their small changes and negatives."""
    shape = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(11, 40)),
        draw(st.integers(11, 40)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    level, contrast = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    ramp = np.linspace(-0.5, 0.5, shape[3]) * contrast
    noise = rng.integers(-contrast, contrast + 1, shape)
    first = draw(st.sampled_from([level + noise, level + ramp + np.zeros(shape), np.full(shape, level)]))
    other = draw(
        st.sampled_from(
            [rng.integers(0, 256, shape), first + rng.integers(-3, 4, shape), 255 - first, np.full(shape, level // 2)]
        )
    )
    a, b = (np.clip(np.rint(x), 0, 255).astype(np.float32) / 255 for x in (first, other))
    return a, b


@pytest.mark.slow
@given(pair=pairs())
def test_psnr_and_ssim_are_scikit_images(pair: tuple[Array, Array]) -> None:
    a, b = pair
    with np.errstate(divide="ignore"):
        ratio, similarity = reference(a, b)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(ratio, abs=1e-4)
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(similarity, abs=1e-4)


@given(pair=pairs())
def test_the_labs_ssim_is_scikit_images_default(pair: tuple[Array, Array]) -> None:
    from skimage.metrics import structural_similarity

    a, b = pair
    expected = [
        structural_similarity(x, y, data_range=1, channel_axis=0)
        for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]
    assert ssim_lab(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected, abs=1e-4)


def test_identical_and_negative_images() -> None:
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.random((3, 3, 32, 32), dtype=np.float32))
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert psnr(a, a).tolist() == [math.inf] * 3
    assert (ssim(a, 1 - a) < -0.9).all(), "a negative is as readable as the image itself"
    assert torch.equal(psnr(a, 1 - a), psnr(1 - a, a))
    assert psnr(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)).item() == 0


def test_each_image_has_its_own_number() -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.random((4, 1, 16, 16), dtype=np.float32)) for _ in range(2))
    for metric in (psnr, ssim, ssim_lab, ssim_invariant, edge_correlation):
        assert metric(a, b).shape == (4,)
        one_by_one = [metric(a[i : i + 1], b[i : i + 1]).item() for i in range(4)]
        assert metric(a, b).tolist() == pytest.approx(one_by_one, rel=1e-5)


@given(num=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_solves_its_equation(num: int, share: float) -> None:
    """Its ends are where a proportion's distance to the estimate is 1.96 standard errors at that proportion."""
    successes = round(share * num)
    low, high = wilson_interval(successes, num)
    assert 0 <= low <= successes / num + 1e-12
    assert successes / num - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(successes / num - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / num), rel=1e-6)


class Brightness(nn.Module):
    """Two classes: the mean is below or above a threshold, which some images cross by 8-bit rounding only."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack((0.5 - mean, mean - 0.5), dim=1)


class Faint(Plain):
    """Adds less than half an 8-bit step, which an upload removes."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 0.4 / 255


def test_evaluate_counts_what_is_left_after_8_bit_rounding() -> None:
    images = torch.full((10, 12, 12, 3), 127, dtype=torch.uint8)
    images[5:] = 255
    labels = torch.tensor([0] * 5 + [1] * 5)
    metrics = evaluate(Plain(Plain.Options()), Brightness(), images, labels, batch_size=3)
    assert metrics["num_images"] == 10
    assert metrics["accuracy"] == metrics["accuracy_float"] == 1
    assert metrics["accuracy_interval"] == wilson_interval(10, 10)
    assert metrics["saturated"] == 0.5
    assert metrics["ssim"] == {"mean": 1.0, "median": 1.0, "p99": 1.0}
    assert metrics["psnr"] == {"mean": None, "median": None, "p99": None}  # infinite, and JSON has no infinity
    json.dumps(metrics, allow_nan=False)
    images[:5] = 127  # 127 / 255 is 0.498: in float Faint carries it to 0.4996, still class 0, and 128 lies above
    images[0] = 128
    labels[0] = 1
    faint = evaluate(Faint(Plain.Options()), Brightness(), images, labels, batch_size=10)
    assert faint["accuracy"] == 1
    assert faint["psnr"]["median"] is None


def test_evaluate_rounds_before_it_classifies() -> None:
    images = torch.full((4, 12, 12, 3), 127, dtype=torch.uint8)  # 127.4 / 255 < 0.5; rounded it is 127 again

    class Step(Plain):
        def forward(self, images: Tensor) -> Tensor:
            return images + 0.6 / 255  # 127.6: class 1 only when it was rounded to 128... in float it is 0.50039

    class Above(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images - 0.0015)

    metrics = evaluate(Step(Plain.Options()), Above(), images, torch.ones(4, dtype=torch.int64))
    assert (metrics["accuracy"], metrics["accuracy_float"]) == (1.0, 0.0)


def test_evaluate_does_not_depend_on_the_batch_size_and_takes_small_images() -> None:
    torch.manual_seed(0)
    protection = Learned(Learned.Options(width=4, depth=2))
    images = torch.randint(0, 256, (7, 9, 10, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    small, large = (evaluate(protection, Brightness(), images, labels, size) for size in (2, 100))
    assert small == large
    assert small["ssim"] is None, "an 11 x 11 window does not fit"
    assert not protection.training


def test_polarity_and_edges_are_seen_through_a_negative() -> None:
    rng = np.random.default_rng(1)
    blocks = (
        torch.from_numpy(rng.random((5, 3, 8, 8), dtype=np.float32)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    other = torch.from_numpy(rng.random((5, 3, 32, 32), dtype=np.float32))
    assert ssim_invariant(blocks, 1 - blocks).tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert (edge_correlation(blocks, 1 - blocks) > 0.999).all()
    assert (edge_correlation(blocks, 0.2 + 0.3 * blocks) > 0.999).all()
    assert (edge_correlation(blocks, other) < 0.5).all()
    assert edge_correlation(blocks, torch.full_like(blocks, 0.5)).tolist() == [0] * 5
    assert (ssim_invariant(blocks, other) >= ssim(blocks, other)).all()


def test_edges_are_correlated_as_numpy_says() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 1, 1, 12, 15))
    edges = []
    for picture in (a[0, 0], b[0, 0]):
        down, across = np.gradient(picture)
        edges.append(np.hypot(down, across)[1:-1, 1:-1].ravel())
    expected = np.corrcoef(*edges)[0, 1]
    assert edge_correlation(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected, abs=1e-6)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="sides of at least 11 pixels, not 10"):
        ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20))


def test_ranks_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    gallery = rng.random((50, 3, 4, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    truth = rng.permutation(50)[:20]
    estimates = gallery[truth] + rng.normal(0, 1, (20, 3, 4, 4)).astype(np.float32)
    ranks = reidentify(*(torch.from_numpy(x) for x in (estimates, gallery, truth, labels)))
    for i, (estimate, own) in enumerate(zip(estimates, truth, strict=True)):
        distances = ((gallery - estimate) ** 2).sum((1, 2, 3))
        nearer = distances < distances[own]
        assert ranks.all[i] == nearer.sum()
        assert ranks.same_class[i] == (nearer & (labels == labels[own])).sum()
    assert 0 < ranks.top(1).mean() < 1
    assert ranks.top(5).mean() >= ranks.top(1).mean()
    perfect = reidentify(*(torch.from_numpy(x) for x in (gallery[truth], gallery, truth, labels)))
    assert not perfect.all.any()


def test_duplicates_in_a_gallery_do_not_count_against_the_attacker() -> None:
    image = torch.rand(1, 3, 8, 8)
    gallery = torch.cat((torch.rand(3, 3, 8, 8), image, image))
    assert reidentify(image, gallery, torch.tensor([4]), torch.zeros(5, dtype=torch.int64)).all.item() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_distances_that_are_equal_in_float32_are_distinguished(dtype: torch.dtype) -> None:
    """Three neighbours: one level nearer than the original, as near as it, one level farther."""
    query = torch.full((1, 3, 32, 32), 254, dtype=torch.uint8)
    original = torch.full_like(query, 255)  # the squares' sum is above 2^24, so float32 does not hold it
    original[0, 0, 0, :2] = torch.tensor([254, 255], dtype=torch.uint8)
    nearer, equal, farther = original.clone(), original.clone(), original.clone()
    nearer[0, 1, 5, 5] = 254
    equal[0, 0, 0, :2] = torch.tensor([255, 254], dtype=torch.uint8)
    farther[0, 0, 0, 0] = 255
    labels = torch.zeros(2, dtype=torch.int64)
    ranks = []
    for other in (nearer, equal, farther):
        estimate, gallery = query, torch.cat((original, other))
        if dtype == torch.float32:
            estimate, gallery = estimate.float() / 255, gallery.float() / 255
        ranks.append(reidentify(estimate, gallery, torch.tensor([0]), labels).all.item())
    assert ranks == [1, 1, 0]


def test_reidentification_in_parts_gives_the_same_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8)
    estimates = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8)
    truth, labels = torch.arange(20) * 2, torch.arange(50) % 3

    def edges(images: torch.Tensor) -> torch.Tensor:
        return edge_maps(images.float() / 255)

    whole = [reidentify(estimates, gallery, truth, labels, *kind) for kind in ((), (edges,))]
    monkeypatch.setattr(image, "PART_VALUES", 7 * gallery[0].numel())
    sizes = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return flatten_pixels(images)

    in_parts = [reidentify(estimates, gallery, truth, labels, kind) for kind in (counted, edges)]
    assert max(sizes) == 7
    for one, other in zip(whole, in_parts, strict=True):
        assert torch.equal(one.all, other.all)
        assert torch.equal(one.same_class, other.same_class)
    assert len(set(whole[0].all.tolist())) > 5


@given(num=st.integers(2, 400), seed=st.integers(0, 100))
@few_examples
def test_the_bootstrap_interval_is_near_the_normal_one(num: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(3, 2, num)
    low, high = bootstrap_interval(values)
    assert low <= values.mean() <= high
    if num > 100:
        half = 1.96 * values.std() / num**0.5
        assert high - low == pytest.approx(2 * half, rel=0.15)
    assert bootstrap_interval(values) == (low, high)


@pytest.mark.slow
def test_lpips_where_its_weights_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's published weights are not available everywhere; LPIPS's own heads come with its package."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    load_lpips.cache_clear()
    a = torch.rand(3, 3, 32, 32)
    assert lpips(a, a) is None, "nothing is downloaded"
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    from torchvision.models import alexnet

    torch.save(alexnet(weights=None).state_dict(), tmp_path / "hub" / "checkpoints" / ALEXNET)
    load_lpips.cache_clear()
    near, far = lpips(a, (a + 0.02 * torch.randn(a.shape)).clamp(0, 1)), lpips(a, 1 - a)
    assert near is not None
    assert far is not None
    squared = (lpips_features(a) - lpips_features(1 - a)).square().sum(1)
    assert torch.allclose(squared, far.double(), rtol=1e-4)
    assert "lpips" in build_matchers((a * 255).to(torch.uint8))
    assert "lpips" not in build_matchers(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert near.shape == (3,)
    assert (near < far).all()
    assert torch.equal(lpips(a, a), torch.zeros(3))
    assert lpips(a[..., :16, :16], a[..., :16, :16]) is None, "too small for AlexNet"
    load_lpips.cache_clear()


def test_ties_count_against_an_estimate() -> None:
    """Ties with copies of the original do not."""
    gallery = torch.rand(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    gallery[7] = gallery[3]
    labels, truth = torch.zeros(20, dtype=torch.int64), torch.tensor([3, 7, 5])
    assert reidentify(gallery[truth], gallery, truth, labels).all.tolist() == [0, 0, 0]
    edges = edge_maps(torch.full((3, 3, 12, 12), 0.5))[:, :, None, None]
    ranks = reidentify(edges, edge_maps(gallery)[:, :, None, None], truth, labels)
    assert ranks.all.tolist() == [18, 18, 19]


def test_leakage_in_parts_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without parts, attacks on images of 224 x 224 would need tens of gigabytes."""
    gallery = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8)
    own, own_labels = torch.randint(0, 256, (30, 3, 12, 12), dtype=torch.uint8), torch.arange(30) % 3
    truth, labels = torch.arange(10) * 4, torch.arange(40) % 3
    access = AttackerKnowledge(shape=(3, 12, 12), images=own, labels=own_labels)
    plain = gallery[truth]
    victim = Target("x", "x", access, plain, 255 - plain, labels[truth], gallery, labels, truth, ("a", "b", "c"))
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 144, 3))

    monkeypatch.setattr(baseline_module, "FIT_STEPS", 3)

    def measured() -> list[dict[str, torch.Tensor]]:
        again = replace(victim)  # without cached features
        estimates = baselines(again)
        scores = [score_images(x, again, judge, matcher=BASELINE_MATCHER) for x in estimates.values()]
        return [estimates, *scores]

    whole = measured()
    assert set(whole[0]) == {
        "mean image", "random image", "class mean", "fitted class image", "nearest training image",
    }  # fmt: skip
    assert torch.equal(whole[0]["mean image"][3], own.double().mean(0).round().to(torch.uint8))
    assert torch.equal(whole[0]["class mean"][1], own[own_labels == 1].double().mean(0).round().to(torch.uint8))
    distances = (plain[:, None].double() - own[None].double()).square().sum((2, 3, 4))
    assert torch.equal(whole[0]["nearest training image"], own[distances.argmin(1)])
    monkeypatch.setattr(image, "PART_VALUES", 7 * gallery[0].numel())
    in_parts = measured()
    for one, other in zip(whole, in_parts, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.allclose(values.double(), other[name].double(), atol=1e-6), name


def test_large_images_are_measured_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(Plain):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return super().forward(images)

    images, labels = torch.zeros(100, 32, 32, 3, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 1024, 2))
    monkeypatch.setattr(loader, "PIXELS_AT_A_TIME", 30 * 1024)
    assert evaluate(Counting(Plain.Options()), classifier, images, labels)["num_images"] == 100
    assert sizes == [30, 30, 30, 10]


def test_the_backend_of_scikit_image_gives_the_same_scores() -> None:
    """The fast implementation is pinned to the reference: SSIM to 0.0001, PSNR to 0.001 dB."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(6, 3, 20, 24, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    fast = psnr(a, b), ssim(a, b), ssim_lab(a, b)
    with use_backend("skimage"):
        slow = psnr(a, b), ssim(a, b), ssim_lab(a, b)
        assert torch.isinf(psnr(a, a)).all()
    for x, y, tolerance in zip(fast, slow, (1e-3, 1e-4, 1e-4), strict=True):
        assert not torch.equal(x, y), "another implementation"
        assert torch.allclose(x, y, atol=tolerance, rtol=0)
    assert torch.equal(ssim(a, b), fast[1])
