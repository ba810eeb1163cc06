"""The Python API: the ten lines of a notebook, every kind of target, and results that show themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Trained
from event_files import scalars
from PIL import Image
from torch import Tensor, nn

import raypp
from raypp.api import attack_plan
from raypp.attacks.array_target import ArrayTarget
from raypp.bundle.locate import locate_bundle
from raypp.config.overrides import parse_overrides
from raypp.config.presets import load_config
from raypp.data.splits import load_split
from raypp.utils.errors import BundleError, ConfigError, DataError

FAST = {"num_queries": 40, "curve": False, "reference_epochs": 0}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    config = load_config("quickstart", flags=["data.source.num_test=200", "data.image_size=[16,16]"])
    split = load_split(config, "test")
    return split.images, split.labels


def negative(images: np.ndarray) -> np.ndarray:
    return 255 - images


class Negative(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 1 - images


@pytest.mark.slow
def test_the_lines_of_a_notebook(tmp_path: Path) -> None:
    run = raypp.train("quickstart", TINY, epochs=1, out="results/first", track="tensorboard", quiet=True)
    assert Path(run.path) == tmp_path / "results" / "first"
    assert run.evaluate().to_dict()["accuracy"] == run.accuracy
    assert run.protect(np.zeros((16, 16, 3), np.uint8)).shape == (1, 16, 16, 3)
    steps = scalars(Path(run.path) / "tensorboard")
    assert (steps["plain/val_loss"], steps["joint/val_loss"], steps["test/accuracy"]) == ([1], [2], [2])
    again = raypp.train("quickstart", TINY, epochs=1, quiet=True)
    assert run.path != again.path, "a cell can run twice"
    assert run.accuracy == again.accuracy == run.summary["test"]["accuracy"]
    assert len(run.to_pandas()) == len(run.history) == 2
    assert run.plot().width > 500
    assert "protected, 8 bit" in repr(run)
    assert "<table>" in run._repr_html_()
    bundle = raypp.load(run.path)
    assert bundle.evaluate().accuracy == pytest.approx(run.accuracy)
    card = raypp.attack(bundle, "quick", attacks=["known_gallery", "feature_reconstruction"], quiet=True, **FAST)
    assert card.strongest_attack == "known_gallery"
    assert card.to_pandas().loc["known_gallery", "reidentification_rate"] == card.reidentification_rate
    assert card.plot().width > 500
    assert "known_gallery" in card.report("r.html").read_text()
    assert json.loads(json.dumps(card.to_dict())) == card.to_dict()


def test_settings_as_keywords_dictionaries_and_words() -> None:
    from raypp.dispatch import training_config

    words = training_config("quickstart", ["train.epochs=3", "--protection.width", "4"])
    assert training_config("quickstart", {"train": {"epochs": 3}, "protection.width": 4}) == words
    assert training_config("quickstart", {"protection": {"width": 4}}, epochs=3) == words
    assert training_config("quickstart", epochs=3, train={"alpha": 0.2}).train.alpha == 0.2
    assert training_config("quickstart", train={"optimizer.lr": 0.3, "epochs": 3}).train.optimizer.lr == 0.3
    suite = attack_plan(ArrayTarget(negative), "quick", attacks="inverse", inverse={"train.epochs": 1}).suite
    assert suite.options("inverse").train.epochs == 1  # type: ignore[attr-defined]
    assert parse_overrides({"search": {"space": {"train.alpha": [1]}}}, ["search"]) == {
        "search": {"space": {"train.alpha": [1]}}
    }
    with pytest.raises(ConfigError, match=r"pass settings=\{'section.key': value\}$"):
        training_config("quickstart", epoch=3)
    with pytest.raises(ConfigError, match=r"^epoch is not a setting \(did you mean 'epochs'\?\); pass settings="):
        training_config("quickstart", epoch=3)
    with pytest.raises(ConfigError, match=r"^width may be protection.width or classifier.width; pass settings="):
        training_config("quickstart", width=3)
    with pytest.raises(ConfigError, match=r"train.epochs is 0; allowed is at least 1"):
        training_config("quickstart", epochs=0)
    assert parse_overrides(["seed=1", "--train.alpha=2"]) == {"seed": "1", "train": {"alpha": "2"}}


def test_a_bundle_protects_what_it_is_given(trained: Trained, tmp_path: Path) -> None:
    bundle = raypp.load(trained.run)
    assert locate_bundle(trained.run) == f"{trained.run}/bundle"
    height, width = bundle.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    protected = bundle.protect(pixels)
    assert protected.shape == pixels.shape
    assert (raypp.protect(bundle.path, torch.from_numpy(pixels)) == protected).all()
    assert (bundle.protect(pixels[0]) == protected[:1]).all()
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    assert (bundle.protect(Image.fromarray(pixels[0])) == protected[:1]).all()
    assert (bundle.protect(tmp_path / "a.png") == protected[:1]).all()
    assert (bundle.protect([tmp_path / "a.png", Image.fromarray(pixels[1])]) == protected[:2]).all()
    answers = bundle.classify(protected)
    assert len(answers) == 3
    assert all(name in bundle.classes and 0 < probability <= 1 for name, probability in answers)
    assert repr(bundle).startswith("Bundle ")
    assert f"{height} x {width}" in repr(bundle)
    assert "<table>" in bundle._repr_html_()
    public = raypp.load(trained.bundle / "public")
    assert f"{height} x {width}" in public._repr_html_()
    assert "%" not in repr(public).splitlines()[2], "the public part states no accuracy"
    assert "Test accuracy" in bundle.card or "accuracy" in bundle.card
    with pytest.raises(DataError, match=r"^images is float64 \(2, 2, 2, 2\); allowed is uint8 \(N, H, W, C\)"):
        bundle.protect(np.zeros((2, 2, 2, 2)))
    with pytest.raises(BundleError, match="does not exist"):
        raypp.load(tmp_path / "none")


@pytest.mark.slow
def test_a_function_a_module_a_key_and_a_classifier_are_attacked(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = pictures
    card = raypp.attack(
        negative, "quick", images=images, labels=labels, quiet=True, classifier=lambda x: labels[:len(x)],
        attacks=["chosen_plaintext", "known_gallery", "white_box"], **FAST,
    )  # fmt: skip
    assert card.values["attacks"]["known_gallery"]["reidentification_rate"] == 1
    assert card.values["attacks"]["white_box"]["status"] == "does not apply"
    assert card.values["accuracy"] is not None
    assert card.values["label"] == "negative"
    module = raypp.attack(
        Negative(), "quick", images=images, quiet=True, attacks=["white_box"],
        white_box={"steps": 100, "num_images": 10}, **FAST,
    )  # fmt: skip
    assert module.values["attacks"]["white_box"]["scores"]["ssim"]["mean"] > 0.9

    def xor(batch: np.ndarray, key: int) -> np.ndarray:
        return batch ^ np.uint8(key)

    keys = iter(range(1, 250))
    keyed = raypp.attack(
        xor, "quick", images=images, quiet=True, key_generator=lambda: next(keys), attacks=["inverse_own_keys"],
        inverse_own_keys={"width": 4, "depth": 1, "train": {"epochs": 1}}, **FAST,
    )  # fmt: skip
    assert keyed.values["attacks"]["inverse_own_keys"]["status"] == "done"
    assert next(keys) > 3, "each batch of the attack has a key of the attacker"


@pytest.mark.slow
def test_a_differentiable_function_is_attacked_like_a_module(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    def invert(images: Tensor) -> Tensor:
        return 1 - images

    card = raypp.attack(
        invert, "quick", images=pictures[0], quiet=True, attacks=["white_box"], differentiable=True,
        white_box={"steps": 100, "num_images": 10}, **FAST,
    )  # fmt: skip
    assert card.values["label"] == "invert"
    assert card.values["attacks"]["white_box"]["scores"]["ssim"]["mean"] > 0.9


BAD_TARGETS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no images": (negative, {"images": None}, "images is missing; allowed is uint8 (N, H, W, C)"),
    "floats": (negative, {"images": np.zeros((50, 16, 16, 3))}, "images is float64 (50, 16, 16, 3); allowed is uint8"),
    "few": (
        negative,
        {"labels": None, "images": np.zeros((30, 16, 16, 3), np.uint8)},
        "the gallery has 15 images and the attacker 15",
    ),
    "labels": (negative, {"labels": np.zeros(3)}, "labels has the shape (3,); allowed is (200,), one for each image"),
    "classifier": (negative, {"labels": None, "classifier": negative}, "labels is missing; a classifier needs"),
    "not callable": (
        5,
        {},
        "the target is of type int; allowed is a bundle, its path, a function or a torch.nn.Module",
    ),
    "fails": (lambda _: 1 / 0, {}, "failed: ZeroDivisionError: division by zero"),
    "floats out": (lambda x: x / 255, {}, "gave float64 (8, 16, 16, 3) for uint8 (8, 16, 16, 3)"),
    "no gradients": (lambda x: x.detach(), {"differentiable": True}, "passes no gradients to its input; leave out"),
    "no tensor": (lambda x: x.numpy(), {"differentiable": True}, "function lambda gave ndarray; it must give float"),
    "ray": (negative, {"ray": True}, "are attacked in this process; leave ray out"),
}


@pytest.mark.parametrize("kind", BAD_TARGETS)
def test_a_target_that_cannot_be_attacked_is_one_sentence(
    kind: str, pictures: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    target, changes, sentence = BAD_TARGETS[kind]
    arguments = {"images": pictures[0], "labels": pictures[1], "quiet": True, "attacks": ["known_gallery"]} | changes
    with pytest.raises((ConfigError, DataError)) as raised:
        raypp.attack(target, "quick", **arguments)
    assert sentence in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


BAD_CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "split": (lambda b: b.evaluate(split="tst"), "split is 'tst'; allowed: test, val, train"),
    "jpeg": (lambda b: b.evaluate(jpeg="75"), "jpeg is '75'; allowed is a quality from 1 to 100"),
    "floats": (lambda b: b.classify(np.zeros((1, 16, 16, 3))), "protected is float64 (1, 16, 16, 3); allowed is uint8"),
    "gray": (lambda b: b.protect(np.zeros((1, 16, 16, 1), np.uint8)), "images have 1 channels; the bundle reads 3"),
    "nothing": (lambda b: b.protect([]), "images is empty; allowed are one or more images of one size"),
    "arrays of a bundle": (lambda b: raypp.attack(b, images=1), "images belongs to a function or module as target"),
    "differentiable bundle": (lambda b: raypp.attack(b, differentiable=True), "differentiable belongs to a function"),
    "out and name": (
        lambda _: raypp.train(out="runs/a", name="a"),
        "out and name are both set; out is the run's folder",
    ),
    "out and storage": (lambda _: raypp.train(out="runs/a", storage="runs"), "out and storage are both set"),
    "twice": (lambda _: raypp.train(epochs=3, train={"epochs": 4}), "train.epochs is given twice, first as 3, then"),
    "an empty key": (lambda _: raypp.train(settings={"train.": 1}), "setting 'train.' has an empty part"),
    "no such attack": (lambda b: raypp.attack(b, "quick", attacks="gallery"), "unknown attack 'gallery'"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_a_bad_argument_is_one_sentence(kind: str, trained: Trained) -> None:
    call, sentence = BAD_CALLS[kind]
    with pytest.raises((ConfigError, DataError)) as raised:
        call(raypp.load(trained.run))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lists_and_public_names() -> None:
    assert "quickstart" in raypp.list_presets()
    assert raypp.list_attacks()["white_box"].startswith("T5: ")
    assert set(raypp.list_protections()) >= {"learned", "plain", "tanaka"}
    assert {name for name in dir(raypp) if name in raypp.__all__} == set(raypp.__all__)
    for name in raypp.__all__:
        assert getattr(raypp, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        raypp.nothing  # noqa: B018
