"""Searches on a real Ray: resumed after the driver died, with trials that diverge, and trials of several workers."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Cluster, override, tiny_flags, wait_until
from event_files import hyperparameters, scalars

import raypp
from raypp.bundle.load import load_private, load_public
from raypp.bundle.manifest import verify
from raypp.cli.main import main
from raypp.experiments.search import make_search_plan
from raypp.results import SearchResult
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


class InOneSession:
    """Calls a function in a process with one session of Ray; returns the states of placement groups that are left."""

    def __init__(self, cluster: Cluster, processes: ForkServerContext) -> None:
        self.environment, self.processes = dict(cluster.client), processes

    def __call__(self, function: Callable[..., None], *arguments: Any) -> list[str]:
        states = self.processes.Queue()
        process = self.processes.Process(target=_in_session, args=(self.environment, states, function, *arguments))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
        listed: list[str] = states.get(timeout=10)
        return listed


def _in_session(environment: Mapping[str, str], states: Any, function: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    from raypp.cluster.session import ray_session

    with ray_session():
        function(*arguments)
        in_session = _placement_groups()
    time.sleep(3)  # a controller of Ray Train that outlives its driver may reserve resources
    with ray_session():
        states.put([*in_session, *_placement_groups()])


def _placement_groups() -> list[str]:
    """States of placement groups that Ray does not remove within 20 s."""
    import ray

    end, states = time.monotonic() + 20, ["unknown"]
    while states and time.monotonic() < end:
        time.sleep(0.2)
        states = [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return states


@pytest.fixture
def in_one_session(cluster: Cluster, processes: ForkServerContext) -> InOneSession:
    return InOneSession(cluster, processes)


def table(folder: Path) -> list[dict[str, Any]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_outlives_its_driver(cluster: Cluster, tmp_path: Path) -> None:
    """And a lost worker; trials that diverge are recorded and stop nothing. Ray's own results have all bundles."""
    from ray.tune import Tuner  # seconds, also where no test of this file is chosen

    from raypp.cluster.trial import train_trial

    folder = tmp_path / "search"
    space = (
        "{train.alpha: {low: 0.01, high: 1.0, log: true}, train.optimizer.lr: [0.05, 1.0e+12], protection.skips: null, "
        "train.schedule: null}"
    )
    flags = ["--search.space", space, "--search.num_trials", "8", "--search.scheduler", "none"]
    arguments = [*command(tmp_path, "search", *flags), "--track", "tensorboard"]
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
    grid = Tuner.restore(str(folder / "tune"), trainable=train_trial).get_results()
    known = {result.metrics["trial_id"] for result in grid}
    assert len(known) == len(grid) == 8
    # Trials that ended in the last second before the driver died are in the table, and not in Tune's records.
    unnoted = {row["trial"] for row in rows} - known
    assert {name for name in unnoted if after[name].stat().st_mtime >= begun} == set()
    assert {row["status"] for row in rows} == {"done", "diverged"}
    assert all("not a finite number" in row["explanation"] for row in rows if row["status"] == "diverged")
    # The sampler goes on where it was: a new study would begin with the points of the first.
    assert len({row["train.alpha"] for row in rows if row["trial"] in known}) == 8
    best = grid.get_best_result("accuracy", "max")
    bundle = folder / "trials" / best.metrics["trial_id"] / "bundle"
    for result in grid:
        done = result.metrics["trial_id"] in {row["trial"] for row in rows if row["status"] == "done"}
        assert (result.checkpoint is not None) is done
        assert len(list(Path(result.path).glob("checkpoint_*"))) == done
    checkpoint = Path(best.checkpoint.path)
    assert raypp.load(checkpoint).public.about == raypp.load(bundle).public.about
    for path in (bundle, *bundle.rglob("*")):
        twin = checkpoint / path.relative_to(bundle)
        assert twin.samefile(path) is path.is_file(), "a checkpoint takes no space"
        assert twin.stat().st_mode == path.stat().st_mode, "a classifier that only its owner can read"
    (checkpoint / "private" / "manifest.json").unlink()
    verify(bundle / "private")

    summary = json.loads((folder / "search.json").read_text())
    front = {point["trial"] for point in summary["front"]}
    assert front == {row["trial"] for row in rows if row["on_front"] == "true"}
    for name, trial in summary["best"].items():
        assert trial in front
        assert load_public(folder / "best" / name).image_size == (16, 16)
        load_private(folder / "best" / name)
    assert (folder / "front.png").exists()
    assert not list(folder.glob("tune/*/events.out.tfevents.*"))
    for row in rows:
        tracked = folder / "tracking" / row["trial"] / "tensorboard"
        if row["status"] == "done":
            assert set(scalars(tracked)["joint/val_accuracy"]) == {2, 3}, "an epoch was reported to the killed driver"
            assert set(scalars(tracked)["leakage"]) == {3}
            assert f"{hyperparameters(tracked)['train.alpha']:.4g}" == f"{float(row['train.alpha']):.4g}"

    again = cluster.run([*arguments, "--resume"])
    assert again.returncode == 0
    assert {name: path.stat().st_mtime_ns for name, path in results(folder).items()} == {
        name: path.stat().st_mtime_ns for name, path in after.items()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_search_loses_nothing(
    cluster: Cluster, in_one_session: InOneSession, tmp_path: Path, workers: int
) -> None:
    """Its two trials write checkpoints first, and go on from them: on two CPUs side by side where each has one worker,
    one after the other where each has two. There, ASHA stops the second trial, which learns nothing. Median stopping
    compares four trials at least."""
    trials, epochs = tmp_path / "stopped" / "trials", 8
    space = "{train.optimizer.lr: [1.0e-9, 0.1], train.alpha: null, protection.skips: null, train.schedule: null}"
    flags = ["--cluster.num_workers", str(workers), "--search.num_trials", "2", "--search.grace_epochs", "1"]
    flags += ["--search.scheduler", "median" if workers == 1 else "asha", "--search.space", space]
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

    assert in_one_session(main, [*arguments[1:], "--resume"]) == []
    lines = table(tmp_path / "stopped")
    assert [line["status"] for line in lines] == ["done", "done" if workers == 1 else "stopped early"]
    for line in lines:
        if line["status"] == "stopped early":
            assert float(line["train.optimizer.lr"]) == 1e-9
            assert float(line["epochs"]) < epochs
            continue
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
    for trial in folder.glob("tune/train_trial_*"):
        # Of five, for every second of nine epochs and for the bundle.
        assert len(list(trial.glob("checkpoint_*"))) <= 4
    for result in SearchResult({}, str(folder)).result_grid:
        assert raypp.load(result.checkpoint.path).image_size == (16, 16)
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
    for epoch in (3, 8, 9):  # without a checkpoint, the last, and the report after the attack
        result = {"epoch": epoch, "epochs": 8, "final_phase_accuracy": 0.5}
        assert population.on_trial_result(None, None, result) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("scheduler", "stopped"), [("asha", {1: 2, 3: 2, 4: 2}), ("median", {3: 2, 4: 2})])
