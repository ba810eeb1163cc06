"""The attacks that a service can run on a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, Threat, TrainedAttack
from raypp.attacks.white_box import WhiteBoxOptions
from raypp.bundle.load import PublicBundle
from raypp.serve.loaded_model import LoadedModel, pad_to_bucket
from raypp.serve.scorecard_summary import baseline_scores, summarize_attack

MAX_IMAGES = 256
"""Images of one request."""
MAX_IMAGES_OF_SLOW = {"white_box": 4}
MAX_STEPS = 100  # optimization steps of an attack while a client waits


@dataclass(frozen=True)
class ServedAttack:
    """One attack of a service, and its scores in the bundle's scorecard."""

    name: str
    threat: Threat
    max_images: int
    measured: dict[str, Any]
    run: Callable[[Tensor], Tensor]
    """Estimates uint8 (N, C, H, W) of plain images from protected images uint8 (N, C, H', W')."""


@dataclass(frozen=True)
class AttackCatalog:
    """The attacks on one bundle."""

    model: LoadedModel
    attacks: dict[str, ServedAttack]
    baselines: dict[str, Any]


def build_catalog(model: LoadedModel) -> AttackCatalog:
    """Load the attacks of a model."""
    return AttackCatalog(model, load_attacks(model), baseline_scores(model.scorecard))


def load_attacks(model: LoadedModel) -> dict[str, ServedAttack]:
    """Load the attacks of a bundle's scorecard, by name, that need no data outside the bundle.

    Attacks that search a gallery or need pairs of images are left out.
    """
    results = (model.scorecard or {}).get("attacks", {})
    done = {name: result for name, result in results.items() if result["status"] == "done"}
    material = model.attack_material
    if material is None:
        raise ValueError("the bundle was loaded without its attack networks: load_model(..., attacks=True)")
    knowledge = _attacker_knowledge(model, material.public)
    networks: dict[str, ImageMap] = {}
    attacks: dict[str, ServedAttack] = {}
    for name in sorted(done, key=lambda n: bool(ATTACKS.get(n).after)):
        kind: type[Attack] = ATTACKS.get(name)
        options = ATTACKS.options(name).model_validate(done[name]["options"])
        if isinstance(options, WhiteBoxOptions):
            options = options.model_copy(update={"steps": min(options.steps, MAX_STEPS), "restarts": 0})
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
        attacks[name] = ServedAttack(name, kind.threat, max_images, summarize_attack(done[name]), run)
    return attacks


def _attacker_knowledge(model: LoadedModel, public: PublicBundle) -> AttackerKnowledge:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protection = public.protection.to(device)

    def gradients(images: Tensor) -> Tensor:
        protected: Tensor = protection(images)
        return protected

    @torch.inference_mode()
    def classify(protected: Tensor) -> Tensor:
        return model.probabilities(protected).argmax(1).to(protected.device)

    return AttackerKnowledge(
        shape=(public.channels, *public.image_size),
        structure=type(protection).adaptation,
        num_classes=len(model.classes),
        protect=lambda images: protection.protect(images.to(device)),
        gradients=gradients if protection.differentiable else None,
        classify=classify,
        device=device,
    )
