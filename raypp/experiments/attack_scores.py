"""The scorecard of an attack run, with its scores and examples, and its copy in the attacked bundle."""

from __future__ import annotations

import csv
import io
import json
from math import isnan
from typing import Any

import torch
from torch import nn

from raypp.attacks import ATTACKS
from raypp.attacks.base import tensor_sha256
from raypp.attacks.suite import HALF_EFFORT, HALF_EPOCHS, QUARTER
from raypp.attacks.target import Target
from raypp.bundle.export import add_attacks
from raypp.evaluation import scorecard
from raypp.evaluation.baselines import BASELINE_MATCHER, BLIND, SIGNIFICANCE, above_baseline_p_values, baselines
from raypp.evaluation.output import as_csv
from raypp.evaluation.scorecard import Scores, aggregate, score_images, strongest_attack
from raypp.experiments import attack_plan
from raypp.experiments.attack_plan import EXAMPLES, SCORECARD, SCORES, AttackPlan, Outcome
from raypp.experiments.client_classifier import measure_client_of
from raypp.experiments.reference_classifier import load_reference_classifier
from raypp.experiments.run_folder import environment, lock
from raypp.metrics.cost import reasons_for_upper_bound
from raypp.metrics.image import use_backend
from raypp.metrics.matchers import PIXELS
from raypp.metrics.statistics import chance_error, holm_adjust
from raypp.models.perceptual import StateDict
from raypp.utils.documents import dump_json
from raypp.utils.errors import StorageError
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

NUM_EXAMPLES = 10


def write_scorecard(plan: AttackPlan, target: Target, failures: dict[str, str]) -> dict[str, Any]:
    """Write ``scorecard.json``, ``scores.csv`` and the examples of a run; returns the scorecard."""
    with use_backend(plan.suite.metrics.backend):
        return _write_scorecard(plan, target, failures)


def _write_scorecard(plan: AttackPlan, target: Target, failures: dict[str, str]) -> dict[str, Any]:
    seed = plan.suite.seed
    classifier = load_reference_classifier(plan, target)
    reference_accuracy = None
    if classifier is not None:
        originals = score_images(target.plain, target, classifier, matcher=PIXELS, all_matchers=False)
        reference_accuracy = float(originals["accuracy"].mean())
    test = (target.metrics or {}).get("test") or {}
    at_chance = chance_error(test, len(target.classes))
    attacks, attack_scores = _score_attacks(plan, target, failures, classifier)
    baseline_scores = {
        name: score_images(images, target, classifier, matcher=BASELINE_MATCHER)
        for name, images in baselines(target, seed).items()
    }
    _compare_with_baselines(attacks, attack_scores, baseline_scores)
    client, client_note = measure_client_of(plan, target, failures)
    card = {
        "target": target.name,
        "label": target.label,
        "keyed": target.access.fresh is not None,
        "num_queries": len(target.plain),
        "num_gallery": len(target.gallery),
        "gallery_sha256": tensor_sha256(target.gallery),
        "num_attacker_images": len(target.access.images) if target.access.images is not None else 0,
        "chance": 1 / len(target.gallery),
        "accuracy": test.get("accuracy"),
        "accuracy_interval": test.get("accuracy_interval"),
        "at_chance": at_chance,
        "reference_accuracy": reference_accuracy,
        "reference_note": failures.get(attack_plan.REFERENCE_CLASSIFIER, ""),
        "client": client,
        "client_note": client_note,
        **headline(attacks, at_chance=at_chance is not None),
        "attacks": attacks,
        "baselines": {name: aggregate(scores, len(target.gallery), seed) for name, scores in baseline_scores.items()},
        "blind_baselines": [name for name in BLIND if name in baseline_scores],
        "suite": plan.dump()["suite"],
        "environment": environment(),
    }
    rows = attack_scores | {f"baseline: {name}": scores for name, scores in baseline_scores.items()}
    plan.storage.write(SCORECARD, dump_json(card))
    plan.storage.write(SCORES, _csv(target, rows))
    save_tensors(plan.storage, EXAMPLES, _examples(plan, target, attack_scores))
    return card


