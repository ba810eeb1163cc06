"""Attack runs from the plan to scorecard, bundle and report, with valid and invalid targets of every kind."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Trained, override
from methods import build
from PIL import Image

from raypp.api import run_attacks
from raypp.attacks import ATTACKS
from raypp.attacks.array_target import ArrayTarget, load_array_target
from raypp.attacks.user_function import user_function
from raypp.bundle.load import load_plain_classifier, load_public
from raypp.bundle.manifest import MANIFEST, verify, write_manifest
from raypp.cli.attack import print_attack_results
from raypp.cli.main import main
from raypp.cli.render import print_scorecard
from raypp.evaluation.report.render import write_report
from raypp.evaluation.scorecard import aggregate, is_rising, strongest_attack, verdict
from raypp.experiments import attack_plan, attack_run, attack_scores
from raypp.metrics.statistics import chance_error, wilson_interval
from raypp.utils.errors import ConfigError, RayppError, StorageError, TrainingInterrupted
from raypp.utils.images import write_png
from raypp.utils.progress import MultiProgressDisplay
from raypp.utils.storage import Storage

SUITE: dict[str, Any] = {
    "num_queries": 20,
    "reference_epochs": 0,
    "attacks": {
        "feature_reconstruction": {},
        "inverse": {"width": 4, "depth": 2, "train": {"epochs": 2, "batch_size": 10}},
        "white_box": {"steps": 3, "num_images": 10, "restarts": 0},
        "attribute_inference": {"width": 2, "train": {"epochs": 1, "batch_size": 10}},
        "learned_matcher": {"width": 2, "num_features": 4, "train": {"epochs": 1, "batch_size": 10}},
        "known_gallery": {},
        "chosen_plaintext": {},
    },
}
TWO_ATTACKS = SUITE | {"attacks": {name: SUITE["attacks"][name] for name in ("feature_reconstruction", "inverse")}}


def plan(
    tmp_path: Path, name: str = "attack", suite: dict[str, Any] | None = None, **target: Any
) -> attack_plan.AttackPlan:
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(SUITE if suite is None else suite))
    return attack_plan.make_attack_plan(**({"suite": str(file), "storage": tmp_path / "runs", "name": name} | target))


def attack(run_plan: attack_plan.AttackPlan, *, resume: bool = False) -> dict[str, Any]:
    card = run_attacks(run_plan, ray=False, quiet=True, resume=resume)
    print_attack_results(card, json=False, quiet=True)  # raises if an attack failed
    return card.to_dict()


def refusal(tmp_path: Path, **target: Any) -> str:
    with pytest.raises(RayppError) as raised:
        attack(plan(tmp_path, **target))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def attacked(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A bundle after an attack run: bundle, the run's folder, the scorecard."""
    folder = tmp_path_factory.mktemp("attacked")
    bundle = shutil.copytree(trained.bundle, folder / "bundle")
    card = attack(plan(folder, bundle=str(bundle)))
    return bundle, folder / "runs" / "attack", card


@pytest.mark.slow
def test_the_scorecard_holds_every_attack_and_the_baselines(attacked: tuple[Path, Path, dict[str, Any]]) -> None:
    _, folder, card = attacked
    assert card == json.loads((folder / "scorecard.json").read_text())
    assert card["num_queries"] == 20
    assert card["num_gallery"] == 30
    assert card["num_attacker_images"] == 60
    status = {name: result["status"] for name, result in card["attacks"].items()}
    assert status == {
        "feature_reconstruction": "done",
        "inverse": "done",
        "white_box": "done",
        "attribute_inference": "done",
        "learned_matcher": "done",
        "known_gallery": "done",
        "chosen_plaintext": "does not apply",
    }
    assert "no permutation" in card["attacks"]["chosen_plaintext"]["note"]
    assert set(card["baselines"]) == {
        "mean image", "class mean", "fitted class image", "random image", "nearest training image",
    }  # fmt: skip
    assert card["blind_baselines"] == ["mean image", "random image", "class mean", "fitted class image"]
    for scores in (card["attacks"]["inverse"]["scores"], card["baselines"]["mean image"]):
        assert {"psnr", "ssim", "ssim_lab", "ssim_invariant", "edges", "reidentified", "reidentified_top5",
                "reidentified_same_class", "reidentified_unseen", "reidentified_pixels", "reidentified_cosine",
                "reidentified_edges", "bits_identified", "accuracy"} <= set(scores)  # fmt: skip
        assert scores["ssim"]["low"] <= scores["ssim"]["mean"] <= scores["ssim"]["high"]
        assert scores["ssim"]["min"] <= scores["ssim"]["median"] <= scores["ssim"]["top_1_percent"]
    inverse = card["attacks"]["inverse"]
    assert inverse["num_validation"] == 6
    assert inverse["scores"]["reidentified"] == inverse["scores"][f"reidentified_{inverse['matcher']}"]
    assert card["attacks"]["white_box"]["num_validation"] == 6
    matchers = {name: card["attacks"][name]["matcher"] for name in ("feature_reconstruction", "known_gallery")}
    assert matchers == {"feature_reconstruction": "edges", "known_gallery": "own scores"}
    assert card["attacks"]["known_gallery"]["above_baseline_p_values"]["reidentified"] < 0.001
    assert [row["epoch"] for row in inverse["history"]] == [1, 2]
    assert {"val_ssim", "val_psnr", "val_reidentified"} <= set(inverse["history"][0])
    assert [(point["what"], point["num_images"]) for point in inverse["curve"]] == [
        ("half the epochs", 54),
        ("a sixteenth of the images", 3),
        ("a quarter of the images", 14),
        ("everything", 54),
    ]
    assert card["attacks"]["white_box"]["num_queries"] == 10
    assert "the inverse network's estimate" in card["attacks"]["white_box"]["note"]
    assert card["strongest_attack"] in status
    assert card["attacks"][card["strongest_attack"]]["reidentification_rate"] == max(
        result["reidentification_rate"] for result in card["attacks"].values() if result["status"] == "done"
    )


