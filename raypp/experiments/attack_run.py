"""The attack ladder: every attack of a suite against one victim, each resumable, and the scorecard that comes of them.

NAME/suite.yaml           what was asked for: victim, suite, where images come from
NAME/attacks/ATTACK/      of each attack: training checkpoints, network.safetensors, estimates.safetensors, result.json
NAME/judge/               the plain classifier that reads reconstructions, where one is trained for it
NAME/scorecard.json       everything measured; scores.csv has it image by image
NAME/examples.safetensors pictures for reports
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, TrainedAttack, match_shape
from raypp.attacks.suite import CURVE, HALF_EFFORT
from raypp.attacks.target import Target
from raypp.evaluation.scorecard import aggregate, reidentification_rate, score_images
from raypp.experiments.attack_export import export_to_bundle
from raypp.experiments.attack_plan import (
    REFERENCE_CLASSIFIER,
    AttackPlan,
    Outcome,
    load_result,
    load_target_of,
    open_attack_plan,
    topological_order,
)
from raypp.experiments.attack_scores import _json, scorecard
from raypp.experiments.reference_classifier import needs_reference_classifier, train_reference_classifier
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import is_rank_zero
from raypp.training.optim import configure_torch
from raypp.training.reporter import LocalReporter, Reporter
from raypp.training.trainer import Trainer, run_on_all_ranks
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.registry import MethodConfig
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage


def run_attack(plan: AttackPlan, name: str, display: ProgressListener, victim: Target | None = None) -> Outcome:
    """Run one attack to its end, from where it was stopped; store and return its result.

    In an initialised process group all processes call it: they train together, and the first does the rest.

    Args:
        victim: already loaded, or None.

    Raises:
        RayppError: the victim cannot be loaded or fails; an attack that does not apply to it is a result, not an error.
    """
    if (found := load_result(plan, name)) is not None:
        return found
    suite, folder = plan.suite, plan.folder(name)
    began = time.monotonic()
    victim = victim or load_target_of(plan)
    kind, options = ATTACKS.get(name), suite.options(name)
    about: Outcome = {
        "attack": name,
        "threat": kind.threat.name,
        "threat_meaning": kind.threat.meaning,
        "options": options.model_dump(mode="json"),
        "victim": victim.fingerprint,
    }
    try:
        attack: Attack = kind(options, _with_earlier(plan, kind, victim.access), seed=suite.seed)
        history: list[EpochMetrics] = []
        curve: list[dict[str, Any]] = []
        if isinstance(attack, TrainedAttack):
            history, curve = _train(attack, plan, name, victim, display)
        if not is_rank_zero():
            return about
        attack.prepare()
        num = min(len(victim.plain), attack.max_queries or len(victim.plain))
        torch.manual_seed(suite.seed)
        estimates = match_shape(attack.reconstruct(victim.protected[:num]), victim.access.shape).cpu()
        if attack.effort is not None and suite.curve:
            curve = _half_effort(attack, estimates, plan, victim)
    except AttackError as error:
        result = about | {"status": "does not apply", "note": str(error)}
        if is_rank_zero():
            folder.write("result.json", _json(result))
        return result
    from safetensors.torch import save

    folder.write("estimates.safetensors", save({"estimates": estimates.contiguous()}))
    summary = aggregate(score_images(estimates, victim), suite.seed)
    result = about | {
        "status": "done",
        "note": attack.note,
        "num_queries": num,
        "seconds": round(time.monotonic() - began, 1),
        "scores": summary,
        "history": history,
        "curve": curve,
    }
    folder.write("result.json", _json(result))
    return result


def _half_effort(attack: Attack, estimates: Tensor, plan: AttackPlan, victim: Target) -> list[dict[str, Any]]:
    """The curve of an attack that is no training: what it finds with half its effort, and with all of it."""
    assert attack.effort is not None
    full = attack.options
    attack.options = full.model_copy(update={attack.effort: max(1, getattr(full, attack.effort) // 2)})
    torch.manual_seed(plan.suite.seed)
    half = match_shape(attack.reconstruct(victim.protected[: len(estimates)]), victim.access.shape)
    attack.options = full
    points = ((HALF_EFFORT, half), ("everything", estimates))
    return [{"what": what} | _release_memory(images, victim) for what, images in points]


def _train(
    attack: TrainedAttack, plan: AttackPlan, name: str, victim: Target, display: ProgressListener
) -> tuple[list[EpochMetrics], list[dict[str, Any]]]:
    """Train the attack's network, and for its curve smaller ones; leaves the attack loaded with the full one."""
    folder, total = plan.folder(name), attack.num_images

    def make(storage: Storage) -> Reporter:
        return LocalReporter(storage, display, victim.access.device)

    sink = make(folder)
    num_workers = sink.world
    full, history = _fit(attack, sink, 1.0, None)
    attack.load(full)
    if is_rank_zero():
        _save_network(folder, full)
    curve = []
    if plan.suite.curve:
        for label, epochs, share in CURVE:
            num = max(2, num_workers, round(share * total)) if share < 1 else None
            if epochs < 1 and round(epochs * attack.epochs) in (0, attack.epochs):
                continue  # one epoch has no half: whether more of them would help stays unknown
            state, rows = _fit(attack, make(folder.folder(label.replace(" ", "_"))), epochs, num)
            if is_rank_zero():
                attack.load(state)
                point = {"what": label, "epochs": len(rows), "num_images": num or total}
                curve.append(point | _release_memory(attack.reconstruct(victim.protected), victim))
        if is_rank_zero():
            attack.load(full)
            curve.append(
                {"what": "everything", "epochs": len(history), "num_images": total}
                | _release_memory(attack.reconstruct(victim.protected), victim)
            )
    return history, curve


