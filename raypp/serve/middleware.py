"""Request identifiers, logs and metrics of every request."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raypp.serve.admission import RequestError
from raypp.serve.problems import CLIENT_CLOSED_REQUEST, check_bare, problem_of, problem_response
from raypp.serve.request_checks import negotiate

PROTECTION_HEADER, MODEL_HEADER, REQUEST_ID = "Raypp-Protection", "Raypp-Model", "X-Request-ID"
REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("raypp.serve")


class RequestObserver(Protocol):
    """Counts a request for monitoring."""

    def __call__(self, route: str, status: int, num_images: int, seconds: float) -> None: ...


class RequestMiddleware:
    """Identifies, counts and logs each request, answers HEAD as GET, and turns exceptions into a response.

    Plain ASGI: Starlette's ``BaseHTTPMiddleware`` needs a task and two queues for each request.

    Args:
        root: redirect target of the application's root path; None if a route answers there.
        pages: media types, by path, of the pages that FastAPI serves without our checks.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: RequestObserver | None,
        root: str | None = None,
        pages: Mapping[str, str] | None = None,
    ) -> None:
        self.app, self.observe, self.root, self.pages = app, observe, root, pages or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        client_id = Headers(scope=scope).get(REQUEST_ID, "")
        identifier = client_id if REQUEST_ID_FORM.fullmatch(client_id) else uuid.uuid4().hex
        method, is_head = scope["method"], scope["method"] == "HEAD"
        scope = {**scope, "method": "GET"} if is_head else scope
        state = scope["state"] = {**scope.get("state", {}), "identifier": identifier, "num_images": 0}
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
            await self._respond(scope, receive, send_adapted)
        finally:
            if state.get("disconnected"):
                status = CLIENT_CLOSED_REQUEST
            route = getattr(scope.get("route"), "path", "none")
            self._report(state, method, route, status, time.perf_counter() - start)

    def _report(self, state: dict[str, Any], method: str, route: str, status: int | None, seconds: float) -> None:
        if self.observe is not None:
            self.observe(route, status or 0, state["num_images"], seconds)
        if logger.isEnabledFor(logging.INFO):
            record = {
                "request": state["identifier"], "method": method, "route": route, "status": status,
                "images": state["num_images"], "ms": round(1000 * seconds, 2),
            }  # fmt: skip
            logger.info("%s", json.dumps(record))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_tracked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await (self._page_response(scope) or self.app)(scope, receive, send_tracked)
        except ClientDisconnect:
            scope["state"]["disconnected"] = True
        except Exception:  # a bug: the log has the traceback, the client gets the identifier
            logger.exception("request %s failed", scope["state"]["identifier"])
            if started:
                raise  # only a broken connection tells the client
            detail = "the service failed; its log has the reason"
            await problem_response(Request(scope), 500, "defect", detail)(scope, receive, send_tracked)

    def _page_response(self, scope: Scope) -> Response | None:
        """The redirect of the root path, or the refusal of a request for it or a page of FastAPI."""
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        is_root = self.root is not None and path in ("", "/")
        if scope["method"] != "GET" or not (is_root or path in self.pages):
            return None
        request = Request(scope)
        try:
            check_bare(request)
            if path in self.pages:
                negotiate(request.headers.getlist("accept"), (self.pages[path],))
        except RequestError as error:
            return problem_of(request, error)
        target = f"{scope.get('root_path', '')}{self.root}"
        return Response(status_code=307, headers={"Location": target}) if is_root else None
