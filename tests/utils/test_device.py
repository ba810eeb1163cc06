"""The device of a process outside of Ray; ``tests/cluster/test_workers.py`` has Ray's workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Tiny, Trained

from raypp.dispatch import default_suite, uses_ray
from raypp.experiments import attack_plan, search_trial, training_run
from raypp.experiments.search import make_search_plan
from raypp.training.reporter import Reporter
from raypp.utils.device import default_device, num_gpus
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch reports two GPUs; the use of one fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_a_process_outside_of_ray_uses_the_gpus_of_its_machine(tmp_path: Path, tiny: Tiny) -> None:
    assert (default_device().type, num_gpus()) == ("cuda", 2)
    assert Reporter(Storage(tmp_path), ProgressListener()).device.type == "cuda"
    assert default_suite() == "small"
    assert uses_ray(None, tiny().cluster)


@pytest.mark.usefixtures("two_gpus")
def test_cluster_gpu_false_keeps_work_in_this_process_off_the_gpu(
    monkeypatch: pytest.MonkeyPatch, trained: Trained, tmp_path: Path, tiny: Tiny
) -> None:
    flags = ["--cluster.gpu", "false", "--num_queries", "10"]
    plan = attack_plan.make_attack_plan(bundle=str(trained.bundle), storage=tmp_path, name="a", flags=flags)
    assert attack_plan.load_target_of(plan).access.device.type == "cpu"

    search = make_search_plan("quickstart", storage=str(tmp_path), name="s").search
    quick = search_trial._validation_target(str(trained.bundle), tiny(cluster__gpu=False), search)
    assert quick.access.device.type == "cpu"

    devices: list[str] = []
    monkeypatch.setattr(training_run, "fit", lambda config, reporter, *_: devices.append(reporter.device.type))
    monkeypatch.setattr(training_run, "finalize_run", lambda *_: {})
    for gpu in (False, None):
        config = tiny() if gpu is None else tiny(cluster__gpu=gpu)
        run = training_run.Run(Storage(tmp_path), config, None, None, ())
        training_run.train_locally(run, ProgressListener())
    assert devices == ["cpu", "cuda"]


def test_a_machine_without_a_gpu_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (default_device().type, num_gpus()) == ("cpu", 0)
    assert default_device(gpu=True).type == "cpu"
