"""Resources of Ray's workers on a Ray with two GPUs that do not exist: devices, memory of streams, shared storage."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raypp.cluster import session
from raypp.utils.errors import ConfigError

pytestmark = pytest.mark.ray

NUM_CPUS = 6
SECONDS, NUM_BLOCKS = 0.3, 12
STREAM = ["--data.stream", "true", "--data.image_size", "[8, 8]", "--data.stream_mib_per_worker", "40"]


@pytest.fixture(scope="module")
def report(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measurements of :func:`measure` in a process that starts its own Ray."""
    folder = tmp_path_factory.mktemp("workers")
    process = processes.Process(target=measure, args=(folder,))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0, (folder / "log").read_text()
    result: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return result


def measure(folder: Path) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")  # others on this machine write into the default one
    import ray

    from raypp.cluster.ray_internals import HEAD, loopback_only

    with loopback_only():
        ray.init(address="local", num_cpus=NUM_CPUS, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        report = {
            "trial": trial_states(folder),
            "devices": devices(ray),
            "tasks": {str(gpu): device_of_task(folder, gpu) for gpu in (None, False)},
            "blocks": {num: blocks_in_flight(ray, num) for num in (1, 3)},
            "storage": error_of_storage(folder),
            "loader": loader_options(),
            "head": ray.cluster_resources().get(HEAD),
            "node": ray.nodes()[0]["NodeManagerAddress"],
            "reserved": reserved_by_groups(ray),
            "events": polled_events(),
            "drained": drain_this_node(ray),
            "ended": ended_processes(),
        }
    finally:
        ray.shutdown()
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    (folder / "report.json").write_text(json.dumps(report))


def make_choose() -> Callable[[], list[Any]]:
    """A function that pickles by value: workers do not have this module."""

    def choose() -> list[Any]:
        """Device and number of GPUs in this process, where torch sees eight."""
        import torch

        from raypp.utils.device import default_device, num_gpus

        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 8
        return [default_device().type, num_gpus(), default_device(gpu=False).type]

    return choose


def devices(ray: Any) -> dict[str, list[Any]]:
    choose = make_choose()

    class Actor:
        def choose(self) -> list[Any]:
            return choose()

        async def choose_in_thread(self) -> list[Any]:
            return await asyncio.to_thread(choose)

    def choices(num_gpus: float) -> tuple[list[Any], list[Any], list[Any]]:
        in_task = ray.get(ray.remote(num_gpus=num_gpus)(choose).remote())  # before the actor takes all GPUs
        actor = ray.remote(num_cpus=0, num_gpus=num_gpus)(Actor).remote()
        return (in_task, *ray.get([actor.choose.remote(), actor.choose_in_thread.remote()]))

    return {"0": choices(0), "0.25": choices(0.25), "2": choices(2), "driver": [choose()]}


def device_of_task(folder: Path, gpu: bool | None) -> list[Any]:
    """The device of a task of :func:`run_tasks`: attacks and cells of Table I."""
    from raypp.cluster.tasks import run_tasks
    from raypp.config.schema import Cluster
    from raypp.utils.progress import MultiProgressDisplay
    from raypp.utils.storage import Storage

    choose = make_choose()
    outcomes: list[Any] = []
    run_tasks(
        lambda _: choose(), {"a": ()}, Cluster(gpu=gpu), Storage(folder / "tasks"), MultiProgressDisplay(1, quiet=True),
        lambda _, outcome: outcomes.append(outcome.get("result", outcome)), what="a task",
    )  # fmt: skip
    assert list((folder / "tasks").iterdir()) == [], "the driver's mark is left"
    return outcomes


def error_of_storage(folder: Path) -> str:
    """The error of a task for which the path of the storage names another folder than for the driver."""
    from raypp.cluster.tasks import run_tasks
    from raypp.config.schema import Cluster
    from raypp.utils.progress import MultiProgressDisplay
    from raypp.utils.storage import Storage

    (folder / "driver").mkdir()
    os.chdir(folder / "driver")
    storage, display = Storage("/proc/self/cwd/runs"), MultiProgressDisplay(1, quiet=True)
    done: list[str] = []
    try:
        run_tasks(
            lambda _: None, {"a": ()}, Cluster(), storage, display, lambda name, _: done.append(name), what="a task"
        )
    except ConfigError as error:
        assert not done
        return str(error)
    return "no error"


def trial_states(folder: Path) -> list[Any]:
    """What :mod:`raypp.cluster.ray_internals` tells of a trial before its start, while it runs, and after its end."""
    from ray.exceptions import RayTaskError
    from ray.train._internal.storage import StorageContext
    from ray.tune.experiment import Trial

    from raypp.cluster.ray_internals import has_ended, is_running, skip_second_checkpoint, trial_error

    trial = Trial("raypp", stub=True, storage=StorageContext(str(folder), "search", trial_dir_name="trial"))
    trial.init_local_path()
    results: list[dict[str, Any]] = [{}, {}]
    skip_second_checkpoint(trial, results[0])
    trial.temporary_state.saving_to = object()
    skip_second_checkpoint(trial, results[1])
    trial.temporary_state.saving_to = None
    states: list[Any] = [results, has_ended(trial), is_running(trial), trial_error(trial)]
    trial.set_status(Trial.RUNNING)
    trial.handle_error(RayTaskError("train_trial", "a traceback", ValueError("a reason")))
    shutil.copytree(trial.local_path, trial.storage.trial_fs_path)  # as Tune does
    error = trial_error(trial)
    assert isinstance(error, RayTaskError)
    running = is_running(trial)
    trial.set_status(Trial.TERMINATED)
    assert trial.is_finished()
    return [*states, running, str(error.cause), has_ended(trial)]


def reserved_by_groups(ray: Any) -> list[dict[str, float]]:
    """Resources that placement groups of this job reserve, with one and without; another job's do not count."""
    from raypp.cluster.ray_internals import reserved_resources

    group = ray.util.placement_group([{"CPU": 1}, {"CPU": 2, "GPU": 1}])
    ray.get(group.ready())
    reserved = reserved_resources()
    table, other = ray.util.placement_group_table, ray.get_runtime_context().get_job_id()[::-1]
    ray.util.placement_group_table = lambda: {
        key: entry | {"placement_group_id": entry["placement_group_id"][: -len(other)] + other}
        for key, entry in table().items()
    }
    in_other_job = reserved_resources()
    ray.util.placement_group_table = table
    ray.util.remove_placement_group(group)
    end = time.monotonic() + 20
    while reserved_resources() and time.monotonic() < end:
        time.sleep(0.1)
    return [reserved, in_other_job, reserved_resources()]


def polled_events() -> list[list[Any]]:
    """Events of an actor: those taken before it has started, afterwards, and at the end."""
    from raypp.cluster.progress_actor import EventPoll, create_progress_actor

    actor = create_progress_actor()
    poll, taken = EventPoll(actor, 0.2), list[list[Any]]()
    taken.append(poll.take())
    for number in range(3):
        actor.report.remote("trial", "warn", number)
    taken.append([])
    end = time.monotonic() + 30
    while len(taken[1]) < 3 and time.monotonic() < end:
        taken[1] += poll.take()
        time.sleep(0.05)
    actor.report.remote("trial", "warn", 3)
    taken.append(poll.take())  # may leave a request without an answer
    actor.report.remote("trial", "warn", 4)
    taken[2] += poll.take_last(30)
    return [[value for _, _, value in events] for events in taken]


def drain_this_node(ray: Any) -> list[list[str]]:
    """The nodes that the cluster drains after a spot notice, and all. The command runs in this process."""
    from ray._raylet import GcsClient
    from ray.scripts.scripts import cli

    from raypp.cluster import spot_notice

    def run(command: list[str], *, env: dict[str, str], check: bool) -> None:
        assert (command[0], env["RAY_ADDRESS"], check) == ("ray", address, True)
        cli.main(command[1:], standalone_mode=False)

    address = ray.get_runtime_context().gcs_address
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spot_notice.subprocess, "run", run)
        spot_notice.drain(address, datetime.now(UTC) + timedelta(seconds=120))
    return [list(GcsClient(address=address).get_draining_nodes()), [node["NodeID"] for node in ray.nodes()]]


