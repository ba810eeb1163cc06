"""Table I as a grid of runs: what is in it, how it goes on after a fault, and what is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifar_files import write_cifar
from conftest import TINY, override
from PIL import Image
from torchvision import datasets

from raypp.cli.app import app
from raypp.config.overrides import deep_merge
from raypp.config.presets import load_config
from raypp.config.validation import validate
from raypp.experiments.table1 import run_cells_locally, table1
from raypp.experiments.table1_grid import GridCell, grid_cells, num_parameters, table_rows
from raypp.experiments.table1_results import CellResult, collect, deviations_from_paper, markdown
from raypp.utils.errors import ConfigError, RayppError, StorageError
from raypp.utils.progress import MultiProgressDisplay
from raypp.utils.storage import Storage

FLAGS = tuple(word for key, value in TINY.items() if key != "train.alpha" for word in (f"--{key}", value))


def grid(tmp_path: Path, chosen: Sequence[str], datasets: Sequence[str] = ("quickstart",), seeds: Any = (0,)) -> Any:
    return grid_cells(datasets, chosen, seeds, FLAGS, Storage(tmp_path / "table"))


def run(tmp_path: Path, chosen: Sequence[str], **options: Any) -> list[CellResult]:
    options = {"seeds": (0,), "run": run_cells_locally, "name": "table", "quiet": True, **options}
    seeds = options.pop("seeds")
    return table1(["quickstart"], chosen, seeds, override(FLAGS, ["--train.epochs", "1"]), storage=tmp_path, **options)


def test_the_papers_rows_hold_the_papers_numbers() -> None:
    """Table I of the paper, typed a second time."""
    paper = {name: (m.paper.get("cifar10"), m.paper.get("cifar100")) for name, m in table_rows().items() if m.paper}
    assert paper == {
        "alpha-0.005": (91.72, 70.78),
        "alpha-0.01": (91.41, 70.08),
        "alpha-0.05": (89.63, 42.91),
        "alpha-0.1": (39.92, 1.00),
        "frozen-0.005": (91.72, 70.78),
        "frozen-0.01": (91.41, 70.08),
        "frozen-0.05": (89.63, 42.91),
        "frozen-0.1": (39.92, 1.00),
        "plain": (91.23, 67.9),
        "tanaka": (85.18, 60.08),
        "pixel": (90.99, 60.50),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "cifar10-small", "quickstart"])
def test_every_row_is_a_configuration_of_every_preset(tmp_path: Path, dataset: str) -> None:
    cells = grid_cells([dataset], list(table_rows()), [0, 1], (), Storage(tmp_path))
    assert len(cells) == 2 * len(table_rows())
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.config.seed == cell.seed
        assert validate(cell.config.model_dump(mode="json")) == cell.config
        mode, _, alpha = cell.method.name.partition("-")
        if mode in {"alpha", "frozen"}:
            assert cell.config.train.alpha == float(alpha)
            assert cell.config.train.mode == ("frozen" if mode == "frozen" else "joint")
            assert cell.config.protection == load_config(dataset).protection


@pytest.mark.slow
def test_the_matched_baseline_has_as_many_parameters(tmp_path: Path) -> None:
    ours, matched = grid_cells(["cifar10"], ["alpha-0.005", "plain-matched"], [0], (), Storage(tmp_path))
    expected = num_parameters(ours.config)
    assert expected == 34_527_171 + 269_722
    assert num_parameters(matched.config) == pytest.approx(expected, rel=0.01)
    assert matched.config.train.mode == "plain"


def test_gan_takes_the_width_of_the_proposed(tmp_path: Path) -> None:
    (cell,) = grid_cells(["cifar10-small"], ["gan"], [0], (), Storage(tmp_path))
    assert cell.config.protection.model_dump()["width"] == 16


def test_the_plain_row_has_the_recipe_of_its_preset(tmp_path: Path) -> None:
    plain, ours = grid_cells(["cifar10-small"], ["plain", "alpha-0.005"], [0], (), Storage(tmp_path))
    assert (ours.config.train.optimizer.name, ours.config.train.optimizer.lr) == ("muon", 0.02)
    assert ours.config.train.batch_size == 128
    assert plain.config.train == ours.config.train.model_copy(update={"mode": "plain"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen": ["plan"]}, r"unknown method 'plan' \(did you mean 'plain'\?\); allowed: alpha-0, "),
        ({"chosen": []}, "no method is given"),
        ({"chosen": ["plain", "plain"]}, "method plain is given twice"),
        ({"seeds": [1, 1]}, "seed 1 is given twice"),
        ({"seeds": []}, "no seed is given"),
        ({"datasets": ["cifar"]}, "unknown preset 'cifar'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        grid(tmp_path, **({"chosen": ["plain"]} | change))


def test_an_empty_choice_is_not_everything(tmp_path: Path) -> None:
    for option in ("--methods", "--seeds", "--presets"):
        presets = [] if option == "--presets" else ["--presets", "quickstart"]
        with pytest.raises(RayppError, match=f"no {option[2:-1]} is given"):
            app(["table1", option, *presets, "--storage", str(tmp_path), "--local"], exit_on_error=False)


def test_settings_that_no_cell_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers is 2, allowed for table1 is 1"):
        grid_cells(["quickstart"], ["plain"], [0], ("--cluster.num_workers", "2"), Storage(tmp_path))
    with pytest.raises(ConfigError, match="needs a classifier with a width; vgg16_bn has none"):
        grid_cells(["quickstart"], ["plain-matched"], [0], ("--classifier", "vgg16_bn"), Storage(tmp_path))
    with pytest.raises(ConfigError, match=r"seed is -1; allowed is at least 0"):
        grid_cells(["quickstart"], ["plain"], [-1], (), Storage(tmp_path))


@pytest.mark.slow
def test_every_method_trains_and_stands_in_the_table(tmp_path: Path) -> None:
    chosen = ["alpha-0", "alpha-0.01", "plain", "tanaka", "pixel", "pixel-per-image", "ele", "etc", "gan"]
    results = run(tmp_path, chosen)
    assert [r.method.name for r in results] == chosen
    folder = tmp_path / "table"
    rows = list(csv.DictReader(io.StringIO((folder / "table1.csv").read_text())))
    assert [row["method"] for row in rows] == chosen
    for row, result in zip(rows, results, strict=True):
        summary = json.loads((folder / "cells" / f"quickstart-{result.method.name}-seed0" / "summary.json").read_text())
        assert float(row["accuracy_mean"]) == summary["test"]["accuracy"] == result.mean
        assert int(row["num_test"]) == 30
    text = (folder / "table1.md").read_text()
    assert all(table_rows()[name].label in text for name in chosen)
    assert "row gan is an approximation" in text
    with Image.open(folder / "table1.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10
    # A keyed run's key lies in private folders only, for its owner's eyes, and nowhere else in the table.
    for name in ("tanaka", "ele", "etc", "pixel"):
        cell = folder / "cells" / f"quickstart-{name}-seed0"
        files = sorted(p.relative_to(cell).as_posix() for p in cell.rglob("protection.key"))
        assert files == ["bundle/private/protection.key", "private/protection.key"]
        secret = (cell / "private" / "protection.key").read_text().strip()
        for path in cell.rglob("*"):
            if path.name == "protection.key":
                assert path.stat().st_mode & 0o777 == 0o600
                assert path.read_text().strip() == secret
            elif path.is_file():
                data = path.read_bytes()
                assert secret.encode() not in data, path
                assert bytes.fromhex(secret) not in data, path


@pytest.mark.slow
def test_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    trained: list[str] = []

    def one_then_die(
        cells: Sequence[GridCell], display: MultiProgressDisplay, on_done: Callable[[GridCell, dict[str, Any]], None]
    ) -> None:
        run_cells_locally(cells[:1], display, on_done)
        trained.append(cells[0].name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["plain", "tanaka"], run=one_then_die)
    text = (tmp_path / "table" / "table1.md").read_text()
    assert "not run" in text
    assert "85.18" not in text  # the paper's value is for CIFAR
    with pytest.raises(StorageError, match="table 'table' exists already"):
        run(tmp_path, ["plain", "tanaka"])

    def note(
        cells: Sequence[GridCell], display: MultiProgressDisplay, on_done: Callable[[GridCell, dict[str, Any]], None]
    ) -> None:
        trained.extend(cell.name for cell in cells)
        run_cells_locally(cells, display, on_done)

    results = run(tmp_path, ["plain", "tanaka"], resume=True, run=note, seeds=(0, 1))
    assert trained == [
        "quickstart-plain-seed0",
        "quickstart-plain-seed1",
        "quickstart-tanaka-seed0",
        "quickstart-tanaka-seed1",
    ]
    assert [len(r.accuracies) for r in results] == [2, 2]
    assert all(r.spread is not None for r in results)
    trained.clear()
    fewer = run(tmp_path, ["plain"], resume=True, run=note)  # what it does not name stays in the table
    assert trained == []
    assert [(r.method.name, len(r.accuracies)) for r in fewer] == [("plain", 2), ("tanaka", 2)]
    assert "Tanaka" in (tmp_path / "table" / "table1.md").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "run.json").write_text("{}")
    with pytest.raises(StorageError, match=r"holds 'run.json', which a table has not written; take another --name"):
        run(tmp_path, ["plain"], name="notes")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["run.json"]
    with pytest.raises(StorageError, match="no table 'other' to resume"):
        run(tmp_path, ["plain"], name="other", resume=True)
    with pytest.raises(StorageError, match=r"run name '\.\./x' is not allowed"):
        run(tmp_path, ["plain"], name="../x")


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """One cell's worker dies for good, as far as the table can see; the other trains."""

    def with_failure(cells: Sequence[GridCell], display: MultiProgressDisplay, on_done: Any) -> None:
        on_done(cells[0], {"error": "its worker died too often"})
        run_cells_locally(cells[1:], display, on_done)

    results = run(tmp_path, ["plain", "tanaka"], run=with_failure)
    assert results[0].failed == ("quickstart-plain-seed0: its worker died too often",)
    assert not results[0].accuracies
    assert results[1].accuracies
    text = (tmp_path / "table" / "table1.md").read_text()
    assert "## Runs that failed\n\n- quickstart-plain-seed0: its worker died too often" in text


