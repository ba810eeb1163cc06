"""Run every attack of a suite against one target. Each attack can be resumed; the scorecard has all results.

NAME/suite.yaml             settings: target, suite, source of the images
NAME/attacks/ATTACK/        per attack: training checkpoints, network.safetensors, estimates.safetensors, result.json
NAME/reference_classifier/  the reference classifier, where one is trained
NAME/client_classifier/     the classifier that the client could run alone, where one is trained
NAME/scorecard.json         all measurements; scores.csv lists them per image
NAME/examples.safetensors   pictures for reports
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, match_shape
from raypp.attacks.suite import CURVE, HALF_EFFORT
from raypp.attacks.target import Target
from raypp.attacks.trained import TrainedAttack, train_attack
from raypp.evaluation.reidentification import candidate_reidentification_scores, select_matcher
from raypp.evaluation.scorecard import aggregate, score_images
from raypp.experiments import attack_plan
from raypp.experiments.attack_plan import AttackPlan, Outcome, load_result, load_target_of
from raypp.experiments.attack_scores import export_to_bundle, save_tensors, write_scorecard
from raypp.experiments.client_classifier import PLAIN_CLASSIFIERS, missing_classifiers, train_plain_classifier
from raypp.metrics.image import use_backend
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import is_rank_zero
from raypp.training.reporter import Reporter
from raypp.utils.documents import dump_json
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.registry import MethodConfig
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

CurvePoint = dict[str, Any]


class Training(NamedTuple):
    """A finished training of an attack's network."""

    label: str
    network: StateDict
    history: list[EpochMetrics]
    num_images: int


OnDone = Callable[[str, Outcome], None]
"""Receives the name of an attack that ended, with ``{"result": ...}`` or ``{"error": message}``."""


def run_attack(plan: AttackPlan, name: str, display: ProgressListener, target: Target | None = None) -> Outcome:
    """Run one attack to its end, or resume it; store and return its result.

    In an initialized process group, all processes call it. They train together, and rank 0 does the rest.

    Args:
        target: the loaded target; None loads it.

    Raises:
        RayppError: the target cannot be loaded or fails. An attack that does not apply to it returns a result.
    """
    if (stored := load_result(plan, name)) is not None:
        return stored
    with use_backend(plan.suite.metrics.backend):
        return _run_attack(plan, name, display, target or load_target_of(plan))


def _run_attack(plan: AttackPlan, name: str, display: ProgressListener, target: Target) -> Outcome:
    folder = plan.folder(name)
    start = time.monotonic()
    kind, options = ATTACKS.get(name), plan.suite.options(name)
    result = attack_plan.describe_attack(options, target.access)
    result |= {"options": options.model_dump(mode="json"), "target": target.fingerprint}
    try:
        attack: Attack = kind(options, _with_earlier_networks(plan, name, target.access), seed=plan.suite.seed)
        attack.listener = display
        trainings = _train(attack, plan, name, target, display) if isinstance(attack, TrainedAttack) else []
        if not is_rank_zero():
            return result
        attack.prepare()
        torch.manual_seed(plan.suite.seed)
        choice = select_matcher(attack, target)
        num_queries = min(len(target.plain), attack.max_queries or len(target.plain))
        estimates = _reconstruct(attack, plan, target, num_queries).cpu()
        curve: list[CurvePoint] = []
        if isinstance(attack, TrainedAttack) and plan.suite.curve:
            curve = _training_curve(attack, trainings, target, choice.matcher)
        elif attack.effort is not None and plan.suite.curve:
            curve = _effort_curve(attack, attack.effort, estimates, plan, target, choice.matcher)
    except AttackError as error:
        result |= {"status": "does not apply", "note": str(error)}
        if is_rank_zero():
            folder.write("result.json", dump_json(result))
        return result
    queries = (target.plain[:num_queries], target.protected[:num_queries], target.truth[:num_queries])
    more_scores = attack.measure(*queries) | candidate_reidentification_scores(attack, target, num_queries)
    more_scores = {key: values.float().cpu() for key, values in more_scores.items()}
    save_tensors(folder, "estimates.safetensors", {"estimates": estimates, **more_scores})
    scores = score_images(estimates, target, matcher=choice.matcher) | more_scores
    result |= {
        "status": "done",
        "note": attack.note,
        "num_queries": num_queries,
        "num_gallery": len(target.gallery),
        **asdict(choice),
        "seconds": round(time.monotonic() - start, 1),
        "scores": aggregate(scores, len(target.gallery), plan.suite.seed),
        "extra_scores": attack.extra_scores,
        "history": trainings[0].history if trainings else [],
        "curve": curve,
    }
    folder.write("result.json", dump_json(result))
    return result


def _reconstruct(attack: Attack, plan: AttackPlan, target: Target, num_queries: int) -> Tensor:
    torch.manual_seed(plan.suite.seed)
    return match_shape(attack.reconstruct(target.protected[:num_queries]), target.access.shape)