def ended_processes() -> list[bool]:
    """Whether a process of the node has ended, before and after one does."""
    from raypp.cluster.ray_internals import processes_ended

    before = processes_ended()
    monitor = next(part for part in psutil.Process().children() if "log_monitor" in " ".join(part.cmdline()))
    monitor.kill()
    end = time.monotonic() + 20
    while not processes_ended() and time.monotonic() < end:
        time.sleep(0.1)
    return [before, processes_ended()]


def blocks_in_flight(ray: Any, num_workers: int) -> int:
    """The largest number of blocks of 16 MiB that tasks of a stream make at the same time."""
    from raypp.config.presets import load_config
    from raypp.data.streaming import BLOCK_BYTES, build_execution_options

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        start = time.time()
        time.sleep(SECONDS)
        return {"start": [start], "end": [time.time()], "image": np.zeros((1, BLOCK_BYTES), np.uint8)}

    rows = ray.data.range(NUM_BLOCKS, override_num_blocks=NUM_BLOCKS).map_batches(decode, batch_size=1)
    rows.context.enable_progress_bars = False
    rows.context.target_max_block_size = BLOCK_BYTES
    rows.context.execution_options = build_execution_options(load_config("quickstart", flags=STREAM), num_workers)
    times = [(row["start"], row["end"]) for row in rows.iter_rows()]
    return max(sum(start <= moment < end for start, end in times) for moment, _ in times)


