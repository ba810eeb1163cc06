"""What a request asks for beyond its body: headers, query, types of content. What is not read is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers

from raypp.serve.admission import RequestError
from raypp.utils.registry import suggest

ONCE = ("authorization", "content-type", "content-range", "expect", "raypp-protection")
"""Headers of which two would contradict each other."""
DIGESTS = ("content-digest", "repr-digest", "digest", "content-md5")
"""Headers that state what a body hashes to: a client that sends one expects damage on the way to be noticed."""
MEDIA_RANGE = re.compile(r"([^\s/;,]+)/([^\s/;,]+)")
QUALITY = re.compile(r"q\s*=\s*(\d+(?:\.\d*)?|\.\d+)", re.IGNORECASE)
ENTITY_TAG = re.compile(r'(W/)?("[^"]*")')
MAX_SHOWN = 60  # characters of a client's own words in an answer


def check_headers(headers: Headers, *, reads_body: bool, tagged: bool) -> None:
    """Refuse headers that ask for something that is not done here.

    Args:
        reads_body: whether the request has a body that is read.
        tagged: whether the answer has an ETag, by which the route itself checks conditions.

    Raises:
        RefusedError: 400, 412, 415, 417 or 501, with the header's name and what is allowed.
    """
    for name in ONCE:
        if len(headers.getlist(name)) > 1:
            raise RequestError(400, "header-twice", f"the header {_title(name)} is sent twice; allowed is once")
    transfer = _words(headers.getlist("transfer-encoding"))
    if transfer not in ([], ["chunked"]):
        raise RequestError(
            501, "unsupported-transfer-encoding",
            f"Transfer-Encoding {shown(', '.join(transfer))} is not read here; allowed is chunked",
        )  # fmt: skip
    expectation = headers.get("expect")
    if expectation is not None and expectation.strip().lower() != "100-continue":
        raise RequestError(
            417, "unsupported-expectation", f"Expect {shown(expectation)} is not known here; allowed is 100-continue"
        )
    if not reads_body and (transfer or headers.get("content-length", "0").strip("0 ")):
        raise RequestError(400, "body-not-read", "the request has a body, and none is read here; send it without one")
    encodings = [word for word in _words(headers.getlist("content-encoding")) if word != "identity"]
    if encodings:
        raise RequestError(
            415, "unsupported-encoding",
            f"Content-Encoding {shown(', '.join(encodings))} is not read here; allowed is identity, a body as it is",
            {"Accept-Encoding": "identity"},
        )  # fmt: skip
    if "content-range" in headers:
        raise RequestError(
            400, "partial-body", "Content-Range is not read here: a request holds the whole body; leave the header out"
        )
    for name in DIGESTS:
        if name in headers:
            raise RequestError(
                400, "digest-not-read", f"{_title(name)} is not checked here, and damage would stay unseen; leave the "
                "header out",
            )  # fmt: skip
    if tagged:
        return
    if headers.get("if-match", "*").strip() != "*":
        raise RequestError(
            412, "no-version", "If-Match names a version, and this answer has none (no ETag); leave the header out"
        )
    if headers.get("if-none-match", "").strip() == "*":
        raise RequestError(412, "no-version", "If-None-Match: * can never hold here; leave the header out")


def check_query(names: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse parameters that are unknown, or there twice; raises RefusedError (422)."""
    seen: set[str] = set()
    for name in names:
        if name not in allowed:
            known = f"allowed: {', '.join(allowed)}" if allowed else "this request takes none"
            raise RequestError(
                422, "unknown-parameter", f"unknown query parameter {shown(name)}{suggest(name, allowed)}; {known}"
            )
        if name in seen:
            raise RequestError(422, "parameter-twice", f"query parameter {name!r} is there twice; allowed is once")
        seen.add(name)


def negotiate(accept: Sequence[str], offered: Sequence[str]) -> str:
    """Which of the types of content that an answer can have the client prefers.

    Args:
        accept: the headers Accept, none where everything is accepted.
        offered: in our own order of preference.

    Raises:
        RefusedError: 406, it accepts none of them.
    """
    text = ",".join(accept)
    if not text.strip(" ,"):
        return offered[0]
    ranges = []
    for place, part in enumerate(text.split(",")):
        kind, *parameters = part.split(";")
        match = MEDIA_RANGE.fullmatch(kind.strip().lower())
        if match is not None:
            qualities = [found for p in parameters if (found := QUALITY.fullmatch(p.strip())) is not None]
            ranges.append((match[1], match[2], float(qualities[0][1]) if qualities else 1.0, place))
    best: tuple[float, int, str] | None = None
    for media_type in offered:
        main, _, sub = media_type.partition("/")
        matching = [r for r in ranges if r[0] in (main, "*") and r[1] in (sub, "*")]
        if not matching:
            continue
        # The most exact range says how welcome a type is.
        _, _, quality, place = max(matching, key=lambda r: ((r[0] != "*") + (r[1] != "*"), -r[3]))
        if quality > 0 and (best is None or (quality, -place) > best[:2]):
            best = quality, -place, media_type
    if best is None:
        raise RequestError(
            406, "not-acceptable", f"Accept {shown(text)} allows no answer that there is; allowed: {', '.join(offered)}"
        )
    return best[2]


def matches_etag(condition: str, tag: str, *, weakly: bool) -> bool:
    """Whether a header If-Match or If-None-Match names an entity tag; ``weakly`` also in the form ``W/"..."``."""
    if condition.strip() == "*":
        return True
    return any(found[2] == tag and (weakly or not found[1]) for found in ENTITY_TAG.finditer(condition))


def shown(text: str) -> str:
    """A client's own words, in quotes and cut short."""
    text = text.strip()
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def _words(values: Iterable[str]) -> list[str]:
    """The elements of a header that is a list, in lower case."""
    return [word for value in values for part in value.split(",") if (word := part.strip().lower())]


def _title(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-")).replace("Md5", "MD5")
