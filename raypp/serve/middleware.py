"""Around every route: request identifiers, logs, metrics, and errors as problem documents (RFC 9457)."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raypp.serve.admission import RequestError
from raypp.serve.request_checks import check_bare, negotiate, quote
from raypp.serve.schemas import HTML, JSON, METHOD_NOT_ALLOWED, NOT_FOUND, PROBLEM
from raypp.utils.registry import suggest

PROTECTION_HEADER, MODEL_HEADER, REQUEST_ID = "Raypp-Protection", "Raypp-Model", "X-Request-ID"
REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_CLOSED_REQUEST = 499  # counted for a client that disconnects before its request is complete; never sent
PAGES = {"/docs": HTML, "/openapi.json": JSON}
"""Media types, by path, of the pages that FastAPI serves without our checks."""

RequestObserver = Callable[[str, int, int, float], None]
"""Counts a request for monitoring: its route, status, number of images and seconds."""

logger = logging.getLogger("raypp.serve")


class RequestMiddleware:
    """Identifies, counts and logs each request, answers HEAD as GET, and turns exceptions into a response.

    Plain ASGI: Starlette's ``BaseHTTPMiddleware`` needs a task and two queues for each request. An application that
    ``has_pages`` has those of ``PAGES``, and its root path redirects to ``/docs``.
    """

    def __init__(self, app: ASGIApp, observe: RequestObserver | None, has_pages: bool) -> None:
        self.app, self.observe, self.has_pages = app, observe, has_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        client_id = Headers(scope=scope).get(REQUEST_ID, "")
        identifier = client_id if REQUEST_ID_FORM.fullmatch(client_id) else uuid.uuid4().hex
        method, is_head = scope["method"], scope["method"] == "HEAD"
        scope = {**scope, "method": "GET"} if is_head else scope
        scope["state"] = {**scope.get("state", {}), "identifier": identifier, "num_images": 0}
        status: int | None = None

        async def send_adapted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not client_id:  # Serve sets and returns this header in all requests
                    message.setdefault("headers", []).append((REQUEST_ID.lower().encode(), identifier.encode()))
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await (self._page_response(scope) or self.app)(scope, receive, send_adapted)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:  # a bug: the log has the traceback, the client gets the identifier
            logger.exception("request %s failed", identifier)
            if status is not None:
                raise  # only a broken connection tells the client
            error = RequestError(500, "defect", "the service failed; its log has the reason")
            await problem_response(Request(scope), error)(scope, receive, send_adapted)
        finally:
            self._report(scope, method, status, time.perf_counter() - start)

    def _report(self, scope: Scope, method: str, status: int | None, seconds: float) -> None:
        state, route = scope["state"], getattr(scope.get("route"), "path", "none")
        if self.observe is not None:
            self.observe(route, status or 0, state["num_images"], seconds)
        if logger.isEnabledFor(logging.INFO):
            record = {
                "request": state["identifier"], "method": method, "route": route, "status": status,
                "images": state["num_images"], "ms": round(1000 * seconds, 2),
            }  # fmt: skip
            logger.info("%s", json.dumps(record))

    def _page_response(self, scope: Scope) -> Response | None:
        """The redirect of the root path, or the refusal of a request for it or a page of FastAPI."""
        root_path = scope.get("root_path", "")
        path = str(scope["path"]).removeprefix(root_path)
        is_root = path in ("", "/")
        if not self.has_pages or scope["method"] != "GET" or not (is_root or path in PAGES):
            return None
        request = Request(scope)
        try:
            check_bare(request)
            if is_root:
                return Response(status_code=307, headers={"Location": f"{root_path}/docs"})
            negotiate(request.headers.getlist("accept"), (PAGES[path],))
        except RequestError as error:
            return problem_response(request, error)
        return None


def add_middleware(api: FastAPI, observe: RequestObserver | None) -> None:
    """Add :class:`RequestMiddleware`, and answer every error with a problem document."""
    api.add_middleware(RequestMiddleware, observe=observe, has_pages=api.docs_url is not None)

    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return problem_response(request, error)

    @api.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where, *_, name = first["loc"]
        return problem_response(request, parameter_error(where, name, str(first["input"]), first["msg"]))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers, path = dict(error.headers or {}), request.url.path
        code, detail = "http", str(error.detail)
        if error.status_code == 404:
            code = NOT_FOUND
            root = request.scope.get("root_path", "")
            paths = sorted({root + route.path for route in api.routes if isinstance(route, APIRoute)})
            docs = f"; {root}/docs lists what there is" if api.docs_url is not None else ""
            detail = f"there is nothing at {quote(path)}{suggest(path, paths)}{docs}"
        elif error.status_code == 405:
            code = METHOD_NOT_ALLOWED
            methods = {word.strip() for word in headers.get("Allow", "").split(",")}
            headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
            detail = f"{quote(request.method)} is not supported at {quote(path)}; allowed: {headers['Allow']}"
        return problem_response(request, RequestError(error.status_code, code, detail, headers))


def parameter_error(where: str, name: str, value: str, reason: str) -> RequestError:
    """The refusal of a parameter in the query, the path or a header, for pydantic's reason."""
    detail = f"{where} parameter {name} is {quote(value)}: {reason[0].lower()}{reason[1:]}"
    return RequestError(422, "bad-parameter", detail)


def problem_response(request: Request, error: RequestError) -> Response:
    document = {
        "type": f"urn:raypp:problem:{error.code}",
        "title": error.code.replace("-", " "),
        "status": error.status,
        "detail": str(error),
        "instance": f"urn:raypp:request:{request.state.identifier}",
    } | error.members
    return Response(json.dumps(document), error.status, error.headers, PROBLEM)
