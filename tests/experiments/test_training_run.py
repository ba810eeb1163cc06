"""A run's folder: names are never reused silently, drivers keep out of each other's way, resuming is exact."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Tiny, Trained, tiny_flags
from PIL import Image

import raypp
from raypp.bundle.manifest import verify
from raypp.config.overrides import deep_merge
from raypp.config.presets import load_config
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.experiments.run_folder import commit, environment
from raypp.experiments.training_run import first_of_each_class, open_run, summary, train_locally
from raypp.training.checkpoint import list_checkpoints
from raypp.utils.errors import ConfigError, RayppError, StorageError
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage


def train(config: Config, name: str, *, resume: bool = False) -> dict[str, Any]:
    with open_run(config, name, resume=resume) as run:
        results = summary(run)
        return train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu")) if results is None else results


def refusal(config: Config, name: str, *, resume: bool = False) -> str:
    with pytest.raises(RayppError) as raised:
        train(config, name, resume=resume)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def timeless(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in {"seconds", "images_per_s"}} for row in rows]


@pytest.fixture
def finished(trained: Trained, tmp_path: Path) -> tuple[Callable[..., Config], Path]:
    """A copy of the finished tiny run, and what makes its configuration."""
    folder = shutil.copytree(trained.run, tmp_path / "tiny")
    return (lambda **changes: load_config("quickstart", flags=tiny_flags(tmp_path, **changes))), folder


def test_a_run_leaves_what_it_promises(trained: Trained) -> None:
    results = json.loads((trained.run / "summary.json").read_text())
    assert results["epochs"] == {"plain": 1, "joint": 2}
    assert results["best"] == trained.fit.best
    assert (results["num_train"], results["num_val"], results["test"]["num_images"]) == (40, 20, 30)
    assert results["plain_test"]["num_images"] == 30
    assert results["features"] == "plain_classifier, early block"
    assert len(timeless(trained.run)) == 3
    assert list_checkpoints(Storage(trained.run)) == ["epoch_0003", "epoch_0002"]
    assert Image.open(trained.run / "protected.png").size[0] > 16 * 4 * 10
    info = json.loads((trained.run / "run.json").read_text())
    assert torch.__version__.startswith(info["environment"]["versions"]["torch"])
    assert info["warnings"] == []
    assert validate_again(trained.run) == trained.config
    verify(trained.bundle)


def validate_again(folder: Path) -> Config:
    return load_config(folder / "config.yaml")


def test_the_same_configuration_gives_the_same_bundle(trained: Trained, tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(), "again")
    for part in ("public/protection.safetensors", "private/classifier.safetensors"):
        assert (tmp_path / "again" / "bundle" / part).read_bytes() == (trained.bundle / part).read_bytes()


# Names


def test_a_taken_name_is_refused(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    before = files(folder)
    assert refusal(config(), "tiny") == (
        f"run 'tiny' exists already in {folder}; --resume continues it, another --name starts a new one"
    )
    assert files(folder) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "a\nb", "a\0"])
def test_names_that_are_no_folder_names_are_refused(tiny: Tiny, name: str, tmp_path: Path) -> None:
    assert "is not allowed; use letters, digits and - _ . +" in refusal(tiny(), name)
    assert not any(tmp_path.iterdir())


def test_storage_that_is_a_file_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "deeper"):
        config = tiny()
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"storage": str(storage)})})
        assert refusal(config, "new").startswith(f"cannot create {storage}/new: ")
    assert (tmp_path / "file").read_text() == ""


def test_a_mistake_in_the_feature_network_leaves_the_name_free(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features.weights .* does not exist"):
        train(tiny(features="vgg16", features__weights=tmp_path / "none.pt"), "new")
    assert not (tmp_path / "new").exists()


def try_to_create(tree: dict[str, Any], name: str, start: Any, outcome: Any, end: Any) -> None:
    config = validate(tree)
    start.wait(60)
    try:
        with open_run(config, name):
            outcome.put("created")
            end.wait(60)
    except StorageError as error:
        outcome.put(str(error))


@pytest.mark.slow
def test_of_two_processes_that_create_one_name_one_wins(processes: ForkServerContext, tiny: Tiny) -> None:
    tree = tiny().model_dump(mode="json")
    start, outcome, end = processes.Barrier(2), processes.Queue(), processes.Event()
    contest = (tree, "contested", start, outcome, end)
    drivers = [processes.Process(target=try_to_create, args=contest) for _ in range(2)]
    for driver in drivers:
        driver.start()
    outcomes = sorted(outcome.get(timeout=120) for _ in drivers)
    end.set()
    for driver in drivers:
        driver.join(60)
    assert outcomes[0] == "created"
    assert outcomes[1] == "run 'contested' is in use by another process; wait for it or take another --name"


def hold(tree: dict[str, Any], name: str, held: Any, release: Any) -> None:
    with open_run(validate(tree), name, resume=True):
        held.set()
        release.wait(60)


@pytest.mark.slow
def test_a_run_in_use_by_another_process_is_refused(
    processes: ForkServerContext, finished: tuple[Callable[..., Config], Path]
) -> None:
    config, _ = finished
    held, release = processes.Event(), processes.Event()
    driver = processes.Process(target=hold, args=(config().model_dump(mode="json"), "tiny", held, release))
    driver.start()
    try:
        assert held.wait(120)
        assert refusal(config(), "tiny", resume=True) == (
            "run 'tiny' is in use by another process; wait for it or take another --name"
        )
    finally:
        release.set()
        driver.join(60)
    assert train(config(), "tiny", resume=True)["epochs"] == {"plain": 1, "joint": 2}


# Resuming


def test_unknown_runs_are_not_resumed(tiny: Tiny, tmp_path: Path) -> None:
    assert refusal(tiny(), "none", resume=True) == f"there is no run 'none' to resume under '{tmp_path}'"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train__alpha": 0.5}, "train.alpha = 0.005, now it is 0.5"),
        ({"seed": 7}, "seed = 0, now it is 7"),
        ({"protection__width": 5}, "protection.width = 4, now it is 5"),
        ({"train__plain_epochs": 2}, "train.plain_epochs = 1, now it is 2"),
        ({"data__source__seed": 1}, "data.source.seed = 0, now it is 1"),
        ({"data__image_size": "null"}, r"data.image_size = [16, 16], now it is None"),
        ({"train__schedule": "constant"}, "train.schedule.final = 0.0, now it is None"),
    ],
)
def test_another_configuration_is_refused(
    finished: tuple[Callable[..., Config], Path], changes: dict[str, Any], sentence: str
) -> None:
    config, folder = finished
    before = files(folder)
    message = refusal(config(**changes), "tiny", resume=True)
    assert message.startswith(f"run 'tiny' was started with {sentence}; ")
    assert files(folder) == before


def test_what_may_change_on_resume_does_not_matter(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    before = files(folder)
    changed = config(train__eval_batch_size=7, cluster__max_failures=9)
    results = train(changed, "tiny", resume=True)
    assert results == json.loads((folder / "summary.json").read_text())
    after = files(folder)
    assert after.pop("config.yaml") == changed.to_yaml().encode()
    del before["config.yaml"]
    assert after == before, "a finished run trains nothing"


def test_a_run_does_not_end_before_what_it_has_trained(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    before = files(folder)
    assert "has trained 2 epochs, train.epochs is 1; a run can end sooner" in refusal(
        config(train__epochs=1), "tiny", resume=True
    )
    assert files(folder) == before


@pytest.mark.slow
def test_a_stopped_run_is_ended_with_what_it_has(finished: tuple[Callable[..., Config], Path]) -> None:
    """What a run that was started for 9 epochs and stopped after 2 holds, ended there without a step more."""
    config, folder = finished
    whole, rows = files(folder), timeless(folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "bundle")
    (folder / "config.yaml").write_text(config(train__epochs=9).to_yaml())
    first, *others = (folder / "metrics.jsonl").read_text().splitlines()
    longer = json.loads(first) | {"epoch": 5}  # a plain phase may be longer than the joint one
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(longer), *others]))
    results = train(config(), "tiny", resume=True)
    assert results["epochs"] == {"plain": 1, "joint": 2}
    assert timeless(folder) == rows
    assert files(folder).keys() == whole.keys()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["epochs"] == 2
    verify(folder / "bundle")


@pytest.mark.slow
def test_more_epochs_go_on_from_the_last(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    before = timeless(folder)
    results = train(config(train__epochs=4), "tiny", resume=True)
    after = timeless(folder)
    assert [(row["phase"], row["epoch"]) for row in after] == [("plain", 1), *(("joint", e) for e in (1, 2, 3, 4))]
    assert after[:3] == before
    assert results["epochs"] == {"plain": 1, "joint": 4}
    assert list_checkpoints(Storage(folder)) == ["epoch_0005", "epoch_0004"]
    assert results["best"]["val_loss"] == min(row["val_loss"] for row in after[1:])
    verify(folder / "bundle")


@pytest.mark.slow
def test_milestones_move_with_the_epochs_of_a_resumed_run(tiny: Tiny, tmp_path: Path) -> None:
    schedule = "{name: multistep, milestones: [1], gamma: 0.5}"
    stated = tiny(train__mode="plain", protection="plain", train__schedule=schedule)
    train(stated, "run")
    tree = stated.model_dump(mode="json")
    moved = validate(deep_merge(tree, {"train": {"epochs": 4}}))
    other = tiny(train__mode="plain", protection="plain", train__epochs=4, train__schedule=schedule.replace("1", "3"))
    assert "train.schedule.milestones = [1], now it is [3]" in refusal(other, "run", resume=True)
    train(moved, "run", resume=True)
    assert [row["lr"] for row in timeless(tmp_path / "run")] == pytest.approx([0.1, 0.05, 0.05, 0.05])
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]
    assert (stored["epochs"], stored["schedule"]["milestones"]) == (4, [2])


@pytest.mark.slow
def test_a_run_that_stopped_before_its_summary_only_writes_it(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    whole = files(folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "bundle")
    (folder / "protected.png").unlink()
    train(config(), "tiny", resume=True)
    again = files(folder)
    assert again.keys() == whole.keys()
    for name in ("protected.png", "metrics.jsonl", "bundle/public/protection.safetensors"):
        assert again[name] == whole[name]
    summaries = [json.loads(content["summary.json"]) for content in (again, whole)]
    for results in summaries:
        del results["client"]["milliseconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_feature_network_that_it_began_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that had to do without VGG-16 must not find it on the second day."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    refused = tiny(features="vgg16", train__epochs=1)
    assert "which departs from the paper, with --features.fallback allow" in refusal(refused, "run")
    assert not (tmp_path / "run").exists()
    config = tiny(features="vgg16", features__fallback="allow", train__epochs=1)
    results = train(config, "run")
    assert results["features"] == "plain_classifier, early block"
    assert "a departure from the paper" in results["warnings"][0]
    assert results["warnings"][0] in (tmp_path / "run" / "bundle" / "MODEL_CARD.md").read_text()
    with open_run(config, "run", resume=True) as run:
        assert run.config.features.name == "plain_classifier"
        assert list(run.warnings) == results["warnings"]
    before = yaml.safe_load(config.to_yaml())
    del before["features"]["fallback"]  # as an earlier version stored it
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(before))
    for again in (config, refused):
        with open_run(again, "run", resume=True) as run:
            assert run.config.features.name == "plain_classifier"


@pytest.mark.slow
def test_a_resumed_run_keeps_its_weights_of_the_feature_network(tiny: Tiny, tmp_path: Path) -> None:
    from networks import same, vgg_slice

    weights = tmp_path / "slice.pt"
    torch.save(vgg_slice(), weights)
    config = tiny(features="vgg16", features__weights=weights, train__epochs=1)
    assert train(config, "run")["features"] == f"vgg16, relu2_2 (weights {weights})"
    weights.unlink()
    with open_run(config, "run", resume=True) as run:
        assert run.phi is not None
        assert same(dict(run.phi), vgg_slice())


@pytest.mark.slow
def test_a_mistake_in_the_data_leaves_the_name_free(tiny: Tiny, tmp_path: Path) -> None:
    assert refusal(tiny(data__num_train=100), "run") == "data.num_train is 100, but there are only 40 images"
    train(tiny(data__num_train=20, train__epochs=1), "run")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_folder_of_something_else_is_not_taken_over(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"dear")
    assert "run 'photos' exists already" in refusal(tiny(), "photos")
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"dear"
    assert not (tmp_path / "photos" / "config.yaml").exists()


def test_first_of_each_class_takes_turns() -> None:
    labels = np.array([2, 2, 0, 1, 0, 1, 2])
    assert first_of_each_class(labels, 5).tolist() == [2, 3, 0, 4, 5]
    assert first_of_each_class(labels, 100).tolist() == [2, 3, 0, 4, 5, 1, 6]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["another key", "no key"])
def test_a_run_is_not_resumed_with_another_key(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    config = tiny(protection="tanaka", train__epochs=1)
    train(config, "keyed")
    path = tmp_path / "keyed" / "private" / "protection.key"
    before = Key.read(path).identifier
    path.unlink()
    if damage == "another key":
        Key.generate().write(path)
    sentence = refusal(config, "keyed", resume=True)
    assert f"is missing or not the key {before} that the run was started with; put the run's own key file" in sentence


def test_a_damaged_record_is_named(finished: tuple[Callable[..., Config], Path]) -> None:
    config, folder = finished
    for file, data in (("config.yaml", "[1"), ("config.yaml", "data: {}"), ("run.json", "{}")):
        original = (folder / file).read_bytes()
        (folder / file).write_text(data)
        assert f"{file} is damaged" in refusal(config(), "tiny", resume=True)
        (folder / file).write_bytes(original)


def test_the_test_split_is_read_before_hours_of_training(tiny: Tiny, tmp_path: Path) -> None:
    sentence = refusal(tiny(data__num_test=31), "run")
    assert "data.num_test" in sentence
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for number in (2, 9999, 10000):
        storage.write(f"checkpoints/epoch_{number:04d}/checkpoint.json", b"{}")
    assert list_checkpoints(storage) == ["epoch_10000", "epoch_9999", "epoch_0002"]


def test_the_commit_of_the_code_is_recorded(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert commit(tmp_path) is None
    commit.cache_clear()
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    sha = git("rev-parse", "HEAD").strip()
    assert commit(tmp_path) == sha[:12]
    commit.cache_clear()
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == f"{sha[:12]}-dirty"
    assert environment()["commit"] == commit(Path(raypp.__file__).parents[1])