@pytest.mark.slow
def test_extra_scores_are_in_scorecard_table_and_report(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, card = attacked
    assert card["attacks"]["inverse"]["extra_scores"] == {}
    print_scorecard(card, str(folder))
    printed = capsys.readouterr().out
    write_report([str(folder)], Storage(tmp_path))
    page = (tmp_path / "report.html").read_text()
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    for name in ("attribute_inference", "learned_matcher"):
        attack = card["attacks"][name]
        for key, description in attack["extra_scores"].items():
            score = attack["scores"][key]
            values = [float(row[key]) for row in rows if row["attack"] == name]
            assert score["mean"] == pytest.approx(np.mean(values), abs=1e-3)
            assert score["low"] <= score["mean"] <= score["high"]
            assert re.search(rf"{name}: .* {re.escape(description)}", printed)
            assert description in page
    assert card["attacks"]["learned_matcher"]["scores"]["mutual_information_bits"]["max"] <= np.log2(20)


@pytest.mark.slow
def test_scores_are_there_image_by_image(attacked: tuple[Path, Path, dict[str, Any]]) -> None:
    _, folder, card = attacked
    rows = list(csv.DictReader(io.StringIO((folder / "scores.csv").read_text())))
    of_gallery = [row for row in rows if row["attack"] == "known_gallery"]
    assert len(of_gallery) == 20
    mean = np.mean([float(row["ssim"]) for row in of_gallery])
    assert mean == pytest.approx(card["attacks"]["known_gallery"]["scores"]["ssim"]["mean"], abs=1e-4)
    assert len({row["image"] for row in of_gallery}) == 20
    assert {row["attack"] for row in rows if row["attack"].startswith("baseline")} == {
        f"baseline: {n}" for n in card["baselines"]
    }


@pytest.mark.slow
def test_the_bundle_keeps_networks_and_verdict(attacked: tuple[Path, Path, dict[str, Any]], trained: Trained) -> None:
    bundle, _, card = attacked
    public = [(part / "public" / "manifest.json").read_bytes() for part in (bundle, trained.bundle)]
    assert public[0] == public[1], "clients know a protection by this file"
    for part in ("", "public", "private"):
        verify(bundle / part)
    assert sorted(path.name for path in (bundle / "private" / "attacks").iterdir()) == [
        "attribute_inference.json", "attribute_inference.safetensors", "inverse.json", "inverse.safetensors",
    ]  # fmt: skip
    assert json.loads((bundle / "private" / "scorecard.json").read_text()) == card
    text = (bundle / "MODEL_CARD.md").read_text()
    assert "No attack has been run" not in text
    assert f"| inverse | T4 | 20 | {card['attacks']['inverse']['reidentification_rate']:.1%}" in text
    assert "in a gallery of 30 images" in text
    assert load_plain_classifier(bundle) is not None
    assert not any("attack" in path.name for path in (bundle / "public").rglob("*"))


@pytest.mark.slow
def test_a_stored_network_reconstructs_as_it_did(attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    from safetensors.torch import load

    bundle, folder, _ = attacked
    run_plan = plan(tmp_path, bundle=str(bundle))
    target = attack_plan.load_target_of(run_plan)
    network = attack_run.load_network(
        Storage(folder / "attacks" / "inverse"), run_plan.suite.options("inverse"), target.access
    )
    estimates = load((folder / "attacks" / "inverse" / "estimates.safetensors").read_bytes())["estimates"]
    assert torch.equal(network(target.protected), estimates)


def test_the_white_box_compares_the_logits_of_a_bundle_and_of_a_module(trained: Trained, tmp_path: Path) -> None:
    arrays = ArrayTarget(load_public(trained.bundle).protection, images=np.zeros((40, 16, 16, 3), np.uint8))
    targets = (
        attack_plan.load_target_of(plan(tmp_path, bundle=str(trained.bundle))),
        load_array_target(arrays, num_queries=10, num_images=None, seed=0),
    )
    for target in targets:
        white_box = build("white_box", target.access)
        white_box.prepare()
        assert "steps on logits" in white_box.note


@pytest.mark.parametrize("suite", ["small", "standard"])
def test_a_large_suite_has_every_attack(suite: str) -> None:
    run_plan = attack_plan.make_attack_plan(folders=("plain", "protected"), suite=suite, name="x")
    assert {options.name for options in run_plan.suite.attacks} == set(ATTACKS)


@pytest.mark.parametrize("resume", [False, True])
def test_a_mistake_leaves_no_folder(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(RayppError, match="does not exist"):
        attack(plan(tmp_path, bundle=str(tmp_path / "none")), resume=resume)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_resuming_runs_what_is_missing_and_nothing_else(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    bundle, folder, card = attacked
    shutil.copytree(folder, tmp_path / "runs" / "attack")
    results = tmp_path / "runs" / "attack" / "attacks"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("result.json")}
    with pytest.raises(StorageError, match="exists already; --resume continues it"):
        attack(plan(tmp_path, bundle=str(bundle)))
    more = SUITE | {"attacks": SUITE["attacks"] | {"minimum_difference": {}}}
    again = attack(plan(tmp_path, suite=more, bundle=str(bundle)), resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["attacks"]["minimum_difference"]["status"] == "done"
    assert again["attacks"]["inverse"]["scores"] == card["attacks"]["inverse"]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_queries": 10}, "num_queries"),
        ({"seed": 3}, "seed"),
        ({"reference_epochs": 1}, "reference_epochs"),
        ({"attacks": {"inverse": {"width": 5}}}, "inverse"),
    ],
)
def test_a_resumed_run_stays_what_it_was(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    bundle, folder, _ = attacked
    shutil.copytree(folder, tmp_path / "runs" / "attack")
    with pytest.raises(StorageError, match=f"was started with another {what}; resume it with the same"):
        attack(plan(tmp_path, suite=SUITE | change, bundle=str(bundle)), resume=True)


@pytest.mark.slow
def test_a_damaged_file_of_a_run_is_named(attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    bundle, folder, _ = attacked
    run_folder = shutil.copytree(folder, tmp_path / "runs" / "attack")
    again = plan(tmp_path, bundle=str(bundle))
    result = run_folder / "attacks" / "feature_reconstruction" / "result.json"
    result.write_text(result.read_text()[:-20])
    with pytest.raises(
        StorageError, match=r"feature_reconstruction/result.json is damaged .*; delete it, and --resume"
    ):
        attack(again, resume=True)
    (run_folder / "suite.yaml").write_text("target: [")
    with pytest.raises(StorageError, match=r"suite\.yaml is damaged: "):
        attack(again, resume=True)


def test_a_training_runs_folder_is_no_place_for_attacks(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "runs" / "attack").mkdir(parents=True)
    (tmp_path / "runs" / "attack" / "run.json").write_text("{}")
    with pytest.raises(StorageError, match=r"holds a run of raypp train; take another --name$"):
        attack(plan(tmp_path, bundle=str(trained.bundle)))


@pytest.mark.slow
def test_a_stopped_attack_run_resumes_from_its_checkpoint(
    trained: Trained, attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, _, whole = attacked

    def stopped(plan: attack_plan.AttackPlan, missing: Any, display: MultiProgressDisplay, on_done: Any) -> None:
        signalled: list[str] = []

        def stop_once(run: str, info: dict[str, Any]) -> None:
            if run == "inverse" and info["steps_done"] > 1 and not signalled:  # a second signal would end this process
                signalled.append(run)
                signal.raise_signal(signal.SIGTERM)

        display.step = stop_once  # type: ignore[method-assign]
        attack_run.run_attacks_locally(plan, attack_plan.load_target_of(plan), missing, display, on_done)

    part = plan(tmp_path, "part", TWO_ATTACKS, bundle=str(shutil.copytree(trained.bundle, tmp_path / "other")))
    with pytest.raises(TrainingInterrupted, match="stopped after checkpoint epoch_"):
        attack_run.run_attack_suite(part, quiet=True, run=stopped)
    assert attack_plan.load_result(part, "feature_reconstruction") is not None
    assert attack_plan.load_result(part, "inverse") is None
    again = attack(part, resume=True)
    assert again["attacks"]["inverse"]["scores"] == whole["attacks"]["inverse"]["scores"]


@pytest.mark.slow
def test_an_attack_that_is_killed_goes_on_from_its_checkpoint(
    trained: Trained,
    attacked: tuple[Path, Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a killed process leaves it: an epoch trained, no result."""
    _, _, whole = attacked
    from raypp.training.reporter import Reporter

    report = Reporter.report

    def killed(self: Any, history: Sequence[Any], name: str, checkpoint: Path | None) -> None:
        report(self, list(history), name, checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "report", killed)
    run_plan = plan(
        tmp_path,
        "cut",
        TWO_ATTACKS | {"curve": False},
        bundle=str(shutil.copytree(trained.bundle, tmp_path / "bundle")),
    )
    with pytest.raises(KeyboardInterrupt):
        attack(run_plan)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "runs" / "cut" / "attacks" / "inverse" / "checkpoints").iterdir()] == [
        "epoch_0001"
    ]
    again = attack(run_plan, resume=True)
    assert again["attacks"]["inverse"]["scores"] == whole["attacks"]["inverse"]["scores"]


# Other targets

INVERT = """
import numpy as np

def protect(images):
    return 255 - images
"""


def function(tmp_path: Path, body: str = INVERT) -> str:
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path / 'mine.py'}:protect"


IMAGES = [
    "--data.num_val", "10", "--data.image_size", "[16, 16]",
    "--data.source", "{name: shapes, num_train: 60, num_test: 30}",
]  # fmt: skip


def of_function(tmp_path: Path, name: str = "attack", **more: Any) -> attack_plan.AttackPlan:
    where = more.pop("function", None) or function(tmp_path)
    return plan(tmp_path, name, preset="quickstart", function=where, **({"flags": IMAGES} | more))


@pytest.mark.slow
def test_any_function_can_be_attacked(tmp_path: Path) -> None:
    attacks = {"feature_reconstruction": {}, "known_gallery": {}, "chosen_plaintext": {}, "white_box": {}}
    card = attack(of_function(tmp_path, suite=SUITE | {"attacks": attacks, "reference_epochs": 1}))
    assert card["attacks"]["chosen_plaintext"]["reidentification_rate"] == 1
    assert card["attacks"]["known_gallery"]["reidentification_rate"] > 0.2
    assert "needs a differentiable protection, which this target" in card["attacks"]["white_box"]["note"]
    assert card["accuracy"] is None
    assert card["reference_accuracy"] is not None
    assert (tmp_path / "runs" / "attack" / "report.html").exists()


@pytest.mark.slow
def test_a_reference_classifier_that_cannot_be_trained_is_reported(tmp_path: Path) -> None:
    settings = override(IMAGES, ["--data.num_val", "60"])
    suite = SUITE | {"attacks": {"feature_reconstruction": {}}, "reference_epochs": 1}
    card = attack(of_function(tmp_path, suite=suite, flags=settings))
    assert "cannot set 60 of 60 images aside" in card["reference_note"]
    assert "cannot set 60 of 60 images aside" in (tmp_path / "runs" / "attack" / "report.html").read_text()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "def protect(images):\n    return images[0]",
            r"gave uint8 \(16, 16, 3\) for uint8 \(30, 16, 16, 3\)",
        ),
        ("def protect(images):\n    return images / 2", "gave float64"),
        ("def protect(images):\n    return None", "gave NoneType"),
        ("def protect(images):\n    raise KeyError('no')", "failed: KeyError: 'no'"),
        ("def protect(images):\n    raise SystemExit(5)", "failed: SystemExit: 5"),
        ("def protect(images):\n    return images[:, :0]", r"gave uint8 \(30, 0, 16, 3\)"),
        (
            "sizes = iter((8, 9))\ndef protect(images):\n    return images[:, : next(sizes)]",
            r"gave images \(9, 16, 3\) after images \(8, 16, 3\)",
        ),
        ("def protetc(images):\n    return images", "cannot be loaded: AttributeError"),
        ("import nothing_like_it", "cannot be loaded: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def protect(images", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_broken_function_is_named(tmp_path: Path, body: str, sentence: str) -> None:
    where = function(tmp_path, body)
    with pytest.raises(RayppError, match=sentence) as raised:
        attack(of_function(tmp_path, function=where, suite=SUITE | {"num_queries": 30}))
    assert where in str(raised.value)
    assert "\n" not in str(raised.value)


FILES = {
    "a dataclass": (
        "mine.py",
        """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Settings:
    top: int = 255
def protect(images):
    return Settings().top - images
""",
    ),
    "pickled": (
        "mine_pickled.py",
        """import pickle
class Settings:
    top = 255
def protect(images):
    pickle.dumps(Settings())  # finds the class by its module's name
    return Settings().top - images
""",
    ),
    "a sibling": ("mine_sibling.py", "from helper_of_mine import top\ndef protect(images):\n    return top - images"),
    "a late sibling": (
        "mine_late.py",
        "def protect(images):\n    import late_helper_of_mine\n    return late_helper_of_mine.top - images",
    ),
    "a guard": (
        "mine_guard.py",
        "def protect(images):\n    return 255 - images\nif __name__ == '__main__':\n    raise SystemExit(3)",
    ),
    "no identifier": ("my-own 2.py", "from dataclasses import dataclass\n@dataclass\nclass A:\n    top: int = 255\n"
                      "def protect(images):\n    return A().top - images"),
    "a module's name": ("random.py", "import random\nrandom.random()\ndef protect(images):\n    return 255 - images"),
    "a package's name": ("torch.py", "import torch\ntorch.zeros(1)\ndef protect(images):\n    return 255 - images"),
    "a module not yet imported": (
        "colorsys.py", "import colorsys\nassert colorsys.rgb_to_hsv\ndef protect(images):\n    return 255 - images"
    ),
    "another encoding": (
        "mine_latin.py", "# coding: latin-1\n# \xfc\ndef protect(images):\n    return 255 - images"
    ),
    "a lambda": ("mine_lambda.py", "protect = lambda images: 255 - images"),
    "an instance": (
        "mine_instance.py",
        "class Invert:\n    def __call__(self, images):\n        return 255 - images\nprotect = Invert()",
    ),
    "a partial": (
        "mine_partial.py",
        "from functools import partial\ndef f(top, images):\n    return top - images\nprotect = partial(f, 255)",
    ),
    "a builtin": ("mine_builtin.py", "import numpy as np\nprotect = np.invert"),
    "options": ("mine_options.py", "def protect(images, top=255, *, more=0):\n    return top - images"),
    "one array for all": (
        "mine_buffer.py",
        "import numpy as np\nout = np.empty((2, 8, 8, 3), 'uint8')\ndef protect(images):\n"
        "    return np.subtract(255, images, out=out)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_loaded_as_python_runs_it(tmp_path: Path, kind: str) -> None:
    name, body = FILES[kind]
    file = tmp_path / name
    file.write_bytes(body.encode("latin-1"))
    for helper in ("helper_of_mine", "late_helper_of_mine"):
        (tmp_path / f"{helper}.py").write_text("top = 255")
    path, known = list(sys.path), {k: sys.modules.get(k) for k in ("torch", "random", "numpy")}
    try:
        protect = user_function(f"{file}:protect", torch.device("cpu"))
        images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        first, second = protect(images), protect(images // 2)
    finally:
        for helper in ("helper_of_mine", "late_helper_of_mine"):
            sys.modules.pop(helper, None)
    assert torch.equal(first, 255 - images)
    assert torch.equal(second, 255 - images // 2)
    assert sys.path == path
    assert {k: sys.modules.get(k) for k in known} == known
    assert not list(tmp_path.glob(f"__pycache__/{file.stem}.*")), "no bytecode of it"


def test_a_file_does_not_see_the_arguments_of_raypp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that parses them as it is imported, or as it is called, does not see those of raypp."""
    arguments = ["raypp", "attack", "--function", "mine.py:protect"]
    monkeypatch.setattr(sys, "argv", arguments)
    body = """import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--top", type=int, default=255)
top = parser.parse_args().top
def protect(images):
    return parser.parse_args().top - images
"""
    images = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    for where in (function(tmp_path, body), "arguments_of_mine:protect"):
        (tmp_path / "arguments_of_mine.py").write_text(body)
        assert bool((user_function(where, torch.device("cpu"), str(tmp_path))(images) == 255).all())
    sys.modules.pop("arguments_of_mine")
    assert sys.argv is arguments
    with pytest.raises(ConfigError, match=r"cannot be loaded: SystemExit: \['.*mine\.py'\]"):
        user_function(function(tmp_path, "import sys\nsys.exit(str(sys.argv))"), torch.device("cpu"))


def test_a_file_is_executed_once_for_each_of_its_versions(tmp_path: Path) -> None:
    images = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    body = "calls = 0\ndef protect(images):\n    global calls\n    calls += 1\n    return images + calls"
    where = function(tmp_path, body)
    first = [int(user_function(where, torch.device("cpu"))(images)[0, 0, 0, 0]) for _ in range(2)]
    function(tmp_path, body.replace("calls = 0", "calls = 5"))  # as long as before, in the same second
    assert [*first, int(user_function(where, torch.device("cpu"))(images)[0, 0, 0, 0])] == [1, 2, 6]
    (tmp_path / "other").mkdir()
    other = function(tmp_path / "other", body.replace("calls = 0", "calls = 8"))
    assert int(user_function(other, torch.device("cpu"))(images)[0, 0, 0, 0]) == 9
    assert int(user_function(where, torch.device("cpu"))(images)[0, 0, 0, 0]) == 7, (
        "the other file of its name changes nothing"
    )


def test_a_file_that_ends_python_or_misses_is_named(tmp_path: Path) -> None:
    for body, sentence in (
        ("x = 1\nimport sys\nsys.exit('done')", "cannot be loaded: SystemExit: done (mine.py, line 3)"),
        ("x = 1\n\ny = 1 / 0", "cannot be loaded: ZeroDivisionError: division by zero (mine.py, line 3)"),
        ("def f():\n    raise ValueError\nf()", "cannot be loaded: ValueError (mine.py, line 2)"),
        ("def protect(images)\n  pass", "cannot be loaded: SyntaxError: expected ':' (mine.py, line 1)"),
        ("def protec(images):\n    return images", "there is no 'protect' (did you mean 'protec'?)"),
        ("class protect:\n    pass", "is a class; allowed is a function"),
        ("protect = 5", "is of type int, which cannot be called"),
        ("async def protect(images):\n    return images", "is asynchronous; allowed is a function"),
        ("def protect():\n    pass", "does not take one argument, the images: too many positional"),
        ("def protect(a, b):\n    pass", "does not take one argument, the images: missing a required argument: 'b'"),
        ("from .helper import x", "cannot be loaded: ImportError: attempted relative import with no known parent"),
    ):
        with pytest.raises(ConfigError) as raised:
            user_function(function(tmp_path, body), torch.device("cpu"))
        assert sentence in str(raised.value)
        assert "\n" not in str(raised.value)
    images = torch.zeros((2, 3, 8, 8), dtype=torch.uint8)
    for body, sentence in (
        ("import torch\ndef protect(images):\n    return torch.from_numpy(images)", "gave a tensor uint8 (2, 8, 8, 3)"),
        ("def protect(images):\n    return images.tolist()", "gave list for uint8 (2, 8, 8, 3); it must give a NumPy"),
        ("def protect(images):\n    yield images", "gave generator"),
        ("def protect(images):\n    return images.astype('float32')", "gave float32 (2, 8, 8, 3)"),
        ("def protect(images):\n    return images[:1]", "gave uint8 (1, 8, 8, 3)"),
        ("import torch\nprotect = torch.nn.ReLU()", "failed: TypeError: relu()"),
        ("def protect(images):\n\n    return images.nothing", "no attribute 'nothing' (mine.py, line 3)"),
    ):
        with pytest.raises(RayppError) as raised_later:
            user_function(function(tmp_path, body), torch.device("cpu"))(images)
        assert sentence in str(raised_later.value)
        assert "\n" not in str(raised_later.value)
    for where, sentence in (
        (f"{tmp_path / 'none.py'}:protect", "there is no file"),
        (f"{tmp_path / 'mine.py'}:", "is not understood; allowed is MODULE:NAME or FILE.py:NAME"),
        (f"{tmp_path / 'mine.txt'}:protect", "names a file that is not a .py file"),
        (f"{tmp_path}.py:protect", "there is no file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            user_function(where, torch.device("cpu"))


def test_a_function_may_work_in_place(tmp_path: Path) -> None:
    where = function(
        tmp_path, "import numpy as np\ndef protect(images):\n    return np.subtract(255, images, out=images)"
    )
    for channels in (1, 3):
        images = torch.randint(0, 256, (4, channels, 16, 16), dtype=torch.uint8)
        before = images.clone()
        protected = user_function(where, torch.device("cpu"))(images)
        assert torch.equal(images, before)
        assert torch.equal(protected, 255 - before)


def write_folders(tmp_path: Path, num: int = 60) -> tuple[str, str]:
    random = np.random.default_rng(0)
    for i in range(num):
        image = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for folder, pixels in (("plain", image), ("protected", 255 - image)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_png(tmp_path / folder / f"{i:03d}.png", pixels)
    return str(tmp_path / "plain"), str(tmp_path / "protected")


@pytest.mark.slow
def test_two_folders_can_be_attacked(tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    settings = {"width": 8, "depth": 1, "loss": "mse", "ssim_weight": 0, "ema": 0}
    attacks = {
        "inverse": settings | {"train": {"epochs": 40, "batch_size": 11, "optimizer": {"lr": 0.02}}},
        "known_gallery": {},
    }
    card = attack(plan(tmp_path, suite=SUITE | {"attacks": attacks, "curve": False}, folders=folders))
    assert card["num_queries"] == 12
    assert card["attacks"]["inverse"]["reidentification_rate"] > 0.2
    assert [card["attacks"][name]["threat"] for name in attacks] == ["T3", "T4"]
    assert card["attacks"]["known_gallery"]["status"] == "does not apply"
    assert "class mean" not in card["baselines"]


@pytest.mark.parametrize(("num_images", "num_gallery"), [(None, 12), (20, 40)])
def test_the_attackers_own_images_of_a_folder_are_no_candidates(
    tmp_path: Path, num_images: int | None, num_gallery: int
) -> None:
    folders = write_folders(tmp_path)
    target = attack_plan.load_target_of(plan(tmp_path, suite=SUITE | {"num_images": num_images}, folders=folders))
    own, gallery = target.access.images, target.gallery
    assert own is not None
    assert len(own) == (num_images or 48)
    assert len(gallery) == len(target.gallery_labels) == num_gallery
    assert not (own[:, None] == gallery[None]).flatten(2).all(2).any()
    assert torch.equal(gallery[target.truth], target.plain)
    assert torch.equal(target.protected, 255 - target.plain)


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, 20)
    plain, protected = (Path(folder) for folder in folders)
    (protected / "007.png").rename(tmp_path / "away.png")
    assert f"folder '{protected}' has no image '007'; plain and protected images need the same" in refusal(
        tmp_path, folders=folders
    )
    (protected / "007.png").write_bytes((tmp_path / "away.png").read_bytes()[:50])
    assert f"{protected / '007.png'} " in refusal(tmp_path, folders=folders)
    write_png(protected / "007.png", np.zeros((20, 16, 3), dtype=np.uint8))
    assert "/007 is 20 x 16, 000 is 16 x 16; images of a folder must have one size" in refusal(
        tmp_path, folders=folders
    )
    for folder in (plain, protected):
        (folder / "007.png").unlink()
    assert "holds 19 images; allowed are 20 or more" in refusal(tmp_path, folders=folders)
    assert "none' is not a folder" in refusal(tmp_path, folders=(str(plain), str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert "empty" in refusal(tmp_path, folders=(empty, empty))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attacks": {"invers": {}}}, "unknown attack 'invers'"),
        ({"attacks": {"inverse": {"widht": 3}}}, "unknown key 'inverse.widht'"),
        ({"attacks": {"inverse": {"train": {"epochs": 0}}}}, "inverse.train.epochs is 0"),
        (
            {"attacks": {"itn": {"train": {"epochs": 5, "schedule": {"milestones": [2, 5]}}}}},
            "itn.train.schedule.milestones is [2, 5], but training ends after itn.train.epochs 5",
        ),
        ({"seed": 2**31}, "seed is 2147483648; allowed is less than 2,147,483,648"),
        ({"attacks": {"inverse": 3}}, "attacks.inverse is 3; allowed is a mapping of its options"),
        ({"attacks": ["inverse"]}, "attacks is ['inverse']; allowed is a mapping of attacks to their options"),
        ({"attacks": {}}, "the suite has no attacks; allowed: "),
        ({"num_queries": 3}, "num_queries is 3"),
        ({"epochs": 3}, "unknown key 'epochs'"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(tmp_path, suite=SUITE | change, bundle="none")


def test_a_plan_that_makes_no_sense_is_refused(trained: Trained, tmp_path: Path) -> None:
    bundle = str(trained.bundle)
    assert "name one target" in refusal(tmp_path)
    assert "name one target" in refusal(tmp_path, bundle=bundle, function="a:b")
    with pytest.raises(RayppError, match=r"unknown suite 'smal' \(did you mean 'small'\?\)"):
        attack_plan.make_attack_plan(bundle=bundle, suite="smal", name="a")
    with pytest.raises(RayppError, match=r"unknown attack 'invers' \(did you mean 'inverse'\?\)"):
        attack_plan.make_attack_plan(bundle=bundle, attacks=["invers"], name="a")
    with pytest.raises(RayppError, match="--itn sets an attack that is not run"):
        attack_plan.make_attack_plan(bundle=bundle, attacks=["inverse"], flags=["--itn.width", "3"], name="a")
    for flags, message in (
        (["--inverse", "5"], "--inverse is '5'; allowed are options of the attack"),
        (["--attacks.inverse.width", "4"], "unknown option --attacks.inverse.width"),
    ):
        with pytest.raises(RayppError, match=re.escape(message)):
            attack_plan.make_attack_plan(bundle=bundle, attacks=["inverse"], flags=flags, name="a")
    with pytest.raises(RayppError, match="--data chooses the images of a bundle or a --function"):
        attack_plan.make_attack_plan(folders=("a", "b"), flags=["--data.source.num_train", "100"], name="a")
    assert "bundle" in refusal(tmp_path, bundle=str(tmp_path / "none"))
    assert "function 'nothing' is not understood" in refusal(tmp_path, function="nothing")


# Numbers


def test_verdicts() -> None:
    def rate(share: float, half_width: float = 0.0) -> dict[str, float]:
        return {"mean": share, "low": share - half_width, "high": share + half_width}

    shares = [rate(share) for share in (0, 0.0499, 0.05, 0.2, 0.2001, 1)]
    thresholds = ["holds", "holds", "weak", "weak", "broken", "broken"]
    sure = {"num_queries": 200, "lower_bound": False, "at_chance": False}
    assert [verdict(share, **sure) for share in shares] == [(words, "") for words in thresholds]
    # A stronger attack may turn "holds" and "weak" into anything, and "broken" into nothing else.
    bounds = [verdict(share, **sure | {"lower_bound": True}) for share in shares]
    assert [words for words, _ in bounds] == ["inconclusive"] * 4 + ["broken"] * 2
    assert "lower bound" in bounds[0][1]
    for change, reason in (({"num_queries": 199}, "199 images were attacked"), ({"at_chance": True}, "is at chance")):
        for share in shares[:4]:
            words, why = verdict(share, **sure | change)
            assert words == "inconclusive"
            assert reason in why
    # Few images suffice if the whole interval is above 20%, and many do not if it contains 5%.
    assert verdict(rate(0.5, 0.25), **sure | {"num_queries": 12}) == ("broken", "")
    assert verdict(rate(0.5, 0.35), **sure | {"num_queries": 12})[0] == "inconclusive"
    assert verdict(rate(0.25, 0.1), **sure) == ("broken", "")
    assert verdict(rate(0.04, 0.02), **sure) == (
        "inconclusive", "its interval reaches 6.0%, and the verdict holds needs less than 5%"
    )  # fmt: skip
    assert verdict(rate(1.0), **sure | {"at_chance": True}) == (
        "inconclusive", "the classifier's accuracy is at chance"
    )  # fmt: skip


def test_the_verdict_of_a_scorecard_needs_evidence() -> None:
    def done(rate: float, **changes: Any) -> dict[str, Any]:
        interval = {"mean": rate, "low": rate, "high": rate}
        scores = {"reidentified": interval, "ssim_invariant": interval, "bits_identified": {"mean": 1.0}}
        return {
            "status": "done",
            "reidentification_rate": rate,
            "num_queries": 500,
            "lower_bound": False,
            "scores": scores,
        } | changes

    def summarize(attacks: dict[str, Any], at_chance: bool = False) -> tuple[Any, ...]:
        card = attack_scores.headline(attacks, at_chance=at_chance)
        return card["strongest_attack"], card["verdict"], card["verdict_by_reconstruction"]

    assert summarize({"inverse": done(0.01), "known_gallery": done(0.02)}) == ("known_gallery", "holds", "holds")
    assert summarize({"inverse": done(0.01, lower_bound=True)}) == ("inverse", "inconclusive", "inconclusive")
    weak = {"inverse": done(0.01, lower_bound=True), "known_gallery": done(1.0)}
    assert summarize(weak) == ("known_gallery", "broken", "inconclusive")
    assert summarize({"inverse": done(0.9, lower_bound=True)}) == ("inverse", "broken", "broken")
    assert summarize({"inverse": done(0.9)}, at_chance=True) == ("inverse", "inconclusive", "inconclusive")
    failed = {"white_box": {"status": "failed"}, "inverse": done(0.01)}
    assert summarize(failed) == ("inverse", "inconclusive", "inconclusive")
    assert "white_box failed" in attack_scores.headline(failed, at_chance=False)["verdict_reason"]
    assert summarize(failed | {"known_gallery": done(0.5)})[1] == "broken"
    assert summarize({"white_box": {"status": "does not apply"}}) == (None, None, None)
    few = done(0.6, num_queries=20) | {"scores": done(0.15)["scores"] | {"reidentified": {"low": 0.1, "mean": 0.6}}}
    assert summarize({"white_box": few, "inverse": done(0.5)}) == ("inverse", "broken", "broken")


@pytest.mark.parametrize(
    ("correct", "num", "chance", "at_chance"),
    [(500, 5000, 0.1, True), (490, 5000, 0.1, True), (600, 5000, 0.1, False), (300, 5000, 0.1, True),
     (4500, 5000, 0.9, True), (4500, 5000, 0.5, False)],
)  # fmt: skip
def test_accuracy_at_chance_is_an_error(correct: int, num: int, chance: float, at_chance: bool) -> None:
    numbers = {"accuracy": correct / num, "accuracy_interval": wilson_interval(correct, num), "chance": chance}
    sentence = chance_error(numbers, 10)
    assert (sentence is not None) == at_chance
    assert sentence is None or f"{correct / num:.1%}" in sentence
    if chance == 0.1:  # bundles of earlier versions say nothing about chance
        assert chance_error({key: numbers[key] for key in ("accuracy", "accuracy_interval")}, 10) == sentence
    assert chance_error(None, 10) is None
    flat = [
        {"ssim_invariant": 0.3, "reidentification_rate": 0.1},
        {"ssim_invariant": 0.305, "reidentification_rate": 0.105},
    ]
    assert not is_rising(flat)
    assert is_rising([flat[0], {"ssim_invariant": 0.3, "reidentification_rate": 0.12}])
    assert is_rising([flat[0], {"ssim_invariant": 0.32, "reidentification_rate": 0.1}])


def scores_of(num_reidentified: int) -> dict[str, torch.Tensor]:
    hits, zeros = (torch.arange(2000) < num_reidentified).float(), torch.zeros(2000)
    return {"reidentified": hits, "reidentified_cosine": hits, "ssim_invariant": zeros, "edges": zeros}


def test_an_attack_is_marked_as_above_the_baseline_only_if_it_is_significant() -> None:
    attacks: dict[str, Any] = {name: {"matcher": "cosine"} for name in ("4 of 2000", "10 of 2000")}
    values = {"4 of 2000": scores_of(4), "10 of 2000": scores_of(10)}
    attack_scores._compare_with_baselines(attacks, values, {"mean image": scores_of(0)})
    assert [result["above_baseline"] for result in attacks.values()] == [False, True]
    assert attacks["10 of 2000"]["above_baseline_p_values"]["reidentified"] == pytest.approx(6 * 0.5**10, rel=1e-4)


def test_many_attacks_do_not_exceed_the_baseline_by_chance() -> None:
    """Six hits against none are significant for one attack, and are no surprise among those of sixteen."""
    for num, is_above in ((1, True), (16, False)):
        attacks: dict[str, Any] = {str(number): {"matcher": "cosine"} for number in range(num)}
        values = {name: scores_of(6 if name == "0" else 0) for name in attacks}
        attack_scores._compare_with_baselines(attacks, values, {"mean image": scores_of(0)})
        assert attacks["0"]["above_baseline"] is is_above


def test_the_strongest_attack_counts_not_the_average() -> None:
    def result(rate: float, ssim: float = 0.1, status: str = "done") -> dict[str, Any]:
        scores = {"reidentified": {"mean": 0.9, "low": rate}, "ssim_invariant": {"mean": 0.9, "low": ssim}}
        return {"status": status, "reidentification_rate": 0.9, "scores": scores}

    assert strongest_attack({}) is None
    assert strongest_attack({"a": result(0.1), "b": result(0.3), "c": result(0.9, status="failed")}) == "b"
    assert strongest_attack({"a": result(0.1, 0.2), "b": result(0.1, 0.4)}) == "b"


def test_a_summary_of_known_values() -> None:
    summary = aggregate({"ssim": torch.linspace(0, 1, 101), "reidentified": torch.tensor([0.0, 1.0, 1.0, 1.0])}, 4)
    assert summary["ssim"]["mean"] == pytest.approx(0.5)
    assert summary["ssim"]["median"] == pytest.approx(0.5)
    assert summary["ssim"]["top_1_percent"] == pytest.approx(0.99)
    assert summary["ssim"]["low"] < 0.45 < 0.5 < 0.55 < summary["ssim"]["high"]
    assert summary["reidentified"]["num"] == 4
    assert set(summary["reidentified"]) == {"num", "mean", "low", "high"}


# The report


@pytest.mark.slow
def test_the_report_is_one_page_that_needs_nothing_else(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    bundle, folder, card = attacked
    write_report([str(folder), str(bundle)], Storage(tmp_path / "report"))
    page = (tmp_path / "report" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "it loads something"
    assert "<script" not in page
    for name, result in card["attacks"].items():
        assert f"<td>{name}</td>" in page
        if result["status"] == "done":
            assert f'<span class="mark {result["verdict"]}">{result["verdict"]}</span>' in page
    assert "baseline: class mean" in page
    assert "/".join(bundle.parts[-2:]) in page
    assert str(bundle.parent) not in page, "a page to share shows no paths of this machine"
    assert f"{card['reidentification_rate']:.1%}" in page
    assert "originals among 30 pictures" in page
    assert 'title="in a gallery of 30 images"' in page
    assert '<th class="n">by cosine</th>' in page
    pictures = sorted((tmp_path / "report" / "figures").glob("*.png"))
    assert {p.stem.rstrip("_12") for p in pictures} == {
        "protected", "front", "estimates", "boxes", "best", "curves",
    }  # fmt: skip
    for path in pictures:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5, path
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "report.csv").read_text())))
    assert {row["attack"] for row in rows} >= {"inverse", "baseline: mean image"}
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["targets"]) == 2


def test_a_report_of_nothing_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(RayppError, match="holds no scorecard; `raypp attack` makes one"):
        write_report([str(trained.bundle)], Storage(tmp_path / "report"))
    with pytest.raises(RayppError, match="no source is given"):
        write_report([], Storage(tmp_path / "report"))
    (tmp_path / "damaged").mkdir()
    for file in ("scorecard.json", "examples.safetensors", "scores.csv"):
        (tmp_path / "damaged" / file).write_text("{")
    with pytest.raises(RayppError, match="cannot be read"):
        write_report([str(tmp_path / "damaged")], Storage(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


# What must not happen to a bundle's reputation


@pytest.mark.slow
def test_a_weaker_attack_afterwards_does_not_make_a_bundle_look_better(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    original, _, before = attacked
    bundle = shutil.copytree(original, tmp_path / "bundle")
    weak = {"feature_reconstruction": {}, "inverse": SUITE["attacks"]["inverse"] | {"train": {"epochs": 1}}}
    attack(plan(tmp_path, suite=SUITE | {"num_queries": 10, "attacks": weak, "curve": False}, bundle=str(bundle)))
    verify(bundle)
    stored = json.loads((bundle / "private" / "scorecard.json").read_text())
    assert (stored["verdict"], stored["strongest_attack"]) == (before["verdict"], before["strongest_attack"])
    assert set(stored["attacks"]) >= set(before["attacks"])
    for name, was in before["attacks"].items():
        if was["status"] == "done":
            assert stored["attacks"][name]["reidentification_rate"] >= was["reidentification_rate"]
    assert stored["num_queries"] == 20  # of the baselines: those of more images
    rows = list(csv.DictReader(io.StringIO((bundle / "private" / "scores.csv").read_text())))
    assert {row["attack"] for row in rows} >= {"known_gallery", "baseline: mean image"}
    assert sum(row["attack"] == "baseline: mean image" for row in rows) == 20
    write_report([str(bundle)], Storage(tmp_path / "report"))
    assert "known_gallery" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.slow
def test_two_attack_runs_that_end_together_both_stay_in_a_bundle(
    attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, run_folder, card = attacked
    bundle = shutil.copytree(original, tmp_path / "bundle")
    shutil.rmtree(bundle / "private" / "attacks")
    for name in ("scorecard.json", "scores.csv", "examples.safetensors"):
        (bundle / "private" / name).unlink()
    for part in (bundle / "private", bundle):
        write_manifest(part)
    names = ("known_gallery", "feature_reconstruction")
    plans = [plan(tmp_path, name, SUITE | {"attacks": {name: {}}}, bundle=str(bundle)) for name in names]
    cards = [card | {"attacks": {name: card["attacks"][name]}} for name in names]
    for of in plans:
        shutil.copytree(run_folder, of.storage.path)
    second = threading.Thread(target=attack_scores.export_to_bundle, args=(plans[1], cards[1], True))
    merge = attack_scores._merge_with_stored

    def slow(*arguments: Any) -> Any:
        merged = merge(*arguments)
        if threading.current_thread() is not second and not second.is_alive():
            second.start()
            second.join(0.5)  # as long as the first is under way it must not write
        return merged

    monkeypatch.setattr(attack_scores, "_merge_with_stored", slow)
    attack_scores.export_to_bundle(plans[0], cards[0], True)
    second.join()
    assert set(json.loads((bundle / "private" / "scorecard.json").read_text())["attacks"]) == set(names)
    verify(bundle)


@pytest.mark.parametrize(("bits", "replaced"), [(5.0, False), (7.0, False), (8.0, True)])
@pytest.mark.parametrize("num_gallery", [100, 10_000])
def test_scorecards_of_different_galleries_are_compared_by_bits(
    tmp_path: Path, num_gallery: int, bits: float, replaced: bool
) -> None:
    """A rate of 60% in a gallery of 100 images may mean less than 50% of 10,000; so may one of smaller images."""

    def card(gallery: str, num_gallery: int, rate: float, bits: float) -> dict[str, Any]:
        scores = {"bits_identified": {"mean": 9.0, "low": bits}}
        result = {"status": "done", "matcher": "cosine", "reidentification_rate": rate, "scores": scores}
        return {
            "num_gallery": num_gallery, "gallery_sha256": gallery, "bits_identified": 9.0,
            "strongest_attack": "inverse", "attacks": {"inverse": result},
        }  # fmt: skip

    stored, new = card("a", 10_000, 0.5, 7.0), card("b", num_gallery, 0.6, bits)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "scorecard.json").write_text(json.dumps(stored))
    names = ("scores.csv", "examples.safetensors")
    for name in names:
        (tmp_path / "private" / name).write_bytes(b"stored")
    merged, files, from_stored = attack_scores._merge_with_stored(str(tmp_path), new, dict.fromkeys(names, b"new"))
    assert merged == (new if replaced else stored)
    assert files == dict.fromkeys(names, b"new" if replaced else b"stored")
    assert from_stored == (set() if replaced else {"inverse"})


def test_an_attack_run_does_not_begin_in_a_folder_of_something_else(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "runs" / "attack").mkdir(parents=True)
    (tmp_path / "runs" / "attack" / "search.yaml").write_text("")
    assert "holds 'search.yaml', which an attack run has not written" in refusal(tmp_path, bundle=str(trained.bundle))


@pytest.mark.slow
def test_a_function_may_be_attacked_further_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine_in_a_module.py").write_text(INVERT)
    suite = SUITE | {"attacks": {"feature_reconstruction": {}}}
    monkeypatch.syspath_prepend(tmp_path)
    for folder, resume in ((tmp_path, False), (tmp_path / "elsewhere", True)):
        monkeypatch.chdir(folder)
        card = attack(of_function(tmp_path, function="mine_in_a_module:protect", suite=suite), resume=resume)
        assert card["attacks"]["feature_reconstruction"]["status"] == "done"
    with pytest.raises(StorageError, match="was started with another reference_epochs; resume it with the same"):
        attack(
            of_function(tmp_path, function="mine_in_a_module:protect", suite=suite | {"reference_epochs": 1}),
            resume=True,
        )


@pytest.mark.slow
def test_a_resumed_run_keeps_the_attacks_that_it_does_not_name(tmp_path: Path) -> None:
    first = {"feature_reconstruction": {}, "known_gallery": {}}
    attack(of_function(tmp_path, suite=SUITE | {"attacks": first}))
    card = attack(of_function(tmp_path, suite=SUITE | {"attacks": {"minimum_difference": {}}}), resume=True)
    assert set(card["attacks"]) == {"feature_reconstruction", "known_gallery", "minimum_difference"}


@pytest.mark.slow
def test_a_resumed_run_refuses_another_version_of_its_target(tmp_path: Path) -> None:
    first = {"feature_reconstruction": {}}
    attack(of_function(tmp_path, suite=SUITE | {"attacks": first}))
    where = function(tmp_path, "def protect(images):\n    return images // 2")
    with pytest.raises(StorageError, match="was started against another version of"):
        attack(
            of_function(tmp_path, function=where, suite=SUITE | {"attacks": first}),
            resume=True,
        )


# Convergence, and protections without information


@pytest.mark.slow
def test_one_epoch_has_no_half_so_its_curve_is_not_flat(tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    inverse = {"width": 4, "depth": 1, "train": {"epochs": 1, "batch_size": 10}}
    card = attack(plan(tmp_path, suite=SUITE | {"attacks": {"inverse": inverse}}, folders=folders))
    result = card["attacks"]["inverse"]
    assert "half the epochs" not in [point["what"] for point in result["curve"]]
    assert result["lower_bound"]
    assert "epochs" in result["unknown"]
    assert "not known for inverse" in (tmp_path / "runs" / "attack" / "report.html").read_text()


@pytest.mark.slow
def test_an_optimization_has_a_curve_too(attacked: tuple[Path, Path, dict[str, Any]]) -> None:
    result = attacked[2]["attacks"]["white_box"]
    assert [point["what"] for point in result["curve"]] == ["half the steps", "everything"]
    assert result["lower_bound"]  # ten queries say nothing about a hundredth


@pytest.mark.slow
@pytest.mark.parametrize("value", [0, 77])
def test_a_protection_that_says_nothing_is_not_broken(tmp_path: Path, value: int) -> None:
    """All protected images are equal, so no attack can re-identify an image."""
    where = function(tmp_path, f"import numpy as np\ndef protect(images):\n    return np.full_like(images, {value})")
    names = ("feature_reconstruction", "minimum_difference", "known_gallery")
    card = attack(of_function(tmp_path, function=where, suite=SUITE | {"attacks": {name: {} for name in names}}))
    assert [result["status"] for result in card["attacks"].values()] == ["done"] * 3
    for result in (card["attacks"][name] for name in names[:2]):
        assert result["reidentification_rate"] <= 0.05
        assert result["verdict"] == "inconclusive"  # of so few images
    assert card["attacks"]["known_gallery"]["reidentification_rate"] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "def protect(images):\n    return images.repeat(2, axis=1).repeat(2, axis=2)",
        "def protect(images):\n    return images[:, ::2, ::2]",
        "def protect(images):\n    return images[..., :1]",
    ],
    ids=["larger", "smaller", "grey"],
)
def test_protected_images_of_another_shape_are_attacked(tmp_path: Path, body: str) -> None:
    inverse = {"width": 4, "depth": 1, "train": {"epochs": 1, "batch_size": 10}}
    attacks = {"feature_reconstruction": {}, "minimum_difference": {}, "inverse": inverse}
    suite = SUITE | {"attacks": attacks, "curve": False}
    card = attack(of_function(tmp_path, function=function(tmp_path, body), suite=suite))
    assert [result["status"] for result in card["attacks"].values()] == ["done"] * 3
    assert card["attacks"]["feature_reconstruction"]["reidentification_rate"] > 0.5


@pytest.mark.slow
def test_an_attack_that_needs_the_cloud_says_so_before_it_trains(tmp_path: Path) -> None:
    options = {"width": 4, "depth": 1, "train": {"epochs": 1, "batch_size": 10}}
    card = attack(of_function(tmp_path, suite=SUITE | {"attacks": {"inverse_conditional": options}}))
    assert card["attacks"]["inverse_conditional"]["status"] == "does not apply"
    assert "inverse_conditional needs the cloud's classifier" in card["attacks"]["inverse_conditional"]["note"]


@pytest.mark.slow
def test_posterior_samples_attack_a_few_images_of_a_function_without_gradients(tmp_path: Path) -> None:
    flow = {"width": 4, "depth": 1, "samples": 2, "steps": 2, "num_images": 5, "train": {"epochs": 2, "batch_size": 20}}
    card = attack(of_function(tmp_path, suite=SUITE | {"attacks": {"flow_matching": flow}}))
    result = card["attacks"]["flow_matching"]
    assert result["note"] == "2 samples without guidance; the one with the lowest misfit counts"
    assert result["num_queries"] == 5
    assert [point["what"] for point in result["curve"]][-1] == "everything"
    assert [row["epoch"] for row in result["history"]] == [1, 2]


@pytest.mark.slow
def test_a_report_leaves_other_files_alone(attacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_text("mine")
    with pytest.raises(StorageError, match="holds other files; give a new or empty folder"):
        write_report([str(attacked[0])], Storage(tmp_path))
    write_report([str(attacked[0])], Storage(tmp_path / "new"))
    write_report([str(attacked[0])], Storage(tmp_path / "new"))  # over an earlier one


def test_settings_stand_anywhere_for_every_kind_of_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of images and attacks after --function and --folders, and before and after a bundle."""
    monkeypatch.setenv("COLUMNS", "200")
    seen: list[attack_plan.AttackPlan] = []
    monkeypatch.setattr("raypp.api.run_attacks", lambda plan, **_: seen.append(plan))
    monkeypatch.setattr("raypp.cli.attack.print_attack_results", lambda *_, **__: None)
    where = function(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["attack", "--function", where, "--preset", "quickstart", "--data.source.num_train", "70", "--suite", "quick"])
    main(["attack", "--folders", "a", "b", "--suite", "quick", "--num_queries", "30", "--inverse.width", "4"])
    bundle = "runs/x/bundle"
    Storage(tmp_path / bundle).write(MANIFEST, b"{}")  # loaded only when the attack runs
    for words in (
        [bundle, "--suite", "quick", "--num_queries", "40"],
        ["--num_queries", "40", bundle, "--suite", "quick"],
        ["--num_queries=40", "--inverse.flip", "false", bundle, "--suite", "quick"],
        ["--suite", "quick", "--num-queries", "40", "--inverse.crop_padding", "0", "--local", bundle],
        ["--attacks", "inverse", "--num_queries", "40", bundle, "--curve", "no"],
    ):
        main(["attack", *words])
    bundles = [str(Path(bundle).absolute())] * 5
    assert [p.spec.name for p in seen] == [where, str(Path("b").absolute()), *bundles]
    assert [p.suite.num_queries for p in seen] == [500, 30, *[40] * 5]
    assert seen[0].spec.config is not None
    assert seen[0].spec.config["data"]["source"]["num_train"] == 70
    for words, sentence in (
        (["bundle", "another"], "name one bundle, not 'bundle' and 'another'; a setting is written --name VALUE"),
        (["--num_queries", "500", "bundle", "another"], "name one bundle, not 'bundle' and 'another'"),
        (["--curve", "bundle"], "curve is 'bundle': expected true or false"),
        (["--num_queries", "500"], "name one target: a bundle, --function MODULE:NAME, or --folders"),
        (["bundle", "--num_queries"], "--num_queries needs a value"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["attack", *words])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_printed_scorecard_has_a_title_for_each_column(
    attacked: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_scorecard(attacked[2], "runs/a")
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["attack", "threat", "re-identified", "bits", "SSIM", "edges", "verdict"]
    verdicts = [row for row in rows if "strongest" in row]
    assert verdicts
    assert all("gallery of 30 images" in row for row in verdicts)
    assert "  by own scores; 4.9 of 4.9 bits" in rows, "known_gallery"
    (gallery,) = (row for row in rows if row.startswith("known_gallery"))
    assert gallery.split()[:2] == ["known_gallery", "T4"]
    assert gallery.split()[-3:-1] == ["1.000", "1.000"], "SSIM and edges of the original itself"
