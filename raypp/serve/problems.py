"""Error responses as problem documents (RFC 9457)."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from raypp.serve.admission import RequestError
from raypp.serve.request_checks import check_headers, check_query, shown
from raypp.utils.registry import suggest

PROBLEM = "application/problem+json"
TYPES = "urn:raypp:problem:"
CLIENT_CLOSED_REQUEST = (
    499  # counted for a client that hung up before its request was whole; nobody gets it as an answer
)


def check_bare(request: Request) -> None:
    """Refuse a request that has a query, a body or headers that are not read; raises RefusedError."""
    check_headers(request.headers, reads_body=False, tagged=False)
    check_query((name for name, _ in request.query_params.multi_items()), ())


def add_problems(api: FastAPI) -> None:
    """Have every error answered by a problem document."""

    @api.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return problem_of(request, error)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        sentence = f"{first['loc'][0]} parameter {first['loc'][-1]} is {shown(str(first['input']))}: {reason}"
        return problem_response(request, 422, "bad-parameter", sentence)

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        headers, path = dict(error.headers or {}), request.url.path
        sentence = str(error.detail)
        if error.status_code == 404:
            root = request.scope.get("root_path", "")
            known = sorted({root + route.path for route in api.routes if isinstance(route, APIRoute)})
            listed = f"; {root}/docs lists what there is" if api.docs_url is not None else ""
            sentence = f"there is nothing at {shown(path)}{suggest(path, known)}{listed}"
        elif error.status_code == 405:
            methods = {word.strip() for word in headers.get("Allow", "").split(",")}
            headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
            sentence = f"{shown(request.method)} is not read at {shown(path)}; allowed: {headers['Allow']}"
        return problem_response(request, error.status_code, "http", sentence, headers)


def problem_of(request: Request, error: RequestError) -> Response:
    return problem_response(request, error.status, error.code, str(error), error.headers, error.more)


def problem_response(
    request: Request,
    status: int,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> Response:
    """A problem document, with ``more`` members of its own type."""
    document = {
        "type": TYPES + code,
        "title": code.replace("-", " "),
        "status": status,
        "detail": detail,
        "instance": f"urn:raypp:request:{request.state.identifier}",
    } | (more or {})
    return Response(json.dumps(document), status, headers, PROBLEM)


_PROBLEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "detail": {"type": "string"}, "instance": {"type": "string"},
        "images": {
            "type": "array", "items": {"type": "integer"},
            "description": "With not-protected: the images that do not look protected, counted from zero.",
        },
    },
    "required": ["type", "title", "status", "detail"],
}  # fmt: skip
_MEANING = {
    400: "The request cannot be read.", 401: "No valid token.", 403: "The token lacks the scope.",
    404: "There is no such attack.", 405: "Another method is needed.", 406: "Accept allows no type of answer.",
    408: "It took too long.", 409: "Protected with a protection that is not served.",
    412: "A condition names another version.", 413: "Too large or too many.",
    415: "A type or an encoding of content that is not read.", 417: "An expectation that is not known.",
    422: "No image of the right shape, not a protected one, or a parameter or field that is not known.",
    500: "A defect.", 501: "A transfer encoding that is not read.", 503: "Busy: come back after Retry-After.",
}  # fmt: skip
_BY_THE_PROXY = {408, 500, 503}  # Serve's proxy may answer before or instead of a replica: by a sentence, no document
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": meaning,
        "content": {PROBLEM: {"schema": _PROBLEM_SCHEMA}}
        | ({"text/plain": {"schema": {"type": "string"}}} if status in _BY_THE_PROXY else {}),
    }
    for status, meaning in _MEANING.items()
}
