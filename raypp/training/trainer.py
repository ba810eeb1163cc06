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
from raypp.training.optim import autocast, build_optimizer, configure_torch, learning_rate
from raypp.training.reporter import Reporter
from raypp.training.task import EpochState, Phase, StepOutput, Task, TrainingOutcome
from raypp.training.threads import AdaptiveThreads
from raypp.utils.errors import DataError, NonRetryableError, TrainingError, TrainingInterrupted

PROGRESS_SECONDS = 0.25
CHECK_STEPS, CHECK_SECONDS = 50, 1.0  # longest interval between two syncs of the workers; each waits for the device


class Trainer:
    """Trains the phases of a task, one after the other; the reporter also holds rank, world size and device."""

    def __init__(self, task: Task, reporter: Reporter) -> None:
        self.task, self.reporter = task, reporter
        self.phases = task.phases
        self.history: list[EpochMetrics] = []
        self.newest = "none yet"
        self.last_progress = 0.0
        self.saved_at = time.monotonic()
        self.save_requested = False
        self.threads = AdaptiveThreads(enabled=False)
        self.steps_until_sync = 1

    def train(self) -> TrainingOutcome:
        """Train from the newest intact checkpoint, if there is one, to the end of the last phase."""
        configure_torch(self.task.train)
        with AdaptiveThreads(self.task.train.adapt_threads and self.reporter.device.type == "cpu") as self.threads:
            state = run_on_all_ranks(self.load_checkpoint)
            if state is not None:
                self.reporter.on_resume(self.history, self.newest)
            for index in range(state["phase"] if state is not None else 0, len(self.phases)):
                self.train_phase(index, state)
                state = None
        self.trainee.eval()
        return TrainingOutcome(self.trainee, self.history, self.best)

    def train_phase(self, index: int, state: dict[str, Any] | None) -> None:
        """Train a phase, after a checkpoint's state if there is one, and load the weights of its best epoch."""
        phase = self.phases[index]
        self.setup_phase(phase, state)
        first_epoch, part = (state["epoch"], state.get("part")) if state is not None else (0, None)
        partial = EpochState(**part) if part is not None else None
        for epoch in range(first_epoch, phase.epochs):
            metrics = self.train_epoch(index, epoch, partial)
            metrics |= self.task.validate(self.trainee, self.reporter.rank, self.reporter.world)
            self._update_best(metrics)
            name = checkpoint_name(len(self.history))
            with self._write_checkpoint(name, epoch + 1) as folder:
                self.reporter.report(self.history, name, folder)
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
        self.best: EpochMetrics = {}
        self.best_state: StateDict = {}
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
        self.start_epoch(phase_index, epoch, partial)
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

    def start_epoch(self, phase_index: int, epoch: int, partial: EpochState | None = None) -> None:
        """Reset the sums of an epoch, or continue those of a partial one, before its first step."""
        self.phase_index, self.epoch = phase_index, epoch
        self.trainee.train()
        device = self.reporter.device
        zero = torch.zeros(1, dtype=torch.float64)
        state = partial or EpochState(0, [], zero, 0, 0.0)
        if self.reporter.rank:  # a checkpoint holds the sums over all workers; rank 0 continues them
            state = EpochState(state.step, [], zero, 0, state.seconds)
        self.state = dataclasses.replace(state, sums=state.sums.to(device))
        self.bad_step = torch.tensor(-1, device=device)
        self.first_step, self.images_seen, self.lr, self.epoch_start = state.step, 0, 0.0, time.monotonic()

    def _elapsed(self) -> float:
        """Seconds since this process began or resumed the epoch."""
        return time.monotonic() - self.epoch_start

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Update the weights with one batch, and add its loss and metrics to the epoch's sums."""
        self.lr = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            output = self.forward(images, labels)
        output.loss.backward()
        self.optimizer.step()
        self.trainee.on_after_optimizer_step()
        for parameter in self.trainee.reinitialize():
            self.optimizer.state.pop(parameter, None)
        self.threads.update()
        loss, state, num_images = output.loss.detach(), self.state, len(labels)
        with torch.no_grad():
            means = torch.stack([loss, *output.metrics.values()]).double()
        state.names = ["loss", *output.metrics]
        state.sums = state.sums + num_images * means
        self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), step, self.bad_step)
        self.images_seen += num_images
        state.step, state.images = step + 1, state.images + num_images

    def _epoch_metrics(self) -> EpochMetrics:
        state, phase, seconds = self.state, self.phases[self.phase_index], self.state.seconds + self._elapsed()
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

        A checkpoint is due once it is old enough, or on the reporter's request.

        Raises:
            NonRetryableError: on every worker, if the loss is not finite on one of them.
        """
        max_seconds = self.task.train.checkpoint_seconds
        self.save_requested |= self.reporter.should_save()
        is_old = max_seconds is not None and time.monotonic() - self.saved_at >= max_seconds
        save = is_old or self.save_requested
        steps_per_s = (self.state.step - self.first_step) / self._elapsed()
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
        self.reporter.listener.step(
            {
                "phase": phase.name,
                "epoch": self.epoch + 1,
                "epochs": phase.epochs,
                "steps_done": self._global_step(state.step),
                "steps_total": self._epochs_before(len(self.phases)) * self.task.batches.num_batches,
                "phase_end": self._epochs_before(self.phase_index + 1) * self.task.batches.num_batches,
                "images_per_s": self.images_seen / self._elapsed() * self.reporter.world,
                **dict(zip(state.names, (state.sums / state.images).tolist(), strict=True)),
            }
        )

    def save_mid_epoch_checkpoint(self) -> None:
        """Store a checkpoint within an epoch, unless the last step left weights that are not finite."""
        sync_batch_norm_buffers(self.trainee)  # averaging once more at the epoch's end gives the same means
        if not all(bool(value.isfinite().all()) for value in self.trainee.trainable_state_dict().values()):
            return  # all workers have the same values; the next loss raises the error
        state = self.state
        total = EpochState(
            state.step,
            state.names,
            all_reduce_sum(state.sums.clone()),
            int(self._sum_over_workers(state.images)),
            state.seconds + self._elapsed(),
        )
        name = checkpoint_name(len(self.history), state.step / self.task.batches.num_batches)
        with self._write_checkpoint(name, self.epoch, total) as folder:
            self.reporter.save_mid_epoch(self.history, name, folder)

    @contextmanager
    def _write_checkpoint(self, name: str, epochs: int, partial: EpochState | None = None) -> Iterator[Path | None]:
        """Write a checkpoint to a temporary folder on rank 0, after ``epochs`` of the phase and part of the next."""
        if self.reporter.rank:
            yield None
        else:
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
        self.newest, self.saved_at, self.save_requested = name, time.monotonic(), False

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint and return its state; None if there is no checkpoint."""
        names = self.reporter.checkpoints()
        for name in names:
            try:
                with self.reporter.open(name) as folder:
                    state, history = checkpoint.load(folder)
            except TrainingError as error:
                if self.reporter.rank == 0:
                    self.reporter.listener.warn(f"{error}; going back to the one before")
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
            return state
        if names:
            raise TrainingError(f"all checkpoints of this run are damaged: {', '.join(names)}")
        return None

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
        return all_reduce_sum(torch.tensor(value, dtype=torch.float64, device=self.reporter.device)).item()
