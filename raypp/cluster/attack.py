"""The attack suite on a cluster: each attack is a task.

If ``cluster.num_workers`` is above one, attacks that train networks run first, one at a time, on that many workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.train.torch import TorchTrainer

from raypp.attacks import ATTACKS
from raypp.attacks.trained import TrainedAttack
from raypp.cluster.progress_actor import create_progress_actor, polling
from raypp.cluster.session import check_resources, ray_session, uses_gpu
from raypp.cluster.tasks import Outcome, outcome_of, run_tasks
from raypp.cluster.train import build_trainer_configs, run_trainer
from raypp.cluster.train_reporter import TrainWorkerProgress, watches_preemption
from raypp.cluster.waiting import ResourceNotice, SubmittedParts
from raypp.experiments.attack_plan import AttackPlan, dependencies, load_target_of, restore_attack_plan
from raypp.experiments.attack_run import run_attack
from raypp.experiments.client_classifier import PLAIN_CLASSIFIERS, train_plain_classifier
from raypp.training.distributed import is_rank_zero
from raypp.utils.errors import NonRetryableError, RayppError
from raypp.utils.progress import MultiProgressDisplay, ProgressListener


def run_on_ray(
    plan: AttackPlan, missing: Sequence[str], display: MultiProgressDisplay, on_done: Callable[[str, Outcome], None]
) -> None:
    """Run attacks; one whose worker dies resumes its training from the newest checkpoint.

    Args:
        missing: names of the attacks to run.
        on_done: called with each name and its ``{"result": ...}`` or ``{"error": sentence}``.

    Raises:
        ConfigError: no attack fits into a cluster that cannot grow.
        TrainingInterrupted: by ``display`` or SIGTERM, after checkpoints of the running attacks.
    """
    dumped = plan.dump()
    distributed = [name for name in missing if (plan.suite.cluster.num_workers or 1) > 1 and _trains(name)]
    single = [name for name in missing if name not in distributed]
    with ray_session() as resources:
        for name in distributed:
            on_done(name, _run_distributed(plan, name, resources, display))
        if single:
            after = {name: dependencies(plan, name) for name in single if name not in PLAIN_CLASSIFIERS}
            work = {name: (dumped, name) for name in single}
            run_tasks(_run, work, plan.suite.cluster, plan.storage, display, on_done, what="an attack", after=after)


def _trains(name: str) -> bool:
    return name not in PLAIN_CLASSIFIERS and issubclass(ATTACKS.get(name), TrainedAttack)


def _run(dumped: dict[str, Any], name: str, display: ProgressListener) -> dict[str, Any]:
    plan = restore_attack_plan(dumped)
    if name in PLAIN_CLASSIFIERS:
        train_plain_classifier(plan, load_target_of(plan), name, display)
        return {}
    return run_attack(plan, name, display)


def _run_distributed(
    plan: AttackPlan, name: str, resources: dict[str, float], display: MultiProgressDisplay
) -> Outcome:
    """Run one attack whose network trains on ``cluster.num_workers`` workers."""
    cluster, folder = plan.suite.cluster, plan.folder(name)
    num_workers, use_gpu = cluster.num_workers or 1, uses_gpu(cluster, resources)
    min_workers = cluster.min_workers or num_workers
    num_cpus, num_gpus = min_workers * cluster.cpus_per_worker, min_workers * use_gpu
    listener = display.of("cluster")
    check_resources(f"attack {name} needs", num_cpus, num_gpus, resources, listener)
    actor, parts = create_progress_actor(), SubmittedParts(name)
    required = {"CPU": num_cpus, "GPU": num_gpus}
    notice = ResourceNotice(f"attack {name}", required, cluster.notice_seconds, parts.all_wait, listener.warn)
    trainer = TorchTrainer(
        _train_loop_per_worker,
        train_loop_config={"plan": plan.dump(), "name": name, "actor": actor, "watch": watches_preemption()},
        **build_trainer_configs(cluster, num_workers, use_gpu, folder.folder("ray")),
    )
    try:
        with polling(actor, display.of, parts, notice):
            return {"result": run_trainer(trainer, cluster.max_failures, folder, actor)}
    except RayppError as error:
        return {"error": str(error)}


def _train_loop_per_worker(arguments: dict[str, Any]) -> Outcome:
    plan, name = restore_attack_plan(arguments["plan"]), arguments["name"]
    torch.set_num_threads(max(1, int(plan.suite.cluster.cpus_per_worker)))
    display = TrainWorkerProgress(arguments["actor"], name, watch=arguments["watch"])
    if is_rank_zero():
        display.started()
    return outcome_of(lambda: run_attack(plan, name, display), NonRetryableError)
