"""What the benchmarks share: raypp's training loop one epoch at a time, interleaved rounds, tables and JSON."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from raypp.config.presets import load_config
from raypp.config.schema import Config
from raypp.data.loader import Augmentation, BatchLoader, DeviceLoader, to_device
from raypp.experiments.run_folder import environment
from raypp.models.perceptual import StateDict, load_vgg_slice
from raypp.models.vgg import RELU2_2, VGG16_LAYERS, vgg_features
from raypp.training.checkpoint import checkpoint_name
from raypp.training.optim import configure_torch
from raypp.training.protected_classifier import phases
from raypp.training.protection_task import ProtectionTask, TrainingData
from raypp.training.reporter import Reporter
from raypp.training.trainer import Trainer
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

NUM_CLASSES = 10
BATCH_SIZE = 128  # the paper's, whatever a preset has


@dataclass(frozen=True)
class Spread:
    """The measurements of one contestant, one per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """At least 95% confidence for the median, from order statistics (the sign test's interval): no shape assumed.

        With fewer than six values it is the whole spread, and no more than that.
        """
        ordered, num = sorted(self.values), len(self.values)
        below, cut = 0.0, 0
        while cut < num // 2 and (below := below + math.comb(num, cut) / 2**num) <= 0.025:
            cut += 1
        first = max(cut - 1, 0)
        return ordered[first], ordered[num - 1 - first]

    def __str__(self) -> str:
        return f"{min(self.values):,.1f} - {max(self.values):,.1f}"

    def to_json(self) -> dict[str, Any]:
        return {
            "n": len(self.values),
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "interval_of_median": list(self.interval),
            "values": list(self.values),
        }


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """Measure every contestant once per round, in turn, every second round in reverse order.

    What changes slowly on the machine (clock, other load) then meets all of them alike, and values of the same round
    may be divided by each other.
    """
    measurements: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds):
        names = list(contestants) if index % 2 == 0 else list(reversed(contestants))
        for name in names:
            progress(f"round {index + 1}/{rounds}: {name}")
            measurements[name].append(contestants[name]())
    progress("")
    return {name: Spread(tuple(values)) for name, values in measurements.items()}


def ratio(ours: Spread, theirs: Spread) -> Spread:
    """Ours over theirs, round by round."""
    return Spread(tuple(a / b for a, b in zip(ours.values, theirs.values, strict=True)))


def progress(message: str) -> None:
    """Say on a terminal what is being measured; an empty message clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{message}")
        sys.stderr.flush()


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: coloured on a terminal, plain text anywhere else."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(title, style="bold")
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def machine() -> dict[str, Any]:
    """Hardware, versions, time and load: what every number has to stand beside."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return environment() | {
        "memory_gib": round(memory / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(conditions: dict[str, Any]) -> str:
    """One line about a machine, as :func:`machine` returns it."""
    return (
        f"{conditions['hardware']}, {conditions['memory_gib']} GiB, torch {conditions['versions']['torch']}, "
        f"{conditions['threads']} threads, load average {conditions['load_average']:.1f} at the start"
    )


def finish(path: Path | None, benchmark: str, start: dict[str, Any], results: dict[str, Any]) -> None:
    """Write what was measured as JSON, if a path is given."""
    if path is not None:
        whole = {
            "benchmark": benchmark,
            "command": sys.argv,
            "machine": start,
            "load_average_at_end": os.getloadavg()[0],
            "results": results,
        }
        path.write_text(json.dumps(whole, indent=2) + "\n")
        print(f"wrote {path}")


def own_ray(folder: Path) -> dict[str, str]:
    """An environment in which ``raypp train`` starts a Ray of its own under ``folder``, whatever else runs here."""
    rest = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return rest | {"RAY_TMPDIR": str(folder)}


def joint_config(preset: str, **train: Any) -> Config:
    """A preset in joint mode with alpha 0.005, batches of 128 and SGD, with further ``train`` settings."""
    flags = ["--train.mode", "joint", "--train.alpha", "0.005", "--train.batch_size", str(BATCH_SIZE)]
    flags += ["--train.optimizer", "{name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 0.0005}"]  # as the obvious loop
    config = load_config(preset, flags=flags)
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def feature_weights(path: Path | None) -> StateDict:
    """VGG-16 up to relu2_2: from a file, else random; the time of a step does not depend on which."""
    if path is None:
        torch.manual_seed(0)
        return vgg_features(VGG16_LAYERS[:RELU2_2], 3, batch_norm=False).state_dict()
    state = load_vgg_slice(str(path))
    assert state is not None
    return state


def random_images(num: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (num, 32, 32, 3) and int64 labels (num,)."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (num, 32, 32, 3), np.uint8), random.integers(0, NUM_CLASSES, num, np.int64)


def device_batches(config: Config, steps: int, sink: Reporter) -> DeviceLoader:
    """raypp's own loader with ``steps`` batches of random images, built as for a training run."""
    images, labels = to_device(*random_images(steps * config.train.batch_size), sink.device)
    return DeviceLoader(
        images,
        labels,
        batch_size=config.train.batch_size,
        seed=config.seed,
        augmentation=Augmentation(config.data.augment.crop_padding, config.data.augment.flip),
        rank=sink.rank,
        world=sink.world,
    )


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """The process-wide settings that ``raypp.training.protection_task.fit`` makes, taken back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    configure_torch(config.train)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class RayppLoop:
    """raypp's real training loop (the class that ``fit`` runs), entered, and run for one epoch at a time.

    Args:
        config: what to train; its last phase is the one measured.
        phi: weights of the feature network.
        sink: where the loop believes it reports: gives rank, world size and device.
    """

    def __init__(self, config: Config, phi: StateDict, sink: Reporter) -> None:
        self._config = config
        nothing = torch.empty(0, 32, 32, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        classes = tuple(str(i) for i in range(NUM_CLASSES))
        data = TrainingData(device_batches(config, 1, sink), nothing, classes, config.train.batch_size, "")
        self._phase = phases(config)[-1]
        self._loop = Trainer(ProtectionTask(config, data, phi, None), sink)
        with torch_settings(config):
            self._loop.setup_phase(self._phase)

    def feed(self, batches: BatchLoader) -> None:
        """Take the batches of every epoch from ``batches`` from now on."""
        self._loop.task.batches = batches

    def epoch(self) -> float:
        """Train one epoch and return images/s over all workers, as raypp reports it."""
        with torch_settings(self._config):
            row = self._loop.train_epoch(self._loop.phases.index(self._phase), 0)
        self._metrics = row
        return float(row["images_per_s"])

    def save(self) -> None:
        """Write the checkpoint of the last epoch and report its metrics, as the loop does after validation."""
        loop = self._loop
        loop._update_best(self._metrics)
        name = checkpoint_name(len(loop.history))
        with loop._write_checkpoint(name, 1) as folder:
            loop.reporter.report(loop.history, name, folder)


@contextmanager
def quiet_sink(device: torch.device) -> Iterator[Reporter]:
    """A sink of this process that shows and keeps nothing."""
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as folder:
        yield Reporter(Storage(folder), ProgressDisplay(quiet=True), device)
