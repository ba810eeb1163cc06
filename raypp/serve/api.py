"""The two services as FastAPI applications. They know no Ray: whoever runs them gives what answers.

Every error is a problem document (RFC 9457) whose ``type`` a program can rely on and whose ``detail`` a person can.
Nothing of an image is ever logged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.security import HTTPBearer
from torch import Tensor

import raypp
from raypp.attacks import ATTACKS
from raypp.attacks.base import Threat
from raypp.metrics.image import MIN_SIDE, psnr, ssim
from raypp.metrics.statistics import chance_error
from raypp.serve.admission import AdmissionControl, Limits, RequestError
from raypp.serve.auth import Tokens
from raypp.serve.image_parsing import Shape
from raypp.serve.loaded_model import LoadedModel
from raypp.serve.middleware import MODEL_HEADER, PROTECTION_HEADER, RequestMiddleware, RequestObserver
from raypp.serve.problems import add_problems
from raypp.serve.request_checks import check_headers, check_query, matches_etag, negotiate
from raypp.serve.request_parsing import MULTIPART, NPY, PNG, read_body, read_images
from raypp.serve.schemas import ATTACKS_OFFERED, CLASSIFIED, MODEL, RECONSTRUCTED, example_of, response_of
from raypp.utils.errors import RayppError
from raypp.utils.images import Pixels, encode_png

MAX_PSNR = 60.0  # dB: JSON has no infinity


class ClassifierService(Protocol):
    """What answers the classifier's requests."""

    limits: Limits
    waiting: AdmissionControl

    async def tokens(self) -> Tokens | None:
        """The tokens that are valid now; None where none is asked for."""

    def now(self) -> LoadedModel: ...

    async def served(self, protection: str | None) -> LoadedModel | None:
        """The bundle that answers for a protection, the live one for None."""

    def rejected(self) -> dict[str, str] | None: ...

    async def predict(self, served: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities float (N, K) of images uint8 (N, C, H, W), and whether each looks protected, bool (N,)."""


@dataclass(frozen=True)
class ServedAttack:
    """One attack that a service offers."""

    name: str
    threat: Threat
    max_images: int
    measured: dict[str, Any]
    run: Callable[[Tensor], Tensor]
    """Estimates uint8 (N, C, H, W) of plain images from protected ones uint8 (N, C, H', W')."""


@dataclass(frozen=True)
class AttackCatalog:
    """The attacks on one bundle."""

    served: LoadedModel
    attacks: dict[str, ServedAttack]
    baselines: dict[str, Any]


def build_catalog(served: LoadedModel, runnable: dict[str, tuple[Callable[[Tensor], Tensor], int]]) -> AttackCatalog:
    """Attacks as they are offered: each with the largest batch that it takes and what it recovered when measured."""
    listed = (served.scorecard or {}).get("attacks", {})
    attacks = {
        name: ServedAttack(name, ATTACKS.get(name).threat, most, measured(listed[name]), run)
        for name, (run, most) in runnable.items()
    }
    return AttackCatalog(served, attacks, baseline_scores(served.scorecard))


class AttackService(Protocol):
    """What answers the attack service's requests."""

    limits: Limits

    async def tokens(self) -> Tokens | None:
        """The tokens that are valid now; None where none is asked for."""

    def rejected(self) -> dict[str, str] | None:
        """What was published last but does not work, and why."""

    async def offered(self, protection: str | None) -> AttackCatalog | None:
        """The attacks on the bundle with a protection, on the live one for None."""

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        """Run the attack where it does not hold up other requests."""


def classifier_api(service: Callable[[], ClassifierService], observe: RequestObserver | None = None) -> FastAPI:
    """The classifier's API; ``service`` is asked at every request, since a replica has none when it is imported."""
    api = _api(
        "raypp classifier", "Classifies protected images. It never sees a plain one.", service, "classify", observe
    )

    @api.post("/v1/classify", openapi_extra=_body("image", plain=False), responses=response_of(CLASSIFIED))
    async def classify(
        request: Request, top: int = Query(5, ge=1, le=1000, description="Classes to return for each image.")
    ) -> Response:
        """Classify one protected image or a batch.

        The header `Raypp-Protection` names what the images were protected with (the ETag of `/v1/protection`): while a
        new bundle takes over, both it and the one before are served, each by its own classifier.
        """
        began = time.perf_counter()
        asked = service()
        async with _request_timeout(asked.limits):
            served = await asked.served(_requested_protection(request))
            if served is None:
                raise _other_protection()
            images, _ = await _images(request, served.shape, asked.limits)
            read = time.perf_counter()
            with asked.waiting.admitted(len(images)):
                probabilities, protected = await asked.predict(served, _to_tensor(images))
        _refuse_plain(protected)
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
        responses=example_of("application/zip", {"type": "string", "format": "binary"})
        | {304: {"description": "The client has it already."}},
        response_class=Response,
    )
    async def protection(request: Request) -> Response:
        """The public part of the live bundle: what a client protects with. A key is never in it."""
        asked = service()
        served = asked.now()
        tag = f'"{served.protection}"'
        headers = {"ETag": tag, MODEL_HEADER: served.version, "Cache-Control": "no-cache", "Accept-Ranges": "none"}
        if not matches_etag(request.headers.get("if-match", "*"), tag, weakly=False):
            raise RequestError(412, "other-version", f"If-Match names another protection than {tag}, which is live")
        if matches_etag(request.headers.get("if-none-match", ""), tag, weakly=True):
            return Response(status_code=304, headers=headers)
        return Response(served.archive, media_type="application/zip", headers=headers)

    @api.get("/v1/model", responses=example_of("application/json", {"type": "object"}, MODEL))
    async def model() -> Response:
        """What is served: card, classes, shape of an upload, what attacks recovered, how the guard was calibrated."""
        asked = service()
        served = asked.now()
        guard = None
        if served.guard is not None:
            guard = {k: getattr(served.guard, k) for k in ("plain_refused", "protected_refused")}
        test = served.private.metrics.get("test", {})
        about = {
            "version": served.version,
            "bundle": served.name,
            "protection": served.protection,
            "classes": list(served.classes),
            "upload": {"height": served.shape[0], "width": served.shape[1], "channels": served.shape[2], "bits": 8},
            "limits": {"body_bytes": asked.limits.body, "images": asked.limits.images},
            "accuracy": test.get("accuracy"),
            "accuracy_interval": test.get("accuracy_interval"),
            "at_chance": chance_error(test, len(served.classes)),
            "guard": guard,
            "scorecard": summary(served.scorecard),
            "card": served.card,
            "rejected": asked.rejected(),
            "raypp": raypp.__version__,
        }
        return Response(json.dumps(about), media_type="application/json")

    return api


