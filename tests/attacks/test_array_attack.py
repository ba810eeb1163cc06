"""An attack alone, on arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raypp
from raypp.attacks.base import AttackError
from raypp.utils.errors import ConfigError, DataError, RayppError

SMALL = {"width": 4, "depth": 1, "epochs": 1}


@pytest.fixture
def plain() -> np.ndarray:
    import torch._dynamo  # noqa: F401 (an optimizer's first step imports it)

    return np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)


def test_an_attack_learns_from_pairs_and_leaves_nothing(
    plain: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    attack = raypp.attacks.Inverse(**SMALL)
    assert attack.options.train.epochs == 1
    before = torch.random.get_rng_state()
    estimates = attack.fit(plain, 255 - plain).reconstruct(255 - plain[:7])
    assert estimates.shape == (7, 16, 16, 3)
    assert estimates.dtype == np.uint8
    assert np.abs(estimates.astype(int) - plain[:7]).mean() < np.abs(127.0 - plain[:7]).mean() + 5
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(tmp_path.glob("raypp-*"))
    again = raypp.attacks.Inverse(**SMALL).fit(torch.from_numpy(plain), 255 - plain)
    assert (again.reconstruct(255 - plain[:7]) == estimates).all(), "the seed decides all"
    assert repr(again) == "Inverse(fitted)"


def test_an_attack_without_training_inverts_a_cipher(plain: np.ndarray) -> None:
    assert (raypp.attacks.KnownPlaintext().fit(plain, 255 - plain).reconstruct(255 - plain[:3]) == plain[:3]).all()
    with pytest.raises(AttackError, match="no permutation of half bytes explains the pairs"):
        raypp.attacks.KnownPlaintext().fit(plain, plain[::-1])


@pytest.mark.parametrize("name", ["ITN", "FlowMatching"])
def test_the_other_attacks_that_learn_from_pairs(name: str, plain: np.ndarray) -> None:
    options: dict[str, Any] = {"samples": 1, "steps": 1} if name == "FlowMatching" else {}
    attack = getattr(raypp.attacks, name)(**SMALL, **options)
    assert attack.fit(plain, 255 - plain[:, :8, :8, :1]).reconstruct(plain[:2, :8, :8, :1]).shape == (2, 16, 16, 3)


BAD: dict[str, tuple[type[RayppError], Callable[[np.ndarray], object], str]] = {
    "no pairs": (ConfigError, lambda _: raypp.attacks.Codebook(), "attack codebook does not learn from pairs alone"),
    "classifier": (ConfigError, lambda _: raypp.attacks.InverseConditional(), "allowed: KnownPlaintext, ITN, Inverse"),
    "option": (ConfigError, lambda _: raypp.attacks.Inverse(widht=3), "widht is not a setting (did you mean 'width'?)"),
    "value": (ConfigError, lambda _: raypp.attacks.Inverse(epochs=0), "train.epochs is 0; allowed is at least 1"),
    "early": (ConfigError, lambda x: raypp.attacks.Inverse().reconstruct(x), "Inverse is not fitted; call fit(plain"),
    "number": (DataError, lambda x: raypp.attacks.Inverse().fit(x, x[:3]), "plain has 30 images and protected 3"),
    "floats": (DataError, lambda x: raypp.attacks.Inverse().fit(x, x / 255), "protected is float64 (30, 16, 16, 3)"),
    "small": (DataError, lambda x: raypp.attacks.Inverse().fit(x[:, :4], x), "images are 4 x 16 pixels"),
    "shape": (
        DataError,
        lambda x: raypp.attacks.KnownPlaintext().fit(x, x).reconstruct(x[:, :8]),
        "protected images are (8, 16, 3); allowed is (16, 16, 3), as in fit",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_argument_is_one_sentence(kind: str, plain: np.ndarray) -> None:
    error, call, sentence = BAD[kind]
    with pytest.raises(error) as raised:
        call(plain)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_attacks_are_classes_of_the_package() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        raypp.attacks.Nothing  # noqa: B018
    assert "Inverse" in dir(raypp.attacks)
