"""Models of responses, and the description of uploads, from which FastAPI writes the OpenAPI document.

Routes write their JSON directly, for speed; the tests compare it with these models.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

JSON, HTML, PNG, NPY, ZIP = "application/json", "text/html", "image/png", "application/x-npy", "application/zip"
MULTIPART, PROBLEM = "multipart/form-data", "application/problem+json"

Responses = dict[int | str, dict[str, Any]]
VERSION = Field(description="First 16 hexadecimal digits of the manifest's SHA-256.", examples=["0123456789abcdef"])
PROTECTION = Field(description="SHA-256 of the manifest of the bundle's public part.")
THREAT = Field(description="Threat level, T0 to T5.", examples=["T4"])
REJECTED = Field(description="Version that the service refused to load, and the reason.")


class ClassScore(BaseModel):
    label: str = Field(alias="class", examples=["ship"])
    index: int = Field(examples=[8])
    probability: float = Field(examples=[0.93])


class ImageClasses(ClassScore):
    top: list[ClassScore] = Field(description="The most probable classes.")


class Classification(BaseModel):
    model: str = VERSION
    protection: str = PROTECTION
    images: list[ImageClasses]
    timing_ms: dict[str, float] = Field(examples=[{"read": 0.4, "model": 6.1, "total": 6.5}])


class UploadShape(BaseModel):
    height: int
    width: int
    channels: int
    bits: int


class UploadLimits(BaseModel):
    body_bytes: int
    images: int


class ScorecardSummary(BaseModel):
    verdict: str | None = Field(examples=["broken"])
    verdict_reason: str | None
    strongest_attack: str | None = Field(examples=["inverse"])
    reidentification_rate: float | None
    bits_identified: float | None
    num_queries: int | None
    num_gallery: int | None
    accuracy: Any
    attacks: dict[str, dict[str, Any]]
    baselines: dict[str, dict[str, Any]]


class ModelInfo(BaseModel):
    version: str = VERSION
    bundle: str = Field(examples=["first/bundle"])
    protection: str = PROTECTION
    classes: list[str] = Field(examples=[["airplane", "ship"]])
    upload: UploadShape
    limits: UploadLimits
    accuracy: float | None
    accuracy_interval: Any
    at_chance: Any
    guard: dict[str, Any] | None = Field(description="Refusal rates of the detector of plain images.")
    scorecard: ScorecardSummary | None
    card: str = Field(description="Model card in Markdown.")
    rejected: dict[str, str] | None = REJECTED
    raypp: str = Field(description="Version of raypp.")


class AttackInfo(BaseModel):
    attack: str = Field(examples=["inverse"])
    threat: str = THREAT
    attacker_has: str = Field(examples=["protected versions of images of the attacker's choice"])
    max_images: int = Field(description="Images of one request.")
    measured: dict[str, Any] = Field(description="Scores in the bundle's scorecard.")


class AttackList(BaseModel):
    model: str = VERSION
    attacks: list[AttackInfo]
    baselines: dict[str, dict[str, Any]] = Field(description="Scores of guesses that use no protected image.")
    rejected: dict[str, str] | None = REJECTED


class Reconstruction(BaseModel):
    png: str = Field(description="PNG file, base64.")
    psnr: float | None = Field(None, description="In dB, at most 60; only with the originals in 'plain'.")
    ssim: float | None = Field(None, description="Only with originals in 'plain' that are large enough.")


class Reconstructions(BaseModel):
    attack: str = Field(examples=["inverse"])
    threat: str = THREAT
    model: str = VERSION
    reconstructions: list[Reconstruction]
    timing_ms: dict[str, float] = Field(examples=[{"total": 12.3}])


class Problem(BaseModel):
    """Problem document of RFC 9457."""

    type: str = Field(examples=["urn:raypp:problem:wrong-shape"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="URN with the request's identifier.")
    images: list[int] | None = Field(None, description="With not-protected: indices, from 0, of the refused images.")


NOT_FOUND, METHOD_NOT_ALLOWED = "not-found", "method-not-allowed"
OTHER_PATHS = f"An unknown path gives 404 `{NOT_FOUND}`, and a method that a path lacks 405 `{METHOD_NOT_ALLOWED}`."
BY_PROXY = (408, 500, 503)  # Serve's proxy may answer with plain text instead of the replica


def _problems(descriptions: dict[int, str]) -> Responses:
    """Responses with problem documents, by status."""
    problem: dict[str, Any] = {PROBLEM: {"schema": Problem.model_json_schema()}}
    text: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        status: {"description": description, "content": problem | (text if status in BY_PROXY else {})}
        for status, description in descriptions.items()
    }


COMMON_PROBLEMS = _problems({
    400: "The request or a header cannot be read.", 401: "No valid token.", 403: "The token lacks the scope.",
    406: "Accept allows no available media type.", 408: "The request timed out.",
    412: "A condition names another version.", 415: "The media type or content encoding is not supported.",
    417: "The expectation is not supported.", 422: "A query parameter is unknown or repeated.", 500: "Internal error.",
    501: "The transfer encoding is not supported.", 503: "Busy: retry after Retry-After.",
})  # fmt: skip
"""Refusals of every route."""
UPLOAD_PROBLEMS = _problems({
    409: "The images were protected with a protection that is not served.",
    413: "The body is too large or holds too many images.",
    422: "An image has the wrong shape or is not protected, or a parameter or field is unknown.",
})  # fmt: skip
ATTACK_PROBLEMS = UPLOAD_PROBLEMS | _problems({
    404: "There is no attack of this name: `unknown-attack`.",
    422: "An image has the wrong shape or is not protected, a field is unknown, or the attack does not apply.",
})  # fmt: skip
BINARY = {"type": "string", "format": "binary"}


def json_responses(model: type[BaseModel], *other_media_types: str) -> Responses:
    """Responses of a route: JSON by a model, alternative binary media types, and common problems.

    The order of the media types is the service's order of preference.
    """
    content: dict[str, Any] = {JSON: {}} | {media_type: {"schema": BINARY} for media_type in other_media_types}
    return {200: {"description": "Success.", "model": model, "content": content}, **COMMON_PROBLEMS}


def binary_responses(media_type: str) -> Responses:
    """Responses of a route with an entity tag: a file, 304, and common problems."""
    return {
        200: {"description": "Success.", "content": {media_type: {"schema": BINARY}}},
        304: {"description": "The client has the current version."},
        **COMMON_PROBLEMS,
    }


def image_body(*fields: str) -> dict[str, Any]:
    """OpenAPI's description of a body, which the service parses without FastAPI; a form requires its first field."""
    files = {"type": "array", "items": BINARY, "minItems": 1}
    form = {
        "type": "object",
        "properties": dict.fromkeys(fields, files),
        "required": [fields[0]],
        "additionalProperties": False,
    }
    return {
        "requestBody": {
            "required": True,
            "description": f"One protected image as PNG, or one or a batch as a NumPy file of uint8 (H, W, C) or "
            f"(N, H, W, C), or a form with files of either kind in '{fields[0]}'.",
            "content": {
                PNG: {"schema": BINARY, "example": "the bytes of a PNG file, as curl --data-binary @protected.png"},
                NPY: {"schema": BINARY, "example": "the bytes that numpy.save writes of uint8 (N, H, W, C)"},
                MULTIPART: {"schema": form, "example": {fields[0]: ["the bytes of protected.png"]}},
            },
        }
    }