def _score_attacks(
    plan: AttackPlan, target: Target, failures: dict[str, str], classifier: nn.Module | None
) -> tuple[dict[str, Outcome], dict[str, Scores]]:
    """Results of all attacks, and the scores per image of the finished ones."""
    attacks: dict[str, Outcome] = {}
    scores: dict[str, Scores] = {}
    for name in attack_plan.dependencies_first(plan):
        result = attack_plan.load_result(plan, name)
        if result is None:
            note = failures.get(name, "not run")
            description = attack_plan.describe_attack(plan.suite.options(name), target.access)
            result = description | {"status": "failed", "note": note}
        elif result["status"] == "done":
            stored = _load_estimates(plan, name)
            estimates = stored.pop("estimates")
            scores[name] = score_images(estimates, target, classifier, matcher=result["matcher"]) | stored
            result["scores"] = aggregate(scores[name], len(target.gallery), plan.suite.seed)
            result["reidentification_rate"] = result["scores"]["reidentified"]["mean"]
            result |= _convergence(result)
        attacks[name] = result
    return attacks, scores


def _compare_with_baselines(
    attacks: dict[str, Outcome], attack_scores: dict[str, Scores], baseline_scores: dict[str, Scores]
) -> None:
    """Set whether each finished attack is above the blind baselines, beyond chance, and the p-values of that.

    Holm's method adjusts the p-values of all metrics of all attacks together. They have five significant digits.
    """
    p_values = {
        (name, metric): p_value
        for name, scores in attack_scores.items()
        for metric, p_value in above_baseline_p_values(scores, baseline_scores, attacks[name]["matcher"]).items()
    }
    adjusted = holm_adjust(p_values)
    for name in attack_scores:
        of_attack = {metric: float(f"{p:.5g}") for (attack, metric), p in adjusted.items() if attack == name}
        attacks[name]["above_baseline"] = min(of_attack.values()) < SIGNIFICANCE
        attacks[name]["above_baseline_p_values"] = of_attack


def _load_estimates(plan: AttackPlan, attack: str) -> StateDict:
    """An attack's ``estimates``, and the values of its extra scores by name."""
    from safetensors.torch import load

    return load(plan.folder(attack).read("estimates.safetensors"))


def save_tensors(folder: Storage, file: str, tensors: StateDict) -> None:
    from safetensors.torch import save

    folder.write(file, save({key: tensor.contiguous() for key, tensor in tensors.items()}))


def _examples(plan: AttackPlan, target: Target, attack_scores: dict[str, Scores]) -> StateDict:
    """Pictures for reports: the first queries, and each attack's best reconstructions."""
    tensors = {"plain": target.plain[:NUM_EXAMPLES].cpu(), "protected": target.protected[:NUM_EXAMPLES].cpu()}
    for name, scores in attack_scores.items():
        estimates = _load_estimates(plan, name)["estimates"]
        first = torch.arange(min(NUM_EXAMPLES, len(estimates)))
        best = scores["ssim_invariant"].argsort(descending=True)[:NUM_EXAMPLES]
        for group, indices in (("first", first), ("best", best)):
            on_device = indices.to(target.plain.device)
            tensors[f"{name}/{group}/plain"] = target.plain[on_device].cpu()
            tensors[f"{name}/{group}/protected"] = target.protected[on_device].cpu()
            tensors[f"{name}/{group}/estimate"] = estimates[indices]
            tensors[f"{name}/{group}/psnr"] = scores["psnr"][indices]
            tensors[f"{name}/{group}/ssim"] = scores["ssim"][indices]
    return tensors