def attack_api(service: Callable[[], AttackService], observe: RequestObserver | None = None) -> FastAPI:
    """The attack service's API; see :func:`classifier_api`."""
    api = _api(
        "raypp attacks", "What an attacker makes of protected images, and how much he recovers.", service, "attack",
        observe,
    )  # fmt: skip

    @api.get("/v1", responses=example_of("application/json", {"type": "object"}, ATTACKS_OFFERED))
    async def listing() -> Response:
        """Which attacks are served, who carries them out, and what they recovered when the bundle was attacked."""
        asked = service()
        offered = await asked.offered(None)
        assert offered is not None
        found = [
            {
                "attack": attack.name,
                "threat": attack.threat.name,
                "attacker_has": attack.threat.meaning,
                "max_images": min(attack.max_images, asked.limits.images),
                "measured": attack.measured,
            }
            for attack in offered.attacks.values()
        ]
        about = {
            "model": offered.served.version,
            "attacks": found,
            "baselines": offered.baselines,
            "rejected": asked.rejected(),
        }
        return Response(json.dumps(about), media_type="application/json")

    @api.post("/v1/{attack}", openapi_extra=_body("image", plain=True), responses=response_of(RECONSTRUCTED, PNG))
    async def run(request: Request, attack: str) -> Response:
        """Reconstruct plain images from protected ones.

        Sent along on purpose in the form's field `plain`, the originals are compared with the reconstructions. With
        `Accept: image/png` the answer is the first reconstruction as a picture.
        """
        began = time.perf_counter()
        asked = service()
        async with _request_timeout(asked.limits):
            offered = await asked.offered(_requested_protection(request))
        if offered is None:
            raise _other_protection()
        served, chosen = offered.served, offered.attacks.get(attack)
        if chosen is None:
            known = ", ".join(offered.attacks) or "none: the bundle has not been attacked"
            raise RequestError(404, "unknown-attack", f"there is no attack {attack[:50]!r} here; served are {known}")
        most = replace(asked.limits, images=min(asked.limits.images, chosen.max_images))
        async with _request_timeout(asked.limits):
            images, plain = await _images(request, served.shape, most, served.plain)
            values = _to_tensor(images)
            if served.guard is not None:
                _refuse_plain(await asyncio.to_thread(served.guard.is_protected, values))
            try:
                made = await asked.reconstruct(chosen, values)
            except RayppError as error:
                raise RequestError(422, "attack-does-not-apply", str(error)) from error
        pixels = made.cpu().permute(0, 2, 3, 1).numpy()
        if request.state.media_type == PNG:
            return Response(encode_png(pixels[0]), media_type=PNG, headers={MODEL_HEADER: served.version})
        scores = await asyncio.to_thread(_compare, pixels, plain)
        pngs = await asyncio.to_thread(lambda: [base64.b64encode(encode_png(image)).decode() for image in pixels])
        found = [{"png": png} | score for png, score in zip(pngs, scores, strict=True)]
        answer = {
            "attack": attack,
            "threat": chosen.threat.name,
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
    kept = (
        "verdict",
        "verdict_reason",
        "strongest_attack",
        "reidentification_rate",
        "num_queries",
        "num_gallery",
        "accuracy",
    )
    attacks = {name: measured(found) for name, found in scorecard["attacks"].items()}
    return {key: scorecard.get(key) for key in kept} | {"attacks": attacks, "baselines": baseline_scores(scorecard)}


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """Of one attack's entry in a scorecard: threat, share found, SSIM and PSNR, verdict."""
    about = {
        key: found.get(key)
        for key in ("threat", "status", "verdict", "verdict_reason", "reidentification_rate", "lower_bound")
    }
    scores = found.get("scores") or {}
    return about | {key: scores[key]["mean"] for key in ("ssim", "psnr", "edges") if key in scores}


def baseline_scores(scorecard: dict[str, Any] | None) -> dict[str, Any]:
    """What somebody recovers who never saw the protected image."""
    baselines = (scorecard or {}).get("baselines") or {}
    return {
        name: {key: scores[key]["mean"] for key in ("ssim", "psnr", "edges", "reidentified") if key in scores}
        for name, scores in baselines.items()
    }


def _compare(made: Pixels, plain: Pixels | None) -> list[dict[str, float]]:
    if plain is None:
        return [{} for _ in made]
    a, b = (torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).float() / 255 for x in (made, plain))
    scores = {"psnr": psnr(a, b).clamp_max(MAX_PSNR)}
    if min(made.shape[1:3]) >= MIN_SIDE:
        scores["ssim"] = ssim(a, b)
    return [{key: round(float(values[i]), 4) for key, values in scores.items()} for i in range(len(made))]


