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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, TrainedAttack, match_shape
from raypp.attacks.suite import CURVE, HALF_EFFORT
from raypp.attacks.target import Target
from raypp.evaluation.scorecard import aggregate, reidentification_rate, score_images
from raypp.experiments import attack_plan
from raypp.experiments.attack_plan import AttackPlan, Outcome, load_result, load_target_of
from raypp.experiments.attack_scores import export_to_bundle, save_tensors, write_scorecard
from raypp.experiments.client_classifier import PLAIN_CLASSIFIERS, missing_classifiers
from raypp.metrics.image import use_backend
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import is_rank_zero, run_on_all_ranks
from raypp.training.reporter import Reporter
from raypp.training.trainer import Trainer
from raypp.utils.documents import dump_json
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.registry import MethodConfig
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

CurvePoint = dict[str, Any]
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
    result = attack_plan.describe_attack(name)
    result |= {"options": options.model_dump(mode="json"), "target": target.fingerprint}
    try:
        attack: Attack = kind(options, _with_earlier_networks(plan, name, target.access), seed=plan.suite.seed)
        history: list[EpochMetrics] = []
        curve: list[CurvePoint] = []
        if isinstance(attack, TrainedAttack):
            history, curve = _train(attack, plan, name, target, display)
        if not is_rank_zero():
            return result
        attack.prepare()
        num_queries = min(len(target.plain), attack.max_queries or len(target.plain))
        estimates = _reconstruct(attack, plan, target, num_queries).cpu()
        if attack.effort is not None and plan.suite.curve:
            curve = _effort_curve(attack, attack.effort, estimates, plan, target)
    except AttackError as error:
        result |= {"status": "does not apply", "note": str(error)}
        if is_rank_zero():
            folder.write("result.json", dump_json(result))
        return result
    save_tensors(folder, "estimates.safetensors", {"estimates": estimates})
    result |= {
        "status": "done",
        "note": attack.note,
        "num_queries": num_queries,
        "seconds": round(time.monotonic() - start, 1),
        "scores": aggregate(score_images(estimates, target), plan.suite.seed),
        "history": history,
        "curve": curve,
    }
    folder.write("result.json", dump_json(result))
    return result


def _reconstruct(attack: Attack, plan: AttackPlan, target: Target, num_queries: int) -> Tensor:
    torch.manual_seed(plan.suite.seed)
    return match_shape(attack.reconstruct(target.protected[:num_queries]), target.access.shape)


def _effort_curve(attack: Attack, effort: str, estimates: Tensor, plan: AttackPlan, target: Target) -> list[CurvePoint]:
    """Scores of an attack without training, at half the option ``effort`` and at all of it."""
    options = attack.options
    attack.options = options.model_copy(update={effort: max(1, getattr(options, effort) // 2)})
    half = _reconstruct(attack, plan, target, len(estimates))
    attack.options = options
    return [{"what": HALF_EFFORT} | _score(half, target), {"what": "everything"} | _score(estimates, target)]


def _train(
    attack: TrainedAttack, plan: AttackPlan, name: str, target: Target, display: ProgressListener
) -> tuple[list[EpochMetrics], list[CurvePoint]]:
    """Train the attack's network, and smaller trainings for its curve; the attack ends with the full network loaded."""
    folder, device, total = plan.folder(name), target.access.device, attack.num_images
    curve: list[CurvePoint] = []

    def add_point(network: StateDict, label: str, epochs: int, num_images: int) -> None:
        attack.load(network)
        scores = _score(attack.reconstruct(target.protected[: attack.max_queries]), target)
        curve.append({"what": label, "epochs": epochs, "num_images": num_images} | scores)

    reporter = Reporter(folder, display, device)
    num_workers = reporter.world
    network, history = _fit(attack, reporter, 1.0, None)
    attack.load(network)
    if is_rank_zero():
        save_tensors(folder, "network.safetensors", network)
    if not plan.suite.curve:
        return history, curve
    for label, epochs, share in CURVE:
        num_images = max(2, num_workers, round(share * total)) if share < 1 else None
        if epochs < 1 and round(epochs * attack.options.train.epochs) in (0, attack.options.train.epochs):
            continue  # one epoch has no half, so the effect of more epochs stays unknown
        reporter = Reporter(folder.folder(label.replace(" ", "_")), display, device)
        smaller, rows = _fit(attack, reporter, epochs, num_images)
        if is_rank_zero():
            add_point(smaller, label, len(rows), num_images or total)
    if is_rank_zero():
        add_point(network, "everything", len(history), total)
    return history, curve


def _fit(
    attack: TrainedAttack, reporter: Reporter, epochs: float, num_images: int | None
) -> tuple[StateDict, list[EpochMetrics]]:
    task = attack.task(epochs, num_images)
    run_on_all_ranks(lambda: task.share(reporter.rank, reporter.world))  # refuses fewer images than workers
    result = Trainer(task, reporter).train()
    return attack.state(result.trainee), result.history


def _score(estimates: Tensor, target: Target) -> dict[str, float]:
    """Mean scores of reconstructions, for a point of a curve."""
    scores = score_images(match_shape(estimates, target.access.shape), target)
    means = {key: {"mean": round(float(values.double().mean()), 5)} for key, values in scores.items()}
    return {"reidentification_rate": reidentification_rate(means)} | {
        key: means[key]["mean"] for key in ("ssim", "ssim_invariant", "psnr", "reidentified")
    }


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
                    PLAIN_CLASSIFIERS[name](plan, target, display.of(name))
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
    rate = reidentification_rate(result["scores"])
    return f"{rate:.1%} re-identified, SSIM {result['scores']['ssim']['mean']:.3f}"