def headline(attacks: dict[str, Any], *, at_chance: bool) -> dict[str, Any]:
    """Set each attack's verdict; return those of the strongest attack and of the strongest reconstruction attack.

    A failed attack may be the strongest one, so it turns ``holds`` and ``weak`` into ``inconclusive``.
    """
    for attack in attacks.values():
        if attack["status"] == "done":
            attack["verdict"], attack["verdict_reason"] = scorecard.verdict(
                attack["scores"]["reidentified"],
                attack["num_queries"],
                lower_bound=attack["lower_bound"],
                at_chance=at_chance,
            )
    failed = [name for name, attack in attacks.items() if attack["status"] == "failed"]

    def conclude(name: str | None, suffix: str = "") -> dict[str, Any]:
        rate, bits, word, reason = None, None, None, ""
        if name is not None:
            rate, word, reason = (attacks[name][key] for key in ("reidentification_rate", "verdict", "verdict_reason"))
            bits = attacks[name]["scores"]["bits_identified"]["mean"]
        if failed and word in ("holds", "weak"):
            word, reason = scorecard.INCONCLUSIVE, f"{', '.join(failed)} failed and may be stronger"
        results = {"reidentification_rate": rate, "bits_identified": bits, "verdict": word, "verdict_reason": reason}
        return {f"{key}{suffix}": value for key, value in results.items()}

    strongest = strongest_attack(attacks)
    reconstruction = strongest_attack({name: a for name, a in attacks.items() if ATTACKS.get(name).draws})
    is_broken = strongest is not None and attacks[strongest]["verdict"] == scorecard.BROKEN
    return {
        "strongest_attack": strongest,
        "strongest_reconstruction": reconstruction,
        **conclude(reconstruction, "_by_reconstruction"),
        **conclude(strongest),
        "lower_bound": any(a.get("lower_bound") for a in attacks.values()) and not is_broken,
    }


def _convergence(result: Outcome) -> Outcome:
    """Whether a larger effort would raise an attack's score, read from its curve."""
    checks: tuple[tuple[str, str], ...] = ()
    if result["history"]:
        checks = (("epochs", HALF_EPOCHS), ("images", QUARTER))
    elif ATTACKS.get(result["attack"]).effort is not None:
        checks = (("steps", HALF_EFFORT),)
    points = {point["what"]: point for point in result["curve"]}
    rising, unknown = [], []
    for resource, label in checks:
        if label not in points or result["num_queries"] < scorecard.MIN_QUERIES:
            unknown.append(resource)
        elif scorecard.is_rising([points[label], points["everything"]]):
            rising.append(resource)
    return {"lower_bound": bool(rising or unknown), "rises_with": rising, "unknown": unknown}


def _csv(target: Target, all_scores: dict[str, Scores]) -> bytes:
    """A row per attack and image; ``image`` is the index in the gallery."""
    images, labels = target.truth.tolist(), target.labels.tolist()
    rows = []
    for name, scores in all_scores.items():
        # An attack may have fewer images than the target.
        for image, label, *values in zip(images, labels, *(v.tolist() for v in scores.values()), strict=False):
            texts = ("" if isnan(value) else f"{value:.5g}" for value in values)
            rows.append({"attack": name, "image": image, "label": label} | dict(zip(scores, texts, strict=True)))
    metrics = dict.fromkeys(metric for scores in all_scores.values() for metric in scores)
    return as_csv(["attack", "image", "label", *metrics], rows)


def export_to_bundle(plan: AttackPlan, card: dict[str, Any], quiet: bool) -> None:
    """Store trained networks and the scorecard in the bundle's private part, for serving."""
    from safetensors.torch import load

    bundle = plan.spec.bundle
    assert bundle is not None
    try:
        # No other process may write between our read and write.
        with lock(Storage(bundle), f"bundle {bundle}", wait=True):
            files = {name: plan.storage.read(name) for name in (SCORES, EXAMPLES)}
            card, files, from_stored = _merge_with_stored(bundle, card, files)
            networks = {}
            for options in plan.suite.attacks:
                folder = plan.folder(options.name)
                draws = ATTACKS.get(options.name).draws  # a service has no gallery for the others
                if draws and options.name not in from_stored and folder.exists("network.safetensors"):
                    weights = load(folder.read("network.safetensors"))
                    networks[options.name] = (options.model_dump(mode="json"), weights)
            add_attacks(bundle, networks, card, files)
    except StorageError as error:
        if not quiet:
            ProgressDisplay().warn(f"the scorecard could not be stored in the bundle: {error}")


