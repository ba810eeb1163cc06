"""The attack ladder on a cluster: a task per attack, as many at a time as there are CPUs or GPUs for.

Where ``cluster.num_workers`` asks for more than one, attacks that train networks do so on that many workers together,
one attack after the other, before the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raypp.attacks import ATTACKS
from raypp.attacks.base import TrainedAttack
from raypp.cluster.progress_actor import Events, Steps, create_progress_actor, polling
from raypp.cluster.session import ray_session
from raypp.cluster.tasks import Outcome, RemoteProgress, run_tasks, task_resources
from raypp.cluster.train import build_scaling_config, run_trainer
from raypp.experiments.attack_plan import (
    REFERENCE_CLASSIFIER,
    AttackPlan,
    dependencies,
    load_target_of,
    restore_attack_plan,
)
from raypp.experiments.attack_run import run_attack
from raypp.experiments.reference_classifier import train_reference_classifier
from raypp.utils.errors import NonRetryableError, RayppError, TrainingInterrupted
from raypp.utils.progress import MultiProgressDisplay, ProgressListener


def run_on_ray(
    plan: AttackPlan, missing: Sequence[str], display: MultiProgressDisplay, ended: Callable[[str, Outcome], None]
) -> None:
    """Run attacks; ``ended`` is told of each ``{"result": ...}`` or ``{"error": sentence}``.

    A task whose worker dies is started again and resumes its training from the newest checkpoint.

    Raises:
        ConfigError: no attack fits into a cluster that cannot grow.
        ToldToStop: by ``display`` or SIGTERM, once the attacks under way have written checkpoints.
    """
    dumped = plan.dump()
    together = [name for name in missing if (plan.suite.cluster.num_workers or 1) > 1 and _trains(name)]
    alone = [name for name in missing if name not in together]
    with ray_session() as have:
        for name in together:
            ended(name, _run_together(plan, name, have, display))
        if alone:
            after = {name: dependencies(plan, name) for name in alone if name != REFERENCE_CLASSIFIER}
            work = {name: (dumped, name) for name in alone}
            run_tasks(_run, work, plan.suite.cluster, display, ended, what="an attack", after=after)


def _trains(name: str) -> bool:
    return name != REFERENCE_CLASSIFIER and issubclass(ATTACKS.get(name), TrainedAttack)


def _run(dumped: dict[str, Any], name: str, display: ProgressListener) -> dict[str, Any]:
    plan = restore_attack_plan(dumped)
    if name == REFERENCE_CLASSIFIER:
        train_reference_classifier(plan, load_target_of(plan), display)
        return {}
    return run_attack(plan, name, display)


def _run_together(plan: AttackPlan, name: str, have: dict[str, float], display: MultiProgressDisplay) -> Outcome:
    """Run one attack whose network trains on ``cluster.num_workers`` workers."""
    cluster, folder = plan.suite.cluster, plan.folder(name)
    num = cluster.num_workers or 1
    use_gpu = task_resources(cluster, have, f"attack {name}", display, cluster.min_workers or num)["num_gpus"] > 0
    board = create_progress_actor()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "plan": plan.dump(), "name": name, "board": board, "threads": max(1, int(cluster.cpus_per_worker)),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=build_scaling_config(cluster, num, use_gpu),
        run_config=RunConfig(
            name="ray",
            storage_path=folder.uri,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )  # fmt: skip

    def show(steps: Steps, events: Events) -> None:
        for step in steps.values():
            display.step(name, step)
        for _, _, message in events:
            display.warn(name, message)

    try:
        with polling(board, show):
            outcome = run_trainer(trainer, cluster.max_failures, folder, board)
    except RayppError as error:
        return {"error": str(error)}
    if "told" in outcome:
        raise TrainingInterrupted(outcome["told"])
    return outcome


def _worker(arguments: dict[str, Any]) -> Outcome:
    """What runs on each worker. What stops all of them alike is returned, not raised: a restart would meet it again."""
    torch.set_num_threads(arguments["threads"])
    display = RemoteProgress(arguments["board"], arguments["name"])
    try:
        return {"result": run_attack(restore_attack_plan(arguments["plan"]), arguments["name"], display)}
    except NonRetryableError as error:
        return {"error": str(error)}
    except TrainingInterrupted as told:
        return {"told": str(told)}
