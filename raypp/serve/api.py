"""The two services as FastAPI applications, independent of Ray.

Errors are problem documents (RFC 9457). Image contents are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from torch import Tensor

import raypp
from raypp.metrics.image import MIN_SIDE, psnr, ssim
from raypp.metrics.statistics import chance_error
from raypp.serve.admission import AdmissionControl, RequestError
from raypp.serve.attack_catalog import AttackCatalog, ServedAttack
from raypp.serve.endpoint import (
    RequestedProtection,
    Service,
    create_api,
    elapsed_ms,
    read_request_images,
    refuse_plain_images,
    request_timeout,
    to_tensor,
    unknown_protection,
)
from raypp.serve.loaded_model import LoadedModel
from raypp.serve.middleware import MODEL_HEADER, PROTECTION_HEADER, RequestObserver
from raypp.serve.request_checks import matches_etag
from raypp.serve.schemas import (
    JSON,
    PNG,
    ZIP,
    AttackList,
    Classification,
    ModelInfo,
    Reconstructions,
    binary_responses,
    image_body,
    json_responses,
)
from raypp.serve.scorecard_summary import summarize_scorecard
from raypp.utils.errors import RayppError
from raypp.utils.images import Pixels, encode_png

MAX_PSNR = 60.0  # dB: JSON has no infinity


class ClassifierService(Service, Protocol):
    """Backend of the classifier's API."""

    waiting: AdmissionControl

    def active_model(self) -> LoadedModel: ...

    async def find_model(self, protection: str | None) -> LoadedModel | None:
        """The newest loaded model with a protection; the active one for None."""

    async def predict(self, model: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities float (N, K) of images uint8 (N, C, H, W), and whether each looks protected, bool (N,)."""


class AttackService(Service, Protocol):
    """Backend of the attack API."""

    async def find_attacks(self, protection: str | None) -> AttackCatalog | None:
        """The attacks on the newest model with a protection; on the active one for None."""

    async def reconstruct(self, attack: ServedAttack, images: Tensor) -> Tensor:
        """Run an attack without blocking other requests."""


def classifier_api(service: Callable[[], ClassifierService], observe: RequestObserver | None = None) -> FastAPI:
    """The classifier's API.

    Args:
        service: returns the backend; called in each request, since a replica creates it after the application.
    """
    description = "Classifies protected images. Plain images never reach it."
    api = create_api("raypp classifier", description, service, "classify", observe)
    routes = _ClassifierRoutes(service)
    post = api.post("/v1/classify", openapi_extra=image_body("image"), responses=json_responses(Classification))
    post(routes.classify)
    api.get("/v1/protection", responses=binary_responses(ZIP), response_class=Response)(routes.protection)
    api.get("/v1/model", responses=json_responses(ModelInfo))(routes.model)
    return api


def attack_api(service: Callable[[], AttackService], observe: RequestObserver | None = None) -> FastAPI:
    """The attack service's API; see :func:`classifier_api`."""
    description = "Reconstructs plain images from protected ones, as an attacker would."
    api = create_api("raypp attacks", description, service, "attack", observe)
    routes = _AttackRoutes(service)
    api.get("/v1", responses=json_responses(AttackList))(routes.listing)
    body, responses = image_body("image", "plain"), json_responses(Reconstructions, PNG)
    api.post("/v1/{attack}", openapi_extra=body, responses=responses)(routes.run)
    return api


@dataclass
class _ClassifierRoutes:
    service: Callable[[], ClassifierService]

    async def classify(
        self,
        request: Request,
        protection: RequestedProtection = None,
        top: Annotated[int, Query(ge=1, le=1000, description="Classes to return for each image.")] = 5,
    ) -> Response:
        """Classify one protected image or a batch.

        The header `Raypp-Protection` names the protection of the images (the ETag of `/v1/protection`). While a new
        bundle takes over, the service still answers for the previous ones, each with its own classifier.
        """
        start = time.perf_counter()
        service = self.service()
        async with request_timeout(service.limits):
            model = await service.find_model(protection)
            if model is None:
                raise unknown_protection()
            images, _ = await read_request_images(request, model.shape, service.limits)
            read = time.perf_counter()
            with service.waiting.acquire(len(images)):
                probabilities, protected = await service.predict(model, to_tensor(images))
        refuse_plain_images(protected)
        predictions = _top_classes(model, probabilities, top)
        end = time.perf_counter()
        payload = {
            "model": model.version,
            "protection": model.protection,
            "images": predictions,
            "timing_ms": {
                "read": elapsed_ms(start, read),
                "model": elapsed_ms(read, end),
                "total": elapsed_ms(start, end),
            },
        }
        return _json(payload, {PROTECTION_HEADER: service.active_model().protection, MODEL_HEADER: model.version})

    async def protection(self, request: Request) -> Response:
        """The public part of the active bundle, with which clients protect their images. It holds no key."""
        model = self.service().active_model()
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
        model = service.active_model()
        guard = None
        if model.guard is not None:
            guard = {key: getattr(model.guard, key) for key in ("plain_refused", "protected_refused")}
        test = model.private.metrics.get("test", {})
        height, width, channels = model.shape
        payload = {
            "version": model.version,
            "bundle": model.name,
            "protection": model.protection,
            "classes": list(model.classes),
            "upload": {"height": height, "width": width, "channels": channels, "bits": 8},
            "limits": {"body_bytes": service.limits.body, "images": service.limits.images},
            "accuracy": test.get("accuracy"),
            "accuracy_interval": test.get("accuracy_interval"),
            "at_chance": chance_error(test, len(model.classes)),
            "guard": guard,
            "scorecard": summarize_scorecard(model.scorecard),
            "card": model.card,
            "rejected": service.rejected(),
            "raypp": raypp.__version__,
        }
        return _json(payload)


@dataclass
class _AttackRoutes:
    service: Callable[[], AttackService]

    async def listing(self) -> Response:
        """The available attacks: threat level, attacker's knowledge and scores on this bundle."""
        service = self.service()
        catalog = await service.find_attacks(None)
        assert catalog is not None
        attacks = [
            {
                "attack": attack.name,
                "threat": attack.threat.name,
                "attacker_has": attack.threat.meaning,
                "max_images": min(attack.max_images, service.limits.images),
                "measured": attack.measured,
            }
            for attack in catalog.attacks.values()
        ]
        payload = {
            "model": catalog.model.version,
            "attacks": attacks,
            "baselines": catalog.baselines,
            "rejected": service.rejected(),
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
            catalog = await service.find_attacks(protection)
        if catalog is None:
            raise unknown_protection()
        model, selected = catalog.model, _select_attack(catalog, attack)
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
            "timing_ms": {"total": elapsed_ms(start)},
        }
        return _json(payload, headers)


def _json(payload: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(payload), media_type=JSON, headers=headers)


def _top_classes(model: LoadedModel, probabilities: Tensor, top: int) -> list[dict[str, Any]]:
    best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    predictions = []
    for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        scores = [
            {"class": model.classes[index], "index": index, "probability": round(value, 6)}
            for index, value in zip(indices, values, strict=True)
        ]
        predictions.append(scores[0] | {"top": scores})
    return predictions


def _select_attack(catalog: AttackCatalog, name: str) -> ServedAttack:
    attack = catalog.attacks.get(name)
    if attack is None:
        known = ", ".join(catalog.attacks) or "none: the bundle has not been attacked"
        raise RequestError(404, "unknown-attack", f"there is no attack {name[:50]!r} here; served are {known}")
    return attack


def _describe_reconstructions(reconstructions: Pixels, originals: Pixels | None) -> list[dict[str, Any]]:
    """PNG file (base64) of each image (N, H, W, C) and, with originals, PSNR (dB) and SSIM."""
    scores: dict[str, Tensor] = {}
    if originals is not None:
        estimates, targets = (to_tensor(images).float() / 255 for images in (reconstructions, originals))
        scores["psnr"] = psnr(estimates, targets).clamp_max(MAX_PSNR)
        if min(reconstructions.shape[1:3]) >= MIN_SIDE:
            scores["ssim"] = ssim(estimates, targets)
    return [
        {"png": base64.b64encode(encode_png(image)).decode()}
        | {name: round(float(values[i]), 4) for name, values in scores.items()}
        for i, image in enumerate(reconstructions)
    ]
