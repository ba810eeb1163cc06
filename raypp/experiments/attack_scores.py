"""The scorecard of an attack run: scores, baselines, verdicts, examples."""

from __future__ import annotations

import csv
import io
import json
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
    load_result,
    topological_order,
)
from raypp.experiments.reference_classifier import load_reference_classifier
from raypp.experiments.run_folder import environment
from raypp.metrics.statistics import chance_error

NUM_SHOWN = 10


def scorecard(plan: AttackPlan, victim: Target, failures: dict[str, str]) -> dict[str, Any]:
    """Put together what has been measured, write ``scorecard.json`` and ``scores.csv``, and return the first."""
    from safetensors.torch import load

    judge = load_reference_classifier(plan, victim)
    test = (victim.metrics or {}).get("test")
    at_chance = chance_error(test, len(victim.classes))
    attacks: dict[str, Any] = {}
    images: dict[str, Scores] = {}
    for name in topological_order(plan):
        result = load_result(plan, name)
        if result is None:
            kind = ATTACKS.get(name)
            attacks[name] = {
                "attack": name, "threat": kind.threat.name, "threat_meaning": kind.threat.meaning,
                "status": "failed", "note": failures.get(name, "not run"),
            }  # fmt: skip
            continue
        if result["status"] == "done":
            estimates = load(plan.folder(name).read("estimates.safetensors"))["estimates"]
            images[name] = score_images(estimates, victim, judge)
            result["scores"] = aggregate(images[name], plan.suite.seed)
            result["reidentification_rate"] = reidentification_rate(result["scores"])
            result |= _convergence(result)
        attacks[name] = result
    beside = {name: score_images(made, victim, judge) for name, made in baselines(victim, plan.suite.seed).items()}
    baseline_scores = {name: aggregate(scores, plan.suite.seed) for name, scores in beside.items()}
    for result in attacks.values():
        if result["status"] == "done":
            result["above_baseline"] = _above_baselines(result["scores"], baseline_scores)
    card = {
        "victim": victim.name,
        "label": victim.label,
        "keyed": victim.access.fresh is not None,
        "num_queries": len(victim.plain),
        "num_gallery": len(victim.gallery),
        "num_attacker_images": len(victim.access.images) if victim.access.images is not None else 0,
        "chance": 1 / len(victim.gallery),
        "accuracy": (test or {}).get("accuracy"),
        "accuracy_interval": (test or {}).get("accuracy_interval"),
        "at_chance": at_chance,
        "reference_accuracy": _reference_accuracy(judge, victim),
        "reference_note": failures.get(REFERENCE_CLASSIFIER, ""),
        **headline(attacks, at_chance=at_chance is not None),
        "attacks": attacks,
        "baselines": baseline_scores,
        "suite": plan.dump()["suite"],
        "environment": environment(),
    }
    plan.storage.write(SCORECARD, _json(card))
    plan.storage.write(SCORES, _csv(victim, images | {f"baseline: {k}": v for k, v in beside.items()}))
    plan.storage.write(EXAMPLES, _examples(plan, victim, images))
    return card


def _examples(plan: AttackPlan, victim: Target, images: dict[str, Scores]) -> bytes:
    """Pictures for reports: the first queries, and of each attack those that it recovered best."""
    from safetensors.torch import load, save

    found: dict[str, Tensor] = {}
    for name, scores in images.items():
        estimates = load(plan.folder(name).read("estimates.safetensors"))["estimates"]
        best = scores["ssim_invariant"].argsort(descending=True)[:NUM_SHOWN]
        for what, chosen in (("first", torch.arange(min(NUM_SHOWN, len(estimates)))), ("worst", best)):
            at = chosen.to(victim.plain.device)
            found[f"{name}/{what}/plain"] = victim.plain[at].cpu()
            found[f"{name}/{what}/protected"] = victim.protected[at].cpu()
            found[f"{name}/{what}/estimate"] = estimates[chosen]
            found[f"{name}/{what}/psnr"] = scores["psnr"][chosen]
            found[f"{name}/{what}/ssim"] = scores["ssim"][chosen]
    found["plain"], found["protected"] = victim.plain[:NUM_SHOWN].cpu(), victim.protected[:NUM_SHOWN].cpu()
    return save({key: tensor.contiguous() for key, tensor in found.items()})


