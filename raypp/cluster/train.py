"""Training on Ray Train: one loop on each of N workers, from the last sound checkpoint after every failure."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from raypp.cluster.progress_actor import (
    Events,
    Steps,
    create_progress_actor,
    polling,
    shutdown_grace_period,
    stop_requested,
)
from raypp.cluster.session import insufficient_resources, ray_session, uses_gpu
from raypp.config.schema import Cluster, Config
from raypp.config.validation import validate
from raypp.data.streaming import Batch, StreamLoader, build_execution_options, collect_validation_set, datasets
from raypp.experiments.training_run import Run, finalize_run, stored_key
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import CHECKPOINTS, CheckpointStore, EpochMetrics, list_checkpoints
from raypp.training.distributed import first_error_message
from raypp.training.protection_task import TrainingData, build_pre_transform, check_image_sizes, fit
from raypp.utils import errors
from raypp.utils.errors import NonRetryableError, RayppError, TrainingError, TrainingInterrupted, last_line
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

MAX_WORKERS = 8  # of a run that does not say how many: a batch of 128 is not worth spreading further


class RayTrainReporter(CheckpointStore):
    """Reports to the run's folder, and the numbers to Ray Train.

    Ray Train would copy a checkpoint file by file into its place; here it appears whole, see :class:`Storage`.
    """

    def __init__(self, run: Storage, board: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        super().__init__(run)
        self._board = board

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        if self.rank == 0:
            self.keep(history, name, checkpoint)
            self._board.pin.remote("epoch", history[-1])
        ray.train.report(history[-1])

    def should_stop(self) -> bool:
        return self.rank == 0 and stop_requested(self._board)

    def progress(self, info: EpochMetrics) -> None:
        self._board.pin.remote("step", info)

    def warn(self, message: str) -> None:
        self._board.pin.remote("warning", message)


def train_on_ray(run: Run, display: ProgressDisplay) -> dict[str, Any]:
    """Train ``run`` on Ray Train and return its summary.

    Raises:
        RayppError: what a worker found wrong with data or configuration, or why training could not go on.
    """
    config = run.config
    cluster = config.cluster
    if config.data.stream and config.data.image_size is not None:
        check_image_sizes(config, *config.data.image_size)
    with ray_session() as have:
        num_workers, use_gpu = _scale(config, have)
        _check_resources(config, have, cluster.min_workers or num_workers, use_gpu, display)
        board = create_progress_actor()
        train, val = None, None
        if config.data.stream:
            display.note("reading validation images")
            train, val_rows = datasets(config)
            val = ray.put(collect_validation_set(val_rows))
        trainer = TorchTrainer(
            _train_loop_per_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "run": run.storage.uri,
                "phi": run.phi,
                "warnings": run.warnings,
                "board": board,
                "val": val,
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=build_scaling_config(cluster, num_workers, use_gpu),
            datasets={"train": train} if train is not None else None,
            dataset_config=ray.train.DataConfig(
                datasets_to_split=["train"], execution_options=build_execution_options()
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=run.storage.uri,
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        display.note("starting workers")
        with polling(board, _progress_of(display, board)):
            outcome = run_trainer(trainer, cluster.max_failures, run.storage, board)
    if "told" in outcome:
        raise TrainingInterrupted(outcome["told"])
    if "error" in outcome:
        raise NonRetryableError(outcome["error"], exit_code=outcome["exit_code"])
    found: dict[str, Any] = outcome["summary"]
    return found


def build_scaling_config(cluster: Cluster, num_workers: int, use_gpu: bool) -> ScalingConfig:
    """What Ray Train is asked for; its default strategy, PACK, keeps the workers on as few nodes as can be."""
    return ScalingConfig(
        num_workers=num_workers if cluster.min_workers is None else (cluster.min_workers, num_workers),
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker},
    )


def _train_loop_per_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What runs on each worker. What stops all workers alike is returned, not raised: a restart would meet it again."""
    config = validate(arguments["config"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    storage = Storage(arguments["run"])
    sink = RayTrainReporter(storage, arguments["board"])
    phi: StateDict | None = arguments["phi"]
    problem: dict[str, Any] | None = None
    found: dict[str, Any] = {}
    try:
        key = stored_key(storage)
        load = (lambda: _streamed(config, ray.get(arguments["val"]), sink, key)) if config.data.stream else None
        result = fit(config, sink, phi, key, load)
    except NonRetryableError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except TrainingInterrupted as told:
        return {"told": str(told)}
    if sink.rank == 0:
        try:
            found = finalize_run(Run(storage, config, phi, key, arguments["warnings"]), result, sink.device)
        except RayppError as error:
            problem = {"error": str(error), "exit_code": error.exit_code}
    return first_error_message(problem) or {"summary": found}


def _streamed(config: Config, val: Batch, sink: RayTrainReporter, key: Key | None) -> TrainingData:
    loader = StreamLoader(config, val, sink.device, sink.rank, sink.world, build_pre_transform(config, key))
    return TrainingData(loader, loader.val, loader.classes, loader.num_train, loader.fingerprint)


def run_trainer(trainer: TorchTrainer, max_failures: int, run: Storage, board: Any = None) -> dict[str, Any]:
    """Run a trainer, whose workers ask the board, if given, whether to stop; return what its first worker returned.

    Raises:
        TrainingError: why it could not go on, and the newest checkpoint in the folder ``run``.
    """
    try:
        with _interruptible(board):
            result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        text = "\n".join(map(str, error.worker_failures.values())) or str(error)
        # What a user can mend may lie deep: a damaged image is met in a task that feeds the worker.
        known = re.findall(r"raypp\.utils\.errors\.(\w+): (.+)", text)
        lines = text.strip().splitlines() or [type(error).__name__]
        kind, reason = known[-1] if known else (TrainingError.__name__, lines[-1])
        raise TrainingError(
            f"training stopped after {max_failures} restarts: {reason}; newest checkpoint: "
            f"{(list_checkpoints(run) or ['none yet'])[0]}; --resume goes on from it",
            exit_code=getattr(errors, kind).exit_code,
        ) from error
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"Ray Train gave up: {last_line(error)}") from error
    outcome: dict[str, Any] = result.return_value
    return outcome


@contextmanager
def _interruptible(board: Any) -> Iterator[None]:
    """On SIGTERM, which ``ray job stop`` sends, have workers that ask ``board`` write a checkpoint and end; on an
    interrupt, or where that takes too long, let Ray Train give back what it holds, and end with a KeyboardInterrupt.

    It does so on an interrupt only: what an elastic run has reserved would stay so for three more minutes after a kill,
    and who resumes it would wait that long.
    """
    if threading.current_thread() is not threading.main_thread():  # in a trial; signals are its driver's
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    told, over = threading.Event(), threading.Event()

    def stop() -> None:
        told.wait()
        if not over.is_set():
            board.stop.remote()
            if not over.wait(shutdown_grace_period()):
                os.kill(os.getpid(), signal.SIGINT)

    def hurry(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    def tell(*_: object) -> None:
        signal.signal(signal.SIGTERM, hurry)  # who asks twice is in one
        told.set()

    threading.Thread(target=stop, daemon=True).start()
    signal.signal(signal.SIGTERM, tell if board is not None else hurry)
    try:
        yield
    except SystemExit as stopped:  # how Ray Train's own handler of interrupts ends
        raise KeyboardInterrupt from stopped
    finally:
        over.set()
        told.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_resources(
    config: Config, have: dict[str, float], num_workers: int, use_gpu: bool, display: ProgressDisplay
) -> None:
    cpus = num_workers * config.cluster.cpus_per_worker + _cpus_beside(config)
    needed = {"CPU": cpus, "GPU": num_workers if use_gpu else 0}
    for kind, num in needed.items():
        if num > have.get(kind, 0):
            sentence = f"{num_workers} workers need {num:g} {kind}s in all, the cluster has {have.get(kind, 0):g}"
            display.warn(
                insufficient_resources(sentence, "cluster.num_workers, cluster.cpus_per_worker and cluster.gpu")
            )


def _cpus_beside(config: Config) -> int:
    """CPUs to leave beside the workers: without one, the tasks that feed them never run."""
    return 1 if config.data.stream else 0


def _scale(config: Config, have: dict[str, float]) -> tuple[int, bool]:
    """How many workers, and whether each gets a GPU, from the configuration or what the cluster has."""
    cluster, gpus = config.cluster, int(have.get("GPU", 0))
    if cluster.num_workers is not None:
        return cluster.num_workers, gpus >= (
            cluster.min_workers or cluster.num_workers
        ) if cluster.gpu is None else cluster.gpu
    use_gpu = uses_gpu(cluster, have)
    slots = gpus if use_gpu else int((have.get("CPU", 1) - _cpus_beside(config)) / cluster.cpus_per_worker)
    batch = config.train.batch_size
    most = min(MAX_WORKERS, max(slots, 1), batch // 2)
    return max(n for n in range(1, most + 1) if batch % n == 0), use_gpu


def _progress_of(display: ProgressDisplay, board: Any) -> Callable[[Steps, Events], None]:
    def show(steps: Steps, events: Events) -> None:
        if display.should_stop():  # within a search, whose driver hears the signals
            board.stop.remote()
        for _, kind, what in events:
            display.epoch(what) if kind == "epoch" else display.warn(what)
        for step in steps.values():
            display.step(step)

    return show