def _fit(
    attack: TrainedAttack, sink: Reporter, epochs: float, num_images: int | None
) -> tuple[StateDict, list[EpochMetrics]]:
    task = attack.task(epochs, num_images)
    run_on_all_ranks(lambda: task.share(sink.rank, sink.world))  # refuses fewer images than workers
    configure_torch(task.train)
    done = Trainer(task, sink).run()
    return attack.state(done.trainee), done.history


def _release_memory(estimates: Tensor, victim: Target) -> dict[str, float]:
    scores = score_images(match_shape(estimates, victim.access.shape), victim)
    means = {key: {"mean": round(float(values.double().mean()), 5)} for key, values in scores.items()}
    return {"reidentification_rate": reidentification_rate(means)} | {
        key: means[key]["mean"] for key in ("ssim", "ssim_invariant", "psnr", "reidentified")
    }


def _save_network(folder: Storage, state: StateDict) -> None:
    from safetensors.torch import save

    folder.write("network.safetensors", save({k: v.contiguous() for k, v in state.items()}))


def load_network(folder: Storage, options: MethodConfig, access: AttackerKnowledge) -> ImageMap:
    """An attack's trained network as a map from protected to plain images."""
    from safetensors.torch import load

    attack: TrainedAttack = ATTACKS.build(options, access)
    attack.load(load(folder.read("network.safetensors")))
    return attack.reconstruct


def _with_earlier(plan: AttackPlan, kind: type[Attack], access: AttackerKnowledge) -> AttackerKnowledge:
    from dataclasses import replace

    networks = {}
    for name in kind.after:
        if any(o.name == name for o in plan.suite.attacks) and plan.folder(name).exists("network.safetensors"):
            networks[name] = load_network(plan.folder(name), plan.suite.options(name), access)
    return replace(access, earlier=networks) if networks else access


def run_attacks_locally(
    plan: AttackPlan, missing: Sequence[str], display: MultiProgressDisplay, ended: Callable[[str, Outcome], None]
) -> None:
    """Run attacks in this process, one after the other; ``ended`` is told of each ``{"result"}`` or ``{"error"}``.

    Raises:
        ToldToStop: by ``display`` or SIGTERM, after a checkpoint.
    """
    victim = load_target_of(plan)
    with stop_on_signal(display.stop, signal.SIGTERM):
        for name in missing:
            display.raise_if_stop_requested()
            try:
                if name == REFERENCE_CLASSIFIER:
                    train_reference_classifier(plan, victim, display.of(REFERENCE_CLASSIFIER))
                    outcome: Outcome = {"result": {}}
                else:
                    outcome = {"result": run_attack(plan, name, display.of(name), victim)}
            except RayppError as error:
                outcome = {"error": str(error)}
            except Exception as error:  # one attack's defect is not the others'; Ray's tasks do likewise
                outcome = {"error": f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"}
            ended(name, outcome)


def run_attack_suite(
    plan: AttackPlan,
    *,
    resume: bool = False,
    quiet: bool = False,
    announce: Callable[[AttackPlan], None] = lambda _: None,
    run: Callable[
        [AttackPlan, Sequence[str], MultiProgressDisplay, Callable[[str, Outcome], None]], None
    ] = run_attacks_locally,
) -> dict[str, Any]:
    """Run what is missing of a plan and write its scorecard; returns the scorecard.

    Args:
        announce: called when victim and folder have turned out to be right, before the first attack.
        run: runs attacks and tells of each how it ended: :func:`run_locally`, or Ray's.

    Raises:
        RayppError: the victim, the suite or the folder is not allowed; an attack that fails does not stop the others.
    """
    with open_attack_plan(plan, resume=resume) as (plan, victim):
        announce(plan)
        failures: dict[str, str] = {}
        names = topological_order(plan)
        jobs = [name for name in names if load_result(plan, name) is None]
        if needs_reference_classifier(plan, victim):
            jobs.append(REFERENCE_CLASSIFIER)
        with MultiProgressDisplay(len(jobs), quiet=quiet, what="attacks") as display:

            def ended(name: str, outcome: Outcome) -> None:
                if "error" in outcome:
                    failures[name] = outcome["error"]
                    display.done(name, f"failed: {outcome['error']}")
                else:
                    display.done(name, _outcome_line(outcome["result"]))

            if jobs:
                run(plan, jobs, display, ended)
        card = scorecard(plan, victim, failures)
        if plan.spec.bundle is not None and not failures.keys() - {REFERENCE_CLASSIFIER}:
            export_to_bundle(plan, card, quiet)
        return card


def _outcome_line(result: Outcome) -> str:
    if not result:
        return "trained"
    if result["status"] != "done":
        return str(result["note"] or result["status"])
    return f"{reidentification_rate(result['scores']):.1%} found, SSIM {result['scores']['ssim']['mean']:.3f}"
