"""Trackers of runs and trials, each by its real client: TensorBoard's files, MLflow's store, wandb's offline mode."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from event_files import hyperparameters, scalars

from raypp.experiments import tracking
from raypp.experiments.search import make_search_plan
from raypp.experiments.tracking import TrackedRun, TrackedTrials, Tracking, check_trackers
from raypp.training.protected_classifier import phases
from raypp.utils.errors import ConfigError
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage


def row(phase: str, epoch: int) -> dict[str, Any]:
    return {
        "phase": phase, "epoch": epoch, "epochs": 2, "step": 3 * epoch, "lr": 0.1, "train_loss": 1 / epoch,
        "val_accuracy": 0.5, "images_per_s": 100.0, "seconds": 1.0, "world": 1, "best": True,
    }  # fmt: skip


def test_a_tracker_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\); allowed: "):
        check_trackers(["tensorbord"])
    check_trackers(["tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"^--track wandb needs the package wandb, .*: uv sync --extra wandb$"):
        check_trackers(["wandb"])


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(tiny: Tiny, tmp_path: Path) -> None:
    config, folder = tiny(train__alpha=0.25), Storage(tmp_path / "run")
    for epoch in (1, 2):
        tracker = Tracking(["tensorboard"], folder, "run", None, config, pytest.fail)
        run = TrackedRun(ProgressListener(), tracker, phases(config))
        run.epoch(row("joint", epoch))
        end = time.monotonic() + 10  # a process that is killed loses at most a second of events
        while sorted(scalars(tmp_path / "run" / "tensorboard").get("joint/lr", [])) != [2, 3][:epoch]:
            assert time.monotonic() < end
            time.sleep(0.05)
    run.results({"test": {"accuracy": 0.5, "classes": ["a"]}, "epochs": {"plain": 1, "joint": 2}})
    tracker.finish(succeeded=True)
    steps = scalars(tmp_path / "run" / "tensorboard")
    for metric in ("train_loss", "val_accuracy", "lr"):
        assert sorted(steps[f"joint/{metric}"]) == [2, 3]  # after one epoch of the plain phase
    assert steps["test/accuracy"] == [3]
    assert "joint/world" not in steps
    settings = hyperparameters(tmp_path / "run" / "tensorboard")
    assert settings["train.alpha"] == 0.25
    assert settings["protection.name"] == "learned"


def test_a_tracker_that_fails_stops_no_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = Tracking(["tensorboard"], Storage(tmp_path), "run", None, tiny(), warnings.append)
    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", lambda *_: 1 / 0)
    for epoch in (1, 2):
        tracker.log_epoch(row("joint", epoch), epoch)
    tracker.finish(succeeded=True)
    assert warnings == ["--track tensorboard: division by zero; the run continues without this tracker"]


def test_a_trial_of_contradicting_settings_needs_no_tracker(tmp_path: Path) -> None:
    plan = make_search_plan("quickstart", storage=str(tmp_path), name="s")
    trials = TrackedTrials(["tensorboard"], plan, lambda *_: pytest.fail("a warning"))
    result = {"finished": True, "accuracy": 0.0, "leakage": 1.0, "reidentification_rate": 1.0, "epoch": 1, "epochs": 0}
    trials.log("bad", {"train.batch_size": -1}, result)
    trials.log("good", {"train.alpha": 0.5}, result | row("joint", 1) | {"finished": False, "epoch": 2})
    trials.close()
    assert not (tmp_path / "s" / tracking.TRACKING / "bad").exists()
    folder = tmp_path / "s" / tracking.TRACKING / "good" / "tensorboard"
    assert scalars(folder)["joint/train_loss"] == [2]
    assert hyperparameters(folder)["train.alpha"] == 0.5


@pytest.mark.parametrize("finished", [False, True])
def test_epochs_that_a_killed_search_has_not_recorded_are_added(tmp_path: Path, finished: bool) -> None:
    plan = make_search_plan("quickstart", storage=str(tmp_path), name="s", flags=["--train.plain_epochs", "1"])
    rows = [row("plain", 1), row("joint", 1), row("joint", 2)]
    plan.storage.write("trials/a/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in rows).encode())
    trials = TrackedTrials(["tensorboard"], plan, lambda *_: pytest.fail("a warning"))
    if finished:
        scores = {"accuracy": 0.5, "leakage": 0.2, "reidentification_rate": 0.1}
        trials.log("a", {"train.alpha": 0.5}, scores | {"finished": True, "epoch": 4, "epochs": 3})
    else:
        trials.log("a", {"train.alpha": 0.5}, rows[-1] | {"finished": False, "epoch": 3})
    trials.finish("a", succeeded=True)
    steps = scalars(tmp_path / "s" / tracking.TRACKING / "a" / "tensorboard")
    assert (steps["plain/lr"], steps["joint/lr"]) == ([1], [2, 3])
    assert steps.get("leakage", []) == [3] * finished


@pytest.mark.slow
def test_mlflow_continues_a_run_in_its_store(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to create
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    for epoch, epochs in ((1, 1), (2, 2)):
        config = tiny(train__epochs=epochs)  # a resumed run may have another number of epochs
        tracker = Tracking(["mlflow"], Storage(tmp_path / "run"), "run", "search", config, pytest.fail)
        tracker.log_epoch(row("joint", epoch), epoch)
        tracker.finish(succeeded=epoch == 2)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("search").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["protection.name"] == "learned"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "joint/train_loss")] == [
        (1, 1.0), (2, 0.5),
    ]  # fmt: skip


@pytest.mark.slow
def test_wandb_records_offline(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = {}
    trackers = {
        name: Tracking(["wandb"], Storage(tmp_path / name), name, "search", tiny(), pytest.fail) for name in ("a", "b")
    }
    for name, tracker in trackers.items():  # side by side, as trials are
        for epoch in (1, 2):
            tracker.log_epoch(row("joint", epoch), epoch)
        tracker.finish(succeeded=True)
        names[name] = json.loads((tmp_path / name / tracking.IDENTIFIERS).read_text())["wandb"]
    assert names["a"] != names["b"]
    for name, identifier in names.items():
        (recorded,) = (tmp_path / name / "wandb").glob(f"offline-run-*-{identifier}/run-{identifier}.wandb")
        data = recorded.read_bytes()
        assert b"joint/train_loss" in data
        assert b"protection.name" in data
