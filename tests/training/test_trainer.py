"""The trainer: its losses and results, and that no interruption changes the result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Tiny, few_examples, tiny_flags
from hypothesis import given
from hypothesis import strategies as st
from networks import same, vgg_slice
from rich.console import Console
from torch import Tensor, nn

from raypp.config.presets import load_config
from raypp.config.schema import Config, MultiStep, Train
from raypp.config.validation import validate
from raypp.data.loader import BatchLoader
from raypp.models.perceptual import VGG16Features
from raypp.protections.learned import Learned
from raypp.training import checkpoint, muon, trainer
from raypp.training.checkpoint import (
    NUM_KEPT,
    RAY_SNAPSHOT,
    EpochMetrics,
    checkpoint_name,
    list_checkpoints,
    prune,
    retention_score,
)
from raypp.training.distributed import SyncBatchNorm1d, SyncBatchNorm2d, convert_sync_batchnorm
from raypp.training.muon import Muon, zeropower_via_newtonschulz
from raypp.training.optim import bf16_is_fast, build_optimizer, learning_rate
from raypp.training.protected_classifier import build_protected_classifier, phases
from raypp.training.protection_task import ProtectionTask, TrainingData, TrainResult, fit, load_data, prepare
from raypp.training.protection_task import validate as validate_system
from raypp.training.reporter import Reporter
from raypp.training.task import Phase
from raypp.utils.errors import ConfigError, NonRetryableError, StorageError, TrainingError, TrainingInterrupted
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

CODE = "{classes: 10, size: 2, encoder: {name: resnet20, width: 4}}"
EPOCHS = 3  # of the joint phase, after one plain epoch


class InterruptedRun(Exception):  # noqa: N818
    """Simulates a killed process."""


class RecordingReporter(Reporter):
    """Records the progress output, and raises InterruptedRun after a number of reports."""

    def __init__(self, folder: Path, dies_after: int | None = None) -> None:
        self.text = io.StringIO()
        super().__init__(Storage(folder), ProgressDisplay(Console(file=self.text, width=500)), torch.device("cpu"))
        self.dies_after = dies_after

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        super().report(history, name, checkpoint)
        if len(history) == self.dies_after:
            raise InterruptedRun


def timeless(history: list[EpochMetrics]) -> list[EpochMetrics]:
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_s"}} for row in history]


def newest(folder: Path) -> tuple[dict[str, Any], list[EpochMetrics]]:
    name = list_checkpoints(Storage(folder))[0]
    return checkpoint.load(folder / "checkpoints" / name)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def initial(config: Config, data: TrainingData, name: str) -> dict[str, Tensor]:
    """The weights that a phase begins with."""
    return build_protected_classifier(config, Phase(name, 1), len(data.classes), None, None).trainable_state_dict()


@dataclasses.dataclass(frozen=True)
class Reference:
    """An uninterrupted run, and the folder of one that died after its third of four epochs."""

    config: Config
    fit: TrainResult
    folder: Path
    interrupted: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    config = load_config("quickstart", flags=tiny_flags(folder, train__epochs=EPOCHS))
    whole = fit(config, RecordingReporter(folder / "whole"))
    with pytest.raises(InterruptedRun):
        fit(config, RecordingReporter(folder / "interrupted", dies_after=3))
    return Reference(config, whole, folder / "whole", folder / "interrupted")


# Modes


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "joint", "frozen"])
def test_training_lowers_the_loss(mode: str, tiny: Tiny, tmp_path: Path) -> None:
    changes = {"protection": "plain"} if mode == "plain" else {}
    config = tiny(
        train__mode=mode,
        train__epochs=6,
        train__plain_epochs=2,
        train__batch_size=10,
        train__optimizer__lr=0.02,
        classifier__width=16,
        **changes,
    )
    reporter = RecordingReporter(tmp_path)
    result = fit(config, reporter)
    own = [row for row in result.history if row["phase"] == mode]
    assert [row["epoch"] for row in own] == [1, 2, 3, 4, 5, 6]
    assert own[-1]["train_loss"] < own[0]["train_loss"] - 0.1
    assert [row["phase"] for row in result.history if row["phase"] != mode] == ["plain"] * (0 if mode == "plain" else 2)
    for row in result.history:
        alpha = 0 if row["phase"] == "plain" else config.train.alpha
        for part in ("train", "val"):
            expected = row[f"{part}_classification_loss"] - alpha * row[f"{part}_feature_distance"]
            assert row[f"{part}_loss"] == pytest.approx(expected, rel=1e-5)
        assert (row["val_feature_distance"] > 0) == (row["phase"] != "plain")
    assert [row["step"] for row in result.history] == [4 * (i + 1) for i in range(len(result.history))]
    assert reporter.text.getvalue().count("\n") == len(result.history), "a line per epoch"


@pytest.mark.slow
def test_frozen_mode_keeps_every_bit_of_the_plain_classifier(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__mode="frozen")
    result = fit(config, RecordingReporter(tmp_path))
    assert result.plain is not None
    assert same(dict(result.system.classifier.state_dict()), result.plain)
    state, _ = newest(tmp_path)
    classifier = {k.removeprefix("classifier."): v for k, v in state["system"].items() if k.startswith("classifier.")}
    assert same(classifier, result.plain)
    assert not same(
        result.plain, {k.removeprefix("classifier."): v for k, v in initial(config, result.data, "plain").items()}
    )
    changed = state["system"]["protection.unet.head.weight"]
    assert not torch.equal(changed, initial(config, result.data, "joint")["protection.unet.head.weight"])


def test_joint_mode_trains_both_and_leaves_the_feature_network(reference: Reference) -> None:
    plain = reference.fit.plain
    assert plain is not None
    before = build_protected_classifier(
        reference.config, phases(reference.config)[1], 10, None, plain
    ).trainable_state_dict()
    after = newest(reference.folder)[0]["system"]
    assert before.keys() == after.keys()
    unchanged = [k for k in before if torch.equal(before[k], after[k])]
    assert unchanged == []
    assert reference.fit.system.features is not None
    features = reference.fit.system.features.classifier.state_dict()
    assert same(dict(features), plain)


def test_vgg_features_train_without_a_plain_phase_and_stay(tiny: Tiny, tmp_path: Path) -> None:
    torch.save(vgg_slice(), tmp_path / "slice.pt")
    config, phi, warning = prepare(tiny(features="vgg16", features__weights=tmp_path / "slice.pt", train__epochs=1))
    assert warning is None
    assert phi is not None
    result = fit(config, RecordingReporter(tmp_path), phi)
    assert [row["phase"] for row in result.history] == ["joint"]
    assert result.plain is None
    assert isinstance(result.system.features, VGG16Features)
    assert same(dict(result.system.features.layers.state_dict()), vgg_slice())


def test_without_torchvisions_weights_a_plain_classifier_stands_in(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ConfigError, match=r"are not available: no network; pass a file with"):
        prepare(tiny(features="vgg16"))
    config, phi, warning = prepare(tiny(features="vgg16", features__fallback="allow"))
    assert (config.features.name, phi) == ("plain_classifier", None)
    assert warning is not None
    assert "a departure from the paper" in warning
    unused, _, silent = prepare(tiny(features="vgg16", train__mode="plain", protection="plain"))
    assert (unused.features.name, silent) == ("vgg16", None), "a plain run needs no feature network"
    unused, _, silent = prepare(load_config("cifar10-code"))
    assert (unused.features.name, silent) == ("vgg16", None), "nor does a run with alpha 0"


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size"), [(1, "[17, 19]"), (3, "[16, 30]")])
def test_any_size_and_grey(tiny: Tiny, tmp_path: Path, channels: int, size: str) -> None:
    config = tiny(data__channels=channels, data__image_size=size, train__epochs=1)
    result = fit(config, RecordingReporter(tmp_path))
    height, width = json.loads(size)
    images = torch.rand(2, channels, height, width)
    assert result.system.protection(images).shape == images.shape


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), "auto"])
def test_precision(tiny: Tiny, tmp_path: Path, precision: str, reference: Reference) -> None:
    config = tiny(train__precision=precision, train__epochs=1)
    row = fit(config, RecordingReporter(tmp_path)).history[0]
    exact = reference.fit.history[0]["train_loss"]  # the plain phase does not depend on the epochs that follow
    bf16 = precision == "bf16" or (precision == "auto" and bf16_is_fast(torch.device("cpu")))
    assert (row["train_loss"] == exact) != bf16
    assert row["train_loss"] == pytest.approx(exact, rel=0.02)


# Repeatability and selection


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(reference: Reference, tmp_path: Path) -> None:
    again = fit(reference.config, RecordingReporter(tmp_path))
    assert timeless(again.history) == timeless(reference.fit.history)
    assert same(newest(tmp_path)[0], newest(reference.folder)[0])
    assert same(again.system.trainable_state_dict(), reference.fit.system.trainable_state_dict())


@pytest.mark.slow
def test_another_seed_gives_another_run(reference: Reference, tmp_path: Path) -> None:
    other = fit(reference.config.model_copy(update={"seed": 1}), RecordingReporter(tmp_path))
    assert other.history[0]["train_loss"] != reference.fit.history[0]["train_loss"]


@dataclasses.dataclass
class Misleading:
    """Batches whose labels are wrong from an epoch on, so that training makes the network worse."""

    sound: BatchLoader
    since: int

    @property
    def num_batches(self) -> int:
        return self.sound.num_batches

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.sound.epoch(epoch, first):
            yield images, (labels + 1) % 10 if epoch >= self.since else labels


@pytest.mark.slow
def test_the_lowest_validation_loss_is_what_is_left(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(
        train__mode="plain", protection="plain", train__epochs=5, train__batch_size=10, train__schedule="constant",
        train__optimizer__lr=0.02, data__source__num_train=220,
    )  # fmt: skip
    data = load_data(config, torch.device("cpu"))
    misleading = dataclasses.replace(data, train=Misleading(data.train, since=3))
    result = fit(config, RecordingReporter(tmp_path), load=lambda: misleading)
    losses = [row["val_loss"] for row in result.history]
    lowest = losses.index(min(losses))
    assert lowest < 4, "the last epoch is the best: nothing is tested"
    assert result.best == result.history[lowest]
    assert [row["best"] for row in result.history] == [loss == min(losses[: i + 1]) for i, loss in enumerate(losses)]
    scores = validate_system(result.system, *data.val, config, 0, 1)
    assert scores["val_loss"] == pytest.approx(min(losses), rel=1e-6)
    state, _ = newest(tmp_path)
    assert same(state["best_state"], result.system.trainable_state_dict())
    assert not same(state["system"], state["best_state"])


def test_validation_is_a_mean_over_images_whatever_the_batches_and_workers(reference: Reference) -> None:
    config, system = reference.config, reference.fit.system
    images, labels = (part[:19] for part in reference.fit.data.val)
    whole = validate_system(system, images, labels, config, 0, 1)
    train = config.train.model_copy(update={"eval_batch_size": 4})
    batched = config.model_copy(update={"train": train})
    assert validate_system(system, images, labels, batched, 0, 1) == pytest.approx(whole, rel=1e-5)
    shares = [validate_system(system, images, labels, config, rank, 2) for rank in range(2)]
    for key, value in whole.items():
        assert (10 * shares[0][key] + 9 * shares[1][key]) / 19 == pytest.approx(value, rel=1e-5)


def test_metrics_lines_are_the_history(reference: Reference) -> None:
    lines = (reference.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == reference.fit.history
    assert list_checkpoints(Storage(reference.folder)) == ["epoch_0004", "epoch_0003"]
    assert NUM_KEPT == 2


# Interruption


@pytest.mark.parametrize("after", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(reference: Reference, tmp_path: Path, after: int) -> None:
    with pytest.raises(InterruptedRun):
        fit(reference.config, RecordingReporter(tmp_path, dies_after=after))
    resumed = fit(reference.config, RecordingReporter(tmp_path))
    assert timeless(resumed.history) == timeless(reference.fit.history)
    assert same(newest(tmp_path), newest(reference.folder))
    assert same(resumed.system.state_dict(), reference.fit.system.state_dict())
    assert same(resumed.plain, reference.fit.plain)
    assert timeless([resumed.best]) == timeless([reference.fit.best])


class Stopped(RecordingReporter):
    """Requests a stop at the call number ``at``."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__(folder)
        self.at, self.calls = at, 0

    def should_stop(self) -> bool:
        self.calls += 1
        return self.calls == self.at


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers sync after every step."""
    monkeypatch.setattr("raypp.training.trainer.CHECK_STEPS", 1)


# Called after each of two steps, and twice at an epoch's end: once before validation, once behind it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "name"),
    [
        (1, "epoch_0000_part_500000"),
        pytest.param(4, "epoch_0001", marks=pytest.mark.slow),
        pytest.param(5, "epoch_0001_part_500000", marks=pytest.mark.slow),
        pytest.param(13, "epoch_0003_part_500000", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("every_step")
def test_a_stopped_run_resumes_to_the_same_result(reference: Reference, tmp_path: Path, at: int, name: str) -> None:
    with pytest.raises(
        TrainingInterrupted, match=f"^training stopped after checkpoint {name}; continue with --resume$"
    ):
        fit(reference.config, Stopped(tmp_path, at))
    assert list_checkpoints(Storage(tmp_path))[0] == name
    resumed = fit(reference.config, RecordingReporter(tmp_path))
    assert timeless(resumed.history) == timeless(reference.fit.history)
    assert same(newest(tmp_path), newest(reference.folder))


@pytest.mark.slow
@pytest.mark.usefixtures("every_step")
def test_checkpoints_within_epochs_follow_the_setting(reference: Reference, tmp_path: Path) -> None:
    written: list[str] = []

    class Counting(RecordingReporter):
        def save_mid_epoch(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
            written.append(name)
            super().save_mid_epoch(history, name, checkpoint)

    ends = [f"epoch_{n:04d}" for n in range(1, 5)]
    fit(reference.config, Counting(tmp_path / "rare"))
    assert written == ends, "the default is minutes, an epoch here takes less than a second"
    written.clear()
    train = reference.config.train.model_copy(update={"checkpoint_seconds": 1e-9})
    fit(reference.config.model_copy(update={"train": train}), Counting(tmp_path / "often"))
    assert written == [name for n, end in enumerate(ends) for name in (f"epoch_{n:04d}_part_500000", end)]
    assert same(newest(tmp_path / "often"), newest(reference.folder))


@pytest.mark.usefixtures("every_step")
def test_weights_that_are_no_numbers_are_not_kept(reference: Reference, tmp_path: Path) -> None:
    """A step may have a finite loss and leave weights that have none."""

    class Ruined(RecordingReporter):
        def should_stop(self) -> bool:
            with torch.no_grad():
                next(current[0].trainee.parameters()).fill_(math.nan)
            return False

    current: list[trainer.Trainer] = []
    train = reference.config.train.model_copy(update={"checkpoint_seconds": 1e-9})
    config = reference.config.model_copy(update={"train": train})
    data = load_data(config, torch.device("cpu"))
    task = ProtectionTask(config, data, None, None)
    current.append(trainer.Trainer(task, Ruined(tmp_path)))
    with pytest.raises(NonRetryableError, match=r"at step 1 .* last good checkpoint: none yet"):
        current[0].train()
    assert list_checkpoints(Storage(tmp_path)) == []


@pytest.mark.usefixtures("every_step")
def test_a_request_for_a_checkpoint_is_served_once(reference: Reference, tmp_path: Path) -> None:
    """At the next sync, within an epoch."""
    written: list[str] = []
    calls: list[None] = []

    class Requested(RecordingReporter):
        def should_save(self) -> bool:
            calls.append(None)
            return len(calls) == 4  # two steps and an end of each epoch: after the first step of the second epoch

        def save_mid_epoch(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
            written.append(name)
            super().save_mid_epoch(history, name, checkpoint)

    fit(reference.config, Requested(tmp_path))
    assert written == ["epoch_0001", "epoch_0001_part_500000", "epoch_0002", "epoch_0003", "epoch_0004"]
    assert len(calls) == 12


def test_a_worker_without_validation_images_counts_none(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train__mode="plain", protection="plain", data__num_val=3)
    data = load_data(config, torch.device("cpu"))
    system = build_protected_classifier(config, phases(config)[0], len(data.classes), (16, 16))
    images, labels = data.val
    alone = validate_system(system, images, labels, config, 0, 1)
    shares: list[Tensor] = []

    def added(share: Tensor) -> Tensor:
        shares.append(share.clone())
        return torch.stack(shares).sum(0)

    monkeypatch.setattr("raypp.training.protection_task.all_reduce_sum", added)
    for rank in range(5):  # two of whom have no image
        together = validate_system(system, images, labels, config, rank, 5)
    assert shares[4].tolist() == [0] * 5
    assert together == pytest.approx(alone)


def test_the_checkpoint_just_written_is_never_pruned(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    for name in ("epoch_0002", "epoch_0002_part_300000", "epoch_0002_part_700000", "epoch_0001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list_checkpoints(run)[:2] == ["epoch_0002_part_700000", "epoch_0002_part_300000"]
    (tmp_path / RAY_SNAPSHOT).touch()
    prune(run, "epoch_0002")  # what is newer is damaged, as it seems, since training goes on from before
    assert not (tmp_path / RAY_SNAPSHOT).exists(), "Ray would refuse a list with checkpoints that are missing"
    assert list_checkpoints(run) == ["epoch_0002_part_700000", "epoch_0002"]
    assert checkpoint_name(2, 1 / 3) == "epoch_0002_part_333333"
    (tmp_path / RAY_SNAPSHOT).touch()
    prune(run, "epoch_0002")
    assert (tmp_path / RAY_SNAPSHOT).exists(), "nothing was deleted"


@few_examples
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 99), max_size=2, unique=True)), min_size=1))
def test_the_three_highest_scores_are_the_newest_two_and_the_best(epochs: list[tuple[bool, list[int]]]) -> None:
    """Whatever epochs are the best so far, with checkpoints within epochs, as Ray applies scores: deleted at once."""
    history: list[EpochMetrics] = []
    kept: list[tuple[float, str]] = []
    written: list[str] = []
    best = None
    for is_best, parts in epochs:
        names = [checkpoint_name(len(history), part / 100) for part in sorted(parts)]
        names.append(checkpoint_name(len(history) + 1))
        for name in names:
            if name == names[-1]:
                history.append({"best": is_best or not history})
                best = name if history[-1]["best"] else best
            written.append(name)
            kept = sorted([*kept, (retention_score(history, name), name)])[-NUM_KEPT - 1 :]
            names_kept = {entry[1] for entry in kept}
            assert set(written[-2:]) <= names_kept
            assert best is None or best in names_kept
            assert best is None or kept[-1][1] == best


@pytest.mark.slow
@pytest.mark.usefixtures("every_step")
def test_a_part_of_an_epoch_goes_on_in_other_batches(reference: Reference, tmp_path: Path) -> None:
    """Another number of workers may make other batches: the part that is done stays about the same."""
    with pytest.raises(TrainingInterrupted):
        fit(reference.config, Stopped(tmp_path, 5))
    train = reference.config.train.model_copy(update={"batch_size": reference.config.train.batch_size // 2})
    other = reference.config.model_copy(update={"train": train})
    data = load_data(other, torch.device("cpu"))
    seen: list[int] = []

    class Watched:
        num_batches = data.train.num_batches

        def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            seen.append(first)
            return data.train.epoch(epoch, first)

    fit(other, RecordingReporter(tmp_path), load=lambda: dataclasses.replace(data, train=Watched()))
    assert seen == [data.train.num_batches // 2, 0, 0]


def truncate(folder: Path) -> None:
    data = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(data[: len(data) // 2])


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.pt").write_bytes(data)


def delete_state(folder: Path) -> None:
    (folder / "state.pt").unlink()


def delete_sums(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def garble_sums(folder: Path) -> None:
    (folder / "checkpoint.json").write_bytes(b'\xff{"sha256": [1]}')


def other_json(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("[]")


def empty_history(folder: Path) -> None:
    (folder / "history.json").write_text("[]")


DAMAGES = [truncate, flip_a_byte, delete_state, delete_sums, garble_sums, other_json, empty_history]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_named(reference: Reference, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = shutil.copytree(reference.interrupted / "checkpoints" / "epoch_0003", tmp_path / "epoch_0003")
    checkpoint.load(folder)
    damage(folder)
    with pytest.raises(TrainingError, match=r"^checkpoint epoch_0003 is damaged: ") as raised:
        checkpoint.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [flip_a_byte, pytest.param(delete_sums, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_costs_an_epoch_and_a_warning(
    reference: Reference, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    damage(folder / "checkpoints" / "epoch_0003")
    reporter = RecordingReporter(folder)
    resumed = fit(reference.config, reporter)
    warning = reporter.text.getvalue().splitlines()[0]
    assert warning.startswith("warning: checkpoint epoch_0003 is damaged: ")
    assert warning.endswith("; going back to the one before")
    assert timeless(resumed.history) == timeless(reference.fit.history)
    assert same(newest(folder), newest(reference.folder))


def test_when_all_checkpoints_are_damaged_the_run_says_so(reference: Reference, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    truncate(folder / "checkpoints" / "epoch_0003")
    delete_sums(folder / "checkpoints" / "epoch_0002")
    before = files(folder)
    with pytest.raises(TrainingError, match=r"^all checkpoints of this run are damaged: epoch_0003, epoch_0002$"):
        fit(reference.config, RecordingReporter(folder))
    assert files(folder) == before


def test_half_written_checkpoints_are_passed_over(reference: Reference, tmp_path: Path) -> None:
    """A process that is killed while it copies leaves a hidden folder behind."""
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    aside = folder / "checkpoints" / ".epoch_0004.12345678.tmp"
    aside.mkdir()
    (aside / "state.pt").write_bytes(b"half")
    resumed = fit(reference.config, RecordingReporter(folder))
    assert timeless(resumed.history) == timeless(reference.fit.history)


def test_other_data_are_refused_on_resume(reference: Reference, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    source = reference.config.data.source.model_copy(update={"seed": 1})
    data = reference.config.data.model_copy(update={"source": source})
    before = files(folder)
    with pytest.raises(NonRetryableError, match="not what checkpoint epoch_0003 was trained on; restore the data"):
        fit(reference.config.model_copy(update={"data": data}), RecordingReporter(folder))
    assert files(folder) == before


def test_a_code_of_other_classes_is_refused_at_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__alpha="0", protection__skips="0", protection__code=CODE.replace("10", "7"))
    with pytest.raises(
        NonRetryableError, match=r"^protection\.code\.classes is 7, allowed is null or the data's number, 10$"
    ):
        fit(config, RecordingReporter(tmp_path))
    assert list_checkpoints(Storage(tmp_path)) == []


def test_a_checkpoint_of_other_networks_is_refused(reference: Reference, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    protection = reference.config.protection.model_copy(update={"skips": 0})
    with pytest.raises(TrainingError, match=r"^checkpoint holds weights of other networks than the configuration"):
        fit(reference.config.model_copy(update={"protection": protection}), RecordingReporter(folder))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(reference.interrupted, tmp_path / "run")
    before = files(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(StorageError, match=r"cannot write .*epoch_0004: .*No space left on device") as raised:
            fit(reference.config, RecordingReporter(folder))
    assert "\n" not in str(raised.value)
    assert files(folder) == before
    assert timeless(fit(reference.config, RecordingReporter(folder)).history) == timeless(reference.fit.history)


def test_storage_that_cannot_be_written_is_one_sentence(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^cannot (read|list|write) .*Not a directory$") as raised:
        fit(tiny(train__epochs=1), RecordingReporter(tmp_path / "file" / "run"))
    assert "\n" not in str(raised.value)


# A loss that is no number


@dataclasses.dataclass
class Poisoned:
    """Batches of which one holds an image that is no number."""

    sound: BatchLoader
    at: tuple[int, int]

    @property
    def num_batches(self) -> int:
        return self.sound.num_batches

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self.sound.epoch(epoch, first), first):
            if (epoch, step) == self.at:
                images[0, 0, 0, 0] = math.nan
            yield images, labels


def test_a_loss_that_is_no_number_stops_at_its_step(reference: Reference, tmp_path: Path) -> None:
    data = load_data(reference.config, torch.device("cpu"))
    poisoned = dataclasses.replace(data, train=Poisoned(data.train, at=(2, 1)))  # the second joint epoch's last step
    with pytest.raises(TrainingError) as raised:
        fit(reference.config, RecordingReporter(tmp_path), load=lambda: poisoned)
    rate = learning_rate(reference.config.train, EPOCHS, 1.75)  # in the middle of the step
    assert str(raised.value) == (
        f"the loss is not a finite number at step 5 with learning rate {rate:.4g}; last good checkpoint: epoch_0002; "
        "try a smaller train.optimizer.lr or train.alpha"
    )
    assert timeless(fit(reference.config, RecordingReporter(tmp_path)).history) == timeless(reference.fit.history)


def test_an_absurd_learning_rate_is_found_out(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__mode="plain", protection="plain", train__schedule="constant", train__optimizer__lr="1.0e+30")
    with pytest.raises(TrainingError, match=r"step \d+ with learning rate 1e\+30; last good checkpoint: none yet; try"):
        fit(config, RecordingReporter(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_validation_loss_of_nought_is_shown() -> None:
    text = io.StringIO()
    display = ProgressDisplay(Console(file=text, width=500))
    row = {
        "phase": "own",
        "epoch": 1,
        "epochs": 2,
        "train_loss": 1.0,
        "images_per_s": 1.0,
        "seconds": 1.0,
        "best": True,
    }
    display.epoch(row | {"val_loss": 0.0})
    display.epoch(row)
    first, second = text.getvalue().splitlines()
    assert "val loss 0.0000" in first
    assert "val loss" not in second


# Schedules and optimisers


def test_multistep_is_the_papers_table() -> None:
    train = load_config("cifar10").train
    table = {0: 0.1, 59.99: 0.1, 60: 0.02, 119.99: 0.02, 120: 0.004, 159.99: 0.004, 160: 0.0008, 199.99: 0.0008}
    for progress, expected in table.items():
        assert learning_rate(train, 200, progress) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "milestones"),
    [
        (["--train.epochs", "50"], (15, 30, 40)),
        (["--train.epochs=50", "--train.schedule", "multistep"], (15, 30, 40)),
        (["--train.epochs", "7"], (2.1, 4.2, 5.6)),
        (["--train.epochs", "1"], (0.3, 0.6, 0.8)),
        (["--train.epochs", "400"], (120, 240, 320)),
        (["--train.epochs", "50", "--train.schedule.milestones", "[20, 45]"], (20, 45)),
        (["--train.schedule.milestones", "[20, 45]", "--train.epochs", "50"], (20, 45)),
        (["--train", "{epochs: 50}", "--train.schedule.milestones", "[20]"], (20,)),
        (["--train.epochs", "50", "--train.schedule", "{name: multistep, milestones: []}"], ()),
        (["--train.epochs", "50", "--train.schedule.gamma", "0.5"], (15, 30, 40)),
    ],
)
def test_milestones_belong_to_the_epochs_that_they_are_stated_with(
    flags: list[str], milestones: tuple[float, ...]
) -> None:
    train = load_config("cifar10", flags=flags).train
    assert isinstance(train.schedule, MultiStep)
    assert train.schedule.milestones == pytest.approx(milestones), "the merged configuration shows them"
    gamma = train.schedule.gamma
    for i, milestone in enumerate(milestones):
        before = learning_rate(train, train.epochs, milestone - 0.01)
        assert before == pytest.approx(0.1 * gamma**i, rel=1e-12)
        assert learning_rate(train, train.epochs, milestone) == pytest.approx(0.1 * gamma ** (i + 1), rel=1e-12)
    last = learning_rate(train, train.epochs, train.epochs - 0.01)
    assert last == pytest.approx(0.1 * gamma ** len(milestones), rel=1e-12)


def test_milestones_of_a_file_move_with_the_epochs_of_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 40, schedule: {milestones: [10, 30]}}\n")
    schedules = [load_config("cifar10", file, flags).train.schedule for flags in ((), ("--train.epochs", "20"))]
    assert [s.milestones for s in schedules if isinstance(s, MultiStep)] == [(10, 30), (5, 15)]
    file.write_text("train: {epochs: 40}\n")
    schedule = load_config("cifar10", file).train.schedule
    assert isinstance(schedule, MultiStep)
    assert schedule.milestones == (12, 24, 32)


def test_milestones_that_nobody_states_lie_within_the_epochs() -> None:
    switched = load_config("quickstart", flags=["--train.schedule", "multistep"]).train
    for train in (switched, Train(epochs=4), Train.model_validate({"epochs": 4, "schedule": {"name": "multistep"}})):
        assert isinstance(train.schedule, MultiStep)
        assert train.schedule.milestones == pytest.approx((1.2, 2.4, 3.2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_milestones_keep_their_shares_of_a_plain_phase(tiny: Tiny, tmp_path: Path, mode: str) -> None:
    schedule = "{name: multistep, milestones: [1, 3], gamma: 0.5}"
    config = tiny(train__mode=mode, train__epochs=4, train__plain_epochs=2, train__schedule=schedule)
    rates = [row["lr"] for row in fit(config, RecordingReporter(tmp_path)).history]  # each in an epoch's last step
    assert rates == pytest.approx([0.05, 0.025, 0.1, 0.05, 0.05, 0.025])


def test_milestones_that_training_ends_before_are_refused() -> None:
    for flags in (
        ["--train.epochs", "50", "--train.schedule.milestones", "[20, 50]"],
        ["--train.schedule.milestones", "[20, 300]"],
    ):
        with pytest.raises(ConfigError, match=r"^train.schedule.milestones is \[20, \d+\], but training ends after"):
            load_config("cifar10", flags=flags)


def test_one_cycle_rises_and_falls_linearly() -> None:
    flags = ["--train.optimizer.lr", "2", "--train.schedule", "{name: one_cycle, warmup: 0.25, final: 0.1}"]
    train = load_config("quickstart", flags=flags).train
    for progress, expected in {0: 0, 2.5: 1, 5: 2, 12.5: 1.1, 20: 0.2, 25: 0.2}.items():
        assert learning_rate(train, 20, progress) == pytest.approx(expected)
    cold = load_config("quickstart", flags=["--train.schedule.warmup", "0"]).train
    assert learning_rate(cold, 4, 0) == cold.optimizer.lr
    assert learning_rate(cold, 4, 4) == 0


def test_constant() -> None:
    train = load_config("quickstart", flags=["--train.schedule", "constant"]).train
    assert {learning_rate(train, 4, progress) for progress in (0, 1.5, 4)} == {train.optimizer.lr}


def test_the_learning_rate_of_every_epoch_is_reported(reference: Reference) -> None:
    assert [row["lr"] for row in reference.fit.history] == pytest.approx(
        [learning_rate(reference.config.train, 1, 0.75)]
        + [learning_rate(reference.config.train, EPOCHS, epoch + 0.75) for epoch in range(EPOCHS)]
    )


def test_sgd_is_the_papers() -> None:
    """Momentum 0.9 and weight decay 0.0005, two steps by hand."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer(load_config("cifar10").train.optimizer, [weight])
    value, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.0005 * value
        value -= 0.1 * velocity
    assert weight.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.slow
