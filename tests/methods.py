"""Protections and attacks by their names."""

from __future__ import annotations

from typing import Any

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge
from raypp.protections import PROTECTIONS
from raypp.utils.keys import Key


def victim(name: str, key: Key | None = None, **options: Any) -> Any:
    chosen = PROTECTIONS.options(name).model_validate({"name": name, **options})
    return PROTECTIONS.build(chosen, channels=3, key=key or Key.generate())


def build(name: str, access: AttackerKnowledge, **options: Any) -> Attack:
    attack: Attack = ATTACKS.build(ATTACKS.options(name).model_validate({"name": name, **options}), access)
    return attack
