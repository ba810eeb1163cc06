"""The exported artefact says when it was altered, gives clients no more than the protection, and holds no pickle."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained, tiny_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from raypp.bundle.load import load_private, load_public
from raypp.bundle.manifest import MANIFEST, SCHEMA, verify, write_manifest
from raypp.bundle.model_card import model_card
from raypp.client.offline import protect_images
from raypp.config.presets import load_config
from raypp.data.splits import load_split
from raypp.evaluation.evaluate import evaluate_bundle
from raypp.experiments.training_run import first_of_each_class, open_run, train_locally
from raypp.utils.errors import BundleError, RayppError
from raypp.utils.images import quantize_8bit
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressDisplay


@pytest.fixture
def bundle(trained: Trained, tmp_path: Path) -> Path:
    return shutil.copytree(trained.bundle, tmp_path / "bundle")


def refusal(attempt: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(RayppError) as raised:
        attempt(*arguments)
    assert isinstance(raised.value, BundleError)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# What it holds


def test_round_trip(trained: Trained) -> None:
    public, private = load_public(trained.bundle), load_private(trained.bundle)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    as_input = images.permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = quantize_8bit(trained.fit.system.protection(as_input))
        protected = torch.from_numpy(protect_images(public, images.numpy())).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(protected, expected)
        assert torch.equal(private.classifier(protected), trained.fit.system.classifier(expected))
    assert (public.channels, public.image_size) == (3, (16, 16))
    assert private.classes == trained.fit.data.classes
    assert not public.protection.training
    assert not private.classifier.training
    assert not any(p.requires_grad for p in [*public.protection.parameters(), *private.classifier.parameters()])


def test_evaluate_gives_the_numbers_of_the_run(trained: Trained) -> None:
    summary = json.loads((trained.run / "summary.json").read_text())
    assert json.loads(json.dumps(evaluate_bundle(trained.bundle))) == summary["test"]
    assert load_private(trained.bundle).metrics == summary
    on_train = evaluate_bundle(trained.bundle, split="train")
    assert on_train["num_images"] == 60


def test_evaluate_refuses_settings_that_change_nothing(trained: Trained) -> None:
    with pytest.raises(RayppError, match=r"--train.alpha changes nothing here; allowed: data\.\*, metrics\.\*"):
        evaluate_bundle(trained.bundle, ("--train.alpha", "1"))
    assert evaluate_bundle(trained.bundle, ("--train.eval_batch_size", "7"))["num_images"] == 30


def test_evaluate_refuses_images_of_other_classes(trained: Trained, tmp_path: Path) -> None:
    from raypp.utils.images import write_png

    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for i in range(4):
            write_png(tmp_path / name / f"{i}.png", torch.full((16, 16, 3), i, dtype=torch.uint8).numpy())
    flags = ("--data.source", "folder", "--data.source.path", str(tmp_path), "--data.source.test_fraction", "0.5")
    with pytest.raises(RayppError, match=r"data.source has the classes cats, dogs; the bundle reads "):
        evaluate_bundle(trained.bundle, flags)


def test_both_parts_load_by_themselves(bundle: Path, tmp_path: Path) -> None:
    for part, load in (("public", load_public), ("private", load_private)):
        alone = shutil.move(bundle / part, tmp_path / f"only-{part}")
        load(alone)
        load(f"file://{alone}")
    assert "is no bundle" in refusal(load_public, tmp_path / "only-private" / "..")


def test_the_public_part_holds_nothing_private(trained: Trained) -> None:
    public = trained.bundle / "public"
    assert {p.name for p in public.rglob("*")} == {"protection.json", "protection.safetensors", MANIFEST}
    assert json.loads((public / "protection.json").read_text()).keys() == {
        "protection",
        "channels",
        "image_size",
        "key",
    }
    weights = load_file(public / "protection.safetensors")
    assert weights.keys() == trained.fit.system.protection.state_dict().keys()
    secrets = [*trained.fit.data.classes, "resnet20", "classifier", "shapes", str(trained.run.parent), "accuracy"]
    for file in public.iterdir():
        data = file.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], file.name
    with pytest.raises(BundleError, match=r"its manifest does not list classifier\.json"):
        load_private(public)


def test_nothing_in_a_bundle_is_a_pickle(trained: Trained) -> None:
    files = [p for p in trained.bundle.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors", ".yaml", ".md"}
    for file in files:
        assert not zipfile.is_zipfile(file)  # torch.save writes these
        load_file(file) if file.suffix == ".safetensors" else file.read_text()


def test_the_manifest_of_the_whole_covers_every_file(trained: Trained) -> None:
    listed = verify(trained.bundle)["files"]
    below = {p.relative_to(trained.bundle).as_posix() for p in trained.bundle.rglob("*") if p.is_file()}
    assert listed.keys() == below - {MANIFEST}
    assert all(entry["bytes"] == (trained.bundle / name).stat().st_size for name, entry in listed.items())


def test_the_model_card_says_what_was_measured_and_what_was_not(trained: Trained) -> None:
    card = (trained.bundle / "MODEL_CARD.md").read_text()
    test = json.loads((trained.run / "summary.json").read_text())["test"]
    assert f"{test['accuracy']:.2%}" in card
    assert "n = 30" in card
    assert "No attack has been run on this bundle yet." in card
    assert "alpha 0.005" in card


# What is refused


@pytest.mark.parametrize(
    ("code", "bits", "public"),
    [("{size: 6}", "6 bits at most", False), ("{classes: 8, size: 2}", "5 bits at most", True), (None, None, False)],
)
def test_the_card_says_what_a_code_tells(trained: Trained, code: str | None, bits: str | None, public: bool) -> None:
    settings = [] if code is None else ["--protection.skips", "0", "--protection.code", code]
    private = load_private(trained.bundle)
    card = model_card(
        load_config("quickstart", flags=settings),
        private.classes,
        (16, 16),
        private.guard,
        private.metrics,
        {"hardware": "x"},
    )
    assert ("bits at most" in card) == (bits is not None)
    assert bits is None or f"| information per protected image | {bits} |" in card
    assert ("the public part classifies" in card) == public


FILES = ["public/protection.json", "public/protection.safetensors", "private/classifier.safetensors", "MODEL_CARD.md"]


def checked(bundle: Path, file: str) -> Callable[[], Any]:
    """What reads a file: the loader of its part, or the check of the whole."""
    part = file.partition("/")[0]
    return {
        "public": lambda: load_public(bundle / "public"),
        "private": lambda: load_private(bundle / "private"),
    }.get(part, lambda: verify(bundle))


@pytest.mark.parametrize("file", FILES)
def test_altered_missing_and_added_files_are_named(bundle: Path, file: str) -> None:
    name = Path(file).name
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    assert f"was altered: {name} does not match its SHA-256" in refusal(checked(bundle, file))
    assert f"was altered: {file} does not match its SHA-256" in refusal(verify, bundle)
    (bundle / file).unlink()
    assert f"is incomplete: {name} is missing" in refusal(checked(bundle, file))
    (bundle / file).mkdir()
    assert f"is incomplete: {name} is missing" in refusal(checked(bundle, file))


@pytest.mark.parametrize("file", ["public/classifier.safetensors", "private/x/y.txt", "notes.txt", "public/.hidden"])
def test_files_that_no_manifest_lists_are_named(bundle: Path, file: str) -> None:
    (bundle / file).parent.mkdir(exist_ok=True)
    (bundle / file).write_bytes(b"x")
    name = file.partition("/")[2] or file
    assert f"was altered: {name} is not listed in its manifest" in refusal(checked(bundle, file))
    assert f"was altered: {file} is not listed in its manifest" in refusal(verify, bundle)


def test_a_manifest_that_omits_a_file_is_refused(bundle: Path) -> None:
    for part, file, load in (
        ("public", "protection.safetensors", load_public),
        ("private", "classifier.json", load_private),
    ):
        edit(bundle / part / MANIFEST, lambda manifest, file=file: manifest["files"].pop(file))
        assert file in refusal(load, bundle / part)
        (bundle / part / file).unlink()  # and not there either
        assert f"its manifest does not list {file}" in refusal(load, bundle / part)


def test_a_newer_schema_is_refused(bundle: Path) -> None:
    edit(bundle / "public" / MANIFEST, lambda manifest: manifest.update(schema=SCHEMA + 1))
    assert f"has bundle schema {SCHEMA + 1}, raypp" in refusal(load_public, bundle / "public")
    assert refusal(load_public, bundle / "public").endswith("upgrade raypp")


@pytest.mark.parametrize(
    "name", ["../private/classifier.json", "/etc/hostname", "a/../../private/classifier.json", ".."]
)
def test_paths_that_lead_out_are_refused(bundle: Path, name: str) -> None:
    edit(bundle / "public" / MANIFEST, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64}}))
    assert f"lists {name!r}, a file outside of it" in refusal(load_public, bundle / "public")


def test_links_that_lead_out_are_refused(bundle: Path) -> None:
    link = bundle / "public" / "protection.json"
    shutil.copy(link, bundle.parent / "elsewhere.json")
    link.unlink()
    link.symlink_to(bundle.parent / "elsewhere.json")
    assert "lists 'protection.json', a file outside of it" in refusal(load_public, bundle / "public")


def test_parts_of_two_bundles_are_not_one(bundle: Path) -> None:
    """A public and a private part of two bundles, each valid by itself."""
    edit(bundle / "public" / "protection.json", lambda about: about.update(image_size=[32, 32]))
    write_manifest(bundle / "public")
    assert load_public(bundle / "public").image_size == (32, 32)
    for load in (load_public, load_private, evaluate_bundle):
        assert "was altered: public/" in refusal(load, bundle)


def test_what_is_no_bundle_is_refused(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert refusal(load_public, tmp_path / "none") == f"bundle '{tmp_path / 'none'}' does not exist"
    assert f"is no bundle: {MANIFEST} is missing" in refusal(load_public, tmp_path / "empty")
    assert "cannot be read" in refusal(load_public, tmp_path / "file")
    assert "cannot be read" in refusal(load_public, "foo://bucket/bundle")
    shutil.rmtree(bundle / "public")
    assert "is incomplete: public/" in refusal(load_public, bundle)


GARBAGE = [
    b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"schema": 1}', b'{"schema": "x", "files": {}}',
    b'{"schema": 1, "files": []}', b'{"schema": 1, "files": {"a": 3}}', b'{"schema": 1e999, "files": {}}',
    b'{"schema": 1, "files": {"a": {}}}', b'{"schema": 1, "files": {"a\\u0000b": {"sha256": ""}}}', b"[" * 100_000,
    b'{"schema": null, "files": {}}', b'{"schema": 1, "files": 5}',
]  # fmt: skip


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_a_garbled_manifest_is_one_sentence(bundle: Path, data: bytes) -> None:
    (bundle / "public" / MANIFEST).write_bytes(data)
    assert str(bundle / "public") in refusal(load_public, bundle / "public")
    assert "was altered: public/manifest.json" in refusal(load_public, bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(
    data=st.fixed_dictionaries({"schema": JSON, "files": JSON | st.dictionaries(st.text(max_size=9), JSON, max_size=2)})
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_manifest_breaks_the_reader(tmp_path: Path, data: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    refusal(load_public, tmp_path)


def reseal(bundle: Path, part: str) -> None:
    """What an attacker who rewrites the manifests too can do."""
    for folder in (bundle / part, bundle):
        (folder / MANIFEST).unlink()
        write_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("protection"),
        lambda about: about.update(protection={"name": "nonesuch"}),
        lambda about: about.update(protection={"name": "learned", "width": 8, "depth": 2}),
        lambda about: about.update(protection={"name": "learned", "width": "wide"}),
        lambda about: about.update(protection={"name": "learned", "code": "import os"}),
        lambda about: about.update(protection=[1]),
        lambda about: about.update(protection={"name": ["learned"]}),
        lambda about: about.update(channels=1),
        lambda about: about.update(channels="3"),
        lambda about: about.update(channels=-3),
        lambda about: about.pop("image_size"),
        lambda about: about.update(image_size=[16]),
        lambda about: about.update(image_size=["a", "b"]),
        lambda about: about.update(image_size=[0, 16]),
        lambda about: about.update(image_size="ab"),
    ],
)
def test_a_resealed_bundle_whose_parts_do_not_fit_is_one_sentence(
    bundle: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit(bundle / "public" / "protection.json", change)
    reseal(bundle, "public")
    refusal(load_public, bundle)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04.", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_resealed_garbage_for_weights_is_one_sentence(bundle: Path, data: bytes) -> None:
    for part, name, load in (("public", "protection", load_public), ("private", "classifier", load_private)):
        (bundle / part / f"{name}.safetensors").write_bytes(data)
        reseal(bundle, part)
        assert f"the {name} in '{bundle}' cannot be built" in refusal(load, bundle)


@pytest.mark.parametrize("file", ["classifier.json", "metrics.json", "config.yaml"])
@pytest.mark.parametrize("data", [b"", b"[", b"[]", b"{}", b"\xff"])
def test_resealed_garbage_in_the_private_part_is_one_sentence(bundle: Path, file: str, data: bytes) -> None:
    (bundle / "private" / file).write_bytes(data)
    reseal(bundle, "private")
    if (file, data) == ("metrics.json", b"{}"):
        load_private(bundle)
    elif file == "config.yaml" and data in (b"", b"{}"):
        with pytest.raises(RayppError, match="data is missing"):
            evaluate_bundle(bundle)
    else:
        refusal(load_private, bundle)


# Keys


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a run whose protection has a key."""
    storage = tmp_path_factory.mktemp("keyed")
    config = load_config("quickstart", flags=tiny_flags(storage, train__epochs=1, protection="tanaka"))
    with open_run(config, "run") as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
    return storage / "run" / "bundle"


