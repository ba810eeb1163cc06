"""Which attacks of a bundle can be carried out on request, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import load
from torch import Tensor

from raypp import bundle as bundles
from raypp.attacks import ATTACKS
from raypp.attacks.base import Access, Attack, AttackError, Map, TrainedAttack
from raypp.attacks.white_box import WhiteBoxOptions
from raypp.serve.model import Served, in_few_sizes
from raypp.storage import Storage

MOST = {"white_box": 4}
"""Images of one request where each costs much."""
STEPS = 100  # of an optimisation that somebody waits for

Run = Callable[[Tensor], Tensor]


def online(served: Served) -> dict[str, tuple[Run, int]]:
    """Attacks that a bundle's scorecard has and that need nothing but what the bundle holds.

    Those that look images up in a gallery, or need pairs, are not among them.

    Returns:
        by name, a map from protected uint8 (N, C, H', W') to estimates uint8 (N, C, H, W), and its largest batch.
    """
    listed = (served.scorecard or {}).get("attacks", {})
    done = {name: found for name, found in listed.items() if found["status"] == "done"}
    access = _access(served)
    networks: dict[str, Map] = {}
    found: dict[str, tuple[Run, int]] = {}
    with Storage(served.location).download("private") as folder:  # a bundle not attacked has no attacks/ in it
        for name in sorted(done, key=lambda n: bool(ATTACKS.get(n).after)):
            kind: type[Attack] = ATTACKS.get(name)
            options = ATTACKS.options(name).model_validate(done[name]["options"])
            if isinstance(options, WhiteBoxOptions):
                options = options.model_copy(update={"steps": min(options.steps, STEPS), "restarts": 0})
            earlier = {n: networks[n] for n in kind.after if n in networks}
            try:
                learned = issubclass(kind, TrainedAttack)
                attack = kind(options, replace(access, earlier=earlier or None), learned=learned)
                if isinstance(attack, TrainedAttack):
                    attack.load(load((folder / "attacks" / f"{name}.safetensors").read_bytes()))
                    networks[name] = attack.reconstruct
                attack.prepare()
            except (AttackError, OSError):
                continue
            run = partial(in_few_sizes, attack.reconstruct) if learned else attack.reconstruct
            found[name] = (run, MOST.get(name, 256))
    return found


def _access(served: Served) -> Access:
    public = bundles.load_public(served.location)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protection = public.protection.to(device)

    def gradients(images: Tensor) -> Tensor:
        protected: Tensor = protection(images)
        return protected

    @torch.inference_mode()
    def classify(protected: Tensor) -> Tensor:
        return served.probabilities(protected).argmax(1).to(protected.device)

    return Access(
        shape=(public.channels, *public.image_size),
        structure=type(protection).adaptation,
        num_classes=len(served.classes),
        protect=lambda images: protection.protect(images.to(device)),
        gradients=gradients if protection.differentiable else None,
        classify=classify,
        device=device,
    )