@pytest.mark.slow
def test_a_cell_that_diverges_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    results = table1(
        ["quickstart"], ["plain"], [0], override(FLAGS, ["--train.optimizer.lr", "1e12"]),
        storage=tmp_path, name="table", quiet=True, run=run_cells_locally,
    )  # fmt: skip
    (sentence,) = results[0].failed
    assert "the loss is not a finite number at step" in sentence


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_rows_that_need_no_feature_network_do_without_it(tmp_path: Path) -> None:
    seen: list[str] = []

    def note(grid: Sequence[GridCell], display: MultiProgressDisplay, on_done: Any) -> None:
        seen.extend(cell.name for cell in grid)

    def table(methods: list[str], *flags: str) -> None:
        table1(["cifar10"], methods, [0], flags, storage=tmp_path, name="-".join(methods), quiet=True, run=note)

    table(["plain", "tanaka", "alpha-0"])
    assert len(seen) == 3
    with pytest.raises(ConfigError, match=r"features.fallback allow"):
        table(["plain", "alpha-0.1"])
    assert not (tmp_path / "plain-alpha-0.1").exists()
    table(["plain", "alpha-0.1"], "--features.fallback", "allow")
    assert len(seen) == 5


@pytest.mark.slow
def test_the_cifar100_preset_trains_on_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "data", monkeypatch, datasets.CIFAR100, num=60)
    flags = {
        "data.source.root": str(tmp_path / "data"), "data.source.download": "false", "data.num_val": "12",
        "protection.width": "2", "protection.depth": "2", "features": "plain_classifier",
        "train.epochs": "1", "train.plain_epochs": "1", "train.batch_size": "16", "train.precision": "fp32",
    }  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    results = table1(
        ["cifar100"], ["alpha-0.005", "ele"], [0], words, storage=tmp_path, name="t", quiet=True, run=run_cells_locally
    )
    assert [len(r.accuracies) for r in results] == [1, 1], results
    assert results[0].paper == 70.78
    assert "70.78%" in (tmp_path / "t" / "table1.md").read_text()
    assert (tmp_path / "t" / "cells" / "cifar100-ele-seed0" / "bundle" / "public").is_dir()


