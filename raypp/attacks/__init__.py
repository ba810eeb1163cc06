"""Attacks, which estimate plain images from protected ones with the knowledge of their threat level."""

import importlib
from collections.abc import Callable
from typing import Any

from raypp.utils.registry import Method, Registry

ATTACKS = Registry(
    "attack",
    {
        "protected_image": "raypp.attacks.ciphertext_only:ProtectedImage",
        "feature_reconstruction": "raypp.attacks.ciphertext_only:FeatureReconstruction",
        "minimum_difference": "raypp.attacks.ciphertext_only:MinimumDifference",
        "unpaired_gan": "raypp.attacks.unpaired_gan:UnpairedGAN",
        "inverse_own_keys": "raypp.attacks.inverse:InverseOwnKeys",
        "known_plaintext": "raypp.attacks.known_plaintext:KnownPlaintext",
        "chosen_plaintext": "raypp.attacks.chosen_plaintext:ChosenPlaintext",
        "itn": "raypp.attacks.inverse:ITN",
        "inverse": "raypp.attacks.inverse:Inverse",
        "inverse_conditional": "raypp.attacks.inverse:InverseConditional",
        "flow_matching": "raypp.attacks.flow_matching:FlowMatching",
        "white_box": "raypp.attacks.white_box:WhiteBox",
        "codebook": "raypp.attacks.codebook:Codebook",
        "attribute_inference": "raypp.attacks.attribute_inference:AttributeInference",
        "learned_matcher": "raypp.attacks.learned_matcher:LearnedMatcher",
        "known_gallery": "raypp.attacks.known_gallery:KnownGallery",
    },
    group="raypp.attacks",
)


def register_attack(name: str) -> Callable[[Method], Method]:
    """Decorate a subclass of :class:`raypp.Attack` that becomes the attack ``name`` in this process.

    A class without a model ``Options`` has no options. An entry point of the group ``raypp.attacks`` adds an attack of
    an installed package to all processes and to the command line.

    Raises:
        ConfigError: raypp itself has an attack of this name, or ``Options`` has another ``name``.
    """
    return ATTACKS.register(name)


def __getattr__(name: str) -> Any:
    """Return the class of an attack alone, on arrays, see :mod:`raypp.attacks.array_attack`."""
    if name[:1].isupper() and (attack := ATTACKS.class_names().get(name)) is not None:
        # A string, because that module imports this one.
        return importlib.import_module("raypp.attacks.array_attack").array_attack_class(attack)
    raise AttributeError(f"module 'raypp.attacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ATTACKS.class_names()})