def headline(attacks: dict[str, Any], *, at_chance: bool) -> dict[str, Any]:
    """Give each attack its verdict, and return those of the strongest attack and the strongest that reconstructs.

    An attack that failed may have been the strongest: without it, ``holds`` and ``weak`` become ``inconclusive``.
    """
    for a in attacks.values():
        if a["status"] == "done":
            a["verdict"], a["verdict_reason"] = verdict(
                a["reidentification_rate"], a["num_queries"], lower_bound=a["lower_bound"], at_chance=at_chance
            )
    failed = [name for name, a in attacks.items() if a["status"] == "failed"]

    def of(name: str | None) -> tuple[str | None, str]:
        if name is None:
            return None, ""
        words, reason = attacks[name]["verdict"], attacks[name]["verdict_reason"]
        if failed and words in ("holds", "weak"):
            return INCONCLUSIVE, f"{', '.join(failed)} failed and may have found more"
        return words, reason

    worst_name = strongest_attack(attacks)
    drawing = strongest_attack({name: a for name, a in attacks.items() if ATTACKS.get(name).draws})
    (words, reason), (drawing_words, drawing_reason) = of(worst_name), of(drawing)
    red = worst_name is not None and attacks[worst_name]["reidentification_rate"] > RED
    return {
        "strongest_attack": worst_name,
        "strongest_reconstruction": drawing,
        "reidentification_rate_by_reconstruction": attacks[drawing]["reidentification_rate"] if drawing else None,
        "verdict_by_reconstruction": drawing_words,
        "verdict_reason_by_reconstruction": drawing_reason,
        "reidentification_rate": attacks[worst_name]["reidentification_rate"] if worst_name else None,
        "verdict": words,
        "verdict_reason": reason,
        "lower_bound": any(a.get("lower_bound") for a in attacks.values()) and not red,
    }


def _convergence(result: Outcome) -> Outcome:
    """Whether a trained attack's score is its last word, by the points of its curve."""
    trained, tried = bool(result["history"]), ATTACKS.get(result["attack"]).effort is not None
    if not trained and not tried:
        return {"lower_bound": False, "rises_with": [], "unknown": []}
    points = {point["what"]: point for point in result["curve"]}
    wanted = (("epochs", HALF_EPOCHS), ("images", QUARTER)) if trained else (("steps", HALF_EFFORT),)
    rising, unknown = [], []
    for what, before in wanted:
        if before not in points or result["num_queries"] < MIN_QUERIES:
            unknown.append(what)
        elif is_rising([points[before], points["everything"]]):
            rising.append(what)
    return {"lower_bound": bool(rising or unknown), "rises_with": rising, "unknown": unknown}


def _above_baselines(scores: dict[str, dict[str, float]], baseline_scores: dict[str, Any]) -> bool:
    """Whether the reconstructions resemble the originals more than what the class alone tells, beyond chance."""
    null = baseline_scores.get("class mean") or baseline_scores["mean image"]
    return any(scores[key]["low"] > null[key]["high"] for key in ("ssim_invariant", "edges", "reidentified"))


def _reference_accuracy(judge: nn.Module | None, victim: Target) -> float | None:
    if judge is None:
        return None
    return float(score_images(victim.plain, victim, judge)["accuracy"].mean())


def _csv(victim: Target, images: dict[str, Scores]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(dict.fromkeys(metric for scores in images.values() for metric in scores))
    writer.writerow(["attack", "image", "label", *names])
    places, labels = victim.truth.tolist(), victim.labels.tolist()
    for attack_name, scores in images.items():
        columns: list[Tensor | None] = [scores.get(name) for name in names]
        for i in range(len(next(iter(scores.values())))):
            numbers = ["" if column is None else f"{float(column[i]):.5g}" for column in columns]
            writer.writerow([attack_name, places[i], labels[i], *numbers])
    return text.getvalue().encode()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()
