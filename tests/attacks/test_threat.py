"""The threat level of an attack on a target that offers less than the attack's class declares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.base import AttackerKnowledge, Threat
from raypp.attacks.threat import threat_of
from raypp.experiments.attack_plan import describe_attack

IMAGES = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)


def negative(images: Tensor) -> Tensor:
    return 1 - images


FOLDERS: dict[str, Any] = {"images": IMAGES, "ciphertexts": lambda: (), "pairs": (IMAGES, IMAGES), "gallery": IMAGES}
FUNCTION = FOLDERS | {"protect": negative}
BUNDLE = FUNCTION | {"fresh": lambda _: negative, "gradients": negative, "classify": negative}


@pytest.mark.parametrize(
    ("attack", "knowledge", "threat"),
    [
        ("flow_matching", BUNDLE, Threat.T5),
        ("flow_matching", FUNCTION, Threat.T4),
        ("flow_matching", FOLDERS, Threat.T3),
        ("inverse", BUNDLE, Threat.T4),
        ("inverse", FOLDERS, Threat.T3),
        ("itn", FOLDERS, Threat.T3),
        ("inverse_own_keys", BUNDLE, Threat.T2),
        ("known_plaintext", FOLDERS, Threat.T3),
        ("feature_reconstruction", {}, Threat.T0),
        ("white_box", FOLDERS, Threat.T5),  # it does not apply
        ("known_gallery", FOLDERS, Threat.T4),
    ],
)
def test_the_level_is_at_most_that_of_the_targets_attacker(
    attack: str, knowledge: dict[str, Any], threat: Threat
) -> None:
    assert threat_of(ATTACKS.get(attack), AttackerKnowledge((3, 8, 8), **knowledge)) == threat


@pytest.mark.parametrize(("guidance", "threat"), [(0.1, "T5"), (0.0, "T4")])
def test_the_table_before_a_run_states_the_level_of_the_options(guidance: float, threat: str) -> None:
    options = ATTACKS.options("flow_matching").model_validate({"name": "flow_matching", "guidance": guidance})
    assert describe_attack(options, AttackerKnowledge((3, 8, 8), **BUNDLE))["threat"] == threat


def test_all_knowledge_lets_every_attack_have_its_declared_level() -> None:
    access = AttackerKnowledge((3, 8, 8), **BUNDLE)
    assert all(threat_of(ATTACKS.get(name), access) == ATTACKS.get(name).threat for name in ATTACKS)
