"""What the fast tests share: a configuration that trains in a second, and a run trained with it once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from raypp.config import Config, load_config
from raypp.progress import Display
from raypp.runs import open_run, train_locally
from raypp.training.fit import Fit, fit
from raypp.training.sinks import LocalSink

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = {
    "data.source.num_train": "60",
    "data.source.num_test": "30",
    "data.image_size": "[16, 16]",
    "data.num_val": "20",
    "protection.width": "4",
    "protection.depth": "2",
    "train.batch_size": "20",
    "train.epochs": "2",
    "train.plain_epochs": "1",
    "train.eval_batch_size": "15",
    "train.precision": "fp32",
    "train.alpha": "0.005",
    "train.optimizer.lr": "0.1",
    "train.schedule": "{name: one_cycle, warmup: 0.25, final: 0.0}",
}

Tiny = Callable[..., Config]


def tiny_flags(storage: Path, **changes: object) -> list[str]:
    """Flags that make the preset quickstart tiny; ``train__epochs=1`` stands for ``--train.epochs 1``; another
    ``protection`` comes without the sizes of the U-Net."""
    settings = TINY | {key.replace("__", "."): str(value) for key, value in changes.items()}
    if "protection" in settings:
        settings = {key: value for key, value in settings.items() if not key.startswith("protection.")}
    pairs = [(f"--{key}", value) for key, value in settings.items()]
    return [word for pair in pairs for word in pair] + ["--cluster.storage", str(storage)]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Makes tiny configurations whose runs lie in ``tmp_path``."""
    return lambda **changes: load_config("quickstart", flags=tiny_flags(tmp_path, **changes))


@dataclass(frozen=True)
class Trained:
    """A finished run and the networks that it left."""

    config: Config
    run: Path
    fit: Fit

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One tiny joint run; tests copy what they change."""
    storage = tmp_path_factory.mktemp("runs")
    config = load_config("quickstart", flags=tiny_flags(storage))
    display = Display(quiet=True)
    with open_run(config, "tiny") as run:
        train_locally(run, display, CPU)
        # The run is over, so this only takes up its last checkpoint.
        left = fit(run.config, LocalSink(run.storage, display, CPU), run.phi)
    return Trained(config, storage / "tiny", left)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have imported already what takes seconds; an optimiser's first step imports dynamo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "raypp.runs"])
    return context
