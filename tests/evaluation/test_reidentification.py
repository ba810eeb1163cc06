"""Re-identification: matchers, their selection, gallery sizes, near-duplicates, baselines and tests against them."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch
import torch._dynamo  # an optimizer's first step imports it, for seconds
from scipy.stats import binomtest, hypergeom
from torch import Tensor

from raypp.attacks.base import Attack, AttackerKnowledge, Threat, required
from raypp.attacks.target import Target
from raypp.evaluation import baselines
from raypp.evaluation.reidentification import (
    candidate_reidentification_scores,
    reidentification_scores,
    select_matcher,
)
from raypp.evaluation.scorecard import aggregate, score_images
from raypp.metrics import retrieval
from raypp.metrics.image import edge_maps, ssim
from raypp.metrics.matchers import OWN_SCORES, build_matchers
from raypp.metrics.retrieval import (
    RetrievalRanks,
    flatten_pixels,
    has_near_duplicate,
    negative_distances,
    rank_by_scores,
    reidentify,
)
from raypp.metrics.statistics import (
    bootstrap_interval,
    holm_adjust,
    mcnemar_test,
    mean_interval,
    paired_t_test,
    wilson_interval,
)
from raypp.utils.registry import MethodConfig

SIDE = 12


def photographs(num: int, seed: int) -> Tensor:
    """Images around gray whose contrast differs, uint8 (N, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    contrasts = torch.rand(num, 1, 1, 1, generator=generator) * 50 + 2
    images = 128 + contrasts * torch.randn(num, 3, SIDE, SIDE, generator=generator)
    return images.round().clamp(0, 255).to(torch.uint8)


def shrink(images: Tensor) -> Tensor:
    """Estimates as of a network that learned by squared error: near the mean image, with noise."""
    noise = 10 * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (128 + 0.2 * (images.float() - 128) + noise).round().clamp(0, 255).to(torch.uint8)


def target_of(gallery: Tensor, own: Tensor, num: int, classes: tuple[str, ...] = ("a", "b")) -> Target:
    labels, truth = torch.arange(len(gallery)) % 2, torch.arange(num)
    access = AttackerKnowledge((3, SIDE, SIDE), images=own, labels=torch.arange(len(own)) % 2)
    plain = gallery[:num]
    return Target("x", "x", access, plain, 255 - plain, labels[:num], gallery, labels, truth, classes)


class WithValidation(Attack):
    """Returns the protected images; its validation images are stated."""

    class Options(MethodConfig):
        name: str = "with_validation"

    threat = Threat.T4
    matcher = "edges"
    pairs: tuple[Tensor, Tensor] | None = None

    def validation_images(self) -> tuple[Tensor, Tensor] | None:
        return self.pairs

    def reconstruct(self, protected: Tensor) -> Tensor:
        return protected


def test_the_centered_cosine_identifies_shrunken_estimates() -> None:
    """Raw distances prefer images of low contrast, so the rate by pixels and edges misses what estimates reveal."""
    target = target_of(photographs(300, 0), photographs(200, 1), 100)
    scores = reidentification_scores(shrink(target.plain), target, "cosine")
    assert scores["reidentified_pixels"].mean() < 0.2
    assert scores["reidentified"].mean() > 0.6
    assert torch.equal(scores["reidentified"], scores["reidentified_cosine"])
    only = reidentification_scores(shrink(target.plain), target, "cosine", all_matchers=False)
    assert only.keys() == scores.keys() - {"reidentified_pixels", "reidentified_edges"}
    assert all(torch.equal(only[name].nan_to_num(-1), scores[name].nan_to_num(-1)) for name in only)


def test_a_matcher_is_selected_on_validation_images_and_never_on_queries() -> None:
    own = photographs(200, 1)
    target = target_of(photographs(300, 0), own, 100)
    attack = WithValidation(WithValidation.Options(), target.access)
    fixed = select_matcher(attack, target)
    assert (fixed.matcher, fixed.num_validation, fixed.validation_rates) == ("edges", 0, {})
    attack.pairs = own, shrink(own[:50])
    choice = select_matcher(attack, target)
    assert (choice.matcher, choice.num_validation) == ("cosine", 50)
    assert set(choice.validation_rates) == {"pixels", "cosine", "edges"}
    assert choice.validation_rates["cosine"] == max(choice.validation_rates.values())
    attack.pairs = own, 255 - own[:50]  # only edges survive a negative
    assert select_matcher(attack, target).matcher == "edges"
    attack.pairs = own, own[:50]  # all matchers are perfect
    assert select_matcher(attack, target).matcher == "edges"
    attack.matcher = "pixels"
    assert select_matcher(attack, target).matcher == "pixels"


def test_the_rate_is_that_of_the_selected_matcher_where_another_one_identifies_more() -> None:
    target = target_of(photographs(300, 0), photographs(200, 1), 100)
    scores = reidentification_scores(shrink(target.plain), target, "pixels")
    assert torch.equal(scores["reidentified"], scores["reidentified_pixels"])
    assert scores["reidentified_cosine"].mean() > scores["reidentified"].mean() + 0.4


def test_an_estimate_that_is_not_a_number_identifies_nothing() -> None:
    gallery = torch.rand(20, 3, SIDE, SIDE)
    estimates = torch.full((2, 3, SIDE, SIDE), float("nan"))
    for features in (flatten_pixels, edge_maps):
        ranks = reidentify(estimates, gallery, torch.arange(2), torch.zeros(20, dtype=torch.int64), features)
        assert ranks.all.tolist() == ranks.same_class.tolist() == [19, 19]


def test_an_estimate_that_is_not_a_number_has_the_last_rank_among_copies_too() -> None:
    gallery = torch.rand(20, 3, SIDE, SIDE)
    gallery[:5] = gallery[0]
    labels = torch.zeros(20, dtype=torch.int64)
    labels[7] = 1
    estimates = torch.full((2, 3, SIDE, SIDE), float("nan"))
    for features in (flatten_pixels, edge_maps, *build_matchers(photographs(9, 0)).values()):
        ranks = reidentify(estimates, gallery, torch.tensor([0, 7]), labels, features)
        assert ranks.all.tolist() == [19, 19]
        assert ranks.same_class.tolist() == [18, 0]
        assert ranks.top_in_class()[0] == 0
        assert ranks.top_in_class()[1].isnan()  # alone in its class
        assert not ranks.bits_identified()[0] > 0.1
    equal = reidentify(estimates, gallery[:5], torch.tensor([0, 4]), labels[:5])
    assert equal.all.tolist() == [4, 4]
    assert equal.top_in_class().isnan().all()


def test_an_original_without_rivals_in_its_class_is_left_out_of_the_rate() -> None:
    gallery = photographs(40, 0)
    labels = torch.arange(40) // 2
    labels[:3] = torch.tensor([20, 21, 22])
    target = dataclasses.replace(target_of(gallery, photographs(50, 1), 10), gallery_labels=labels)
    scores = reidentification_scores(gallery[:10].flip(0), target, "pixels")
    assert scores["reidentified_same_class"].isnan().tolist() == [True] * 4 + [False] * 6
    summary = aggregate(scores, 1024)["reidentified_same_class"]
    assert summary["num"] == 6
    assert 0 <= summary["mean"] <= 1
    assert "unseen" not in aggregate({"unseen": torch.full((3,), torch.nan)}, 1024)


def test_a_gallery_image_without_direction_is_the_farthest() -> None:
    """At more than 60 degrees from the estimate, the original was farther than an image without contrast."""
    gallery = photographs(60, 0)
    own = torch.full((10, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    gallery[50:] = 128
    noise = 60 * torch.randn(gallery[:20].shape, generator=torch.Generator().manual_seed(1))
    estimates = (gallery[:20].float() + noise).round().clamp(0, 255).to(torch.uint8)
    labels = torch.zeros(60, dtype=torch.int64)
    for name in ("cosine", "edges"):
        matcher = build_matchers(own)[name]
        ranks = [reidentify(estimates, gallery[:num], torch.arange(20), labels[:num], matcher).all for num in (60, 50)]
        assert torch.equal(*ranks), name
    flat = reidentify(gallery[50:51], gallery, torch.tensor([50]), labels, build_matchers(own)["cosine"])
    assert flat.all.item() == 0


class Ranking(Attack):
    """A matching attack whose best candidate is wrong, and whose second one is right."""

    class Options(MethodConfig):
        name: str = "ranking"

    threat = Threat.T4
    needs = ("gallery",)
    matcher = OWN_SCORES
    draws = False

    def candidate_scores(self, protected: Tensor) -> Tensor:
        scores = negative_distances(255 - protected, required(self.access.gallery))
        scores[torch.arange(len(scores)), (scores.argmax(1) + 20) % 60] = 1e9
        return scores

    def reconstruct(self, protected: Tensor) -> Tensor:
        return self.best_candidates(protected)


def test_a_matching_attack_ranks_the_gallery_by_its_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances to the wrong pick say nothing about its other candidates."""
    monkeypatch.setattr(retrieval, "SCORE_VALUES", 60 * 7)  # several batches
    gallery = photographs(60, 0)
    target = target_of(gallery, photographs(50, 1), 40)
    target = dataclasses.replace(target, access=dataclasses.replace(target.access, gallery=gallery))
    attack = Ranking(Ranking.Options(), target.access)
    choice = select_matcher(attack, target)
    assert choice.matcher == OWN_SCORES
    assert torch.equal(attack.reconstruct(target.protected), gallery[(torch.arange(40) + 20) % 60])
    estimates = attack.reconstruct(target.protected)
    assert not any(name.startswith("reidentified") for name in score_images(estimates, target, matcher=OWN_SCORES))
    scores = candidate_reidentification_scores(attack, target, 40)
    assert not scores["reidentified"].any()
    assert scores["reidentified_top5"].all()
    assert torch.allclose(scores["bits_identified"], torch.full((40,), 60 / 2).double().log2())
    assert not scores["reidentified_same_class"].any()  # the wrong pick has the same class
    by_pick = reidentification_scores(estimates, target, "pixels")
    assert by_pick["reidentified_top5"].mean() < 0.5
    with_validation = WithValidation(WithValidation.Options(), target.access)
    assert candidate_reidentification_scores(with_validation, target, 40) == {}


def test_scores_and_distances_have_one_rule_for_ties_and_copies() -> None:
    gallery = photographs(30, 0)
    gallery[3] = gallery[0]
    labels, truth = torch.arange(30) % 3, torch.tensor([0, 1, 2])
    scores = torch.zeros(3, 30)
    scores[0, [0, 3]] = scores[1, [1, 4]] = scores[2, 2] = 1
    ranks = rank_by_scores(scores.split(2), truth, gallery, labels)
    assert ranks.all.tolist() == [0, 1, 0]
    assert ranks.same_class.tolist() == [0, 1, 0]


def test_images_without_edges_are_no_copies_of_each_other() -> None:
    flat = torch.tensor([80, 150, 230], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, SIDE, SIDE)
    matchers = build_matchers(photographs(50, 1))
    labels, truth = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    assert reidentify(flat, flat, truth, labels, matchers["edges"]).all.tolist() == [2, 2, 2]
    assert reidentify(flat, flat, truth, labels, matchers["pixels"]).all.tolist() == [0, 0, 0]


def test_an_estimate_without_information_has_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "FIT_STEPS", 0)
    own, gallery = photographs(200, 1), photographs(100, 0)
    target = target_of(gallery, own, 50)
    mean = baselines.baselines(target)["mean image"]
    assert not reidentification_scores(mean, target, "cosine")["reidentified"].any()


def test_exact_estimates_identify_images_that_differ_by_one_gray_level() -> None:
    """Bursts and scans hold such images; distances in float32 cannot rank them."""
    burst = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8).repeat(20, 1, 1, 1)
    for i in range(1, 20):
        burst[i, i % 3, i * 3, i] += 1
    gallery = torch.cat((burst, torch.randint(0, 256, (30, 3, 64, 64), dtype=torch.uint8)))
    labels = torch.zeros(50, dtype=torch.int64)
    for name, features in build_matchers(gallery[20:]).items():
        assert not reidentify(burst, gallery, torch.arange(20), labels, features).all.any(), name


def test_originals_with_a_near_duplicate_among_the_attackers_images_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gallery = photographs(60, 0)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(-9, 10, (20, 3, SIDE, SIDE), generator=generator)
    gallery[20:40] = (gallery[:20].int() + noise).clamp(0, 255).to(torch.uint8)
    contrast = gallery.float().std(dim=(1, 2, 3))
    vivid = contrast > 20
    assert has_near_duplicate(gallery[20:40], gallery[:20])[vivid[20:40]].all()
    assert not has_near_duplicate(gallery[40:][vivid[40:]], gallery[:40][vivid[:40]]).any()
    monkeypatch.setattr(retrieval, "SCORE_VALUES", 5 * 7)
    assert has_near_duplicate(gallery[:20], gallery[20:])[vivid[:20]].all()
    monkeypatch.undo()
    target = target_of(gallery[20:][vivid[20:]], gallery[:20], int(vivid[20:].sum()))
    seen = int(vivid[20:40].sum())
    scores = reidentification_scores(target.plain, target, "pixels")
    assert scores["reidentified"].all()
    unseen = scores["reidentified_unseen"]
    assert unseen[:seen].isnan().all()
    assert unseen[seen:].tolist() == [1] * (len(unseen) - seen)
    assert aggregate(scores, 1024)["reidentified_unseen"]["num"] == len(unseen) - seen


def test_mirrored_brighter_and_flatter_copies_are_near_duplicates_and_negatives_are_not() -> None:
    """CIFAR-10 holds photographs twice, with another exposure: a PSNR of 25 dB found none of them."""
    plain = torch.randint(0, 256, (8, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat = torch.full_like(plain[:1], 90)
    for copies in (plain.flip(3), (plain.float() * 0.5 + 100).to(torch.uint8), plain):
        assert has_near_duplicate(plain, torch.cat((flat, copies))).all()
    assert not has_near_duplicate(plain, torch.cat((flat, 255 - plain))).any()
    assert has_near_duplicate(flat + 1, torch.cat((plain, flat))).all()


def test_the_rate_in_a_smaller_gallery_is_that_of_all_smaller_galleries() -> None:
    num, size = 7, 4
    ranks = torch.arange(num)
    results = RetrievalRanks(ranks, ranks, ranks, num)
    for rank in range(num):
        others = list(combinations(range(num - 1), size - 1))  # the first `rank` others are nearer
        share = sum(min(chosen) >= rank for chosen in others) / len(others)
        assert results.top_in_gallery_of(size)[rank] == pytest.approx(share, abs=1e-12)
    assert results.top_in_gallery_of(num).tolist() == pytest.approx([1] + [0] * (num - 1))
    assert results.top_in_gallery_of(1).tolist() == pytest.approx([1] * num)
    large = torch.tensor([0, 1, 37, 900, 9999])
    expected = hypergeom.pmf(0, 9999, large.numpy(), 999)
    assert RetrievalRanks(large, large, large, 10_000).top_in_gallery_of(1000).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="size is 8; allowed is 1 to 7"):
        results.top_in_gallery_of(8)


def test_bits_identified_do_not_depend_on_a_threshold() -> None:
    ranks = torch.tensor([0, 1, 3, 1023])
    assert RetrievalRanks(ranks, ranks, ranks, 1024).bits_identified().tolist() == pytest.approx([10, 9, 8, 0])
    target = target_of(photographs(150, 0), photographs(50, 1), 40)
    scores = aggregate(score_images(target.plain, target, matcher="cosine"), 150)
    assert scores["bits_identified"]["mean"] == pytest.approx(7.22882, abs=1e-4)  # log2 150
    assert scores["reidentified_of_100"]["mean"] == 1
    assert "reidentified_of_1000" not in scores


def test_intervals_of_shares_are_wilsons() -> None:
    """The bootstrap of 2,000 failures has no width."""
    scores = {
        "reidentified": torch.zeros(2000),
        "reidentified_of_100": torch.full((2000,), 0.25),
    }
    summary = aggregate(scores, 1024)
    assert bootstrap_interval(scores["reidentified"].numpy()) == (0, 0)
    assert summary["reidentified"] == {"num": 2000, "mean": 0, "low": 0, "high": round(wilson_interval(0, 2000)[1], 5)}
    assert summary["reidentified"]["high"] > 0.0015
    interval = binomtest(500, 2000).proportion_ci(method="wilson")
    assert summary["reidentified_of_100"]["low"] == pytest.approx(interval.low, abs=2e-5)
    assert summary["reidentified_of_100"]["high"] == pytest.approx(interval.high, abs=2e-5)
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])


def test_the_interval_of_an_auc_lies_between_0_and_1() -> None:
    """The contributions of images to an AUC may lie outside."""
    contributions = torch.tensor([1.1, 0.9] * 10)
    summary = aggregate({"linkage_auc_crop": contributions}, 1024)
    low, high = bootstrap_interval(contributions.numpy())
    assert summary["linkage_auc_crop"] == {"num": 20, "mean": 1, "low": pytest.approx(low, abs=1e-5), "high": 1}
    assert high > 1


@pytest.mark.parametrize(
    ("name", "bound", "opposite"),
    [
        ("linkage_auc_flip", 1, 0), ("ssim", 1, -1), ("edges", 1, -1), ("psnr", 60, 0), ("bits_identified", 10, 0),
        ("bits_identified", 0, 10),
    ],
)  # fmt: skip
def test_values_that_all_lie_at_a_bound_have_an_interval_with_width(name: str, bound: float, opposite: float) -> None:
    """The bootstrap of equal values has no width, and that of all values but a few has almost none."""
    values, towards = torch.full((2000,), float(bound)), 0.01 * (1 if opposite > bound else -1)
    rate, _ = wilson_interval(2000, 2000)
    interval = aggregate({name: values}, 1024)[name]
    assert interval["mean"] == bound
    ends = sorted((bound, opposite + (bound - opposite) * rate))
    assert [interval["low"], interval["high"]] == pytest.approx(ends, abs=2e-5)
    values[:9] += towards
    wide = aggregate({name: values}, 1024)[name]
    values[9] += towards
    narrow = aggregate({name: values}, 1024)[name]
    widths = [numbers["high"] - numbers["low"] for numbers in (narrow, interval, wide)]
    assert widths == sorted(widths)
    assert widths[0] > 0
    assert (narrow["low"], narrow["high"]) == pytest.approx(bootstrap_interval(values.numpy()), abs=2e-5)


def test_equal_values_and_a_single_one_have_an_interval_with_width() -> None:
    low, high = (pytest.approx(2 * end - 1, abs=1e-5) for end in wilson_interval(0.65, 1))
    assert aggregate({"ssim": torch.tensor([0.3])}, 8)["ssim"] == {
        "num": 1, "mean": 0.3, "low": low, "high": high,
        **dict.fromkeys(("min", "q1", "median", "q3", "top_1_percent", "max"), 0.3),
    }  # fmt: skip
    with pytest.raises(ValueError, match="low is 1 and high is 1; low must be smaller"):
        mean_interval([1], 1, 1)


def test_rounding_makes_no_interval_narrower() -> None:
    values = torch.tensor([0.999991, 0.999992] * 500, dtype=torch.float64)
    numbers = aggregate({"linkage_auc_jpeg": values}, 8)["linkage_auc_jpeg"]
    assert (numbers["low"], numbers["high"]) == (0.99999, 1)


def test_a_small_sample_within_its_range_has_the_interval_of_the_bootstrap() -> None:
    values = torch.tensor([0.2, 0.4, 0.5, 0.6])
    summary = aggregate({"ssim": values, "bits_identified": values}, 1024)
    for name in ("ssim", "bits_identified"):
        assert (summary[name]["low"], summary[name]["high"]) == pytest.approx(
            bootstrap_interval(values.numpy()), abs=1e-5
        )


def metrics(num_reidentified: int, ssim: float = 0.1) -> dict[str, Tensor]:
    hits = (torch.arange(2000) < num_reidentified).float()
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.01
    return {
        "reidentified": hits, "reidentified_cosine": hits, "ssim_invariant": ssim + noise, "edges": torch.zeros(2000),
    }  # fmt: skip


def test_an_attack_is_above_the_baseline_only_beyond_chance() -> None:
    blind = {"mean image": metrics(0), "nearest training image": metrics(2000, 0.9)}  # the last uses the original

    def p_values(scores: dict[str, Tensor], **more: Any) -> dict[str, float]:
        return baselines.above_baseline_p_values(scores, blind | more, "cosine")

    assert min(p_values(metrics(4)).values()) > baselines.SIGNIFICANCE  # 4 of 2,000 against 0
    assert p_values(metrics(4))["reidentified"] == pytest.approx(0.5**4)
    assert p_values(metrics(10))["reidentified"] < 0.01
    assert p_values(metrics(0, 0.11))["ssim_invariant"] < 0.01
    better = p_values(metrics(10, 0.11), **{"fitted class image": metrics(10, 0.12)})
    assert min(better.values()) > 0.5
    few = {name: values[:50] for name, values in metrics(10).items()}
    assert p_values(few)["reidentified"] == pytest.approx(0.5**10, rel=1e-4)
    assert p_values(metrics(900))["reidentified"] == pytest.approx(0.5**900, rel=1e-4), "no p-value is zero"


def test_p_values_are_those_of_the_textbook() -> None:
    assert holm_adjust({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    first, second = torch.tensor([1, 1, 1, 1, 0, 1]), torch.tensor([1, 0, 0, 0, 1, 1])
    assert mcnemar_test(first, second) == pytest.approx(binomtest(3, 4, alternative="greater").pvalue)
    assert mcnemar_test(first, first) == paired_t_test(first, first) == paired_t_test([1], [0]) == 1


def test_the_fitted_class_image_has_a_larger_ssim_than_the_class_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class mean is blurred, so an attacker who knows only the class has more."""
    monkeypatch.setattr(baselines, "FIT_STEPS", 60)
    monkeypatch.setattr(baselines, "FIT_BATCH_SIZES", (16, 32))
    pattern = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))

    def shifted(num: int) -> Tensor:
        """The pattern of each image's class, of another brightness and contrast, moved by some pixels."""
        rows = [
            ((i * 37 % 100) / 150 + (0.1 + i % 5 / 12) * pattern[i % 2]).roll((i % 2, i * 7 % 3), (1, 2))
            for i in range(num)
        ]
        return (torch.stack(rows).clamp(0, 1) * 255).round().to(torch.uint8)

    images = shifted(120)
    target = target_of(images[:40], images[40:], 40)
    estimates = baselines.baselines(target)
    plain = target.plain.float() / 255
    similarity = {name: float(ssim(estimates[name].float() / 255, plain).mean()) for name in estimates}
    assert similarity["fitted class image"] > similarity["class mean"] + 0.02
    assert len(estimates["fitted class image"].unique(dim=0)) == 2
    unlabeled = baselines.baselines(target_of(images[:40], images[40:], 40, classes=()))
    assert "fitted class image" not in unlabeled
    assert len(unlabeled["fitted image"].unique(dim=0)) == 1
