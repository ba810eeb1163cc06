"""Requests that wait together go through the classifier together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from torch import Tensor

from raypp.serve.loaded_model import Inference

Answer = tuple[Tensor, Tensor]
READY = 2  # batches that are asked for: one is computed, and the next begins in the moment that it ends


class DynamicBatcher:
    """What comes while a batch is computed is the next one: the more wait, the larger it is.

    Ray's ``serve.batch`` closes a batch every few milliseconds, whether or not it can be computed by then.

    Args:
        compute: calls a function in the thread that computes, after what it was given before.
        function: an answer for each job.
        most: images of a batch; a job that has more is one of its own.
    """

    def __init__(
        self,
        compute: Callable[[Callable[[], None]], Awaitable[Any]],
        function: Callable[[list[Inference]], list[Answer]],
        most: int,
    ) -> None:
        self._compute, self._function, self._most = compute, function, most
        self._waiting: deque[tuple[Inference, asyncio.Future[Answer]]] = deque()
        self._asking = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself does not keep them

    async def answer(self, job: Inference) -> Answer:
        """The answer to one job; it is left out if nobody waits for it any more."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        if self._asking < READY:
            self._asking += 1
            task = asyncio.get_running_loop().create_task(self._ask())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                await self._compute(lambda: self._run(loop))
        finally:  # in one turn with the look at what waits: who comes later begins another
            self._asking -= 1

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """One batch of what waits now, in the thread that computes."""
        taken = self._take()
        if not taken:
            return
        found: Sequence[Answer | Exception]
        try:
            found = self._function([job for job, _ in taken])
        except Exception as error:  # each of its requests is told
            found = [error] * len(taken)
        loop.call_soon_threadsafe(_give, [(future, one) for (_, future), one in zip(taken, found, strict=True)])

    def _take(self) -> list[tuple[Inference, asyncio.Future[Answer]]]:
        taken: list[tuple[Inference, asyncio.Future[Answer]]] = []
        size = 0
        while self._waiting:
            job, future = self._waiting[0]  # only this thread takes
            if taken and size + len(job[1]) > self._most:
                break
            self._waiting.popleft()
            if not future.cancelled():
                taken.append((job, future))
                size += len(job[1])
        return taken


def _give(answers: list[tuple[asyncio.Future[Answer], Answer | Exception]]) -> None:
    for future, found in answers:
        if future.done():  # given up meanwhile
            continue
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)