# What both have in common


def _api(
    title: str,
    what: str,
    service: Callable[[], ClassifierService | AttackService],
    scope: str,
    observe: RequestObserver | None,
) -> FastAPI:
    bearer = HTTPBearer(auto_error=False, description="Where the service was started with a token file.")

    async def allowed(request: Request) -> None:
        """Before parameters are looked at: who has no token is told nothing else."""
        tokens = await service().tokens()
        if tokens is not None:
            tokens.check(request.headers.get("authorization"), scope)
        # What is not read is refused, and the type of the answer is chosen.
        route = request.scope["route"]
        check_headers(request.headers, reads_body=request.method == "POST", tagged=304 in route.responses)
        check_query(
            (name for name, _ in request.query_params.multi_items()),
            [parameter.alias for parameter in route.dependant.query_params],
        )
        offered = list(route.responses.get(200, {}).get("content", {}))
        request.state.media_type = negotiate(request.headers.getlist("accept"), offered)

    api = FastAPI(
        title=title, version=raypp.__version__, description=what, docs_url="/docs", redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # to an address that the client's Host header names, before its token is looked at
        dependencies=[Depends(allowed), Depends(bearer)],  # the latter so that OpenAPI names it
    )  # fmt: skip
    pages = {"/docs": "text/html", "/openapi.json": "application/json"}
    api.add_middleware(RequestMiddleware, observe=observe, root="/docs", pages=pages)
    add_problems(api)
    return api