def loader_options() -> dict[str, Any]:
    """How a loader asks Ray for batches, on a GPU and on the CPU."""
    import ray.train
    import torch

    from raypp.config.presets import load_config
    from raypp.data import streaming

    asked: dict[str, Any] = {}

    class Shard:
        def iter_torch_batches(self, **options: Any) -> list[Any]:
            asked[options["device"].type] = {key: options[key] for key in ("pin_memory", "prefetch_batches")}
            return []

    ray.train.get_dataset_shard = lambda _: Shard()
    loader = object.__new__(streaming.StreamLoader)
    loader._config, loader._batch_size = load_config("quickstart", flags=STREAM), 2
    for device in ("cuda", "cpu"):
        loader._device = torch.device(device)
        assert list(loader.epoch(0)) == []
    return asked


def test_a_worker_uses_a_gpu_only_if_ray_has_assigned_it(report: dict[str, Any]) -> None:
    devices = report["devices"]
    assert devices["0"] == [["cpu", 0, "cpu"]] * 3
    assert devices["0.25"] == [["cuda", 1, "cpu"]] * 3
    assert devices["2"] == [["cuda", 2, "cpu"]] * 3
    assert devices["driver"] == [["cuda", 8, "cpu"]]


def test_cluster_gpu_false_keeps_tasks_off_the_gpu(report: dict[str, Any]) -> None:
    assert report["tasks"] == {"None": [["cuda", 1, "cpu"]], "False": [["cpu", 0, "cpu"]]}


def test_more_workers_have_more_blocks_in_flight(report: dict[str, Any]) -> None:
    one, three = report["blocks"]["1"], report["blocks"]["3"]
    assert 1 <= one <= 3
    assert one < three <= NUM_CPUS


def test_copies_to_a_gpu_run_ahead_from_pinned_memory(report: dict[str, Any]) -> None:
    assert report["loader"] == {
        "cuda": {"pin_memory": True, "prefetch_batches": 2},
        "cpu": {"pin_memory": False, "prefetch_batches": 2},
    }


def test_storage_that_nodes_do_not_share_is_refused(report: dict[str, Any]) -> None:
    assert report["storage"] == (
        "node 127.0.0.1 does not see the driver's files in /proc/self/cwd/runs; set --storage to a folder that all "
        "nodes share, or to a URI such as s3://bucket/runs"
    )


def test_a_ray_that_starts_here_listens_on_loopback(report: dict[str, Any]) -> None:
    """ray_internals.loopback_only and HEAD."""
    assert report["node"] == "127.0.0.1"
    assert report["head"] == 1


def test_tune_tells_whether_a_trial_runs_and_why_it_failed(report: dict[str, Any]) -> None:
    assert report["trial"] == [[{}, {"should_checkpoint": False}], False, False, None, True, "a reason", True]


def test_resources_of_a_jobs_placement_groups_are_reserved(report: dict[str, Any]) -> None:
    assert report["reserved"] == [{"CPU": 3, "GPU": 1}, {}, {}]


def test_polling_a_progress_actor_waits_for_nothing_and_loses_nothing(report: dict[str, Any]) -> None:
    assert report["events"] == [[], [0, 1, 2], [3, 4]]


def test_the_cluster_accepts_the_drain_of_a_spot_notice(report: dict[str, Any]) -> None:
    draining, nodes = report["drained"]
    assert draining == nodes


def test_a_process_of_the_node_that_ends_is_noticed(report: dict[str, Any]) -> None:
    assert report["ended"] == [False, True]


def test_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is 'ray://head:10001'.*ray job submit --address http://HOST"):
        session.check_address()


def test_a_ray_that_runs_on_this_machine_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> list[str]:
        caplog.clear()
        session._start()
        session._started_here = False
        return [record.getMessage() for record in caplog.records]

    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr(session, "is_loopback", lambda host: host == "127.0.0.2")
    with caplog.at_level(logging.WARNING), socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(session, "started_address", lambda: address)
        assert start() == [f"starting a Ray for this command; RAY_ADDRESS={address} uses the one that runs here"]
        # Another raypp's listens on loopback.
        monkeypatch.setattr(session, "started_address", lambda: address.replace("127.0.0.1", "127.0.0.2"))
        assert start() == []
        monkeypatch.setattr(session, "started_address", lambda: None)
        assert start() == []
    monkeypatch.setattr(session, "started_address", lambda: address)  # it has ended
    assert start() == []
