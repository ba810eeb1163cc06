"""Which attacks of a bundle can be carried out on request, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import load
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap, TrainedAttack
from raypp.attacks.white_box import WhiteBoxOptions
from raypp.bundle.load import PublicBundle
from raypp.serve.loaded_model import LoadedModel, pad_to_bucket

MOST = {"white_box": 4}
"""Images of one request where each costs much."""
STEPS = 100  # of an optimisation that somebody waits for

Run = Callable[[Tensor], Tensor]


def load_attacks(served: LoadedModel) -> dict[str, tuple[Run, int]]:
    """Attacks that a bundle's scorecard has and that need nothing but what the bundle holds.

    Those that look images up in a gallery, or need pairs, are not among them.

    Returns:
        by name, a map from protected uint8 (N, C, H', W') to estimates uint8 (N, C, H, W), and its largest batch.
    """
    listed = (served.scorecard or {}).get("attacks", {})
    done = {name: found for name, found in listed.items() if found["status"] == "done"}
    material = served.attack_material
    if material is None:
        raise ValueError("the bundle was loaded without what its attacks are made of: load_served(..., attacks=True)")
    access = _access(served, material.public)
    networks: dict[str, ImageMap] = {}
    found: dict[str, tuple[Run, int]] = {}
    for name in sorted(done, key=lambda n: bool(ATTACKS.get(n).after)):
        kind: type[Attack] = ATTACKS.get(name)
        options = ATTACKS.options(name).model_validate(done[name]["options"])
        if isinstance(options, WhiteBoxOptions):
            options = options.model_copy(update={"steps": min(options.steps, STEPS), "restarts": 0})
        earlier = {n: networks[n] for n in kind.after if n in networks}
        learned = issubclass(kind, TrainedAttack)
        if learned and name not in material.networks:
            continue
        try:
            attack = kind(options, replace(access, earlier=earlier or None), learned=learned)
            if isinstance(attack, TrainedAttack):
                attack.load(load(material.networks[name]))
                networks[name] = attack.reconstruct
            attack.prepare()
        except AttackError:
            continue
        run = partial(pad_to_bucket, attack.reconstruct) if learned else attack.reconstruct
        found[name] = (run, MOST.get(name, 256))
    return found


def _access(served: LoadedModel, public: PublicBundle) -> AttackerKnowledge:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protection = public.protection.to(device)

    def gradients(images: Tensor) -> Tensor:
        protected: Tensor = protection(images)
        return protected

    @torch.inference_mode()
    def classify(protected: Tensor) -> Tensor:
        return served.probabilities(protected).argmax(1).to(protected.device)

    return AttackerKnowledge(
        shape=(public.channels, *public.image_size),
        structure=type(protection).adaptation,
        num_classes=len(served.classes),
        protect=lambda images: protection.protect(images.to(device)),
        gradients=gradients if protection.differentiable else None,
        classify=classify,
        device=device,
    )
