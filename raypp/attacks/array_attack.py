"""An attack alone, on arrays: it learns from pairs of plain and protected images, and reconstructs others."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, match_shape
from raypp.attacks.target import check_image_size
from raypp.attacks.trained import TrainedAttack, TrainedOptions, train_attack
from raypp.config.overrides import resolve_keywords
from raypp.config.validation import check_milestones, format_validation_error
from raypp.training.reporter import Reporter
from raypp.utils.device import default_device
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.images import as_pixels, channels_first
from raypp.utils.progress import ProgressListener
from raypp.utils.registry import MethodConfig
from raypp.utils.storage import Storage

PAIRS = ("pairs",)
"""Knowledge of the attacks that need pairs only."""


class ArrayAttack:
    """An attack that learns from pairs of plain and protected images, on NumPy or torch arrays.

    ``raypp.attacks`` has a class for each: ``Inverse``, ``ITN``, ``FlowMatching`` and ``KnownPlaintext``. It works in
    memory. To measure an attack on a target, call :func:`raypp.attack`.

    Args:
        seed: seed of its random numbers.
        **options: options of the attack by the last part of their key, such as ``width=32, epochs=2``, or sections as
            dictionaries, such as ``train={"optimizer.lr": 0.01}``.

    Raises:
        ConfigError: an option is not usable, or the attack does not learn from pairs alone.
    """

    attack: ClassVar[str]
    """The attack's name, as in :func:`raypp.list_attacks`."""

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        needs = ATTACKS.get(self.attack).needs
        if needs != PAIRS:
            raise ConfigError(
                f"attack {self.attack} does not learn from pairs alone; allowed: {', '.join(_classes_for_pairs())}; "
                "raypp.attack runs each attack on a target"
            )
        self.seed, self.options = seed, _validate_options(self.attack, options)
        self._attack: Attack | None = None

    def fit(self, plain: Any, protected: Any) -> Self:
        """Learn from pairs of images.

        Args:
            plain: uint8 (N, H, W, C).
            protected: their protected versions, uint8 (N, H', W', C').

        Raises:
            DataError: the arrays are not of this form.
            AttackError: the attack does not apply to these pairs.
        """
        device = default_device()
        pairs = _to_tensor(plain, "plain").to(device), _to_tensor(protected, "protected").to(device)
        if not len(pairs[0]) == len(pairs[1]) >= 2:
            raise DataError(
                f"plain has {len(pairs[0])} images and protected {len(pairs[1])}; allowed is 2 or more pairs"
            )
        channels, height, width = pairs[0].shape[1:]
        check_image_size((height, width))
        access = AttackerKnowledge(shape=(channels, height, width), pairs=pairs, device=device)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            attack: Attack = ATTACKS.build(self.options, access, seed=self.seed)
            if isinstance(attack, TrainedAttack):
                with tempfile.TemporaryDirectory(prefix="raypp-") as folder:
                    network, _ = train_attack(attack, Reporter(Storage(folder), ProgressListener(), device))
                attack.load(network)
            attack.prepare()
        self._attack, self._protected_shape = attack, tuple(pairs[1].shape[1:])
        return self

    def reconstruct(self, protected: Any) -> np.ndarray:
        """Estimate the plain images uint8 (n, H, W, C) of protected ones uint8 (n, H', W', C').

        Raises:
            ConfigError: the attack is not fitted.
            DataError: ``protected`` does not have the shape of the images that the attack was fitted to.
        """
        if self._attack is None:
            raise ConfigError(f"{type(self).__name__} is not fitted; call fit(plain, protected) first")
        images = _to_tensor(protected, "protected")
        if images.shape[1:] != self._protected_shape:
            channels, height, width = self._protected_shape
            raise DataError(
                f"protected images are {tuple(images.permute(0, 2, 3, 1).shape[1:])}; allowed is "
                f"{(height, width, channels)}, as in fit"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            estimates = self._attack.reconstruct(images.to(self._attack.access.device))
        shaped = match_shape(estimates, self._attack.access.shape)
        return shaped.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def __repr__(self) -> str:
        state = "not fitted" if self._attack is None else "fitted"
        return f"{type(self).__name__}({state})"


@cache
def array_attack_class(name: str) -> type[ArrayAttack]:
    """The class of one attack, which has the name and the documentation of the attack's own class."""
    method = ATTACKS.get(name)
    values = {"attack": name, "__module__": "raypp.attacks", "__doc__": method.__doc__}
    return type(method.__name__, (ArrayAttack,), values)


def _classes_for_pairs() -> list[str]:
    return [ATTACKS.get(name).__name__ for name in ATTACKS if ATTACKS.get(name).needs == PAIRS]


def _validate_options(name: str, keywords: dict[str, Any]) -> MethodConfig:
    """The options of an attack with keywords by the last part of their key; raises ConfigError."""
    model = ATTACKS.options(name)
    known = model.model_validate({"name": name}).model_dump(mode="json", exclude={"name"})
    tree = resolve_keywords((), keywords, known, dictionary="train") if keywords else {}
    try:
        options = model.model_validate({"name": name, **tree})
    except ValidationError as error:
        raise ConfigError(format_validation_error(error, tree, model)) from None
    if isinstance(options, TrainedOptions):
        check_milestones(options.train, "train")
    return options


def _to_tensor(images: Any, name: str) -> Tensor:
    """Images as a tensor uint8 (N, C, H, W)."""
    return channels_first(as_pixels(images, name))
