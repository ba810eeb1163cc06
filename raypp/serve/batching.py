"""Dynamic batching of requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from torch import Tensor

from raypp.serve.loaded_model import Inference

Answer = tuple[Tensor, Tensor]
PREFETCH = 2  # batches in flight: the next one is queued while one is computed


class DynamicBatcher:
    """Adaptive batching: requests that arrive while a batch is computed form the next batch.

    Ray's ``serve.batch`` closes a batch every few milliseconds, even while the model is busy.

    Args:
        compute: runs a function in the inference thread, in the order of the calls.
        function: returns an answer for each job.
        max_images: images of a batch; a larger job forms a batch alone.
    """

    def __init__(
        self,
        compute: Callable[[Callable[[], None]], Awaitable[Any]],
        function: Callable[[list[Inference]], list[Answer]],
        max_images: int,
    ) -> None:
        self._compute, self._function, self._max_images = compute, function, max_images
        self._queue: deque[tuple[Inference, asyncio.Future[Answer]]] = deque()
        self._tasks: set[asyncio.Task[None] | None] = set()  # the event loop holds only weak references

    async def submit(self, job: Inference) -> Answer:
        """Compute one job; a job that is cancelled while it waits is skipped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._queue.append((job, future))
        if len(self._tasks) < PREFETCH:
            self._tasks.add(loop.create_task(self._drain()))
        return await future

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self._compute(self._run_batch)
        finally:  # in the same turn as the check of the queue, so that a later job starts a new task
            self._tasks.discard(asyncio.current_task())

    def _run_batch(self) -> None:
        """Compute one batch of queued jobs; runs in the inference thread."""
        batch = self._collect()
        if not batch:
            return
        results: Sequence[Answer | Exception]
        try:
            results = self._function([job for job, _ in batch])
        except Exception as error:  # every request of the batch gets the error
            results = [error] * len(batch)
        futures = [future for _, future in batch]
        futures[0].get_loop().call_soon_threadsafe(_resolve, futures, results)

    def _collect(self) -> list[tuple[Inference, asyncio.Future[Answer]]]:
        batch: list[tuple[Inference, asyncio.Future[Answer]]] = []
        num_images = 0
        while self._queue:
            job, future = self._queue[0]  # only the inference thread removes jobs
            if batch and num_images + len(job[1]) > self._max_images:
                break
            self._queue.popleft()
            if not future.cancelled():
                batch.append((job, future))
                num_images += len(job[1])
        return batch


def _resolve(futures: list[asyncio.Future[Answer]], results: Sequence[Answer | Exception]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
