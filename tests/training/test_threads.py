"""Number of threads of torch while other processes use the cores."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from raypp.training import threads
from raypp.training.threads import AdaptiveThreads, num_threads
from raypp.utils import runtime


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "cores", "others", "expected"),
    [(2, 2, 0.0, 2), (2, 2, 0.25, 2), (2, 2, 0.67, 1), (2, 2, 1.0, 1), (2, 2, 2.0, 1), (2, 2, -0.1, 2),
     (16, 16, 5.3, 11), (16, 16, 8.0, 8), (2, 4, 2.0, 2), (2, 4, 3.0, 1), (1, 8, 0.0, 1)],
)  # fmt: skip
def test_threads_give_up_the_cores_that_others_use(most: int, cores: int, others: float, expected: int) -> None:
    assert num_threads(most, cores, others) == expected


def test_threads_converge_next_to_busy_threads() -> None:
    """Busy threads get the share of the cores that a fair scheduler gives them; the number settles."""
    most = cores = 16
    now = most
    for _ in range(20):
        others = min(8.0, 8 * cores / (8 + now))
        now = num_threads(most, cores, others)
    assert now == 8


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(runtime.num_cores() != 2 or not threads.STAT.exists(), reason="needs Linux and exactly two cores")
def test_a_busy_process_takes_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS", 0.3)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with AdaptiveThreads() as adaptive:
            end = time.monotonic() + 1.5
            while torch.get_num_threads() == 2 and time.monotonic() < end:
                time.sleep(0.05)
                adaptive.update()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("two_threads")
def test_threads_stay_where_the_setting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS", 0.0)
    monkeypatch.setattr(threads, "num_threads", lambda *_: 1)
    with AdaptiveThreads(enabled=False) as adaptive:
        adaptive.update()
        assert torch.get_num_threads() == 2
    with AdaptiveThreads() as adaptive:
        time.sleep(0.02)
        adaptive.update()
        assert torch.get_num_threads() == (1 if adaptive.enabled else 2)
    assert torch.get_num_threads() == 2
