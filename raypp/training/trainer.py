"""The training loop for protections and attack networks, on one worker or many, with or without Ray.

A :class:`Task` defines the training; a :class:`Reporter` stores checkpoints and shows progress.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raypp.data.loader import make_generator
from raypp.models.perceptual import StateDict
from raypp.training import checkpoint
from raypp.training.checkpoint import EpochMetrics, checkpoint_name
from raypp.training.distributed import (
    all_gather_objects,
    all_reduce_sum,
    convert_sync_batchnorm,
    is_distributed,
    run_on_all_ranks,
    sync_batch_norm_buffers,
)
from raypp.training.optim import autocast, build_optimizer, learning_rate
from raypp.training.reporter import Reporter
from raypp.training.task import EpochState, Phase, StepOutput, Task, TrainingOutcome
from raypp.training.threads import AdaptiveThreads
from raypp.utils.errors import DataError, NonRetryableError, TrainingError, TrainingInterrupted

PROGRESS_SECONDS = 0.25
CHECK_STEPS, CHECK_SECONDS = 50, 1.0  # longest interval between two syncs of the workers; each waits for the device


class Trainer:
    """Trains the phases of a task, one after the other.

    Args:
        task: the networks, batches, settings and validation.
        reporter: where checkpoints and metrics go; it also holds rank, world size and device.
    """

    def __init__(self, task: Task, reporter: Reporter) -> None:
        self.task, self.reporter = task, reporter
        self.phases = task.phases
        self.history: list[EpochMetrics] = []
        self.best_state: StateDict = {}
        self.best: EpochMetrics = {}
        self.newest = "none yet"
        self.last_progress = 0.0
        self.saved_at = time.monotonic()
        self.threads = AdaptiveThreads(enabled=False)
        self.steps_until_sync = 1

    def train(self) -> TrainingOutcome:
        """Train from the newest intact checkpoint, if there is one, to the end of the last phase."""
        with AdaptiveThreads(self.task.train.adapt_threads and self.reporter.device.type == "cpu") as self.threads:
            first_phase, first_epoch, state = run_on_all_ranks(self.load_checkpoint)
            for index in range(first_phase, len(self.phases)):
                self.train_phase(index, first_epoch, state)
                first_epoch, state = 0, None
        self.trainee.eval()
        return TrainingOutcome(self.trainee, self.history, self.best)

    def train_phase(self, index: int, first_epoch: int, state: dict[str, Any] | None) -> None:
        """Train a phase from ``first_epoch`` on, and load the weights of its best epoch at the end."""
        phase = self.phases[index]
        self.setup_phase(phase, state)
        part = (state or {}).get("part")
        partial = EpochState(**part) if part is not None else None
        for epoch in range(first_epoch, phase.epochs):
            metrics = self.train_epoch(index, epoch, partial)
            metrics |= self.task.validate(self.trainee, self.reporter.rank, self.reporter.world)
            self._update_best(metrics)
            self.save_checkpoint()
            if epoch + 1 < phase.epochs or index + 1 < len(self.phases):
                self.raise_if_stop_requested(any(all_gather_objects(self.reporter.should_stop())))
            partial = None
        self.trainee.load_trainable_state_dict(self.best_state)
        self.task.on_phase_end(phase, self.trainee)

    def setup_phase(self, phase: Phase, state: dict[str, Any] | None = None) -> None:
        """Build a phase's networks and optimizer, and load their state from a checkpoint."""
        train, device = self.task.train, self.reporter.device
        self.trainee = self.task.build(phase).to(device)
        if train.sync_batchnorm:
            convert_sync_batchnorm(self.trainee)
        if train.channels_last:
            self.trainee.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(train.optimizer, self.trainee.param_groups())
        self.best, self.best_state = {}, {}
        if state is not None:
            self.trainee.load_trainable_state_dict(state["system"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best, self.best_state = state["best"], state["best_state"]
        self.autocast = autocast(train, device)
        self.forward: Callable[..., StepOutput] = self.trainee
        if is_distributed():
            # Running statistics are averaged once an epoch instead: training never reads them.
            self.forward = DistributedDataParallel(
                self.trainee, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )
        if train.compile:
            self.forward = torch.compile(self.forward)

    def train_epoch(self, phase_index: int, epoch: int, partial: EpochState | None = None) -> EpochMetrics:
        """Train one epoch, or the rest of a partial one; return its metrics, averaged over all workers' images.

        Raises:
            TrainingInterrupted: on every worker, after a checkpoint.
        """
        self.phase_index, self.epoch = phase_index, epoch
        self.trainee.train()
        self._start_epoch(partial)
        loader, first_step = self.task.batches, self.first_step
        epochs_done = self._epochs_before(phase_index) + epoch
        for step, (images, labels) in enumerate(loader.epoch(epochs_done, first_step), first_step):
            # Random operations, such as dropout, repeat after a resume and differ between workers.
            torch.manual_seed(make_generator(self.task.seed, epochs_done, step, self.reporter.rank, 0).initial_seed())
            self.train_step(step, images, labels)
            self.steps_until_sync -= 1
            if self.steps_until_sync <= 0:
                save, stop = self.sync_workers()
                if (save or stop) and self.state.step < loader.num_batches:
                    self.save_mid_epoch_checkpoint()
                    self.raise_if_stop_requested(stop)
            self.log_progress()
        if not self.images_seen:
            raise TrainingError("a worker's share of the training images is less than one batch; see train.batch_size")
        self.sync_workers()
        sync_batch_norm_buffers(self.trainee)
        return self._epoch_metrics()

    def _start_epoch(self, partial: EpochState | None) -> None:
        device = self.reporter.device
        self.state = EpochState(0, [], torch.zeros(1, dtype=torch.float64, device=device), 0, 0.0)
        if partial is not None:
            self.state.step, self.state.seconds = partial.step, partial.seconds
            if self.reporter.rank == 0:  # the checkpoint holds the sums over all workers; rank 0 continues them
                self.state.names, self.state.images = partial.names, partial.images
                self.state.sums = partial.sums.to(device)
        self.bad_step = torch.tensor(-1, device=device)
        self.first_step, self.seconds_before = self.state.step, self.state.seconds
        self.images_seen, self.lr, self.epoch_start = 0, 0.0, time.monotonic()

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Update the weights with one batch, and add its loss and metrics to the epoch's sums."""
        self.lr = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            output = self.forward(images, labels)
        output.loss.backward()
        self.optimizer.step()
        self.trainee.on_after_optimizer_step()
        self.threads.update()
        self._add_to_epoch(step, output, len(labels))

    @torch.no_grad()
    def _add_to_epoch(self, step: int, output: StepOutput, num_images: int) -> None:
        loss, state = output.loss.detach(), self.state
        means = torch.stack([loss, *(metric.detach() for metric in output.metrics.values())]).double()
        state.names = ["loss", *output.metrics]
        state.sums = state.sums + num_images * means
        self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), step, self.bad_step)
        self.images_seen += num_images
        state.step, state.images = step + 1, state.images + num_images
        state.seconds = self._epoch_seconds()

    def _epoch_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.epoch_start

    def _epoch_metrics(self) -> EpochMetrics:
        state, phase, seconds = self.state, self.phases[self.phase_index], self._epoch_seconds()
        num_images = self._sum_over_workers(state.images)
        means = (all_reduce_sum(state.sums) / num_images).tolist()
        return {
            "phase": phase.name,
            "epoch": self.epoch + 1,
            "epochs": phase.epochs,
            "step": self._global_step(self.task.batches.num_batches),
            "lr": self.lr,
            **{f"train_{name}": mean for name, mean in zip(state.names, means, strict=True)},
            "images_per_s": num_images / seconds,
            "seconds": round(seconds, 3),
            "world": self.reporter.world,
        }

    def _update_best(self, metrics: EpochMetrics) -> None:
        """Add an epoch to the history, and keep its weights if its validation loss is the lowest so far."""
        loss, lowest = metrics.get("val_loss"), self.best.get("val_loss")
        if loss is not None and not math.isfinite(loss):
            raise self._divergence_error(metrics["step"], metrics["lr"])
        metrics["best"] = loss is None or lowest is None or loss <= lowest  # a tie takes the later, as the authors do
        self.history.append(metrics)
        if metrics["best"]:
            self.best = metrics
            self.best_state = {k: v.detach().cpu().clone() for k, v in self.trainee.trainable_state_dict().items()}

    def sync_workers(self) -> tuple[bool, bool]:
        """Gather all workers' status, set the steps until the next sync, and return whether to save and to stop.

        Raises:
            NonRetryableError: on every worker, if the loss is not finite on one of them.
        """
        max_seconds = self.task.train.checkpoint_seconds
        save = max_seconds is not None and time.monotonic() - self.saved_at >= max_seconds
        steps_per_s = (self.state.step - self.first_step) / (self.state.seconds - self.seconds_before)
        steps = max(1, min(CHECK_STEPS, int(CHECK_SECONDS * steps_per_s)))
        statuses = all_gather_objects((int(self.bad_step), self.reporter.should_stop(), save, steps))
        bad_step = next((step for step, *_ in statuses if step >= 0), None)
        if bad_step is not None:
            raise self._divergence_error(self._global_step(bad_step), self._learning_rate(bad_step))
        _, _, save, self.steps_until_sync = statuses[0]  # the first worker's clock decides for all
        return save, any(stop for _, stop, *_ in statuses)

    def raise_if_stop_requested(self, stop: bool) -> None:
        if stop:
            raise TrainingInterrupted(f"training stopped after checkpoint {self.newest}; continue with --resume")

    def _divergence_error(self, step: int, lr: float) -> NonRetryableError:
        return NonRetryableError(
            f"the loss is not a finite number at step {step} with learning rate {lr:.4g}; last good checkpoint: "
            f"{self.newest}; try a smaller {self.task.divergence_hint}"
        )

    def log_progress(self) -> None:
        """Report the state of the epoch on rank 0, at most every PROGRESS_SECONDS."""
        now = time.monotonic()
        if self.reporter.rank or now - self.last_progress < PROGRESS_SECONDS:
            return
        self.last_progress = now
        state, phase = self.state, self.phases[self.phase_index]
        self.reporter.progress(
            {
                "phase": phase.name,
                "epoch": self.epoch + 1,
                "epochs": phase.epochs,
                "steps_done": self._global_step(state.step),
                "steps_total": self._epochs_before(len(self.phases)) * self.task.batches.num_batches,
                "images_per_s": self.images_seen / (state.seconds - self.seconds_before) * self.reporter.world,
                **dict(zip(state.names, (state.sums / state.images).tolist(), strict=True)),
            }
        )

    def save_checkpoint(self) -> None:
        """Store a finished epoch with a checkpoint."""
        name = checkpoint_name(len(self.history))
        if self.reporter.rank:
            self.reporter.report(self.history, name, None)
        else:
            with self._write_checkpoint(self.epoch + 1) as folder:
                self.reporter.report(self.history, name, folder)
        self.newest, self.saved_at = name, time.monotonic()

    def save_mid_epoch_checkpoint(self) -> None:
        """Store a checkpoint within an epoch, unless the last step left weights that are not finite."""
        sync_batch_norm_buffers(self.trainee)  # averaging once more at the epoch's end gives the same means
        if not all(bool(value.isfinite().all()) for value in self.trainee.trainable_state_dict().values()):
            return  # all workers have the same values; the next loss raises the error
        name = checkpoint_name(len(self.history), self.state.step / self.task.batches.num_batches)
        images = int(self._sum_over_workers(self.state.images))
        total = dataclasses.replace(self.state, sums=all_reduce_sum(self.state.sums.clone()), images=images)
        if self.reporter.rank == 0:
            with self._write_checkpoint(self.epoch, total) as folder:
                self.reporter.save_mid_epoch(name, folder)
        self.newest, self.saved_at = name, time.monotonic()

    @contextmanager
    def _write_checkpoint(self, epochs: int, partial: EpochState | None = None) -> Iterator[Path]:
        """Write a checkpoint to a temporary folder, after ``epochs`` of the phase and part of the next."""
        state = {
            "phase": self.phase_index,
            "epoch": epochs,
            "part": vars(partial) if partial is not None else None,
            "batches": self.task.batches.num_batches,
            "system": self.trainee.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_state": self.best_state,
            "task": self.task.state_dict(),
            "fingerprint": self.task.fingerprint,
        }
        with tempfile.TemporaryDirectory(prefix="raypp-") as folder:
            checkpoint.save(Path(folder), state, self.history)
            yield Path(folder)

    def load_checkpoint(self) -> tuple[int, int, dict[str, Any] | None]:
        """Load the newest intact checkpoint: phase index, epochs done in that phase, and state; 0, 0, None without."""
        names = self.reporter.checkpoints()
        for name in names:
            try:
                with self.reporter.open(name) as folder:
                    state, history = checkpoint.load(folder)
            except TrainingError as error:
                if self.reporter.rank == 0:
                    self.reporter.warn(f"{error}; going back to the one before")
                continue
            if state["fingerprint"] != self.task.fingerprint:
                raise DataError(
                    f"the training data is not what checkpoint {name} was trained on; "
                    "restore the data or start a run with another name"
                )
            self.history, self.newest = history, name
            self.task.load_state_dict(state["task"])
            partial, batches = state.get("part"), self.task.batches.num_batches
            if partial is not None and state["batches"] != batches:  # another number of workers splits otherwise
                partial["step"] = min(partial["step"] * batches // state["batches"], batches - 1)
            return state["phase"], state["epoch"], state
        if names:
            raise TrainingError(f"all checkpoints of this run are damaged: {', '.join(names)}")
        return 0, 0, None

    def _learning_rate(self, step: int) -> float:
        """The learning rate in the middle of a step of the current epoch."""
        progress = self.epoch + min((step + 0.5) / self.task.batches.num_batches, 1.0)
        return learning_rate(self.task.train, self.phases[self.phase_index].epochs, progress)

    def _global_step(self, step: int) -> int:
        """Steps done over all phases, with ``step`` of them in the current epoch."""
        return (self._epochs_before(self.phase_index) + self.epoch) * self.task.batches.num_batches + step

    def _epochs_before(self, phase_index: int) -> int:
        return sum(phase.epochs for phase in self.phases[:phase_index])

    def _sum_over_workers(self, value: int) -> float:
        return all_reduce_sum(torch.tensor(float(value), dtype=torch.float64, device=self.reporter.device)).item()