def _merge_with_stored(
    bundle: str, card: dict[str, Any], files: dict[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """Merge a scorecard with the one stored in the bundle; each attack keeps its stronger run.

    A weaker later attack must not make a bundle look better. Rates in different galleries cannot be compared, so of two
    such scorecards, the one whose strongest attack identifies more bits stays as it is; the stored one if they are
    equal.

    Returns:
        The scorecard, its files, and the names of attacks whose stored run is the stronger one.
    """
    from safetensors.torch import load, save

    private = Storage(bundle).folder("private")
    if not private.exists(SCORECARD):
        return card, files, set()
    stored = json.loads(private.read(SCORECARD))
    new, old = card["attacks"], stored.get("attacks", {})
    if any("matcher" not in result for result in old.values() if result["status"] == "done"):
        return card, files, set()  # of an earlier version, whose results have other names
    if card["gallery_sha256"] != stored.get("gallery_sha256"):
        if _least_bits_identified(card) > _least_bits_identified(stored):
            return card, files, set()
        return stored, {name: private.read(name) for name in (SCORES, EXAMPLES)}, set(new)
    from_stored = {name for name, result in old.items() if _is_stronger(result, new.get(name))}
    attacks = new | {name: result for name, result in old.items() if name in from_stored or name not in new}
    # The results of the smaller card's attacks stay valid; the baselines are those of the card with more queries.
    stored_is_larger = card["num_queries"] < stored["num_queries"]
    base, other = (stored, card) if stored_is_larger else (card, stored)
    merged = other | base | {"attacks": attacks, "client": _merge_clients(card["client"], stored.get("client"))}
    merged |= headline(attacks, at_chance=card["at_chance"] is not None)
    scores = _merge_scores(files[SCORES], private.read(SCORES), from_stored, stored_is_larger)
    examples = load(files[EXAMPLES])
    examples |= {k: v for k, v in load(private.read(EXAMPLES)).items() if k.partition("/")[0] in from_stored}
    return merged, {SCORES: scores, EXAMPLES: save(examples)}, from_stored


def _least_bits_identified(card: dict[str, Any]) -> float:
    """Lower end of the interval of the bits that the strongest attack identifies; 0 without an attack."""
    name = card["strongest_attack"]
    return 0.0 if name is None else float(card["attacks"][name]["scores"]["bits_identified"]["low"])


def _is_stronger(stored: dict[str, Any], new: dict[str, Any] | None) -> bool:
    """Whether a stored run of an attack has finished and leaks more than a new one in the same gallery."""
    if stored["status"] != "done":
        return False
    return new is None or new["status"] != "done" or scorecard.rank_key(stored) > scorecard.rank_key(new)


def _merge_clients(new: dict[str, Any] | None, stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """The stored client section if its cloud gain is more exact, else the new one."""
    return max(new, stored, key=_exactness)  # the new one, if they are equal


def _exactness(client: dict[str, Any] | None) -> int:
    """0 without a measured cloud gain, else less the more reasons there are why it is an upper bound."""
    if client is None or client.get("cloud_gain_is_upper_bound") is None:  # sections of an earlier version have none
        return 0
    return 3 - len(reasons_for_upper_bound(client["alone"], client["macs"]))


def _merge_scores(new: bytes, stored: bytes, from_stored: set[str], stored_baselines: bool) -> bytes:
    """Merge two ``scores.csv``: each row comes from the run whose result is kept."""

    def is_stored(attack: str) -> bool:
        return stored_baselines if attack.startswith("baseline: ") else attack in from_stored

    old_rows, new_rows = (list(csv.DictReader(io.StringIO(data.decode()))) for data in (stored, new))
    rows = [row for row in new_rows if not is_stored(row["attack"])]
    rows += [row for row in old_rows if is_stored(row["attack"])]
    return as_csv(list(new_rows[0] | old_rows[0]), rows)