def test_adamw(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__optimizer__name="adamw", train__optimizer__lr=0.001, train__epochs=1)
    optimizer = build_optimizer(config.train.optimizer, [nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert math.isfinite(fit(config, RecordingReporter(tmp_path)).best["val_loss"])


def test_muon_is_torchs_own_on_matrices_and_adamw_on_the_rest() -> None:
    """Convolutions are matrices of their outputs' rows; a bias and a learned picture (one row) are none."""
    torch.manual_seed(0)
    options = load_config("cifar10").train.optimizer.model_copy(update={"name": "muon", "lr": 0.01, "momentum": 0.95})
    shapes = [(8, 3, 3, 3), (8, 3, 3, 3), (40, 6), (12,), (1, 4, 5, 5)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [
        nn.Parameter(p.detach().flatten(1).clone() if len(p) > 1 and p.ndim > 1 else p.detach().clone()) for p in ours
    ]
    optimizer = build_optimizer(options, [{"params": ours, "factor": 1.0}])
    assert isinstance(optimizer, Muon)
    with pytest.raises(ValueError, match="Muon takes no closure"):
        optimizer.step(lambda: 0.0)
    matrices = torch.optim.Muon(
        theirs[:3], lr=0.01, momentum=0.95, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(theirs[3:], lr=0.01, betas=(0.95, 0.999), weight_decay=options.weight_decay)
    before = [p.detach().clone() for p in ours]
    for step in range(4):
        if step == 2:  # as after a resume
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(options, [{"params": ours, "factor": 1.0}])
            optimizer.load_state_dict(state)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.reshape(b.shape).clone()
        for each in (optimizer, matrices, adamw):
            each.step()
    for old, a, b in zip(before, ours, theirs, strict=True):
        moved = (b.detach().reshape(a.shape) - old).norm()
        assert (a.detach() - b.detach().reshape(a.shape)).norm() < 0.1 * moved  # torch computes in bf16
        assert 0.2 * 0.01 < moved / a.numel() ** 0.5 < 0.05


def test_muon_makes_matrices_orthogonal() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(shape) for shape in ((3, 6, 30), (3, 30, 6), (1, 6, 8), (2, 6, 6), (1, 4, 9))]
    results = zeropower_via_newtonschulz(batches)
    for batch, result in zip(batches, results, strict=True):
        values = torch.linalg.svdvals(result)
        assert values.shape == (len(batch), min(batch.shape[1:]))
        assert 0.6 < values.min() < values.max() < 1.3
        left, _, right = torch.linalg.svd(batch, full_matrices=False)
        assert (result - left @ right).norm() < 0.4 * (left @ right).norm(), "near the polar factor"
        (alone,) = zeropower_via_newtonschulz([batch])
        torch.testing.assert_close(alone, result)
    assert zeropower_via_newtonschulz([torch.zeros(1, 4, 4)])[0].abs().max() == 0


def test_muon_iterates_once_for_all_layers_with_the_same_smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[tuple[int, ...]] = []
    iterate = muon._newtonschulz_product

    def record(square: Tensor) -> Tensor:
        sides.append(tuple(square.shape))
        return iterate(square)

    monkeypatch.setattr(muon, "_newtonschulz_product", record)
    shapes = [(4, 2, 3, 3), (4, 4, 3, 3), (9, 4), (4, 4), (8, 4, 3, 3), (8,)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    Muon([{"params": weights}], 0.01, 0.9, 0.0).step()
    assert sides == [(4, 4, 4), (1, 8, 8)]


# Two workers without Ray

WORLD = 2


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
BATCH_NORMS = {"images": (4, 5), "features": (), "sequences": (7,)}


def batch_norm_case(sides: tuple[int, ...]) -> tuple[BatchNorm, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3) if len(sides) == 2 else nn.BatchNorm1d(3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double(), torch.randn(8, 3, *sides).double() + 100, torch.randn(8, 3, *sides).double()


def batch_norm_results(layer: BatchNorm, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    tensors = {"y": y, "x_grad": x.grad, "weight_grad": layer.weight.grad, "bias_grad": layer.bias.grad}
    return {k: v.detach() for k, v in tensors.items()} | {"mean": layer.running_mean, "var": layer.running_var}


def gradients(config: Config, data: TrainingData, share: slice, synchronise: bool) -> dict[str, Tensor]:
    """Of the joint objective on a share of one batch; float64, for rounding in float32 decides max-pooling ties."""
    plain = build_protected_classifier(config, phases(config)[0], 10, None, None).classifier.state_dict()
    system = build_protected_classifier(config, phases(config)[1], 10, None, plain).double().train()
    if synchronise:
        convert_sync_batchnorm(system)
    images, labels = next(iter(data.train.epoch(0)))
    images, labels = images[share].double(), labels[share]
    assert isinstance(system.protection, Learned)
    assert system.features is not None
    protected = torch.sigmoid(system.protection.unet(images))
    distance = (system.features(protected) - system.features(images)).square().mean()
    (nn.functional.cross_entropy(system.classifier(protected), labels) - 0.1 * distance).backward()
    return {name: p.grad for name, p in system.named_parameters() if p.grad is not None}


def work(rank: int, folder: Path, trees: dict[str, Any]) -> None:
    """One of two workers: batch normalisation alone, whole trainings, and a loss that is no number on one worker."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    for name, sides in BATCH_NORMS.items():
        layer, x, weights = batch_norm_case(sides)
        convert_sync_batchnorm(layer)
        assert type(layer) is (SyncBatchNorm2d if len(sides) == 2 else SyncBatchNorm1d)
        mine = slice(4 * rank, 4 * rank + 4)
        torch.save(batch_norm_results(layer, x[mine], weights[mine]), folder / f"bn_{name}_{rank}.pt")
    flat = SyncBatchNorm2d(1)(torch.full((4, 1, 3, 3), 12345.678))  # its variance is nothing but rounding
    assert flat.isfinite().all()
    config = validate(trees["sync"])
    half = slice(10 * rank, 10 * rank + 10)
    torch.save(
        gradients(config, load_data(config, torch.device("cpu")), half, synchronise=True),
        folder / f"gradients_{rank}.pt",
    )
    for name, tree in trees.items():
        result = fit(validate(tree), RecordingReporter(folder / name))
        torch.save(
            {"history": result.history, "state": result.system.trainable_state_dict()}, folder / f"{name}_{rank}.pt"
        )
    trainer.CHECK_STEPS = 1
    for name, tree in trees.items():
        with contextlib.suppress(TrainingInterrupted):
            fit(validate(tree), Stopped(folder / f"{name}_stopped", 5))
        dist.barrier()  # the first of them may still be writing
        assert list_checkpoints(Storage(folder / f"{name}_stopped"))[0].endswith("_part_500000")
        result = fit(validate(tree), RecordingReporter(folder / f"{name}_stopped"))
        torch.save(
            {"history": result.history, "state": result.system.trainable_state_dict()},
            folder / f"{name}_resumed_{rank}.pt",
        )
    data = load_data(config, torch.device("cpu"), rank, WORLD)
    if rank:
        data = dataclasses.replace(data, train=Poisoned(data.train, at=(1, 1)))
    try:
        fit(config, RecordingReporter(folder / "poisoned"), load=lambda: data)
    except TrainingError as error:
        (folder / f"poisoned_{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def cases(folder: Path) -> dict[str, Config]:
    """So slow that rounding is not amplified: at 0.1 a change of 1e-7 in the weights grows to 1e-1 in three epochs."""
    slow = {"train__epochs": EPOCHS, "train__optimizer__lr": "1.0e-5", "train__schedule": "constant"}
    code = {"train__alpha": 0, "protection__skips": 0, "protection__code": CODE}
    settings: dict[str, dict[str, Any]] = {
        "sync": {"train__sync_batchnorm": "true"},
        "local": {},
        "code": {"train__sync_batchnorm": "true", **code},
    }
    return {
        name: load_config("quickstart", flags=tiny_flags(folder, **slow | changes))
        for name, changes in settings.items()
    }


@pytest.fixture(scope="module")
def two_workers(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``work`` on two processes; returns the folder of their results."""
    folder = tmp_path_factory.mktemp("workers")
    trees = {name: config.model_dump(mode="json") for name, config in cases(folder).items()}
    workers = [processes.Process(target=work, args=(rank, folder, trees)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_synchronised_batch_norm_is_that_of_the_whole_batch(two_workers: Path, name: str) -> None:
    whole = batch_norm_results(*batch_norm_case(BATCH_NORMS[name]))
    parts = [torch.load(two_workers / f"bn_{name}_{rank}.pt", weights_only=True) for rank in range(WORLD)]
    close = {"rtol": 1e-9, "atol": 1e-9}
    for key in ("y", "x_grad"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key], **close)
    for key in ("weight_grad", "bias_grad"):
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key], **close)
    for key in ("mean", "var"):
        torch.testing.assert_close(parts[0][key], whole[key], **close)
        assert torch.equal(parts[0][key], parts[1][key])


@pytest.mark.slow
def test_two_workers_have_the_gradient_of_one(two_workers: Path, tmp_path: Path) -> None:
    config = cases(tmp_path)["sync"]
    whole = gradients(config, load_data(config, torch.device("cpu")), slice(0, 20), synchronise=False)
    halves = [torch.load(two_workers / f"gradients_{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert whole.keys() == halves[0].keys()
    for key, value in whole.items():
        mean = (halves[0][key] + halves[1][key]) / 2
        assert (mean - value).norm() <= 1e-8 * (1 + value.norm()), key
    assert any(not torch.allclose(halves[0][key], value, rtol=0.1) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sync", "local", "code"])
def test_two_stopped_workers_resume_to_the_same_result(two_workers: Path, name: str) -> None:
    for rank in range(WORLD):
        whole = torch.load(two_workers / f"{name}_{rank}.pt", weights_only=True)
        resumed = torch.load(two_workers / f"{name}_resumed_{rank}.pt", weights_only=True)
        assert len(resumed["history"]) == len(whole["history"]) >= EPOCHS
        # Running statistics of batches are averaged once more, which rounds.
        assert losses(resumed["history"]) == {
            k: pytest.approx(v, rel=1e-5) for k, v in losses(whole["history"]).items()
        }
        for key, value in whole["state"].items():
            torch.testing.assert_close(
                resumed["state"][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def losses(history: list[EpochMetrics]) -> dict[str, list[float]]:
    return {key: [row[key] for row in history] for key in history[0] if key.endswith(("loss", "distance"))}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("sync", 1e-3), ("local", 0.2)])
def test_two_workers_train_as_one(two_workers: Path, tmp_path: Path, name: str, tolerance: float) -> None:
    """Synchronised, rounding is all that differs; otherwise each worker normalises by its own half of a batch."""
    results = [torch.load(two_workers / f"{name}_{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert same(results[0]["state"], results[1]["state"]), "workers part ways"
    together = losses(results[0]["history"])
    assert together == losses(results[1]["history"])
    assert [row["world"] for row in results[0]["history"]] == [WORLD] * (EPOCHS + 1)
    history = fit(cases(tmp_path)[name], RecordingReporter(tmp_path)).history
    alone = losses(history)
    for key, values in alone.items():
        assert together[key] == pytest.approx(values, rel=tolerance, abs=1e-6), key
    assert [row["step"] for row in results[0]["history"]] == [row["step"] for row in history]
    assert (together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)) == (name == "sync")


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_worker_stops_all(two_workers: Path) -> None:
    messages = {(two_workers / f"poisoned_{rank}.txt").read_text() for rank in range(WORLD)}
    assert len(messages) == 1
    assert messages.pop().startswith("the loss is not a finite number at step 3 ")


@pytest.mark.slow
def test_one_process_continues_what_two_have_begun(two_workers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_workers / "sync", tmp_path / "run")
    before = newest(folder)[1]
    longer = cases(tmp_path)["sync"].model_dump(mode="json")
    longer["train"]["epochs"] = EPOCHS + 1
    history = fit(validate(longer), RecordingReporter(folder)).history
    assert history[:-1] == before
    assert [row["world"] for row in history] == [2] * len(before) + [1]
