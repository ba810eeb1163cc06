"""Steps that the routes of both services share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Protocol

import numpy as np
import torch
from fastapi import Depends, FastAPI, Header, Request
from fastapi.security import HTTPBearer
from torch import Tensor

import raypp
from raypp.serve.admission import Limits, RequestError
from raypp.serve.auth import Tokens
from raypp.serve.image_parsing import Shape
from raypp.serve.middleware import PROTECTION_HEADER, RequestMiddleware, RequestObserver
from raypp.serve.problems import add_problems
from raypp.serve.request_checks import check_headers, check_query, negotiate
from raypp.serve.request_parsing import read_body, read_images
from raypp.serve.schemas import JSON
from raypp.utils.images import Pixels

RequestedProtection = Annotated[
    str | None,
    Header(
        alias=PROTECTION_HEADER,
        description="Protection of the images: the ETag of /v1/protection without its quotes.",
    ),
]


class Service(Protocol):
    """State that both services share."""

    limits: Limits

    async def tokens(self) -> Tokens | None:
        """The valid tokens; None if the service needs none."""

    def rejected(self) -> dict[str, str] | None:
        """Version that the service refused to load, and the reason."""


def create_api(
    title: str, description: str, service: Callable[[], Service], scope: str, observe: RequestObserver | None
) -> FastAPI:
    """Create an application that checks tokens for ``scope`` and refuses unsupported headers and parameters."""
    bearer = HTTPBearer(auto_error=False, description="Needed if the service was started with a token file.")

    async def check_request(request: Request) -> None:
        # The token comes first: without one a client learns nothing else.
        tokens = await service().tokens()
        if tokens is not None:
            tokens.check(request.headers.get("authorization"), scope)
        route = request.scope["route"]
        check_headers(request.headers, reads_body=request.method == "POST", has_etag=304 in route.responses)
        check_query(
            (name for name, _ in request.query_params.multi_items()),
            [parameter.alias for parameter in route.dependant.query_params],
        )
        media_types = list(route.responses[200]["content"])
        request.state.media_type = negotiate(request.headers.getlist("accept"), media_types)

    api = FastAPI(
        title=title, version=raypp.__version__, description=description, docs_url="/docs", redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a redirect would use the client's Host header, before its token is checked
        dependencies=[Depends(check_request), Depends(bearer)],  # the latter only documents the token
    )  # fmt: skip
    pages = {"/docs": "text/html", "/openapi.json": JSON}
    api.add_middleware(RequestMiddleware, observe=observe, root="/docs", pages=pages)
    add_problems(api)
    return api


@asynccontextmanager
async def request_timeout(limits: Limits) -> AsyncIterator[None]:
    """Raise RequestError (408) after ``limits.seconds``; a client can disable Serve's own timeout by a header."""
    try:
        async with asyncio.timeout(limits.seconds):
            yield
    except TimeoutError as error:
        raise RequestError(408, "too-slow", f"the request timed out after {limits.seconds:g} s") from error


async def read_request_images(
    request: Request, shape: Shape, limits: Limits, plain: Shape | None = None
) -> tuple[Pixels, Pixels | None]:
    """Read the images of a request's body, as :func:`read_images` does, and count them for the observer."""
    body = await read_body(request.stream(), request.headers.get("content-length"), limits)
    images, originals = await read_images(body, request.headers.get("content-type", ""), shape, limits, plain)
    request.state.num_images = len(images)
    return images, originals


def to_tensor(images: Pixels) -> Tensor:
    """Copy images uint8 (N, H, W, C) to a tensor (N, C, H, W)."""
    return torch.from_numpy(np.array(images, copy=True)).permute(0, 3, 1, 2)


def unknown_protection() -> RequestError:
    return RequestError(
        409, "other-protection",
        "the images were protected with a protection that is not served (any more); fetch "
        "/classifier/v1/protection and protect the images again",
    )  # fmt: skip


def refuse_plain_images(protected: Tensor) -> None:
    """Raise RequestError (422) unless every image looks protected, bool (N,)."""
    if bool(protected.all()):
        return
    indices = (~protected).nonzero().flatten().tolist()
    raise RequestError(
        422, "not-protected",
        f"image {indices[0] + 1} of {len(protected)} does not look protected, and the service stored nothing of it; "
        "protect it first with raypp protect or raypp.Client",
        extra={"images": indices},
    )  # fmt: skip


def elapsed_ms(start: float, end: float | None = None) -> float:
    """Milliseconds between two values of ``time.perf_counter``; until now by default."""
    return round(1000 * ((time.perf_counter() if end is None else end) - start), 2)
