"""Error responses as problem documents (RFC 9457)."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from raypp.serve.admission import RequestError
from raypp.serve.request_checks import check_headers, check_query, quote
from raypp.serve.schemas import PROBLEM
from raypp.utils.registry import suggest

TYPES = "urn:raypp:problem:"
CLIENT_CLOSED_REQUEST = 499  # counted for a client that disconnects before its request is complete; never sent


def check_bare(request: Request) -> None:
    """Raise RequestError if a request has a query, a body or headers that the service does not support."""
    check_headers(request.headers, reads_body=False, has_etag=False)
    check_query((name for name, _ in request.query_params.multi_items()), ())


def add_problems(api: FastAPI) -> None:
    """Answer every error with a problem document."""

    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return problem_of(request, error)

    @api.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        detail = f"{first['loc'][0]} parameter {first['loc'][-1]} is {quote(str(first['input']))}: {reason}"
        return problem_response(request, 422, "bad-parameter", detail)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers, path = dict(error.headers or {}), request.url.path
        detail = str(error.detail)
        if error.status_code == 404:
            root = request.scope.get("root_path", "")
            paths = sorted({root + route.path for route in api.routes if isinstance(route, APIRoute)})
            docs = f"; {root}/docs lists what there is" if api.docs_url is not None else ""
            detail = f"there is nothing at {quote(path)}{suggest(path, paths)}{docs}"
        elif error.status_code == 405:
            methods = {word.strip() for word in headers.get("Allow", "").split(",")}
            headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
            detail = f"{quote(request.method)} is not supported at {quote(path)}; allowed: {headers['Allow']}"
        return problem_response(request, error.status_code, "http", detail, headers)


def problem_of(request: Request, error: RequestError) -> Response:
    return problem_response(request, error.status, error.code, str(error), error.headers, error.extra)


def problem_response(
    request: Request,
    status: int,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
) -> Response:
    """A problem document; ``extra`` holds further members."""
    document = {
        "type": TYPES + code,
        "title": code.replace("-", " "),
        "status": status,
        "detail": detail,
        "instance": f"urn:raypp:request:{request.state.identifier}",
    } | (extra or {})
    return Response(json.dumps(document), status, headers, PROBLEM)
