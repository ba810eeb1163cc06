"""How many replicas the policy wants, and how busy a replica says it is."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from raypp.serve import inference_thread
from raypp.serve.inference_thread import InferenceThread
from raypp.serve.scaling import BUSY, MAX_WAITING, WAITING_IMAGES, scale_by_images

LIMIT = 4096


def context(waiting: list[float], requests: float = 0.0, busy: float = 0.0, current: int | None = None) -> Any:
    """Serve's view of replicas in which so many images wait, each busy for this share of the time."""
    values = {WAITING_IMAGES: waiting, MAX_WAITING: [LIMIT] * len(waiting), BUSY: [busy] * len(waiting)}
    num_replicas = len(waiting) if current is None else current
    return SimpleNamespace(
        current_num_replicas=num_replicas,
        target_num_replicas=max(num_replicas, 1),
        total_num_requests=requests,
        aggregated_metrics={name: dict(enumerate(numbers)) for name, numbers in values.items()},
        config=SimpleNamespace(target_ongoing_requests=48),
    )


def wanted(waiting: list[float], requests: float = 0.0, busy: float = 0.0, current: int | None = None) -> int:
    """Serve rounds up."""
    number, state = scale_by_images(context(waiting, requests, busy, current))
    assert state == {}
    return max(1, math.ceil(number))


def test_full_bodies_start_a_replica_long_before_the_limit() -> None:
    """12 requests of 256 images are far from 48 requests, and from 4,096 images."""
    assert wanted([12 * 256], requests=12) == 3
    assert wanted([5 * 256], requests=5) == 2
    assert wanted([4 * 256], requests=4) == 1
    assert wanted([1024, 1024, 1024], requests=12) == 3  # the same load on three replicas: no fourth


def test_many_small_requests_start_a_replica_too() -> None:
    assert wanted([64], requests=64) == 2
    assert wanted([40], requests=40) == 1


@pytest.mark.parametrize(("busy", "num"), [(0.9, 3), (0.6, 3), (0.45, 2), (0.2, 1), (0.0, 1)])
def test_replicas_stop_if_the_others_can_take_their_work(busy: float, num: int) -> None:
    assert wanted([10, 10, 10], busy=busy) == num


def test_work_alone_starts_no_replica() -> None:
    """A client that waits for each answer can make a replica compute all the time."""
    assert wanted([256], requests=1, busy=1.0) == 1


def test_replicas_without_a_report_count_as_idle() -> None:
    assert wanted([2048], current=2) == 2
    empty = context([], requests=3, current=1)
    empty.aggregated_metrics = None
    assert scale_by_images(empty)[0] < 1
    assert scale_by_images(context([], current=0))[0] == 1  # none runs yet: as many as are starting


def test_the_thread_measures_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(inference_thread.time, "monotonic", lambda: clock[0])
    thread = InferenceThread()
    inside: list[float] = []

    def work(seconds: float) -> float:
        clock[0] += seconds
        inside.append(thread.seconds_running())
        return thread.busy_share()

    async def check() -> None:
        clock[0] += 6
        assert await thread.run(work, 2) == 0.25  # while it runs
        clock[0] += 1
        await thread.run(lambda: None)
        assert thread.busy_share() == 0.0
        await thread.run(lambda: clock.__setitem__(0, clock[0] + 3))
        clock[0] += 1
        assert thread.busy_share() == 0.75
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
        assert thread.seconds_running() == 0.0

    asyncio.run(check())
    assert inside == [2]
