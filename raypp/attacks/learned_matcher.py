"""T4: match protected and plain images by embeddings that are learned from pairs.

Two encoders map protected and plain images to unit vectors; the contrastive loss InfoNCE (van den Oord, Li, Vinyals
2018, arXiv 1807.03748), in the symmetric form of CLIP (Radford et al. 2021), trains them to recognize the pairs of a
batch. The same loss between two protected variants of one image trains the linkage of uploads.

The embeddings identify an original in a gallery that holds a crop, the mirror image or a JPEG re-encoding of it, under
random protections too. InfoNCE on N pairs is a lower bound on the mutual information of a plain image and its protected
one: ``log2(N) - loss``, in bits, in expectation. It cannot exceed log2(N), even if the protected image reveals more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.attacks.base import AttackError, required
from raypp.attacks.encoder import (
    Encoder,
    EncoderAttack,
    EncoderModule,
    EncoderOptions,
    encode_in_batches,
)
from raypp.attacks.variants import VARIANTS, random_variants
from raypp.metrics.matchers import OWN_SCORES
from raypp.metrics.retrieval import query_batches, rank_by_scores
from raypp.models.perceptual import StateDict
from raypp.training.task import StepOutput
from raypp.utils.images import to_uint8

MAX_OTHERS = 2**20  # pairs of different originals, whose scores the AUC sorts
INITIAL_SCALE, MAX_SCALE = 14.0, 100.0  # factor of the cosine, as CLIP's


class MatcherModule(EncoderModule):
    """The two encoders, and the scales of the cosines of pairs and of two uploads."""

    def __init__(self, attack: LearnedMatcher, protected: tuple[int, ...]) -> None:
        super().__init__()
        self.attack, options = attack, attack.options
        channels, height, width = protected
        self.protected_encoder = Encoder((channels, height, width), options.num_features, options.width)
        self.plain_encoder = Encoder(attack.access.shape, options.num_features, options.width)
        self.log_scales = nn.Parameter(torch.full((2,), math.log(INITIAL_SCALE)))

    def fit_normalization(self, plain: Tensor, protected: Tensor) -> None:
        self.protected_encoder.standardize.fit(protected.cpu().float() / 255)
        self.plain_encoder.standardize.fit(plain.cpu().float() / 255)

    @property
    def scales(self) -> Tensor:
        return self.log_scales.exp().clamp_max(MAX_SCALE)

    def embed_plain(self, images: Tensor) -> Tensor:
        """Return unit vectors (N, D) of plain images uint8 (N, C, H, W)."""
        return F.normalize(encode_in_batches(self.plain_encoder, images))

    def embed_protected(self, protected: Tensor) -> Tensor:
        """Return unit vectors (N, D) of protected images uint8 (N, C', H', W')."""
        return F.normalize(encode_in_batches(self.protected_encoder, protected))

    def forward(self, images: Tensor, indices: Tensor) -> StepOutput:
        uploads = torch.cat([self.attack.protect_batch(random_variants(images)) for _ in range(2)])
        first, second = F.normalize(self.protected_encoder(uploads)).chunk(2)
        plain = F.normalize(self.plain_encoder(random_variants(images)))
        pair_scale, link_scale = self.scales
        matching = (_info_nce(pair_scale * first @ plain.t()) + _info_nce(pair_scale * second @ plain.t())) / 2
        linking = _info_nce(link_scale * first @ second.t())
        return StepOutput(matching + linking, {"matching": matching.detach(), "linking": linking.detach()})

    def scores(self, plain: Tensor, protected: Tensor, part: slice) -> dict[str, Tensor]:
        logits = self.scales[0] * self.embed_protected(protected[part]) @ self.embed_plain(plain).t()
        pairs = torch.arange(len(plain), device=logits.device)[part]
        return {
            "loss": F.cross_entropy(logits, pairs, reduction="none"),
            "reidentified": _identified([logits], pairs, plain),
        }


def _info_nce(logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of the pairs on the diagonal of (n, n), over rows and over columns."""
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def _identified(scores: Iterable[Tensor], truth: Tensor, gallery: Tensor) -> Tensor:
    """Return whether the best candidate in the gallery is the true one, float (N,), from batches of scores (n, M)."""
    one_class = torch.zeros(len(gallery), dtype=torch.int64, device=gallery.device)
    return rank_by_scores(scores, truth.to(gallery.device), gallery, one_class).top(1)


class LearnedMatcher(EncoderAttack):
    """Returns the gallery image whose embedding has the largest cosine with that of the protected image.

    Its further scores are the re-identification rates in galleries of variants, the area under the ROC curve of linking
    two uploads of one original, and the lower bound on the mutual information.
    """

    cost: ClassVar[str] = (
        "Trains two encoders, and for its curve six more. A step protects two variants of each image and encodes three."
    )
    extra_scores: ClassVar[dict[str, str]] = {
        "reidentified_crop": "re-identified in a gallery of crops",
        "reidentified_flip": "re-identified in a gallery of mirror images",
        "reidentified_jpeg": "re-identified in a gallery of JPEG re-encodings",
        "linkage_auc_crop": "AUC of linking the upload of a crop to that of the original",
        "linkage_auc_flip": "AUC of linking the upload of the mirror image to that of the original",
        "linkage_auc_jpeg": "AUC of linking the upload of a JPEG re-encoding to that of the original",
        "mutual_information_bits": "lower bound on the mutual information, bits; at most log2 of the attacked images",
    }

    class Options(EncoderOptions):
        name: Literal["learned_matcher"] = "learned_matcher"
        num_features: int = Field(128, ge=1, le=4096)
        """Size of an embedding."""

    needs: ClassVar[tuple[str, ...]] = ("protect", "images", "gallery")
    draws: ClassVar[bool] = False
    matcher: ClassVar[str] = OWN_SCORES
    encoder: ClassVar[str] = "protected_encoder"

    def build_module(self, protected: tuple[int, ...]) -> MatcherModule:
        return MatcherModule(self, protected)

    def load(self, state: StateDict) -> None:
        if self.access.gallery is None:
            raise AttackError(
                "attack learned_matcher needs a gallery of plain images, which this target does not provide"
            )
        super().load(state)
        self._embedded_gallery = self._module.embed_plain(self.access.gallery)

    @torch.inference_mode()
    def candidate_scores(self, protected: Tensor) -> Tensor:
        embedded = self._module.embed_protected(protected.to(self.access.device))
        scores: Tensor = embedded.double() @ self._embedded_gallery.double().t()
        return scores

    def reconstruct(self, protected: Tensor) -> Tensor:
        return self.best_candidates(protected)

    @torch.inference_mode()
    def measure(self, plain: Tensor, protected: Tensor, truth: Tensor) -> dict[str, Tensor]:
        module, gallery, device = self._module, required(self.access.gallery), self.access.device
        embedded = module.embed_protected(protected.to(device))
        reidentified, linked = {}, {}
        for name in VARIANTS:
            candidates = module.embed_plain(self._variant(name, gallery)).double()
            scores = (batch.double() @ candidates.t() for batch in query_batches(embedded, len(gallery)))
            reidentified[f"reidentified_{name}"] = _identified(scores, truth, gallery)
            upload = module.embed_protected(self.protect(self._variant(name, plain)))
            linked[f"linkage_auc_{name}"] = _auc_contributions(embedded, upload, self.seed)
        originals = module.embed_plain(plain)
        nats = [
            F.cross_entropy(module.scales[0] * embedded[pairs] @ originals.t(), pairs, reduction="none")
            for pairs in query_batches(torch.arange(len(plain), device=device), len(plain))
        ]
        bits = math.log2(len(plain)) - torch.cat(nats) / math.log(2)
        return reidentified | linked | {"mutual_information_bits": bits}

    def _variant(self, name: str, images: Tensor) -> Tensor:
        """Return a variant of images uint8 (N, C, H, W), equal in every call."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return torch.cat([to_uint8(VARIANTS[name](batch.float() / 255)) for batch in images.split(500)])


def _auc_contributions(first: Tensor, second: Tensor, seed: int) -> Tensor:
    """Return a value of each image, (N,), whose mean is the AUC of linking uploads by their cosine; NaN for one image.

    Each image is in one pair (i, i) and in many other pairs (i, j) and (j, i). Its value has the structural components
    of them all, so a standard error or a bootstrap of the mean resamples both classes, by images. A value may lie
    outside [0, 1]. Other pairs are all of them, or ``MAX_OTHERS`` drawn at random.

    Args:
        first, second: unit vectors (N, D).
        seed: seed of the draw.

    Source: DeLong, DeLong, Clarke-Pearson 1988 (Biometrics 44:837) for the components, Obuchowski 1997 (Biometrics
    53:567) for their sums over the observations of one unit.
    """
    num, generator = len(first), torch.Generator().manual_seed(seed)
    if num * (num - 1) <= MAX_OTHERS:
        rows, columns = (~torch.eye(num, dtype=torch.bool)).nonzero(as_tuple=True)
    else:
        rows = torch.randint(num, (MAX_OTHERS,), generator=generator)
        columns = (rows + torch.randint(1, num, (MAX_OTHERS,), generator=generator)) % num
    rows, columns = rows.to(first.device), columns.to(first.device)
    others = torch.cat([
        (first[i] * second[j]).sum(1) for i, j in zip(rows.split(2**16), columns.split(2**16), strict=True)
    ])  # fmt: skip
    pairs = (first * second).sum(1)
    of_pairs, of_others = _share_below(others, pairs), 1 - _share_below(pairs, others)
    deviations = (of_others - of_others.mean()) * (num / max(1, len(others)))
    contributions = of_pairs.index_add(0, rows, deviations).index_add(0, columns, deviations)
    return contributions.float()


def _share_below(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return the share of values (n,) below each threshold (m,), ties half, float64 (m,); NaN without values."""
    ordered = values.sort().values
    num_less, num_at_most = torch.searchsorted(ordered, thresholds), torch.searchsorted(ordered, thresholds, right=True)
    return (num_less + num_at_most).double() / (2 * len(values))
