"""The two services as FastAPI applications. They know no Ray: whoever runs them gives what answers.

Every error is a problem document (RFC 9457) whose ``type`` a program can rely on and whose ``detail`` a person can.
Nothing of an image is ever logged.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from torch import Tensor

import raypp
from raypp.attacks.base import Threat
from raypp.errors import RayppError
from raypp.evaluation.metrics import psnr, ssim
from raypp.images import Pixels, encode_png
from raypp.serve.auth import Tokens
from raypp.serve.model import Served
from raypp.serve.wire import MULTIPART, NPY, PNG, Limits, RefusedError, Shape, read_body, read_images

PROBLEM = "application/problem+json"
PROTECTION_HEADER, MODEL_HEADER, REQUEST_ID = "Raypp-Protection", "Raypp-Model", "X-Request-ID"
TYPES = "urn:raypp:problem:"
LEAST_SIDE, MAX_PSNR = 11, 60.0  # of SSIM's window; dB, JSON has no infinity
REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("raypp.serve")


class Observe(Protocol):
    """Counts a request for monitoring."""

    def __call__(self, route: str, status: int, num_images: int, seconds: float) -> None: ...


class Classifying(Protocol):
    """What answers the classifier's requests."""

    limits: Limits
    tokens: Tokens | None

    def now(self) -> Served: ...

    async def served(self, protection: str | None) -> Served | None: ...

    def rejected(self) -> dict[str, str] | None: ...

    async def predict(self, served: Served, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities float (N, K) of images uint8 (N, C, H, W), and whether each looks protected, bool (N,)."""


@dataclass(frozen=True)
class ServedAttack:
    """One attack that a service offers."""

    name: str
    threat: Threat
    max_images: int
    measured: dict[str, Any]


class Attacking(Protocol):
    """What answers the attack service's requests."""

    limits: Limits
    tokens: Tokens | None

    def now(self) -> Served: ...

    def attacks(self) -> dict[str, ServedAttack]: ...

    def nulls(self) -> dict[str, Any]: ...

    async def reconstruct(self, name: str, images: Tensor) -> Tensor:
        """Estimates uint8 (N, C, H, W) of plain images from protected ones uint8 (N, C, H', W')."""


def classifier_api(service: Callable[[], Classifying], observe: Observe | None = None) -> FastAPI:
    """The classifier's API; ``service`` is asked at every request, since a replica has none when it is imported."""
    api = _api("raypp classifier", "Classifies protected images. It never sees a plain one.", observe)

    @api.post("/v1/classify", openapi_extra=_body("image", plain=False), responses=_answers(CLASSIFIED))
    async def classify(
        request: Request, top: int = Query(5, ge=1, le=1000, description="Classes to return for each image.")
    ) -> Response:
        """Classify one protected image or a batch.

        The header `Raypp-Protection` names what the images were protected with (the ETag of `/v1/protection`): while a
        new bundle takes over, both it and the one before are served, each by its own classifier.
        """
        began = time.perf_counter()
        asked = service()
        _allowed(request, asked.tokens, "classify")
        served = await asked.served(_wanted(request))
        if served is None:
            raise RefusedError(
                409, "other-protection",
                "the images were protected with a protection that is not served (any more); fetch "
                "/v1/protection and protect them anew",
            )  # fmt: skip
        images, _ = await _images(request, served.shape, asked.limits)
        read = time.perf_counter()
        values = torch.from_numpy(np.array(images, copy=True)).permute(0, 3, 1, 2)
        probabilities, protected = await asked.predict(served, values)
        if not bool(protected.all()):
            first = int((~protected).int().argmax())
            raise RefusedError(
                422, "not-protected",
                f"image {first + 1} of {len(images)} does not look protected; nothing of it was kept. Protect it "
                "first: raypp protect, or raypp.Client",
            )  # fmt: skip
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        found = [
            {
                "class": served.classes[places[0]],
                "index": places[0],
                "probability": round(shares[0], 6),
                "top": [
                    {"class": served.classes[k], "index": k, "probability": round(p, 6)}
                    for k, p in zip(places, shares, strict=True)
                ],
            }
            for places, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        done = time.perf_counter()
        timing = {"read": _ms(began, read), "model": _ms(read, done), "total": _ms(began, done)}
        answer = {"model": served.version, "protection": served.protection, "images": found, "timing_ms": timing}
        live = {PROTECTION_HEADER: asked.now().protection, MODEL_HEADER: served.version}
        return Response(json.dumps(answer), media_type="application/json", headers=live)

    @api.get(
        "/v1/protection",
        responses=_given("application/zip", {"type": "string", "format": "binary"}),
        response_class=Response,
    )
    async def protection(request: Request) -> Response:
        """The public part of the live bundle: what a client protects with. A key is never in it."""
        asked = service()
        _allowed(request, asked.tokens, "classify")
        served = asked.now()
        tag = f'"{served.protection}"'
        headers = {"ETag": tag, MODEL_HEADER: served.version, "Cache-Control": "no-cache"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(served.archive, media_type="application/zip", headers=headers)

    @api.get("/v1/model", responses=_given("application/json", {"type": "object"}))
    async def model(request: Request) -> Response:
        """What is served: card, classes, shape of an upload, what attacks recovered, how the guard was calibrated."""
        asked = service()
        _allowed(request, asked.tokens, "classify")
        served = asked.now()
        guard = None
        if served.guard is not None:
            guard = {k: getattr(served.guard, k) for k in ("plain_refused", "protected_refused")}
        test = served.private.metrics.get("test", {})
        about = {
            "version": served.version,
            "protection": served.protection,
            "classes": list(served.classes),
            "upload": {"height": served.shape[0], "width": served.shape[1], "channels": served.shape[2], "bits": 8},
            "limits": {"body_bytes": asked.limits.body, "images": asked.limits.images},
            "accuracy": test.get("accuracy"),
            "accuracy_interval": test.get("accuracy_interval"),
            "guard": guard,
            "scorecard": summary(served.scorecard),
            "card": served.card,
            "rejected": asked.rejected(),
            "raypp": raypp.__version__,
        }
        return Response(json.dumps(about), media_type="application/json")

    return api


def attack_api(service: Callable[[], Attacking], observe: Observe | None = None) -> FastAPI:
    """The attack service's API; see :func:`classifier_api`."""
    api = _api("raypp attacks", "What an attacker makes of protected images, and how much he recovers.", observe)

    @api.get("/v1", responses=_given("application/json", {"type": "object"}))
    async def listing(request: Request) -> Response:
        """Which attacks are served, who carries them out, and what they recovered when the bundle was attacked."""
        asked = service()
        _allowed(request, asked.tokens, "attack")
        found = [
            {
                "attack": attack.name,
                "threat": attack.threat.name,
                "attacker_has": attack.threat.meaning,
                "max_images": min(attack.max_images, asked.limits.images),
                "measured": attack.measured,
            }
            for attack in asked.attacks().values()
        ]
        about = {"model": asked.now().version, "attacks": found, "nulls": asked.nulls()}
        return Response(json.dumps(about), media_type="application/json")

    @api.post("/v1/{attack}", openapi_extra=_body("image", plain=True), responses=_answers(RECONSTRUCTED, PNG))
    async def run(request: Request, attack: str) -> Response:
        """Reconstruct plain images from protected ones.

        Sent along on purpose in the form's field `plain`, the originals are compared with the reconstructions. With
        `Accept: image/png` the answer is the first reconstruction as a picture.
        """
        began = time.perf_counter()
        asked = service()
        _allowed(request, asked.tokens, "attack")
        offered = asked.attacks().get(attack)
        if offered is None:
            known = ", ".join(asked.attacks()) or "none: the bundle has not been attacked"
            raise RefusedError(404, "unknown-attack", f"there is no attack {attack[:50]!r} here; served are {known}")
        served = asked.now()
        most = Limits(asked.limits.body, min(asked.limits.images, offered.max_images))
        images, plain = await _images(request, served.shape, most)
        values = torch.from_numpy(np.array(images, copy=True)).permute(0, 3, 1, 2)
        try:
            made = await asked.reconstruct(attack, values)
        except RayppError as error:
            raise RefusedError(422, "attack-does-not-apply", str(error)) from error
        pixels = made.permute(0, 2, 3, 1).numpy()
        if request.headers.get("accept", "").split(",")[0].strip() == PNG:
            return Response(encode_png(pixels[0]), media_type=PNG, headers={MODEL_HEADER: served.version})
        scores = _compare(pixels, plain)
        found = [
            {"png": base64.b64encode(encode_png(image)).decode()} | score
            for image, score in zip(pixels, scores, strict=True)
        ]
        answer = {
            "attack": attack,
            "threat": offered.threat.name,
            "model": served.version,
            "reconstructions": found,
            "timing_ms": {"total": _ms(began, time.perf_counter())},
        }
        return Response(json.dumps(answer), media_type="application/json", headers={MODEL_HEADER: served.version})

    return api


def summary(scorecard: dict[str, Any] | None) -> dict[str, Any] | None:
    """What anybody may know of a scorecard: verdict, and of every attack what it found beside the null."""
    if scorecard is None:
        return None
    kept = ("verdict", "worst_attack", "found", "num_queries", "num_gallery", "accuracy")
    attacks = {name: measured(found) for name, found in scorecard["attacks"].items()}
    return {key: scorecard.get(key) for key in kept} | {"attacks": attacks, "nulls": null_scores(scorecard)}


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """Of one attack's entry in a scorecard: threat, share found, SSIM and PSNR, verdict."""
    about = {key: found.get(key) for key in ("threat", "status", "verdict", "found", "lower_bound")}
    scores = found.get("scores") or {}
    return about | {key: scores[key]["mean"] for key in ("ssim", "psnr", "edges") if key in scores}


def null_scores(scorecard: dict[str, Any] | None) -> dict[str, Any]:
    """What somebody recovers who never saw the protected image."""
    nulls = (scorecard or {}).get("nulls") or {}
    return {
        name: {key: scores[key]["mean"] for key in ("ssim", "psnr", "edges", "reidentified") if key in scores}
        for name, scores in nulls.items()
    }


def _compare(made: Pixels, plain: Pixels | None) -> list[dict[str, float]]:
    if plain is None:
        return [{} for _ in made]
    if plain.shape != made.shape:
        raise RefusedError(
            422, "wrong-shape",
            f"field 'plain' holds {len(plain)} images of {plain.shape[1]} x {plain.shape[2]}; there are {len(made)} "
            f"reconstructions of {made.shape[1]} x {made.shape[2]}",
        )  # fmt: skip
    a, b = (torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).float() / 255 for x in (made, plain))
    scores = {"psnr": psnr(a, b).clamp_max(MAX_PSNR)}
    if min(made.shape[1:3]) >= LEAST_SIDE:
        scores["ssim"] = ssim(a, b)
    return [{key: round(float(values[i]), 4) for key, values in scores.items()} for i in range(len(made))]


# What both have in common


def _api(title: str, what: str, observe: Observe | None) -> FastAPI:
    api = FastAPI(title=title, version=raypp.__version__, description=what, docs_url="/docs", redoc_url=None)

    @api.middleware("http")
    async def around(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        given = request.headers.get(REQUEST_ID, "")
        identifier = given if REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex
        request.state.identifier, request.state.num_images = identifier, 0
        try:
            response = await call(request)
        except Exception:  # a defect of ours: the log has the trace, the client a number to ask about
            logger.exception("request %s failed", identifier)
            response = problem(request, 500, "defect", "the service failed; its log has the reason")
        seconds = time.perf_counter() - began
        response.headers[REQUEST_ID] = identifier
        route = getattr(request.scope.get("route"), "path", "none")
        if observe is not None:
            observe(route, response.status_code, request.state.num_images, seconds)
        logger.info(
            "%s",
            json.dumps(
                {
                    "request": identifier, "method": request.method, "route": route, "status": response.status_code,
                    "images": request.state.num_images, "ms": round(1000 * seconds, 2),
                }
            ),
        )  # fmt: skip
        return response

    @api.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return problem(request, error.status, error.code, str(error), error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(request, 422, "bad-parameter", f"{where}: {first['msg'].lower()}")

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return problem(request, error.status_code, "http", str(error.detail), dict(error.headers or {}))

    return api


def problem(request: Request, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    """A problem document."""
    document = {
        "type": TYPES + code,
        "title": code.replace("-", " "),
        "status": status,
        "detail": detail,
        "instance": f"urn:raypp:request:{request.state.identifier}",
    }
    return Response(json.dumps(document), status, headers, PROBLEM)


def _allowed(request: Request, tokens: Tokens | None, scope: str) -> None:
    if tokens is not None:
        tokens.check(request.headers.get("authorization"), scope)


def _wanted(request: Request) -> str | None:
    return request.headers.get(PROTECTION_HEADER.lower())


async def _images(request: Request, shape: Shape, limits: Limits) -> tuple[Pixels, Pixels | None]:
    body = await read_body(request.stream(), request.headers.get("content-length"), limits)
    images, plain = await read_images(body, request.headers.get("content-type", ""), shape, limits)
    request.state.num_images = len(images)
    return images, plain


def _ms(began: float, ended: float) -> float:
    return round(1000 * (ended - began), 2)


# What OpenAPI says of bodies and answers, which are read and written by hand


def _body(field: str, *, plain: bool) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": binary, "minItems": 1}
    fields = {field: files} | ({"plain": files} if plain else {})
    form = {"type": "object", "properties": fields, "required": [field], "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "description": f"One protected image as PNG, or one or a batch as a NumPy file of uint8 (H, W, C) or "
            f"(N, H, W, C), or a form with files of either kind in '{field}'.",
            "content": {PNG: {"schema": binary}, NPY: {"schema": binary}, MULTIPART: {"schema": form}},
        }
    }


_PROBLEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "detail": {"type": "string"}, "instance": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail"],
}  # fmt: skip
_MEANING = {
    400: "The request cannot be read.", 401: "No valid token.", 403: "The token lacks the scope.",
    404: "There is no such attack.", 405: "Another method is needed.", 408: "It took too long.",
    409: "Protected with a protection that is not served.", 413: "Too large or too many.",
    415: "A type of content that is not read.", 422: "No image of the right shape, or not a protected one.",
    500: "A defect.", 503: "Busy: come back after Retry-After.",
}  # fmt: skip
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "content": {PROBLEM: {"schema": _PROBLEM_SCHEMA}}}
    for status, meaning in _MEANING.items()
}
CLASSIFIED = {
    "model": "0123456789abcdef",
    "protection": "sha256 of the protection's manifest",
    "images": [
        {
            "class": "ship",
            "index": 8,
            "probability": 0.93,
            "top": [{"class": "ship", "index": 8, "probability": 0.93}],
        }
    ],
    "timing_ms": {"read": 0.4, "model": 6.1, "total": 6.5},
}
RECONSTRUCTED = {
    "attack": "inverse",
    "threat": "T4",
    "model": "0123456789abcdef",
    "reconstructions": [{"png": "iVBORw0KGgo=", "psnr": 18.4, "ssim": 0.74}],
    "timing_ms": {"total": 12.3},
}


def _given(kind: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {
        200: {"description": "Done.", "content": {kind: {"schema": schema}}},
        304: {"description": "The client has it already."},
    }
    return found | _PROBLEMS


def _answers(example: dict[str, Any], *others: str) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"example": example, "schema": {"type": "object"}}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in others}
    return {200: {"description": "Done.", "content": content}} | _PROBLEMS
