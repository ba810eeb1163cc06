"""The attacks that a service can run on a bundle, and the public parts of its scorecard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, Threat
from raypp.attacks.statements import logits_of
from raypp.attacks.trained import TrainedAttack
from raypp.bundle.load import PublicBundle
from raypp.serve.loaded_model import LoadedModel, pad_to_bucket
from raypp.utils.device import default_device

MAX_IMAGES = 256
"""Images of one request."""
MAX_IMAGES_OF_SLOW = {"white_box": 4, "flow_matching": 4}
LIMITS_OF_SLOW = {"white_box": {"steps": 100, "restarts": 0}, "flow_matching": {"samples": 2, "steps": 25}}
"""Largest values of options while a client waits."""
SUMMARY_KEYS = (
    "verdict", "verdict_reason", "strongest_attack", "reidentification_rate", "bits_identified", "num_queries",
    "num_gallery", "accuracy",
)  # fmt: skip
ATTACK_KEYS = (
    "threat", "status", "verdict", "verdict_reason", "reidentification_rate", "num_gallery", "matcher", "lower_bound",
)  # fmt: skip


@dataclass(frozen=True)
class ServedAttack:
    """One attack of a service, and its scores in the bundle's scorecard."""

    name: str
    threat: Threat
    max_images: int
    measured: dict[str, Any]
    run: ImageMap
    """Estimates the plain images from protected images."""


def load_attacks(model: LoadedModel) -> dict[str, ServedAttack]:
    """Load the attacks of a bundle's scorecard, by name, that need no data outside the bundle.

    Attacks that search a gallery or need pairs of images are left out, and those of packages that are not installed.
    """
    material = model.attack_material
    if material is None:
        raise ValueError("the bundle was loaded without its attack networks: load_model(..., attacks=True)")
    results = (model.scorecard or {}).get("attacks", {})
    known = set(ATTACKS)
    done = {name: result for name, result in results.items() if result["status"] == "done" and name in known}
    knowledge = _attacker_knowledge(model, material.public)
    networks: dict[str, ImageMap] = {}
    attacks: dict[str, ServedAttack] = {}
    for name in sorted(done, key=lambda n: bool(ATTACKS.get(n).after)):
        kind: type[Attack] = ATTACKS.get(name)
        options = ATTACKS.options(name).model_validate(done[name]["options"])
        limits = LIMITS_OF_SLOW.get(name, {})
        options = options.model_copy(update={key: min(getattr(options, key), limit) for key, limit in limits.items()})
        earlier = {n: networks[n] for n in kind.after if n in networks}
        trained = issubclass(kind, TrainedAttack)
        if trained and name not in material.networks:
            continue
        try:
            attack = kind(options, replace(knowledge, earlier=earlier or None), learned=trained)
            if isinstance(attack, TrainedAttack):
                attack.load(load(material.networks[name]))
                networks[name] = attack.reconstruct
            attack.prepare()
        except AttackError:  # the attack needs other data
            continue
        run = partial(pad_to_bucket, attack.reconstruct) if trained else attack.reconstruct
        max_images = MAX_IMAGES_OF_SLOW.get(name, MAX_IMAGES)
        attacks[name] = ServedAttack(name, Threat[done[name]["threat"]], max_images, _summarize_attack(done[name]), run)
    return attacks


def _attacker_knowledge(model: LoadedModel, public: PublicBundle) -> AttackerKnowledge:
    device = default_device()
    protection = public.protection.to(device)

    @torch.inference_mode()
    def classify(protected: Tensor) -> Tensor:
        return model.probabilities(protected).argmax(1).to(protected.device)

    return AttackerKnowledge(
        shape=(public.channels, *public.image_size),
        structure=type(protection).adaptation,
        num_classes=len(model.private.classes),
        protect=lambda images: protection.protect(images.to(device)),
        noise_std=protection.noise_std,
        gradients=protection if protection.differentiable else None,
        logits=logits_of(protection),
        classify=classify,
        device=device,
    )


def summarize_scorecard(scorecard: dict[str, Any] | None) -> dict[str, Any] | None:
    """Verdict, scores of every attack and baselines."""
    if scorecard is None:
        return None
    attacks = {name: _summarize_attack(result) for name, result in scorecard["attacks"].items()}
    summary = {key: scorecard.get(key) for key in SUMMARY_KEYS}
    return summary | {"attacks": attacks, "baselines": baseline_scores(scorecard)}


def _summarize_attack(result: dict[str, Any]) -> dict[str, Any]:
    """Threat level, verdict, re-identification rate and mean scores of one attack."""
    return {key: result.get(key) for key in ATTACK_KEYS} | _means(
        result.get("scores") or {}, "bits_identified", "ssim", "psnr", "edges"
    )


def baseline_scores(scorecard: dict[str, Any] | None) -> dict[str, Any]:
    """Mean scores of guesses that use no protected image."""
    baselines = (scorecard or {}).get("baselines") or {}
    return {name: _means(scores, "ssim", "psnr", "edges", "reidentified") for name, scores in baselines.items()}


def _means(scores: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: scores[key]["mean"] for key in keys if key in scores}
