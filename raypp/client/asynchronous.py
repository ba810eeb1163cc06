"""The client for asyncio."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Concatenate, ParamSpec, TypeVar

from raypp.client.http import BATCH, Client, Errors, Prediction, report_errors
from raypp.client.protection import Image
from raypp.utils.errors import RayppError

MAX_THREADS = 64  # of an asynchronous client: requests that are under way at once

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _in_thread(
    method: Callable[Concatenate[Client, Arguments], Result],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]]:
    @functools.wraps(method)
    async def call(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return await self._run(method, self._client, *args, **kwargs)

    return call


class AsyncClient:
    """:class:`Client` for asyncio. Each call runs in a thread of the client, at most :data:`MAX_THREADS` at once.

    A cancelled call stops waiting; its thread ends with the request.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._client = Client(url, **options)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="raypp-client")

    async def _run(
        self, call: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    model = _in_thread(Client.model)
    protection = _in_thread(Client.protection)
    protect = _in_thread(Client.protect)
    attacks = _in_thread(Client.attacks)
    reconstruct = _in_thread(Client.reconstruct)

    async def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """See :meth:`Client.classify`."""
        return [prediction async for _, prediction in self.stream(images)]

    async def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: Callable[[Image, RayppError], None] | None = None
    ) -> AsyncIterator[tuple[Image, Prediction]]:
        """See :meth:`Client.stream`."""
        remaining = iter(images)
        while part := list(islice(remaining, await self._run(self._client._batch_size, batch))):
            errors: Errors | None = None if on_error is None else {}
            for index, prediction in await self._run(self._client._classify, dict(enumerate(part)), errors):
                yield part[index], prediction
            report_errors(on_error, part, errors)
