"""The one training loop: for protections with their classifiers and for attack networks, on one worker or many, with or
without Ray. A :class:`Task` says what is trained; a sink says where it is reported.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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
    first_error_message,
    is_distributed,
    sync_batch_norm_buffers,
)
from raypp.training.optim import autocast, build_optimizer, learning_rate
from raypp.training.reporter import Reporter
from raypp.training.task import EpochState, Phase, StepOutput, Task, TrainingOutcome
from raypp.training.threads import AdaptiveThreads
from raypp.utils.errors import DataError, NonRetryableError, RayppError, TrainingError, TrainingInterrupted

PROGRESS_SECONDS = 0.25
CHECK_STEPS, CHECK_SECONDS = 50, 1.0  # how often, at least, workers agree on how to go on: it waits for the device


T = TypeVar("T")


def run_on_all_ranks(step: Callable[[], T]) -> T:
    """Take a step on every worker; if it fails on one, all stop with the first one's reason and none waits for ever."""
    problem: tuple[str, int] | None = None
    try:
        done = step()
    except RayppError as error:
        problem = str(error), error.exit_code
    if (problem := first_error_message(problem)) is not None:
        message, code = problem
        raise NonRetryableError(message, exit_code=code)
    return done


class Trainer:
    """The state of one run: which phase and epoch it is in, the networks, the best of them so far."""

    def __init__(self, task: Task, sink: Reporter) -> None:
        self.task, self.sink = task, sink
        self.phases = task.phases
        self.history: list[EpochMetrics] = []
        self.best_state: StateDict = {}
        self.best: EpochMetrics = {}
        self.newest = "none yet"
        self.last_progress = 0.0
        self.saved_at = time.monotonic()
        self.threads = AdaptiveThreads(enabled=False)
        self.look_in = 1  # steps until workers agree again on how to go on

    def run(self) -> TrainingOutcome:
        """Train from the sink's newest sound checkpoint, if it has one, to the end of the last phase."""
        with AdaptiveThreads(self.task.train.adapt_threads and self.sink.device.type == "cpu") as self.threads:
            return self.run_from(*run_on_all_ranks(self.restore))

    def run_from(self, at_phase: int, at_epoch: int, resumed: dict[str, Any] | None) -> TrainingOutcome:
        for index in range(at_phase, len(self.phases)):
            phase = self.phases[index]
            self.enter(phase, resumed if index == at_phase else None)
            for epoch in range(at_epoch if index == at_phase else 0, phase.epochs):
                part, resumed = (resumed or {}).get("part"), None
                row = self.train_epoch(index, epoch, EpochState(**part) if part is not None else None)
                row |= self.task.validate(self.trainee, self.sink.rank, self.sink.world)
                loss, least = row.get("val_loss"), self.best.get("val_loss")
                if loss is not None and not math.isfinite(loss):
                    raise self.diverged(row["step"], row["lr"])
                # "<=": of equal losses the later wins, as in the authors' released code.
                row["best"] = loss is None or least is None or loss <= least
                self.history.append(row)
                if row["best"]:
                    self.best = row
                    self.best_state = {
                        k: v.detach().cpu().clone() for k, v in self.trainee.trainable_state_dict().items()
                    }
                self.report(index, epoch)
                if epoch + 1 < phase.epochs or index + 1 < len(self.phases):
                    self.raise_if_stop_requested(any(all_gather_objects(self.sink.should_stop())))
            self.trainee.load_trainable_state_dict(self.best_state)
            self.task.end(phase, self.trainee)
        self.trainee.eval()
        return TrainingOutcome(self.trainee, self.history, self.best)

    def enter(self, phase: Phase, resumed: dict[str, Any] | None) -> None:
        """Build a phase's networks and optimiser, or take them over from a checkpoint."""
        device = self.sink.device
        self.trainee = self.task.build(phase).to(device)
        if self.task.train.sync_batchnorm:
            convert_sync_batchnorm(self.trainee)
        if self.task.train.channels_last:
            self.trainee.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.task.train.optimizer, self.trainee.groups())
        self.best, self.best_state = {}, {}
        if resumed is not None:
            self.trainee.load_trainable_state_dict(resumed["system"])
            self.optimizer.load_state_dict(resumed["optimizer"])
            self.best, self.best_state = resumed["best"], resumed["best_state"]
        self.forward: Callable[..., StepOutput] = self.trainee
        if is_distributed():
            # Running statistics are averaged once an epoch instead: training never reads them.
            self.forward = DistributedDataParallel(
                self.trainee, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )
        if self.task.train.compile:
            self.forward = torch.compile(self.forward)

    def train_epoch(self, index: int, epoch: int, part: EpochState | None) -> EpochMetrics:
        """Take one pass over the training batches, or the rest of one; return its row of metrics, means over workers.

        Raises:
            ToldToStop: on every worker, after a checkpoint.
        """
        train, loader, device = self.task.train, self.task.batches, self.sink.device
        phase, overall = self.phases[index], self.epochs_before(self.phases[index]) + epoch
        context = autocast(train, device)
        self.trainee.train()
        now = EpochState(0, [], torch.zeros(1, dtype=torch.float64, device=device), 0, 0.0)
        if part is not None:
            now.step, now.seconds = part.step, part.seconds
            if self.sink.rank == 0:  # what all have done so far is the first one's from here on
                now.names, now.sums, now.images = part.names, part.sums.to(device), part.images
        bad_step = torch.tensor(-1, device=device)
        first, before, seen, began, lr = now.step, now.seconds, 0, time.monotonic(), 0.0
        for step, (images, labels) in enumerate(loader.epoch(overall, first), first):
            # What networks draw, such as dropout: the same after a resume, another on each worker.
            torch.manual_seed(make_generator(self.task.seed, overall, step, self.sink.rank, 0).initial_seed())
            lr = learning_rate(train, phase.epochs, epoch + min((step + 0.5) / loader.num_batches, 1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            self.optimizer.zero_grad(set_to_none=True)
            with context():
                terms = self.forward(images, labels)
            terms.loss.backward()
            self.optimizer.step()
            self.trainee.on_after_optimizer_step()
            with torch.no_grad():
                loss = terms.loss.detach()
                now.names = ["loss", *terms.metrics]
                means = torch.stack([loss, *(m.detach() for m in terms.metrics.values())]).double()
                now.sums = now.sums + len(labels) * means
                bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), step, bad_step)
            self.threads.update()
            seen += len(labels)
            now.step, now.images = step + 1, now.images + len(labels)
            now.seconds = before + time.monotonic() - began
            self.look_in -= 1
            if self.look_in <= 0:
                save, stop = self.look(bad_step, phase, epoch, (now.step - first) / (now.seconds - before))
                if (save or stop) and now.step < loader.num_batches:
                    self.save_mid_epoch_checkpoint(index, epoch, now)
                    self.raise_if_stop_requested(stop)
            self.show(phase, epoch, seen / (now.seconds - before), now)
        if not seen:
            raise TrainingError("a worker's share of the training images is less than one batch; see train.batch_size")
        self.look(bad_step, phase, epoch, (now.step - first) / (now.seconds - before))
        sync_batch_norm_buffers(self.trainee)
        seconds = before + time.monotonic() - began
        num_images = all_reduce_sum(torch.tensor(float(now.images), dtype=torch.float64, device=device)).item()
        found = dict(zip(now.names, (all_reduce_sum(now.sums) / num_images).tolist(), strict=True))
        return {
            "phase": phase.name,
            "epoch": epoch + 1,
            "epochs": phase.epochs,
            "step": self.steps_before(phase) + (epoch + 1) * loader.num_batches,
            "lr": lr,
            **{f"train_{name}": mean for name, mean in found.items()},
            "images_per_s": num_images / seconds,
            "seconds": round(seconds, 3),
            "world": self.sink.world,
        }

    def epochs_before(self, phase: Phase) -> int:
        return sum(p.epochs for p in self.phases[: self.phases.index(phase)])

    def steps_before(self, phase: Phase) -> int:
        return self.epochs_before(phase) * self.task.batches.num_batches

    def look(self, bad_step: Tensor, phase: Phase, epoch: int, steps_per_s: float) -> tuple[bool, bool]:
        """Agree with all workers on whether a checkpoint is due and whether to stop, and on when to look again.

        Raises:
            StoppedError: on every worker, when any of them met a loss that is not a number.
        """
        due = self.task.train.checkpoint_seconds
        save = due is not None and time.monotonic() - self.saved_at >= due
        steps = max(1, min(CHECK_STEPS, int(CHECK_SECONDS * steps_per_s)))
        found = all_gather_objects((int(bad_step), self.sink.should_stop(), save, steps))
        bad = next((step for step, *_ in found if step >= 0), None)
        if bad is not None:
            batches = self.task.batches.num_batches
            rate = learning_rate(self.task.train, phase.epochs, epoch + min((bad + 0.5) / batches, 1.0))
            raise self.diverged(self.steps_before(phase) + epoch * batches + bad, rate)
        _, _, save, self.look_in = found[0]  # the first worker's clock is everybody's
        return save, any(stop for _, stop, *_ in found)

    def raise_if_stop_requested(self, stop: bool) -> None:
        if stop:
            raise TrainingInterrupted(f"stopped after checkpoint {self.newest}, as told; --resume goes on from it")

    def diverged(self, step: int, lr: float) -> NonRetryableError:
        return NonRetryableError(
            f"the loss is not a finite number at step {step} with learning rate {lr:.4g}; last good checkpoint: "
            f"{self.newest}; try a smaller {self.task.divergence_hint}"
        )

    def show(self, phase: Phase, epoch: int, images_per_s: float, part: EpochState) -> None:
        now = time.monotonic()
        if self.sink.rank or now - self.last_progress < PROGRESS_SECONDS:
            return
        self.last_progress = now
        batches = self.task.batches.num_batches
        self.sink.progress(
            {
                "phase": phase.name,
                "epoch": epoch + 1,
                "epochs": phase.epochs,
                "steps_done": self.steps_before(phase) + epoch * batches + part.step,
                "steps_total": sum(p.epochs for p in self.phases) * batches,
                "images_per_s": images_per_s * self.sink.world,
                **dict(zip(part.names, (part.sums / part.images).tolist(), strict=True)),
            }
        )

    def report(self, index: int, epoch: int) -> None:
        """Store an epoch, with a checkpoint."""
        name = checkpoint_name(len(self.history))
        if self.sink.rank:
            self.sink.report(self.history, name, None)
        else:
            with self.written(index, epoch + 1) as folder:
                self.sink.report(self.history, name, folder)
        self.newest, self.saved_at = name, time.monotonic()

    def save_mid_epoch_checkpoint(self, index: int, epoch: int, part: EpochState) -> None:
        """Store a checkpoint from within an epoch, if the last step left nothing that is no number."""
        sync_batch_norm_buffers(self.trainee)  # once more at the epoch's end: means of moving means are the same
        if not all(bool(value.isfinite().all()) for value in self.trainee.trainable_state_dict().values()):
            return  # all workers have the same values; the next loss will tell
        name = checkpoint_name(len(self.history), part.step / self.task.batches.num_batches)
        images = int(all_reduce_sum(torch.tensor(float(part.images), dtype=torch.float64, device=self.sink.device)))
        whole = dataclasses.replace(part, sums=all_reduce_sum(part.sums.clone()), images=images)
        if self.sink.rank == 0:
            with self.written(index, epoch, whole) as folder:
                self.sink.save_mid_epoch(name, folder)
        self.newest, self.saved_at = name, time.monotonic()

    @contextmanager
    def written(self, index: int, epochs: int, part: EpochState | None = None) -> Iterator[Path]:
        """A checkpoint in a folder of its own, after so many epochs of a phase and a part of the next."""
        state = {
            "phase": index,
            "epoch": epochs,
            "part": vars(part) if part is not None else None,
            "batches": self.task.batches.num_batches,
            "system": self.trainee.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_state": self.best_state,
            "task": self.task.state(),
            "fingerprint": self.task.fingerprint,
        }
        with tempfile.TemporaryDirectory(prefix="raypp-") as folder:
            checkpoint.save(Path(folder), state, self.history)
            yield Path(folder)

    def restore(self) -> tuple[int, int, dict[str, Any] | None]:
        """Take up the newest sound checkpoint: phase index, epochs done in it, and its state (None to begin afresh)."""
        names = self.sink.checkpoints()
        for name in names:
            try:
                with self.sink.open(name) as folder:
                    state, history = checkpoint.load(folder)
            except TrainingError as error:
                if self.sink.rank == 0:
                    self.sink.warn(f"{error}; going back to the one before")
                continue
            if state["fingerprint"] != self.task.fingerprint:
                raise DataError(
                    f"the training data is not what checkpoint {name} was trained on; "
                    "restore the data or start a run with another name"
                )
            self.history, self.newest = history, name
            self.task.restore(state["task"])
            part, batches = state.get("part"), self.task.batches.num_batches
            if part is not None and state["batches"] != batches:  # another number of workers, which split otherwise
                part["step"] = min(part["step"] * batches // state["batches"], batches - 1)
            return state["phase"], state["epoch"], state
        if names:
            raise TrainingError(f"all checkpoints of this run are damaged: {', '.join(names)}")
        return 0, 0, None