def test_the_key_stays_in_the_private_part(keyed: Path) -> None:
    key = Key.read(keyed / "private" / "protection.key")
    assert (keyed / "private" / "protection.key").stat().st_mode & 0o777 == 0o600
    public = json.loads((keyed / "public" / "protection.json").read_text())
    assert public["key"] == key.identifier
    assert public["protection"] == {"name": "tanaka", "parity": None}
    for path in keyed.rglob("*"):
        if path.is_file() and path.name != "protection.key":
            assert key.text().strip() not in path.read_text(errors="replace")
    assert "everyone who has the key" in (keyed / "MODEL_CARD.md").read_text()


def test_the_picture_of_a_keyed_run_does_not_show_pairs_under_its_key(keyed: Path) -> None:
    config = load_config("quickstart", flags=tiny_flags(keyed, train__epochs=1, protection="tanaka"))
    test = load_split(config, "test")
    shown = first_of_each_class(test.labels, 10)
    protect = load_public(keyed).protection.protect
    mine = protect(torch.from_numpy(test.images[shown]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    picture = np.asarray(Image.open(keyed.parent / "protected.png"))
    for row, images in ((0, test.images[shown]), (1, mine)):
        top, left = 4 + 68 * row, picture.shape[1] - 680
        tiles = [picture[top : top + 64 : 4, left + 68 * i : left + 68 * i + 64 : 4] for i in range(10)]
        same = [np.array_equal(tile, image) for tile, image in zip(tiles, images, strict=True)]
        assert all(same) if row == 0 else not any(same)


def test_a_keyed_client_brings_its_key_or_is_told_to(keyed: Path, tmp_path: Path) -> None:
    public = shutil.copytree(keyed / "public", tmp_path / "public")
    key = Key.read(keyed / "private" / "protection.key")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = load_public(keyed).protection.protect(images)
    assert torch.equal(load_public(public, key).protection.protect(images), expected)
    sentence = f"needs its key {key.identifier}: --key FILE; its owner has it as private/protection.key"
    assert sentence in refusal(load_public, public)
    other = Key.generate()
    assert f"the key {other.identifier} is not that of" in refusal(load_public, public, other)
    assert evaluate_bundle(keyed)["num_images"] == 30


def test_a_key_that_is_not_needed_is_refused(trained: Trained) -> None:
    sentence = refusal(load_public, trained.bundle, Key.generate())
    assert "the protection 'learned'" in sentence
    assert "has no key; leave it out" in sentence


def test_only_the_owner_looks_into_the_private_part(trained: Trained) -> None:
    assert (trained.bundle / "private").stat().st_mode & 0o777 == 0o700
    assert (trained.bundle / "public").stat().st_mode & 0o777 == 0o755


def test_a_key_file_is_taken_over(keyed: Path, tmp_path: Path) -> None:
    key = Key.read(keyed / "private" / "protection.key")
    options = f"{{name: tanaka, key_file: {keyed / 'private' / 'protection.key'}}}"
    flags = ["--protection", options, "--cluster.storage", str(tmp_path)]
    with open_run(load_config("quickstart", flags=flags), "again") as run:
        assert run.key is not None
        assert run.key.identifier == key.identifier
    missing = ["--protection", "{name: ele, key_file: none}", "--cluster.storage", str(tmp_path)]
    with (
        pytest.raises(RayppError, match=r"key file .*none' cannot be read: No such file"),
        open_run(load_config("quickstart", flags=missing), "refused"),
    ):
        pass
    assert not (tmp_path / "refused").exists()
