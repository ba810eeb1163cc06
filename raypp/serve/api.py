"""The two services as FastAPI applications, independent of Ray.

Errors are problem documents (RFC 9457). Image contents are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import TypeAdapter
from torch import Tensor

import raypp
from raypp.metrics.image import MIN_SIDE, finite_psnr, ssim
from raypp.metrics.statistics import chance_error
from raypp.serve import schemas
from raypp.serve.admission import AdmissionControl, Limits, RequestError
from raypp.serve.attack_catalog import ServedAttack, baseline_scores, summarize_scorecard
from raypp.serve.auth import Tokens
from raypp.serve.direct_route import DirectAPI, parse_query
from raypp.serve.loaded_model import LoadedModel
from raypp.serve.middleware import MODEL_HEADER, PROTECTION_HEADER, RequestObserver, add_middleware
from raypp.serve.model_store import ModelManager
from raypp.serve.request_checks import check_headers, check_query, matches_etag, negotiate
from raypp.serve.request_parsing import read_request_images
from raypp.serve.schemas import JSON, PNG, ZIP, binary_responses, image_body, json_responses
from raypp.utils.errors import RayppError
from raypp.utils.images import Pixels, encode_png

HEADER_DESCRIPTION = "Protection of the images: the ETag of /v1/protection without its quotes."
CLASSIFY = "/v1/classify"
DEFAULT_TOP = 5
Top = Annotated[int, Query(ge=1, le=1000, description="Classes to return for each image.")]
TOP: TypeAdapter[int] = TypeAdapter(Top)
RequestedProtection = Annotated[str | None, Header(alias=PROTECTION_HEADER, description=HEADER_DESCRIPTION)]


class Service(Protocol):
    """The part of the backend that both services share."""

    limits: Limits
    live: ModelManager

    async def tokens(self) -> Tokens | None:
        """The valid tokens; None if the service needs none."""

    async def find_model(self, protection: str | None) -> LoadedModel | None:
        """The newest loaded model with a protection; the active one for None."""


class ClassifierService(Service, Protocol):
    """Backend of the classifier's API."""

    waiting: AdmissionControl

    async def predict(self, model: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities float (N, K) of images uint8 (N, C, H, W), and whether each looks protected, bool (N,)."""


class AttackService(Service, Protocol):
    """Backend of the attack API. The attachment of its models is their attacks by name."""

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        """Run an attack without blocking other requests."""


def classifier_api(service: Callable[[], ClassifierService], observe: RequestObserver | None = None) -> FastAPI:
    """The classifier's API; each request calls ``service``, since a replica creates it after the application."""
    description = "Classifies protected images. Plain images never reach it."
    api, check_request = create_api("raypp classifier", description, service, "classify", observe)
    routes = _ClassifierRoutes(service)
    responses = json_responses(schemas.Classification) | schemas.UPLOAD_PROBLEMS
    api.post(CLASSIFY, openapi_extra=image_body("image"), responses=responses)(routes.classify)

    async def classify(request: Request) -> Response:
        await check_request(request)
        top = parse_query(request, "top", TOP, DEFAULT_TOP)
        return await routes.classify(request, request.headers.get(PROTECTION_HEADER), top)

    api.set_direct_route(CLASSIFY, classify, observe)
    api.get("/v1/protection", responses=binary_responses(ZIP), response_class=Response)(routes.protection)
    api.get("/v1/model", responses=json_responses(schemas.ModelInfo))(routes.model)
    return api


def attack_api(service: Callable[[], AttackService], observe: RequestObserver | None = None) -> FastAPI:
    """The attack service's API; see :func:`classifier_api`."""
    description = "Reconstructs plain images from protected ones, as an attacker would."
    api, _ = create_api("raypp attacks", description, service, "attack", observe)
    routes = _AttackRoutes(service)
    api.get("/v1", responses=json_responses(schemas.AttackList))(routes.listing)
    responses = json_responses(schemas.Reconstructions, PNG) | schemas.ATTACK_PROBLEMS
    api.post("/v1/{attack}", openapi_extra=image_body("image", "plain"), responses=responses)(routes.run)
    return api


def create_api(
    title: str, description: str, service: Callable[[], Service], scope: str, observe: RequestObserver | None
) -> tuple[DirectAPI, Callable[[Request], Awaitable[None]]]:
    """Create an application that checks tokens for ``scope`` and refuses unsupported headers and parameters.

    Returns:
        the application, and its check of a request, which a direct route calls itself.
    """
    bearer = HTTPBearer(auto_error=False, description="Needed if the service was started with a token file.")

    async def check_request(request: Request) -> None:
        # The token comes first: without one a client learns nothing else.
        tokens = await service().tokens()
        if tokens is not None:
            tokens.check(request.headers.get("authorization"), scope)
        route = request.scope["route"]
        check_headers(request.headers, reads_body=request.method == "POST", has_etag=304 in route.responses)
        check_query(request, [parameter.alias for parameter in route.dependant.query_params])
        media_types = list(route.responses[200]["content"])
        request.state.media_type = negotiate(request.headers.getlist("accept"), media_types)

    api = DirectAPI(
        title=title, version=raypp.__version__, description=f"{description} {schemas.OTHER_PATHS}",
        docs_url="/docs", redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a redirect would use the client's Host header, before its token is checked
        dependencies=[Depends(check_request), Depends(bearer)],  # the latter only documents the token
    )  # fmt: skip
    add_middleware(api, observe)
    return api, check_request


@dataclass
class _ClassifierRoutes:
    service: Callable[[], ClassifierService]

    async def classify(
        self,
        request: Request,
        protection: RequestedProtection = None,
        top: Top = DEFAULT_TOP,
    ) -> Response:
        """Classify one protected image or a batch.

        The header `Raypp-Protection` names the protection of the images (the ETag of `/v1/protection`). While a new
        bundle takes over, the service still answers for the previous ones, each with its own classifier.
        """
        start = time.perf_counter()
        service = self.service()
        async with request_timeout(service.limits):
            model = await require_model(service, protection)
            images, _ = await read_request_images(request, model.shape, service.limits)
            read = time.perf_counter()
            with service.waiting.acquire(len(images)):
                probabilities, protected = await service.predict(model, to_tensor(images))
        refuse_plain_images(protected)
        predictions = _top_classes(model, probabilities, top)
        end = time.perf_counter()
        spans = {"read": (start, read), "model": (read, end), "total": (start, end)}
        times = {name: elapsed_ms(*span) for name, span in spans.items()}
        return _json(
            {"model": model.version, "protection": model.protection, "images": predictions, "timing_ms": times},
            {PROTECTION_HEADER: service.live.active.protection, MODEL_HEADER: model.version},
        )

    async def protection(self, request: Request) -> Response:
        """The public part of the active bundle, with which clients protect their images. It holds no key."""
        model = self.service().live.active
        tag = f'"{model.protection}"'
        headers = {"ETag": tag, MODEL_HEADER: model.version, "Cache-Control": "no-cache", "Accept-Ranges": "none"}
        if not matches_etag(request.headers.get("if-match", "*"), tag, weak=False):
            raise RequestError(412, "other-version", f"If-Match names another protection than the active one, {tag}")
        if matches_etag(request.headers.get("if-none-match", ""), tag, weak=True):
            return Response(status_code=304, headers=headers)
        return Response(model.archive, media_type=ZIP, headers=headers)

    async def model(self) -> Response:
        """The active bundle: card, classes, upload shape, attack results and the detector's refusal rates."""
        service = self.service()
        model = service.live.active
        guard = model.guard and {name: getattr(model.guard, name) for name in ("plain_refused", "protected_refused")}
        test, classes = model.private.metrics.get("test", {}), model.private.classes
        payload = {
            "version": model.version,
            "bundle": model.name,
            "protection": model.protection,
            "classes": list(classes),
            "upload": dict(zip(("height", "width", "channels"), model.shape, strict=True)) | {"bits": 8},
            "limits": {"body_bytes": service.limits.body, "images": service.limits.images},
            "accuracy": test.get("accuracy"),
            "accuracy_interval": test.get("accuracy_interval"),
            "at_chance": chance_error(test, len(classes)),
            "guard": guard,
            "scorecard": summarize_scorecard(model.scorecard),
            "card": model.card,
            "rejected": service.live.rejected,
            "raypp": raypp.__version__,
        }
        return _json(payload)


@dataclass
class _AttackRoutes:
    service: Callable[[], AttackService]

    async def listing(self) -> Response:
        """The available attacks: threat level, attacker's knowledge and scores on this bundle."""
        service = self.service()
        model = service.live.active
        attacks = [
            {
                "attack": attack.name,
                "threat": attack.threat.name,
                "attacker_has": attack.threat.meaning,
                "max_images": min(attack.max_images, service.limits.images),
                "measured": attack.measured,
            }
            for attack in model.attachment.values()
        ]
        payload = {
            "model": model.version,
            "attacks": attacks,
            "baselines": baseline_scores(model.scorecard),
            "rejected": service.live.rejected,
        }
        return _json(payload)

    async def run(self, request: Request, attack: str, protection: RequestedProtection = None) -> Response:
        """Reconstruct plain images from protected ones.

        If the form's field `plain` holds the originals, the reconstructions are compared with them. With
        `Accept: image/png` the response is the first reconstruction as a picture.
        """
        start = time.perf_counter()
        service = self.service()
        async with request_timeout(service.limits):
            model = await require_model(service, protection)
        selected: ServedAttack | None = model.attachment.get(attack)
        if selected is None:
            known = ", ".join(model.attachment) or "none: the bundle has not been attacked"
            raise RequestError(404, "unknown-attack", f"there is no attack {attack[:50]!r} here; served are {known}")
        limits = replace(service.limits, images=min(service.limits.images, selected.max_images))
        async with request_timeout(service.limits):
            images, originals = await read_request_images(request, model.shape, limits, model.plain)
            protected = to_tensor(images)
            if model.guard is not None:
                refuse_plain_images(await asyncio.to_thread(model.guard.is_protected, protected))
            try:
                estimates = await service.reconstruct(selected, protected)
            except RayppError as error:
                raise RequestError(422, "attack-does-not-apply", str(error)) from error
        reconstructions = estimates.cpu().permute(0, 2, 3, 1).numpy()
        headers = {MODEL_HEADER: model.version}
        if request.state.media_type == PNG:
            return Response(encode_png(reconstructions[0]), media_type=PNG, headers=headers)
        payload = {
            "attack": attack,
            "threat": selected.threat.name,
            "model": model.version,
            "reconstructions": await asyncio.to_thread(_describe_reconstructions, reconstructions, originals),
            "timing_ms": {"total": elapsed_ms(start, time.perf_counter())},
        }
        return _json(payload, headers)


def _json(payload: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(payload), media_type=JSON, headers=headers)


def _top_classes(model: LoadedModel, probabilities: Tensor, top: int) -> list[dict[str, Any]]:
    best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    predictions = []
    for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        scores = [
            {"class": model.private.classes[index], "index": index, "probability": round(value, 6)}
            for index, value in zip(indices, values, strict=True)
        ]
        predictions.append(scores[0] | {"top": scores})
    return predictions


def _describe_reconstructions(reconstructions: Pixels, originals: Pixels | None) -> list[dict[str, Any]]:
    """PNG file (base64) of each image (N, H, W, C) and, with originals, PSNR (dB) and SSIM."""
    scores: dict[str, Tensor] = {}
    if originals is not None:
        estimates, targets = (to_tensor(images).float() / 255 for images in (reconstructions, originals))
        scores["psnr"] = finite_psnr(estimates, targets)
        if min(reconstructions.shape[1:3]) >= MIN_SIDE:
            scores["ssim"] = ssim(estimates, targets)
    return [
        {"png": base64.b64encode(encode_png(image)).decode()}
        | {name: round(float(values[i]), 4) for name, values in scores.items()}
        for i, image in enumerate(reconstructions)
    ]


@asynccontextmanager
async def request_timeout(limits: Limits) -> AsyncIterator[None]:
    """Raise RequestError (408) after ``limits.seconds``; a client can disable Serve's own timeout by a header."""
    try:
        async with asyncio.timeout(limits.seconds):
            yield
    except TimeoutError as error:
        raise RequestError(408, "too-slow", f"the request timed out after {limits.seconds:g} s") from error


def to_tensor(images: Pixels) -> Tensor:
    """Copy images uint8 (N, H, W, C) to a tensor (N, C, H, W)."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


async def require_model(service: Service, protection: str | None) -> LoadedModel:
    """Find the model for a protection; raises RequestError (409) if there is none."""
    model = await service.find_model(protection)
    if model is None:
        raise RequestError(
            409, "other-protection", "the images were protected with a protection that is not served (any more); fetch "
            "/classifier/v1/protection and protect the images again",
        )  # fmt: skip
    return model


def refuse_plain_images(protected: Tensor) -> None:
    """Raise RequestError (422) unless every image looks protected, bool (N,)."""
    if not bool(protected.all()):
        indices = (~protected).nonzero().flatten().tolist()
        raise RequestError(
            422, "not-protected",
            f"image {indices[0] + 1} of {len(protected)} does not look protected, and the service stored nothing of "
            "it; protect it first with raypp protect or raypp.Client", images=indices,
        )  # fmt: skip


def elapsed_ms(start: float, end: float) -> float:
    """Milliseconds between two values of ``time.perf_counter``."""
    return round(1000 * (end - start), 2)
