"""The validation set of a stream in its run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raypp.data.validation_set import load_validation_set, save_validation_set
from raypp.utils.storage import Storage


def test_a_stored_set_is_read_again_unless_it_is_damaged_or_foreign(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    images = {"image": np.arange(48, dtype=np.uint8).reshape(2, 4, 2, 3), "label": np.array([1, 0])}
    assert load_validation_set(run, "a") is None
    save_validation_set(run, images, "a")
    stored = load_validation_set(run, "a")
    assert stored is not None
    for key, values in images.items():
        np.testing.assert_array_equal(stored[key], values)
        assert stored[key].dtype == values.dtype
    assert load_validation_set(run, "b") is None

    file = tmp_path / "validation" / "images.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-1] + b"\xff", b""):
        file.write_bytes(damaged)
        assert load_validation_set(run, "a") is None
    file.unlink()
    assert load_validation_set(run, "a") is None
    save_validation_set(run, images, "b")
    assert load_validation_set(run, "b") is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", json.dumps({"fingerprint": "a"})])
def test_a_damaged_description_counts_as_no_set(tmp_path: Path, text: str) -> None:
    run = Storage(tmp_path)
    save_validation_set(run, {"image": np.zeros((1, 2, 2, 3), np.uint8), "label": np.array([0])}, "a")
    (tmp_path / "validation" / "validation.json").write_text(text)
    assert load_validation_set(run, "a") is None