def test_schedulers_stop_trials_of_low_accuracy(
    in_one_session: InOneSession, tmp_path: Path, scheduler: str, stopped: dict[int, int]
) -> None:
    """At the epochs where they compare: trials that train nothing, one after the other, of one bundle or of two."""
    assert in_one_session(compare_trials, scheduler, tmp_path) == []
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert reports == [[stopped.get(number, 5), number not in stopped] for number in range(5)]


def compare_trials(scheduler: str, storage: Path) -> None:
    from ray import tune

    from raypp.cluster.search_algorithms import build_scheduler

    flags = ["--search.scheduler", scheduler, "--search.grace_epochs", "2", "--search.objective", "both"]
    plan = make_search_plan("quickstart", flags=flags, storage=str(storage), name="s")
    dumped = plan.dump()

    def trial(point: dict[str, Any]) -> None:  # Ray sends a local function by value
        from raypp.cluster.trial import TuneListener
        from raypp.experiments.search import restore_search_plan
        from raypp.training.task import Phase
        from raypp.utils.storage import Storage

        listener = TuneListener(restore_search_plan(dumped), None, None)
        listener.phases = [Phase("joint", 4)]
        for epoch in range(1, 5):
            listener.epoch({"phase": "joint", "epoch": epoch, "val_accuracy": point["accuracy"], "val_loss": 1.0})
        listener.end({"status": "diverged"}, Storage("unused"))

    def resources(point: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"CPU": 1}] * (1 + (point["accuracy"] in (0.9, 0.3))))

    grid = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={"accuracy": tune.grid_search([0.8, 0.4, 0.9, 0.3, 0.2])},
        tune_config=tune.TuneConfig(scheduler=build_scheduler(plan), max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name="schedule", storage_path=str(storage), verbose=0),
    ).fit()
    reports = [[result.metrics["epoch"], result.metrics["finished"]] for result in grid]  # in the order of the grid
    (storage / "reports.json").write_text(json.dumps(reports))


@pytest.mark.parametrize(
    ("storage", "num_trials", "seconds"),
    [("here", 20, "1"), ("here", 1000, "auto"), ("s3://bucket/searches?region=eu-west-1", 20, "auto")],
)
def test_short_local_searches_write_snapshots_each_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, num_trials: int, seconds: str
) -> None:
    """Tune reads the variable when a search starts; here, the search has no trials."""
    from raypp.cluster import tune

    seen: list[str | None] = []

    def fit() -> None:
        seen.append(os.environ.get(name))

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(name := "TUNE_GLOBAL_CHECKPOINT_S", raising=False)
    monkeypatch.setattr(tune, "_build_tuner", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(tune.tune, "with_parameters", lambda function, **_: function)  # starts Ray
    plan = make_search_plan("quickstart", flags=["--search.num_trials", str(num_trials)], storage=storage, name="s")
    trackers = SimpleNamespace(close=lambda: None)
    monitor: Any = SimpleNamespace(
        plan=plan, min_accuracy=None, actor=None, trackers=trackers, finish_search=lambda: None
    )
    tune._run_trials(monitor, {"CPU": 1}, 1, begun=False)
    assert seen == [seconds]
    assert name not in os.environ


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


def test_a_checkpoint_that_is_written_again_leaves_the_bundle(tmp_path: Path) -> None:
    """As by a trial of which a killed search had no snapshot. Tune's copy truncates the files that exist."""
    from pyarrow.fs import LocalFileSystem, copy_files

    from raypp.cluster.shared_files import separate_files, share_files

    bundle, checkpoint = tmp_path / "bundle", tmp_path / "checkpoint"
    secret = bundle / "private" / "key"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    secret.chmod(0o600)
    for _ in range(2):
        separate_files(bundle)
        copy_files(str(bundle), str(checkpoint), LocalFileSystem(), LocalFileSystem())
        share_files(bundle, checkpoint)
        share_files(bundle, checkpoint)
        assert (checkpoint / "private" / "key").samefile(secret)
        assert secret.read_text() == "secret"
        assert secret.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["bundle", "checkpoint", *["private", "key"] * 2]
    )


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
