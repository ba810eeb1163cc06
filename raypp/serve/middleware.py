"""Request identifiers, logs and metrics of every request."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Protocol

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
    """Gives every request a number, counts and logs it, answers HEAD as GET, and answers for defects of ours.

    Plain ASGI: Starlette's middleware of functions takes a task and two queues for each request.

    Args:
        root: where a request of the application's own address is sent on to; None where a route answers it.
        pages: media types by path of the pages that FastAPI serves without the checks of our routes.
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
        began = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        identifier = given if REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex
        method, head = scope["method"], scope["method"] == "HEAD"
        scope = {**scope, "method": "GET"} if head else scope
        state = scope["state"] = {**scope.get("state", {}), "identifier": identifier, "num_images": 0}
        status: int | None = None

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not given:  # Serve gives each request one and answers with it by itself
                    message.setdefault("headers", []).append((REQUEST_ID.lower().encode(), identifier.encode()))
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            if state.get("gone"):
                status = CLIENT_CLOSED_REQUEST
            route = getattr(scope.get("route"), "path", "none")
            if self.observe is not None:
                self.observe(route, status or 0, state["num_images"], seconds)
            if logger.isEnabledFor(logging.INFO):
                line = {
                    "request": identifier, "method": method, "route": route, "status": status,
                    "images": state["num_images"], "ms": round(1000 * seconds, 2),
                }  # fmt: skip
                logger.info("%s", json.dumps(line))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await (self._own_answer(scope) or self.app)(scope, receive, sending)
        except ClientDisconnect:
            scope["state"]["gone"] = True
        except Exception:  # a defect of ours: the log has the trace, the client a number to ask about
            logger.exception("request %s failed", scope["state"]["identifier"])
            if begun:
                raise  # only breaking the answer off tells the client
            answer = problem_response(Request(scope), 500, "defect", "the service failed; its log has the reason")
            await answer(scope, receive, sending)

    def _own_answer(self, scope: Scope) -> Response | None:
        """The answer to a request that no route is asked for: one that is sent on, or refused."""
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        to_root = self.root is not None and path in ("", "/")
        if scope["method"] != "GET" or not (to_root or path in self.pages):
            return None
        request = Request(scope)
        try:
            check_bare(request)
            if path in self.pages:
                negotiate(request.headers.getlist("accept"), (self.pages[path],))
        except RequestError as error:
            return problem_of(request, error)
        there = f"{scope.get('root_path', '')}{self.root}"
        return Response(status_code=307, headers={"Location": there}) if to_root else None
