"""Training on Ray Train: N workers, which resume from the newest valid checkpoint after a failure."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raypp.cluster import ray_logs
from raypp.cluster.progress_actor import create_progress_actor, polling, shutdown_grace_period
from raypp.cluster.session import check_resources, ray_session, uses_gpu
from raypp.cluster.tasks import Outcome, outcome_of
from raypp.cluster.train_reporter import SCORE, RayTrainReporter, TrainWorkerProgress, watches_preemption
from raypp.cluster.waiting import ResourceNotice, SubmittedParts
from raypp.config.schema import Cluster, Config
from raypp.config.validation import validate
from raypp.data.streaming import StreamLoader, build_execution_options, open_stream, validation_set
from raypp.data.validation_set import Batch
from raypp.experiments.training_run import Run, finalize_run, stored_key
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import NUM_KEPT, RAY_SNAPSHOT, list_checkpoints
from raypp.training.distributed import run_on_all_ranks
from raypp.training.protection_task import TrainingData, build_pre_transform, check_image_sizes, fit
from raypp.training.reporter import Reporter
from raypp.utils.errors import NonRetryableError, TrainingError, TrainingInterrupted, last_line, reported_error
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressListener
from raypp.utils.signals import on_signal, stop_on_signal
from raypp.utils.storage import Storage

MAX_WORKERS = 8  # by default; with more, each has too few images of a batch of 128
DATA_CPUS = 1  # that workers must leave free for the tasks which read a stream


def train_on_ray(run: Run, display: ProgressListener) -> dict[str, Any]:
    """Train ``run`` on Ray Train and return its summary.

    Raises:
        RayppError: a worker reports an error of data or configuration, or training cannot continue.
        TrainingInterrupted: by ``display`` or SIGTERM, after a checkpoint.
    """
    config = run.config
    cluster = config.cluster
    if config.data.stream and config.data.image_size is not None:
        check_image_sizes(config, *config.data.image_size)
    with ray_session() as resources:
        num_workers, use_gpu = _choose_scale(config, resources)
        min_workers = cluster.min_workers or num_workers
        num_cpus = min_workers * cluster.cpus_per_worker + DATA_CPUS * config.data.stream
        num_gpus = min_workers * use_gpu
        part = f"training on {min_workers} worker{'s' if min_workers > 1 else ''}"
        check_resources(f"{part} needs", num_cpus, num_gpus, resources, display)
        actor, parts = create_progress_actor(), SubmittedParts("")
        required = {"CPU": num_cpus, "GPU": num_gpus}
        notice = ResourceNotice(part, required, cluster.notice_seconds, parts.all_wait, display.warn)
        train, val = {}, None
        options = build_execution_options(config, num_workers)
        if config.data.stream:
            stream = open_stream(config)
            train["train"] = stream.train
            note = partial(display.note, "reading validation images")
            val = ray.put(validation_set(stream, run.storage, options, note))
        _drop_unreadable_snapshot(run.storage)
        trainer = TorchTrainer(
            _train_loop_per_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"), "run": run.storage.uri, "phi": run.phi,
                "warnings": run.warnings, "actor": actor, "val": val, "watch": watches_preemption(),
            },
            datasets=train,
            dataset_config=ray.train.DataConfig(datasets_to_split=["train"], execution_options=options),
            **build_trainer_configs(cluster, num_workers, use_gpu, run.storage),
        )  # fmt: skip
        display.note("starting workers")
        with polling(actor, lambda _: display, parts, notice):
            summary: dict[str, Any] = run_trainer(trainer, cluster.max_failures, run.storage, actor)
    return summary


def _drop_unreadable_snapshot(run: Storage) -> None:
    """Delete Ray's list of checkpoints if Ray could not continue from it; the checkpoints themselves are enough.

    A driver may die while it writes the list, and training without Ray deletes checkpoints that are in it.
    """
    if run.exists(RAY_SNAPSHOT):
        try:
            ray.train.Result.from_path(run.uri)
        except Exception:  # of several kinds, which Ray does not document
            run.remove(RAY_SNAPSHOT)


def build_trainer_configs(cluster: Cluster, num_workers: int, use_gpu: bool, run: Storage) -> dict[str, Any]:
    """Arguments of a ``TorchTrainer`` whose results are in the folder ``run``.

    Ray keeps the newest two checkpoints and the best one, see :func:`raypp.training.checkpoint.retention_score`.
    """
    return {
        "torch_config": TorchConfig(backend="nccl" if use_gpu else "gloo"),
        "scaling_config": build_scaling_config(cluster, num_workers, use_gpu),
        "run_config": RunConfig(
            name=run.name,
            storage_path=run.parent.uri,
            checkpoint_config=CheckpointConfig(num_to_keep=NUM_KEPT + 1, checkpoint_score_attribute=SCORE),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level=ray_logs.train_level()),
        ),
    }


def build_scaling_config(cluster: Cluster, num_workers: int, use_gpu: bool) -> ScalingConfig:
    """Ray Train's workers; its default strategy, PACK, uses as few nodes as possible."""
    return ScalingConfig(
        num_workers=num_workers if cluster.min_workers is None else (cluster.min_workers, num_workers),
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker},
    )


