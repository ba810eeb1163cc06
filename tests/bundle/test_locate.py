"""From what training leaves behind to its bundle. Folders with the files that matter stand for real ones here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raypp.bundle.locate import locate_bundle, split_choice
from raypp.serve.model_store import resolve_model
from raypp.utils.errors import BundleError, StorageError
from raypp.utils.storage import Storage


def write(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "bundle", "manifest.json", "public/manifest.json", "private/manifest.json", "private/config.yaml")
    models = write(tmp_path / "models", "versions/ab/manifest.json", "versions/cd/manifest.json")
    (models / "live.json").write_text(json.dumps({"version": "cd", "previous": "ab"}))
    write(tmp_path / "run", "config.yaml", "bundle/manifest.json", "checkpoints/checkpoint_manager_snapshot.json")
    write(tmp_path / "run", "checkpoints/epoch_0002/checkpoint.json", "checkpoints/epoch_0002/state.pt")
    write(tmp_path / "begun", "config.yaml", "checkpoints/epoch_0001/checkpoint.json")
    search = write(
        tmp_path / "search", "search.yaml", "search.json", "tune/tuner.pkl", "trials/t1/bundle/manifest.json"
    )
    write(search / "best", "accuracy/manifest.json", "knee/manifest.json", "privacy/manifest.json")
    trial = write(search / "tune" / "trial_t1", "params.json", "result.json", "checkpoint_000000/checkpoint.json")
    write(trial, "checkpoint_000001/manifest.json", "checkpoint_000002/manifest.json", "checkpoint_000003/state.pt")
    write(search / "tune" / "trial_t2", "params.json", "checkpoint_000000/checkpoint.json")
    write(tmp_path / "one", "search.yaml", "search.json", "tune/tuner.pkl", "best/privacy/manifest.json")
    write(tmp_path / "searching", "search.yaml", "best/accuracy/manifest.json", "tune/tuner.pkl")
    write(tmp_path / "failed", "search.yaml", "search.json")
    (tmp_path / "latest").symlink_to("run")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a#knee", "manifest.json")
    return tmp_path


LOCATIONS = [
    ("bundle", "bundle"),
    ("bundle/public", "bundle/public"),
    ("bundle/private", "bundle/private"),
    ("models", "models/versions/cd"),
    ("run", "run/bundle"),
    ("run/", "run/bundle"),
    ("latest", "latest/bundle"),
    ("latest/bundle", "latest/bundle"),
    ("run/checkpoints", "run/bundle"),
    ("run/checkpoints/epoch_0002", "run/bundle"),
    ("search", "search/best/knee"),
    ("search#accuracy", "search/best/accuracy"),
    ("search/#privacy", "search/best/privacy"),
    ("search/tune", "search/best/knee"),
    ("search/tune#accuracy", "search/best/accuracy"),
    ("search/tune/trial_t1", "search/tune/trial_t1/checkpoint_000002"),
    ("search/tune/trial_t1/checkpoint_000001", "search/tune/trial_t1/checkpoint_000001"),
    ("search/trials/t1", "search/trials/t1/bundle"),
    ("one", "one/best/privacy"),
    ("a#knee", "a#knee"),
]


@pytest.mark.parametrize(("location", "bundle"), LOCATIONS)
def test_what_training_leaves_leads_to_its_bundle(
    location: str, bundle: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an absolute path, a URI and a relative path; a service sees the version of the same bundle."""
    assert locate_bundle(f"{root}/{location}") == f"{root}/{bundle}"
    assert locate_bundle(Path(root, location)) == f"{root}/{bundle}"
    if location != "a#knee":  # a URI has a fragment there
        assert Storage(locate_bundle(f"file://{root}/{location}")).path == root / bundle
    monkeypatch.chdir(root)
    assert Path(locate_bundle(location)).absolute() == root / bundle
    if location not in ("bundle/public", "bundle/private"):
        assert resolve_model(f"{root}/{location}").location == str((root / bundle).resolve())


REFUSALS = [
    ("none", "bundle '{root}/none' does not exist"),
    ("empty", "'{root}/empty' holds no bundle; allowed is a bundle, a model repository, a run, a search, or a result"),
    ("bundle/manifest.json", "'{root}/bundle/manifest.json' is a file; allowed is the folder of a bundle, a model"),
    ("begun", "'{root}/begun' is a run that has no bundle yet; `raypp train --resume` finishes it"),
    ("begun/checkpoints", "'{root}/begun' is a run that has no bundle yet"),
    ("begun/checkpoints/epoch_0001", "'{root}/begun' is a run that has no bundle yet"),
    ("searching", "'{root}/searching' is a search that has not ended; `raypp tune --resume` finishes it"),
    ("search#best", "is a search without a bundle #best; allowed: #accuracy, #knee, #privacy"),
    ("one#knee", "is a search without a bundle #knee; allowed: #privacy"),
    ("failed", "is a search without a bundle #knee; allowed: none, as the search has no best bundle"),
    ("run#knee", "'{root}/run' is no search, so #knee selects nothing; leave it out"),
    ("search/tune/trial_t2", "is a trial of Ray Tune that reported no bundle; name a finished trial or the search"),
    ("search/tune/trial_t2/checkpoint_000000", "is a checkpoint of training, which holds no bundle; name its run"),
    ("search/trials", "'{root}/search/trials' holds no bundle"),
]


@pytest.mark.parametrize(("location", "sentence"), REFUSALS)
def test_a_location_without_a_bundle_is_one_sentence(location: str, sentence: str, root: Path) -> None:
    for locate in (locate_bundle, resolve_model):
        with pytest.raises(BundleError) as refusal:
            locate(f"{root}/{location}")
        assert sentence.format(root=root) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_damaged_repository_says_so(root: Path) -> None:
    (root / "models" / "live.json").write_text('{"active": 1}')
    with pytest.raises(StorageError, match=r"models/live\.json is damaged; publish a bundle there again"):
        locate_bundle(root / "models")


@pytest.mark.parametrize(
    ("location", "parts"),
    [
        ("runs/one", ("runs/one", None)),
        ("runs/one#", ("runs/one", None)),
        ("s3://b/one?region=x#knee", ("s3://b/one?region=x", "knee")),
    ],
)
def test_a_choice_stands_behind_the_location(location: str, parts: Any) -> None:
    assert split_choice(location) == parts


def test_folders_of_a_uri_keep_its_options() -> None:
    uri = "s3://bucket/runs/one?region=us-east-1&endpoint_override=127.0.0.1:9"
    storage = Storage(uri)
    assert (storage.name, storage.parent.uri) == ("one", uri.replace("/runs/one", "/runs"))
    assert storage.parent.folder("one").uri == uri
