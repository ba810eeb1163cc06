"""The threat level of an attack on one target: an attack may run with less knowledge than its class declares."""

from __future__ import annotations

from raypp.attacks.base import Attack, AttackerKnowledge, Threat

LEVELS = {
    "gradients": Threat.T5,
    "protect": Threat.T4,
    "pairs": Threat.T3,
    "fresh": Threat.T2,
    "images": Threat.T1,
    "ciphertexts": Threat.T1,
}
"""Levels by field of :class:`AttackerKnowledge`, from the highest."""


def threat_of(kind: type[Attack], access: AttackerKnowledge) -> Threat:
    """Return the declared level of an attack, or the level of ``access`` if it is lower and the attack applies."""
    if kind.lacking(access):
        return kind.threat
    available = next((level for name, level in LEVELS.items() if getattr(access, name) is not None), Threat.T0)
    return min(kind.threat, available, key=lambda level: level.name)