def _train_loop_per_worker(arguments: dict[str, Any]) -> Outcome:
    config = validate(arguments["config"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    storage = Storage(arguments["run"])
    progress = TrainWorkerProgress(arguments["actor"], run=storage.name, watch=arguments["watch"])
    reporter = RayTrainReporter(storage, progress)
    if reporter.rank == 0:
        progress.started()
    phi: StateDict | None = arguments["phi"]

    def train() -> dict[str, Any]:
        key = stored_key(storage)
        load = (lambda: _load_stream(config, ray.get(arguments["val"]), reporter, key)) if config.data.stream else None
        result = fit(config, reporter, phi, key, load)
        run = Run(storage, config, phi, key, arguments["warnings"])
        return run_on_all_ranks(lambda: finalize_run(run, result, reporter.device) if reporter.rank == 0 else {})

    return outcome_of(train, NonRetryableError)


def _load_stream(config: Config, val: Batch, reporter: Reporter, key: Key | None) -> TrainingData:
    loader = StreamLoader(config, val, reporter.device, reporter.rank, reporter.world, build_pre_transform(config, key))
    return TrainingData(loader, loader.val, loader.classes, loader.num_train, loader.fingerprint)


def run_trainer(trainer: TorchTrainer, max_failures: int, run: Storage, actor: Any) -> Any:
    """Run a trainer with checkpoints in the folder ``run``, and return the result of its first worker.

    Raises:
        NonRetryableError: the worker returns an error.
        TrainingError: training cannot continue.
        TrainingInterrupted: the workers have stopped on request.
    """
    try:
        with _interruptible(actor):
            result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        text = "\n".join(map(str, error.worker_failures.values())) or str(error)
        # The cause may be nested: a task that reads the worker's data raises for a damaged image.
        lines = text.strip().splitlines() or [type(error).__name__]
        reason = reported_error(text) or TrainingError(lines[-1])
        raise TrainingError(
            f"training stopped after {max_failures} restarts: {reason}; newest checkpoint: "
            f"{(list_checkpoints(run) or ['none yet'])[0]}; --resume continues from it",
            exit_code=reason.exit_code,
        ) from error
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"Ray Train gave up: {last_line(error)}") from error
    outcome: Outcome = result.return_value
    if "error" in outcome:
        raise NonRetryableError(outcome["error"], exit_code=outcome["exit_code"])
    if "interrupted" in outcome:
        raise TrainingInterrupted(outcome["interrupted"])
    return outcome["result"]


@contextmanager
def _interruptible(actor: Any) -> Iterator[None]:
    """Handle signals while Ray Train runs.

    SIGTERM, which ``ray job stop`` sends, requests a stop: workers write a checkpoint and end. After the grace period,
    or on a second SIGTERM, the driver interrupts itself by SIGINT. Only then does Ray Train free the resources of an
    elastic run; after a kill they would stay reserved for three more minutes.

    Raises:
        KeyboardInterrupt: on SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():  # in a trial, whose driver handles the signals
        yield
        return
    stop, finished = threading.Event(), threading.Event()

    def stop_workers() -> None:
        stop.wait()
        if not finished.is_set():
            actor.request_stop.remote()
            if not finished.wait(shutdown_grace_period()):
                os.kill(os.getpid(), signal.SIGINT)

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=stop_workers, daemon=True).start()
    handler = signal.getsignal(signal.SIGINT)  # Ray Train replaces it
    try:
        with on_signal(interrupt, signal.SIGTERM), stop_on_signal(stop, signal.SIGTERM):
            yield
    except SystemExit as error:  # raised by Ray Train's handler of SIGINT
        raise KeyboardInterrupt from error
    finally:
        finished.set()
        stop.set()
        signal.signal(signal.SIGINT, handler)


def _choose_scale(config: Config, resources: dict[str, float]) -> tuple[int, bool]:
    """Number of workers, and whether each uses a GPU, from the configuration or the cluster's resources."""
    cluster, gpus = config.cluster, int(resources.get("GPU", 0))
    if cluster.num_workers is not None:
        has_gpus = gpus >= (cluster.min_workers or cluster.num_workers)
        return cluster.num_workers, has_gpus if cluster.gpu is None else cluster.gpu
    use_gpu = uses_gpu(cluster, resources)
    cpus = resources.get("CPU", 1) - DATA_CPUS * config.data.stream
    slots = gpus if use_gpu else int(cpus / cluster.cpus_per_worker)
    batch_size = config.train.batch_size
    max_workers = min(MAX_WORKERS, max(slots, 1), batch_size // 2)
    return max(num for num in range(1, max_workers + 1) if batch_size % num == 0), use_gpu
