"""Searches on a real Ray: resumed after the driver died, with trials that diverge, and trials of several workers."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster, override, tiny_flags, wait_until

from raypp.bundle.load import load_private, load_public
from raypp.experiments.search import make_search_plan
from raypp.training.checkpoint import list_checkpoints
from raypp.utils.storage import Storage

pytestmark = pytest.mark.ray


def command(tmp_path: Path, name: str, *flags: str, **changes: object) -> list[str]:
    settings = [flag for flag in tiny_flags(tmp_path, **changes) if flag not in ("--cluster.storage", str(tmp_path))]
    settings += ["--search.attack", "{width: 4, train: {epochs: 1}}", "--search.suite", "null"]
    if "--search.space" not in flags:
        settings += ["--search.space.protection.skips", "[0, 1, 2]"]  # of a U-Net of depth 2
    return ["raypp", "tune", "quickstart", "--storage", str(tmp_path), "--name", name, *override(settings, flags)]


def results(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in folder.glob("trials/*/trial.json")}


def table(folder: Path) -> list[dict[str, Any]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_outlives_its_driver(cluster: Cluster, tmp_path: Path) -> None:
    """And a lost worker; trials that diverge are recorded and stop nothing."""
    from ray.tune import ExperimentAnalysis  # seconds, also where no test of this file is chosen

    folder = tmp_path / "search"
    space = (
        "{train.alpha: {low: 0.01, high: 1.0, log: true}, train.optimizer.lr: [0.05, 1.0e+12], protection.skips: null, "
        "train.schedule: null}"
    )
    flags = ["--search.space", space, "--search.num_trials", "8", "--search.scheduler", "none"]
    arguments = command(tmp_path, "search", *flags)
    process = cluster.popen(arguments)
    wait_until(lambda: len(results(folder)) >= 1, process)
    training = wait_until(lambda: cluster.head.processes("ImplicitFunc.train"), process)
    training[0].kill()  # its trial starts again
    wait_until(lambda: len(results(folder)) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    before = {name: path.stat().st_mtime_ns for name, path in results(folder).items()}

    refused = cluster.run(arguments)
    assert refused.returncode == 2
    assert "--resume continues it" in " ".join(refused.stderr.split())
    begun = time.time()
    resumed = cluster.run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = results(folder)
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    rows = table(folder)
    known = set(ExperimentAnalysis(str(folder / "tune")).results)
    assert len(known) == 8
    # Trials that ended in the last second before the driver died are in the table, and not in Tune's records.
    unnoted = {row["trial"] for row in rows} - known
    assert {name for name in unnoted if after[name].stat().st_mtime >= begun} == set()
    assert {row["status"] for row in rows} == {"done", "diverged"}
    assert all("not a finite number" in row["explanation"] for row in rows if row["status"] == "diverged")

    summary = json.loads((folder / "search.json").read_text())
    front = {point["trial"] for point in summary["front"]}
    assert front == {row["trial"] for row in rows if row["on_front"] == "true"}
    for name, trial in summary["best"].items():
        assert trial in front
        assert load_public(folder / "best" / name).image_size == (16, 16)
        load_private(folder / "best" / name)
    assert (folder / "front.png").exists()
    assert list(folder.glob("tune/*/events.out.tfevents.*")), "TensorBoard's logs"

    again = cluster.run([*arguments, "--resume"])
    assert again.returncode == 0
    assert {name: path.stat().st_mtime_ns for name, path in results(folder).items()} == {
        name: path.stat().st_mtime_ns for name, path in after.items()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_search_loses_nothing(cluster: Cluster, tmp_path: Path, workers: int) -> None:
    """Its two trials write checkpoints first, and go on from them: on two CPUs side by side where each has one worker,
    one after the other where each has two."""
    trials, epochs = tmp_path / "stopped" / "trials", 8
    flags = ["--cluster.num_workers", str(workers), "--search.num_trials", "2", "--search.scheduler", "none"]
    arguments = command(tmp_path, "stopped", *flags, train__epochs=epochs)

    def rows(trial: Path) -> list[dict[str, Any]]:
        file = trial / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    process = cluster.popen(arguments)
    wait_until(lambda: len([trial for trial in trials.glob("*") if len(rows(trial)) >= 3]) == 2 // workers, process)
    signalled = time.time()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "stopped; continue with --resume" in " ".join(err.split())
    before = {trial.name: rows(trial) for trial in trials.glob("*") if rows(trial)}
    assert len(before) == 2 // workers
    for name, rows_before in before.items():
        assert len(rows_before) < epochs, "the search ended before the stop request"
        newest = trials / name / "checkpoints" / list_checkpoints(Storage(trials / name))[0]
        assert (newest / "checkpoint.json").stat().st_mtime > signalled - 1  # an epoch may have ended just before

    resumed = cluster.run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    lines = table(tmp_path / "stopped")
    assert [line["status"] for line in lines] == ["done", "done"]
    for line in lines:
        now, rows_before = rows(trials / line["trial"]), before.get(line["trial"], [])
        assert now[: len(rows_before)] == rows_before
        assert {row["world"] for row in now} == {workers}
        assert [(row["phase"], row["epoch"]) for row in now] == [
            *(("plain", n + 1) for n in range(len(now) - epochs)), *(("joint", n + 1) for n in range(epochs)),
        ]  # fmt: skip


def test_a_population_passes_its_best_networks_on(cluster: Cluster, tmp_path: Path) -> None:
    """Of learning rates over five orders of magnitude most learn nothing: their trials take over better networks, with
    another rate, and go on from there."""
    folder = tmp_path / "population"
    rates = "{low: 1.0e-6, high: 0.1, log: true}"
    space = f"{{train.optimizer.lr: {rates}, train.alpha: null, protection.skips: null, train.schedule: null}}"
    flags = [
        "--search.space", space, "--search.objective", "accuracy", "--search.scheduler", "pbt",
        "--search.num_trials", "4", "--search.grace_epochs", "2", "--train.schedule", "{name: constant}",
        "--cluster.cpus_per_worker", "0.5",  # side by side; trials that take turns start again at every turn
    ]  # fmt: skip
    result = cluster.run(command(tmp_path, "population", *flags, train__epochs=8, data__source__num_train=120))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["status"] for row in table(folder)] == ["done"] * 4
    changed = 0
    for trial in results(folder):
        lines = (folder / "trials" / trial / "metrics.jsonl").read_text().splitlines()
        joint = [json.loads(line) for line in lines if '"joint"' in line]
        assert [row["epoch"] for row in joint] == list(range(1, 9))
        taken = {row["lr"] for row in joint}
        assert all(1e-6 <= rate <= 0.1 for rate in taken)
        changed += len(taken) > 1
    assert changed


def test_no_trial_copies_a_finished_network(tmp_path: Path) -> None:
    from ray.tune.schedulers import TrialScheduler

    from raypp.cluster.search_algorithms import build_scheduler

    rates = (
        "{train.optimizer.lr: {low: 0.01, high: 0.1}, train.alpha: null, protection.skips: null, train.schedule: null}"
    )
    flags = ["--search.space", rates, "--search.objective", "accuracy", "--search.scheduler", "pbt"]
    flags += ["--train.schedule", "{name: constant}"]
    population = build_scheduler(make_search_plan("quickstart", flags=flags, storage=str(tmp_path), name="s"))
    for epoch in (8, 9):  # the last, and the report after the attack
        result = {"epoch": epoch, "epochs": 8, "final_phase_accuracy": 0.5}
        assert population.on_trial_result(None, None, result) == TrialScheduler.CONTINUE


def test_budgets_end_a_search_and_every_trial_is_recorded(cluster: Cluster, tmp_path: Path) -> None:
    """The baseline of the constraint is trained before, and the best bundle is attacked after."""
    folder = tmp_path / "budget"
    suite = tmp_path / "suite.yaml"
    attacks = {"feature_reconstruction": {}, "inverse": {"width": 4, "train": {"epochs": 1}}}
    suite.write_text(json.dumps({"num_queries": 20, "curve": False, "reference_epochs": 0, "attacks": attacks}))
    flags = [
        "--search.num_trials", "1000", "--search.scheduler", "median", "--search.max_minutes", "0.1",
        "--search.min_accuracy", "plain - 1.0", "--search.suite", str(suite), "--search.num_attacked", "1",
    ]  # fmt: skip
    result = cluster.run(command(tmp_path, "budget", *flags))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = table(folder)
    assert 1 <= len(rows) < 200
    assert all(row["status"] in ("done", "stopped early") for row in rows)
    assert (folder / "plain" / "summary.json").exists()
    summary = json.loads((folder / "search.json").read_text())
    assert len(summary["scorecards"]) == 1
    assert summary["least_accuracy"] <= 0
    (trial,) = summary["scorecards"]
    name = next(name for name, best in summary["best"].items() if best == trial)
    assert (folder / "best" / name / "private" / "scorecard.json").exists()
    assert (folder / "report" / "report.html").stat().st_size > 10_000


def test_a_trial_whose_worker_died_says_so() -> None:
    from ray.exceptions import OutOfMemoryError, RayActorError

    from raypp.cluster.search_progress import _reason

    assert _reason(None) == "its worker died while it started"
    assert _reason(RayActorError()) == "its worker died too often"
    assert "out of memory" in _reason(OutOfMemoryError("x"))
    assert _reason(ValueError("a\nb")) == "ValueError: a b"


def test_patience_ends_a_search_that_no_longer_improves() -> None:
    from raypp.cluster.search_algorithms import PatienceStopper

    stop = PatienceStopper(2, "both", None)
    for accuracy, leakage, ends in ((0.5, 0.5, False), (0.4, 0.6, False), (0.6, 0.6, False), (0.5, 0.5, False),
                                    (0.3, 0.7, True)):  # fmt: skip
        stop("t", {"accuracy": accuracy, "leakage": 0.0, "finished": False})  # an epoch is no end
        stop("t", {"accuracy": accuracy, "leakage": leakage, "objective_score": accuracy, "finished": True})
        assert stop.stop_all() is ends
