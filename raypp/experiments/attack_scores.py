"""The scorecard of an attack run: scores, baselines, verdicts, examples."""

from __future__ import annotations

import csv
import io
from typing import Any

import torch
from torch import Tensor, nn

from raypp.attacks import ATTACKS
from raypp.attacks.suite import HALF_EFFORT, HALF_EPOCHS, QUARTER
from raypp.attacks.target import Target
from raypp.evaluation.scorecard import (
    INCONCLUSIVE,
    MIN_QUERIES,
    RED,
    Scores,
    aggregate,
    baselines,
    is_rising,
    reidentification_rate,
    score_images,
    strongest_attack,
    verdict,
)
from raypp.experiments.attack_plan import (
    EXAMPLES,
    REFERENCE_CLASSIFIER,
    SCORECARD,
    SCORES,
    AttackPlan,
    Outcome,
    dependencies_first,
    load_result,
)
from raypp.experiments.reference_classifier import load_reference_classifier
from raypp.experiments.run_folder import environment
from raypp.metrics.statistics import chance_error
from raypp.utils.documents import dump_json

NUM_EXAMPLES = 10


def scorecard(plan: AttackPlan, target: Target, failures: dict[str, str]) -> dict[str, Any]:
    """Write ``scorecard.json``, ``scores.csv`` and the examples of a run; returns the scorecard."""
    classifier = load_reference_classifier(plan, target)
    test = (target.metrics or {}).get("test")
    at_chance = chance_error(test, len(target.classes))
    attacks, attack_scores = _score_attacks(plan, target, failures, classifier)
    baseline_scores = {
        name: score_images(images, target, classifier) for name, images in baselines(target, plan.suite.seed).items()
    }
    baseline_summaries = {name: aggregate(scores, plan.suite.seed) for name, scores in baseline_scores.items()}
    for result in attacks.values():
        if result["status"] == "done":
            result["above_baseline"] = _above_baselines(result["scores"], baseline_summaries)
    card = {
        "victim": target.name,
        "label": target.label,
        "keyed": target.access.fresh is not None,
        "num_queries": len(target.plain),
        "num_gallery": len(target.gallery),
        "num_attacker_images": len(target.access.images) if target.access.images is not None else 0,
        "chance": 1 / len(target.gallery),
        "accuracy": (test or {}).get("accuracy"),
        "accuracy_interval": (test or {}).get("accuracy_interval"),
        "at_chance": at_chance,
        "reference_accuracy": _reference_accuracy(classifier, target),
        "reference_note": failures.get(REFERENCE_CLASSIFIER, ""),
        **headline(attacks, at_chance=at_chance is not None),
        "attacks": attacks,
        "baselines": baseline_summaries,
        "suite": plan.dump()["suite"],
        "environment": environment(),
    }
    rows = attack_scores | {f"baseline: {name}": scores for name, scores in baseline_scores.items()}
    plan.storage.write(SCORECARD, dump_json(card))
    plan.storage.write(SCORES, _csv(target, rows))
    plan.storage.write(EXAMPLES, _examples(plan, target, attack_scores))
    return card


def _score_attacks(
    plan: AttackPlan, target: Target, failures: dict[str, str], classifier: nn.Module | None
) -> tuple[dict[str, Outcome], dict[str, Scores]]:
    """Results of all attacks, and the scores per image of the finished ones."""
    attacks: dict[str, Outcome] = {}
    scores: dict[str, Scores] = {}
    for name in dependencies_first(plan):
        result = load_result(plan, name)
        if result is None:
            threat = ATTACKS.get(name).threat
            result = {
                "attack": name,
                "threat": threat.name,
                "threat_meaning": threat.meaning,
                "status": "failed",
                "note": failures.get(name, "not run"),
            }
        elif result["status"] == "done":
            scores[name] = score_images(_load_estimates(plan, name), target, classifier)
            result["scores"] = aggregate(scores[name], plan.suite.seed)
            result["reidentification_rate"] = reidentification_rate(result["scores"])
            result |= _convergence(result)
        attacks[name] = result
    return attacks, scores


def _load_estimates(plan: AttackPlan, attack: str) -> Tensor:
    from safetensors.torch import load

    return load(plan.folder(attack).read("estimates.safetensors"))["estimates"]