def _effort_curve(
    attack: Attack, effort: str, estimates: Tensor, plan: AttackPlan, target: Target, matcher: str
) -> list[CurvePoint]:
    """Scores of an attack without training, at half the option ``effort`` and at all of it."""
    options = attack.options
    attack.options = options.model_copy(update={effort: max(1, getattr(options, effort) // 2)})
    half = _reconstruct(attack, plan, target, len(estimates))
    attack.options = options
    points = ((HALF_EFFORT, half), ("everything", estimates))
    return [{"what": label} | _score(attack, images, target, matcher) for label, images in points]


def _training_curve(attack: TrainedAttack, trainings: list[Training], target: Target, matcher: str) -> list[CurvePoint]:
    """Scores of the smaller trainings, then of the full one, whose network is loaded in the end."""
    full, *smaller = trainings
    curve = []
    for training in (*smaller, full):
        attack.load(training.network)
        budget = {"what": training.label, "epochs": len(training.history), "num_images": training.num_images}
        curve.append(
            budget | _score(attack, attack.reconstruct(target.protected[: attack.max_queries]), target, matcher)
        )
    return curve


def _train(
    attack: TrainedAttack, plan: AttackPlan, name: str, target: Target, display: ProgressListener
) -> list[Training]:
    """Train the attack's network, which is then loaded, and smaller ones for its curve; the full training is first."""
    folder, device, total = plan.folder(name), target.access.device, attack.num_images
    reporter = Reporter(folder, display, device)
    num_workers = reporter.world
    full = Training("everything", *train_attack(attack, reporter, 1.0, None), total)
    attack.load(full.network)
    if is_rank_zero():
        save_tensors(folder, "network.safetensors", full.network)
    trainings = [full]
    for label, epochs, share in CURVE if plan.suite.curve else ():
        num_images = max(2, num_workers, round(share * total)) if share < 1 else None
        if epochs < 1 and round(epochs * attack.options.train.epochs) in (0, attack.options.train.epochs):
            continue  # one epoch has no half, so the effect of more epochs stays unknown
        reporter = Reporter(folder.folder(label.replace(" ", "_")), display, device)
        trainings.append(Training(label, *train_attack(attack, reporter, epochs, num_images), num_images or total))
    return trainings


def _score(attack: Attack, estimates: Tensor, target: Target, matcher: str) -> dict[str, float]:
    """Mean scores of an attack's reconstructions, for a point of a curve."""
    images = match_shape(estimates, target.access.shape)
    scores = score_images(images, target, matcher=matcher, all_matchers=False)
    scores |= candidate_reidentification_scores(attack, target, len(images))
    keys = {"reidentification_rate": "reidentified"}
    keys |= {key: key for key in ("ssim", "ssim_invariant", "psnr", "bits_identified")}
    return {name: round(float(scores[key].double().mean()), 5) for name, key in keys.items()}


def load_network(folder: Storage, options: MethodConfig, access: AttackerKnowledge) -> ImageMap:
    """An attack's trained network as a map from protected to plain images."""
    from safetensors.torch import load

    attack: TrainedAttack = ATTACKS.build(options, access)
    attack.load(load(folder.read("network.safetensors")))
    return attack.reconstruct


def _with_earlier_networks(plan: AttackPlan, attack: str, access: AttackerKnowledge) -> AttackerKnowledge:
    networks = {
        name: load_network(plan.folder(name), plan.suite.options(name), access)
        for name in attack_plan.dependencies(plan, attack)
        if plan.folder(name).exists("network.safetensors")
    }
    return replace(access, earlier=networks) if networks else access


def run_attacks_locally(
    plan: AttackPlan, target: Target, missing: Sequence[str], display: MultiProgressDisplay, on_done: OnDone
) -> None:
    """Run attacks on a loaded target in this process, one after the other.

    Raises:
        TrainingInterrupted: a stop was requested by ``display`` or SIGTERM, and a checkpoint is saved.
    """
    with stop_on_signal(display.stop, signal.SIGTERM):
        for name in missing:
            display.raise_if_stop_requested()
            try:
                if name in PLAIN_CLASSIFIERS:
                    train_plain_classifier(plan, target, name, display.of(name))
                    outcome: Outcome = {"result": {}}
                else:
                    outcome = {"result": run_attack(plan, name, display.of(name), target)}
            except RayppError as error:
                outcome = {"error": str(error)}
            except Exception as error:  # a defect of one attack does not stop the others, as with Ray's tasks
                outcome = {"error": f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"}
            on_done(name, outcome)


def run_attack_suite(
    plan: AttackPlan,
    *,
    resume: bool = False,
    quiet: bool = False,
    announce: Callable[[AttackPlan, Target], None] = lambda *_: None,
    run: Callable[[AttackPlan, Sequence[str], MultiProgressDisplay, OnDone], None] | None = None,
) -> dict[str, Any]:
    """Run the attacks of a plan that have no result yet; write and return the scorecard.

    Args:
        announce: called with the opened plan and its target before the first attack.
        run: runs attacks elsewhere; None runs them in this process, see :func:`run_attacks_locally`.

    Raises:
        RayppError: target, suite or folder is invalid. An attack that fails does not stop the others.
    """
    with attack_plan.open_attack_plan(plan, resume=resume) as (plan, target):
        announce(plan, target)
        failures: dict[str, str] = {}
        jobs = [name for name in attack_plan.dependencies_first(plan) if load_result(plan, name) is None]
        jobs += missing_classifiers(plan, target)
        with MultiProgressDisplay(len(jobs), quiet=quiet, what="attacks") as display:

            def on_done(name: str, outcome: Outcome) -> None:
                if "error" in outcome:
                    failures[name] = outcome["error"]
                display.done(name, _outcome_line(outcome))

            if jobs and run is not None:
                run(plan, jobs, display, on_done)
            elif jobs:
                run_attacks_locally(plan, target, jobs, display, on_done)
        card = write_scorecard(plan, target, failures)
        if plan.spec.bundle is not None and not failures.keys() - PLAIN_CLASSIFIERS.keys():
            export_to_bundle(plan, card, quiet)
        return card


def _outcome_line(outcome: Outcome) -> str:
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    result = outcome["result"]
    if not result:
        return "trained"
    if result["status"] != "done":
        return str(result["note"] or result["status"])
    rate = result["scores"]["reidentified"]["mean"]
    return f"{rate:.1%} re-identified, SSIM {result['scores']['ssim']['mean']:.3f}"
