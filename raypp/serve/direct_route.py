"""A FastAPI application that answers its busiest route without FastAPI's layers around it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from raypp.serve.admission import RequestError
from raypp.serve.middleware import RequestMiddleware, RequestObserver, parameter_error, problem_response

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class DirectAPI(FastAPI):
    """An application with a direct route, which FastAPI documents but does not call.

    For each request FastAPI enters four exit stacks and five middlewares, and resolves dependencies. For one small
    image this takes longer than all checks of the request (benchmarks/journal/2026-11-30-serving.md).
    """

    _direct: tuple[str, str, ASGIApp] | None = None  # method, path and application of the route

    def set_direct_route(self, path: str, handler: Handler, observe: RequestObserver | None) -> None:
        """Answer the route of a path, which has one method, with a handler that checks requests itself.

        A RequestError of the handler becomes a problem document.
        """
        (route,) = (route for route in self.routes if isinstance(route, APIRoute) and route.path == path)
        (method,) = route.methods or {"GET"}

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            scope["route"] = route
            request = Request(scope, receive)
            try:
                response = await handler(request)
            except RequestError as error:
                response = problem_response(request, error)
            await response(scope, receive, send)

        self._direct = method, path, RequestMiddleware(answer, observe, has_pages=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._direct is not None and scope["type"] == "http":
            method, path, application = self._direct
            if scope["method"] == method and scope["path"] == scope.get("root_path", "") + path:
                await application(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def parse_query(request: Request, name: str, adapter: TypeAdapter[T], default: T) -> T:
    """Parse a query parameter as FastAPI does; raises RequestError (422)."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        raise parameter_error("query", name, text, error.errors()[0]["msg"]) from error