def _examples(plan: AttackPlan, target: Target, attack_scores: dict[str, Scores]) -> bytes:
    """Pictures for reports: the first queries, and each attack's best reconstructions."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, scores in attack_scores.items():
        estimates = _load_estimates(plan, name)
        first = torch.arange(min(NUM_EXAMPLES, len(estimates)))
        best = scores["ssim_invariant"].argsort(descending=True)[:NUM_EXAMPLES]
        for group, indices in (("first", first), ("worst", best)):
            on_device = indices.to(target.plain.device)
            tensors[f"{name}/{group}/plain"] = target.plain[on_device].cpu()
            tensors[f"{name}/{group}/protected"] = target.protected[on_device].cpu()
            tensors[f"{name}/{group}/estimate"] = estimates[indices]
            tensors[f"{name}/{group}/psnr"] = scores["psnr"][indices]
            tensors[f"{name}/{group}/ssim"] = scores["ssim"][indices]
    tensors["plain"] = target.plain[:NUM_EXAMPLES].cpu()
    tensors["protected"] = target.protected[:NUM_EXAMPLES].cpu()
    return save({key: tensor.contiguous() for key, tensor in tensors.items()})


def headline(attacks: dict[str, Any], *, at_chance: bool) -> dict[str, Any]:
    """Set each attack's verdict; return those of the strongest attack and of the strongest reconstruction attack.

    A failed attack may be the strongest one, so it turns ``holds`` and ``weak`` into ``inconclusive``.
    """
    for attack in attacks.values():
        if attack["status"] == "done":
            attack["verdict"], attack["verdict_reason"] = verdict(
                attack["reidentification_rate"],
                attack["num_queries"],
                lower_bound=attack["lower_bound"],
                at_chance=at_chance,
            )
    failed = [name for name, attack in attacks.items() if attack["status"] == "failed"]

    def conclude(name: str | None) -> tuple[float | None, str | None, str]:
        if name is None:
            return None, None, ""
        rate, word, reason = (attacks[name][key] for key in ("reidentification_rate", "verdict", "verdict_reason"))
        if failed and word in ("holds", "weak"):
            word, reason = INCONCLUSIVE, f"{', '.join(failed)} failed and may be stronger"
        return rate, word, reason

    strongest = strongest_attack(attacks)
    reconstruction = strongest_attack({name: a for name, a in attacks.items() if ATTACKS.get(name).draws})
    rate, word, reason = conclude(strongest)
    reconstruction_rate, reconstruction_word, reconstruction_reason = conclude(reconstruction)
    return {
        "strongest_attack": strongest,
        "strongest_reconstruction": reconstruction,
        "reidentification_rate_by_reconstruction": reconstruction_rate,
        "verdict_by_reconstruction": reconstruction_word,
        "verdict_reason_by_reconstruction": reconstruction_reason,
        "reidentification_rate": rate,
        "verdict": word,
        "verdict_reason": reason,
        "lower_bound": any(a.get("lower_bound") for a in attacks.values()) and not (rate is not None and rate > RED),
    }


def _convergence(result: Outcome) -> Outcome:
    """Whether a larger effort would raise an attack's score, read from its curve."""
    is_trained, has_effort = bool(result["history"]), ATTACKS.get(result["attack"]).effort is not None
    if not is_trained and not has_effort:
        return {"lower_bound": False, "rises_with": [], "unknown": []}
    points = {point["what"]: point for point in result["curve"]}
    rising, unknown = [], []
    for resource, label in (("epochs", HALF_EPOCHS), ("images", QUARTER)) if is_trained else (("steps", HALF_EFFORT),):
        if label not in points or result["num_queries"] < MIN_QUERIES:
            unknown.append(resource)
        elif is_rising([points[label], points["everything"]]):
            rising.append(resource)
    return {"lower_bound": bool(rising or unknown), "rises_with": rising, "unknown": unknown}


def _above_baselines(scores: dict[str, dict[str, float]], baseline_summaries: dict[str, Any]) -> bool:
    """Whether reconstructions resemble the originals more than the class mean does, beyond chance."""
    baseline = baseline_summaries.get("class mean") or baseline_summaries["mean image"]
    return any(scores[key]["low"] > baseline[key]["high"] for key in ("ssim_invariant", "edges", "reidentified"))


def _reference_accuracy(classifier: nn.Module | None, target: Target) -> float | None:
    if classifier is None:
        return None
    return float(score_images(target.plain, target, classifier)["accuracy"].mean())


def _csv(target: Target, all_scores: dict[str, Scores]) -> bytes:
    """A row per attack and image; ``image`` is the index in the gallery."""
    text = io.StringIO()
    writer = csv.writer(text)
    metrics = list(dict.fromkeys(metric for scores in all_scores.values() for metric in scores))
    writer.writerow(["attack", "image", "label", *metrics])
    images, labels = target.truth.tolist(), target.labels.tolist()
    for name, scores in all_scores.items():
        columns: list[Tensor | None] = [scores.get(metric) for metric in metrics]
        for i in range(len(next(iter(scores.values())))):
            values = ["" if column is None else f"{float(column[i]):.5g}" for column in columns]
            writer.writerow([name, images[i], labels[i], *values])
    return text.getvalue().encode()
