"""Checks of a request's headers and query. What the service does not support is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from fastapi import Request
from starlette.datastructures import Headers

from raypp.serve.admission import RequestError
from raypp.utils.registry import suggest

UNIQUE_HEADERS = ("Authorization", "Content-Type", "Content-Range", "Expect", "Raypp-Protection")
"""Two of these would contradict each other."""
DIGEST_HEADERS = ("Content-Digest", "Repr-Digest", "Digest", "Content-MD5")
"""A client that sends one expects the service to detect damage of the body."""
UNUSUAL_HEADERS = {
    name.lower().encode()
    for name in (
        "Transfer-Encoding", "Expect", "Content-Encoding", "Content-Range", *DIGEST_HEADERS, "If-Match",
        "If-None-Match",
    )
}  # fmt: skip
"""A request for a route with a body passes all checks if it has none of these and no header twice."""
MEDIA_RANGE = re.compile(r"([^\s/;,]+)/([^\s/;,]+)")
QUALITY = re.compile(r"q\s*=\s*(\d+(?:\.\d*)?|\.\d+)", re.IGNORECASE)
ENTITY_TAG = re.compile(r'(W/)?("[^"]*")')
MAX_QUOTED = 60  # characters of a client's text in a message


def check_bare(request: Request) -> None:
    """Raise RequestError if a request has a query, a body or headers that the service does not support."""
    check_headers(request.headers, reads_body=False, has_etag=False)
    check_query(request, ())


def check_headers(headers: Headers, *, reads_body: bool, has_etag: bool) -> None:
    """Raise RequestError (400, 412, 415, 417 or 501) if a header asks for an unsupported feature; the message names it.

    Args:
        reads_body: whether the route reads a body.
        has_etag: whether the response has an ETag; the route then checks conditions itself.
    """
    names = [name for name, _ in headers.raw]
    if reads_body and UNUSUAL_HEADERS.isdisjoint(names) and len(set(names)) == len(names):
        return  # most requests: each check below reads all headers
    for name in UNIQUE_HEADERS:
        if len(headers.getlist(name)) > 1:
            raise RequestError(400, "header-twice", f"the header {name} is sent twice; allowed is once")
    _check_body_headers(headers, reads_body)
    if not has_etag and headers.get("if-match", "*").strip() != "*":
        raise RequestError(412, "no-version", "If-Match names a version, but this response has no ETag; leave it out")
    if not has_etag and headers.get("if-none-match", "").strip() == "*":
        raise RequestError(412, "no-version", "If-None-Match: * never holds here; leave the header out")


def _check_body_headers(headers: Headers, reads_body: bool) -> None:
    transfer = _list_elements(headers.getlist("transfer-encoding"))
    if transfer not in ([], ["chunked"]):
        reason = f"Transfer-Encoding {quote(', '.join(transfer))} is not supported here; allowed is chunked"
        raise RequestError(501, "unsupported-transfer-encoding", reason)
    expectation = headers.get("expect")
    if expectation is not None and expectation.strip().lower() != "100-continue":
        reason = f"Expect {quote(expectation)} is not supported here; allowed is 100-continue"
        raise RequestError(417, "unsupported-expectation", reason)
    if not reads_body and (transfer or headers.get("content-length", "0").strip("0 ")):
        raise RequestError(400, "body-not-read", "the request has a body, but this route reads none; leave it out")
    encodings = ", ".join(word for word in _list_elements(headers.getlist("content-encoding")) if word != "identity")
    if encodings:
        reason = f"Content-Encoding {quote(encodings)} is not supported here; allowed is identity, an uncompressed body"
        raise RequestError(415, "unsupported-encoding", reason, {"Accept-Encoding": "identity"})
    if "content-range" in headers:
        reason = "Content-Range is not supported here; send the whole body and leave the header out"
        raise RequestError(400, "partial-body", reason)
    for name in DIGEST_HEADERS:
        if name in headers:
            reason = f"{name} is not checked here, so damage would go unnoticed; leave the header out"
            raise RequestError(400, "digest-not-read", reason)


def check_query(request: Request, allowed: Sequence[str]) -> None:
    """Raise RequestError (422) if a query parameter is unknown or repeated."""
    names = [name for name, _ in request.query_params.multi_items()]
    for i, name in enumerate(names):
        if name not in allowed:
            known = f"allowed: {', '.join(allowed)}" if allowed else "this request takes none"
            reason = f"unknown query parameter {quote(name)}{suggest(name, allowed)}; {known}"
            raise RequestError(422, "unknown-parameter", reason)
        if name in names[:i]:
            raise RequestError(422, "parameter-twice", f"query parameter {name!r} is there twice; allowed is once")


def negotiate(accept: Sequence[str], available: Sequence[str]) -> str:
    """Choose the media type of a response (RFC 9110, 12.5.1); raises RequestError (406) if none is acceptable.

    Args:
        accept: the Accept headers; without any, everything is accepted.
        available: media types in the service's order of preference.
    """
    text = ",".join(accept)
    return _choose_media_type(text, tuple(available)) if text.strip(" ,") else available[0]


@lru_cache(maxsize=64)  # clients send few different headers
def _choose_media_type(text: str, available: tuple[str, ...]) -> str:
    ranges = _media_ranges(text)
    candidates: list[tuple[float, int, str]] = []
    for media_type in available:
        main, _, sub = media_type.partition("/")
        matches = [r for r in ranges if r[0] in (main, "*") and r[1] in (sub, "*")]
        if matches:  # the most specific range decides on the quality of a type
            _, _, quality, position = max(matches, key=lambda r: ((r[0] != "*") + (r[1] != "*"), -r[3]))
            candidates.append((quality, -position, media_type))
    best_quality, _, best = max(candidates, key=lambda candidate: candidate[:2], default=(0.0, 0, ""))
    if best_quality == 0:
        reason = f"Accept {quote(text)} allows no available media type; allowed: {', '.join(available)}"
        raise RequestError(406, "not-acceptable", reason)
    return best


def _media_ranges(accept: str) -> list[tuple[str, str, float, int]]:
    """Type, subtype, quality and position of each media range; malformed ones are skipped."""
    ranges = []
    for position, part in enumerate(accept.split(",")):
        media_range, *parameters = part.split(";")
        match = MEDIA_RANGE.fullmatch(media_range.strip().lower())
        if match is not None:
            qualities = [m for parameter in parameters if (m := QUALITY.fullmatch(parameter.strip())) is not None]
            ranges.append((match[1], match[2], float(qualities[0][1]) if qualities else 1.0, position))
    return ranges


def matches_etag(condition: str, tag: str, *, weak: bool) -> bool:
    """Whether a header If-Match or If-None-Match names an entity tag; ``weak`` also accepts the form ``W/"..."``."""
    matches = ENTITY_TAG.finditer(condition)
    return condition.strip() == "*" or any(match[2] == tag and (weak or not match[1]) for match in matches)


def quote(text: str) -> str:
    """A client's text in quotes, shortened."""
    text = text.strip()
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...")


def _list_elements(values: Iterable[str]) -> list[str]:
    """The elements, in lower case, of a header that is a list."""
    return [word for value in values for part in value.split(",") if (word := part.strip().lower())]