@pytest.mark.slow
def test_departures_name_what_differs_from_the_paper(tmp_path: Path) -> None:
    grid = grid_cells(["cifar10-small"], ["plain", "alpha-0.005"], [0], ("--train.epochs", "3"), Storage(tmp_path))
    summaries = {grid[1].name: {"warnings": ["the feature network is another"]}}
    sentences = deviations_from_paper(grid, summaries)
    assert "cifar10-small: train.epochs is 3; the paper's experiment has 200" in sentences
    assert "cifar10-small: protection.width is 16; the paper's experiment has 64" in sentences
    assert "cifar10-small: the feature network is another" in sentences
    assert any("rows frozen-* minimize Eq. 3 over the protection's weights only" in sentence for sentence in sentences)
    assert not [sentence for sentence in sentences if "train.alpha" in sentence]
    whole = deviations_from_paper(grid_cells(["cifar100"], ["plain"], [0], (), Storage(tmp_path)), {})
    assert not [sentence for sentence in whole if sentence.startswith("cifar100:")]


def test_the_table_says_what_its_numbers_are(tmp_path: Path) -> None:
    grid = grid_cells(["cifar10-small"], ["plain", "tanaka"], [0, 1], (), Storage(tmp_path))
    test = {"accuracy": 0.8, "accuracy_interval": [0.79, 0.81], "num_images": 10_000, "ssim": None}
    summary = {"test": test, "seconds": 90.0, "classes": list("0123456789")}
    summary |= {"image_size": [32, 32], "warnings": []}
    other = deep_merge(summary, {"test": {"accuracy": 0.9}})
    results = collect(grid, {grid[0].name: summary, grid[1].name: other, grid[2].name: summary})
    assert results[0].mean == pytest.approx(0.85)
    assert results[0].spread == pytest.approx(0.05 * 2**0.5)
    text = markdown(results, ["a note"])
    assert "| plain images | 91.23% | 85.00% ± 7.07 | 2 | - | 269,722 | 3.0 |" in text
    assert "| Tanaka (LE) | 85.18% | 80.00% (79.0 to 81.0) | 1 |" in text
    assert text.endswith("- a note\n")
    assert "at chance" not in text
    guessing = deep_merge(summary, {"test": {"accuracy": 0.1, "accuracy_interval": [0.094, 0.106], "chance": 0.1}})
    results = collect(grid, {grid[0].name: summary, grid[2].name: guessing})
    (error,) = results[1].to_dict()["at_chance"]
    assert error.startswith("cifar10-small-tanaka-seed0: accuracy on protected images is at chance: 10.0%")
    text = markdown(results, [])
    assert "| Tanaka (LE) | 85.18% | 10.00% (9.4 to 10.6), at chance | 1 |" in text
    assert f"<strong>Error: {error}.</strong>" in text


def test_a_stranger_settings_file_is_refused_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(RayppError, match=r"unknown key 'train\.epoch'"):
        grid_cells(["quickstart"], ["plain"], [0], ("--train.epoch", "3"), Storage(tmp_path))