@asynccontextmanager
async def _request_timeout(limits: Limits) -> AsyncIterator[None]:
    """Give a request up after so long: Serve's own limit is one that a client may switch off by a header."""
    try:
        async with asyncio.timeout(limits.seconds):
            yield
    except TimeoutError as error:
        raise RequestError(408, "too-slow", f"the request was given up after {limits.seconds:g} s") from error


def _to_tensor(images: Pixels) -> Tensor:
    return torch.from_numpy(np.array(images, copy=True)).permute(0, 3, 1, 2)


def _other_protection() -> RequestError:
    return RequestError(
        409, "other-protection",
        "the images were protected with a protection that is not served (any more); fetch "
        "/classifier/v1/protection and protect them anew",
    )  # fmt: skip


def _refuse_plain(protected: Tensor) -> None:
    """Refuse a request if one of its images does not look protected, bool (N,); says which, counted from zero."""
    if not bool(protected.all()):
        places = (~protected).nonzero().flatten().tolist()
        raise RequestError(
            422, "not-protected",
            f"image {places[0] + 1} of {len(protected)} does not look protected; nothing of it was kept. Protect it "
            "first: raypp protect, or raypp.Client",
            more={"images": places},
        )  # fmt: skip


def _requested_protection(request: Request) -> str | None:
    return request.headers.get(PROTECTION_HEADER.lower())


async def _images(
    request: Request, shape: Shape, limits: Limits, plain: Shape | None = None
) -> tuple[Pixels, Pixels | None]:
    """See :func:`read_images`."""
    body = await read_body(request.stream(), request.headers.get("content-length"), limits)
    found = await read_images(body, request.headers.get("content-type", ""), shape, limits, plain)
    request.state.num_images = len(found[0])
    return found


def _ms(began: float, ended: float) -> float:
    return round(1000 * (ended - began), 2)


# What OpenAPI says of bodies and answers, which are read and written by hand


def _body(field: str, *, plain: bool) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": binary, "minItems": 1}
    fields = {field: files} | ({"plain": files} if plain else {})
    form = {"type": "object", "properties": fields, "required": [field], "additionalProperties": False}
    header = {
        "name": PROTECTION_HEADER, "in": "header", "required": False, "schema": {"type": "string"},
        "description": "What the images were protected with: the ETag of /v1/protection without its quotes.",
    }  # fmt: skip
    return {
        "parameters": [header],
        "requestBody": {
            "required": True,
            "description": f"One protected image as PNG, or one or a batch as a NumPy file of uint8 (H, W, C) or "
            f"(N, H, W, C), or a form with files of either kind in '{field}'.",
            "content": {
                PNG: {"schema": binary, "example": "the bytes of a PNG file, as curl --data-binary @protected.png"},
                NPY: {"schema": binary, "example": "the bytes that numpy.save writes of uint8 (N, H, W, C)"},
                MULTIPART: {"schema": form, "example": {field: ["the bytes of protected.png"]}},
            },
        },
    }
