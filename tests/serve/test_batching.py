"""Requests that wait together are computed together, while others are computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch

from raypp.serve.batching import PREFETCH, Answer, DynamicBatcher
from raypp.serve.loaded_model import Inference, LoadedModel


def job(first: int, num: int = 1) -> Inference:
    return cast(LoadedModel, None), torch.arange(first, first + num)


class Computer:
    """One thread, whose first batch is computed once it is released; keeps what each batch held."""

    def __init__(self, most: int) -> None:
        self.pool, self.first = ThreadPoolExecutor(1), threading.Event()
        self.seen: list[list[list[int]]] = []
        self.batches = DynamicBatcher(self.compute, self.double, most)

    async def compute(self, function: Callable[[], None]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function)

    def double(self, jobs: list[Inference]) -> list[Answer]:
        self.seen.append([images.tolist() for _, images in jobs])
        if len(self.seen) == 1:
            assert self.first.wait(30)
        if any(13 in images.tolist() for _, images in jobs):
            raise RuntimeError("unlucky")
        return [(2 * images, images > 0) for _, images in jobs]

    async def waiting(self, *jobs: Inference) -> list[asyncio.Task[Answer]]:
        """Have the first job's batch computed, and the others wait; returns once all are submitted."""
        tasks = [asyncio.create_task(self.batches.submit(jobs[0]))]
        while not self.seen:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(self.batches.submit(one)) for one in jobs[1:]]
        await asyncio.sleep(0.05)
        return tasks


def test_waiting_requests_form_the_next_batch_and_each_gets_its_own_answer() -> None:
    async def check() -> None:
        computer = Computer(100)
        tasks = await computer.waiting(*(job(10 * i + 1, i + 1) for i in range(6)))
        assert computer.seen == [[[1]]]
        computer.first.set()
        answers = await asyncio.gather(*tasks)
        assert len(computer.seen) == 2
        assert len(computer.seen[1]) == 5
        for i, (doubled, _) in enumerate(answers):
            assert doubled.tolist() == [2 * value for value in range(10 * i + 1, 11 * i + 2)]

    asyncio.run(check())


def test_a_batch_holds_so_many_images_and_requests_keep_their_order() -> None:
    async def check() -> None:
        computer = Computer(8)
        tasks = await computer.waiting(job(1), job(20, 5), job(30, 4), job(40, 4), job(50, 20), job(80))
        computer.first.set()
        await asyncio.gather(*tasks)
        assert [[len(images) for images in batch] for batch in computer.seen] == [[1], [5], [4, 4], [20], [1]]

    asyncio.run(check())


def test_a_cancelled_request_is_not_computed_and_an_error_reaches_only_its_batch() -> None:
    async def check() -> None:
        computer = Computer(3)
        tasks = await computer.waiting(job(1), job(2), job(13), job(4), job(5, 3))
        tasks[1].cancel()
        await asyncio.sleep(0)
        computer.first.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [str(results[i]) for i in (2, 3)] == ["unlucky", "unlucky"]
        assert computer.seen == [[[1]], [[13], [4]], [[5, 6, 7]]]
        first, last = results[0], results[4]
        assert isinstance(first, tuple)
        assert isinstance(last, tuple)
        assert (first[0].tolist(), last[0].tolist()) == ([2], [10, 12, 14])
        again = await computer.batches.submit(job(7))  # the batcher still works
        assert again[0].tolist() == [14]

    asyncio.run(check())


def test_a_request_that_comes_in_the_turn_in_which_all_batches_end_is_not_left_waiting() -> None:
    async def check() -> None:
        ended = asyncio.Event()

        async def compute(function: Callable[[], None]) -> None:
            function()
            await ended.wait()

        batches = DynamicBatcher(compute, lambda jobs: [(images, images > 0) for _, images in jobs], 1)
        early = [asyncio.create_task(batches.submit(job(number))) for number in range(PREFETCH)]
        await asyncio.gather(*early)
        ended.set()  # resumes the tasks of these batches in the next turn, before this one
        late = asyncio.create_task(batches.submit(job(9)))
        assert (await asyncio.wait_for(late, 5))[0].tolist() == [9]

    asyncio.run(check())


@pytest.mark.parametrize("num", [1, 50])
def test_many_requests_at_once_all_end(num: int) -> None:
    async def check() -> None:
        computer = Computer(16)
        computer.first.set()
        for _ in range(20):
            results = await asyncio.gather(*(computer.batches.submit(job(100 + i)) for i in range(num)))
            assert [int(doubled[0]) for doubled, _ in results] == [200 + 2 * i for i in range(num)]

    asyncio.run(check())
