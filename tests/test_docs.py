"""Every command in the documentation is run, in a folder of its own, in the order in which a reader meets it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Cluster
from PIL import Image

from raypp.bundle.manifest import verify
from raypp.cli.main import main
from raypp.metrics.statistics import chance_error

ROOT = Path(__file__).parents[1]
GUIDES = (
    "docs/train.md",
    "docs/data.md",
    "docs/bundle.md",
    "docs/protections.md",
    "docs/attack.md",
    "docs/tune.md",
    "docs/serve.md",
)
NOT_RUN = "# not run by the tests"
WITHOUT_RAY = {"config", "data", "evaluate", "protect", "report", "publish", "serve", "token"}


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, without comments; blocks that say so are left out."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    lines = [line for block in blocks if not block.startswith(NOT_RUN) for line in block.splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


def test_guides_are_readable_by_this_test() -> None:
    assert all(commands(page) for page in GUIDES)


# Settings that shorten a guide's command here. The run `first` is shorter than a reader's, except in CI.
SMALL = {"--data.image_size": "[16, 16]"}
FEW = {"--data.source.num_train": "200", "--data.num_val": "50", "--data.source.num_test": "100"}
SHORT_TRAINING = SMALL | FEW | {"--train.epochs": "1", "--train.plain_epochs": "1"}
IN_FULL = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
FIRST_IN_SHORT = SMALL | {
    "--data.source.num_train": "1600",
    "--data.num_val": "100",
    "--data.source.num_test": "300",
    "--protection.width": "4",
    "--protection.depth": "2",
    "--train.optimizer": "{name: muon, lr: 0.02}",  # learns as much from half the images
}
FIRST = {} if IN_FULL else FIRST_IN_SHORT
SHORT = {
    "data convert": {"--num_train": "300", "--num_test": "100"},
    "--name first-search": SHORT_TRAINING
    | {
        "--search.scheduler": "none",
        "--search.num_attacked": "1",
        "--search.attack": "{width: 4, train: {epochs: 1}}",
    },
    "--name first-attack": {"--inverse.train.epochs": "1", "--inverse.width": "8"},
    "--name first --resume": FIRST | {"--train.epochs": "6" if IN_FULL else "5"},
    "--name first": FIRST,
    "--name own": {"--train.epochs": "1", "--train.plain_epochs": "1", "--data.num_val": "50"},
    "--name streamed": {"--train.epochs": "1", "--train.plain_epochs": "1", "--data.num_val": "50"},
    "--name few": {"--inverse.train.epochs": "1"},
    "--name mine": {"--data.source.num_train": "600", "--data.source.num_test": "250"},
    "train quickstart": SHORT_TRAINING,
    "table1": SHORT_TRAINING,
}


def shortened(line: str) -> list[str]:
    """The words of a guide's command with the settings of ``SHORT``."""
    words = shlex.split(line, comments=True)
    for name, value in next((settings for key, settings in SHORT.items() if key in line), {}).items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def _json(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def check_train(words: list[str]) -> None:
    name = words[words.index("--name") + 1]
    summary = _json(f"runs/{name}/summary.json")
    verify(Path(f"runs/{name}/bundle"))
    if name == "first":
        epochs = int(words[words.index("--train.epochs") + 1]) if "--train.epochs" in words else 4
        assert summary["epochs"] == {"plain": 4, "joint": epochs}
        assert summary["test"]["accuracy"] >= 0.85
        assert summary["test"]["ssim"]["mean"] < 0.3
        assert "Error" not in Path("runs/first/bundle/MODEL_CARD.md").read_text()
    else:
        assert chance_error(summary["test"]) is None or "Error" in Path(f"runs/{name}/bundle/MODEL_CARD.md").read_text()


def check_attack(words: list[str]) -> None:
    name = words[words.index("--name") + 1]
    card = _json(f"runs/{name}/scorecard.json")
    assert (Path("runs") / name / "report.html").stat().st_size > 10_000
    if name == "first-attack":  # public and deterministic: whoever suspects an image can check it
        assert (card["verdict"], card["strongest_attack"]) == ("broken", "known_gallery")
        assert card["attacks"]["known_gallery"]["reidentification_rate"] == 1
        assert card["attacks"]["inverse"]["reidentification_rate"] > 0.2
        assert card["num_queries"] == (500 if IN_FULL else 300)
        assert "Verdict: **broken**" in Path("runs/first/bundle/MODEL_CARD.md").read_text()
    elif name == "few":
        attacks = {"inverse", "feature_reconstruction"} | ({"minimum_difference"} if "--resume" in words else set())
        assert {n for n, a in card["attacks"].items() if a["status"] == "done"} == attacks
    else:  # the negative of an image says everything
        assert name == "mine"
        assert card["verdict"] == "broken"
        assert card["attacks"]["chosen_plaintext"]["reidentification_rate"] > 0.9


def check_tune(words: list[str]) -> None:
    search = _json("runs/first-search/search.json")
    assert search["trials"] == {"done": 4}
    assert search["front"]
    verify(Path("runs/first-search/best/knee"))


def check_table1(words: list[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(Path("runs/small/table1.csv").read_text())))
    assert len(rows) == 3
    assert len(list(Path("runs/small").rglob("summary.json"))) == (6 if "--resume" in words else 3)


def check_protect(words: list[str]) -> None:
    target = Path(words[4])
    images = sorted(target.glob("*.png")) if target.is_dir() else [target]
    assert len(images) == (len(list((ROOT / "docs" / "images").glob("*.png"))) if target.is_dir() else 1)
    for path in images:
        with Image.open(path) as image:
            assert list(image.size) == _json(f"{words[2]}/protection.json")["image_size"]


def check_data(words: list[str]) -> None:
    if words[2] == "convert":
        counts = {split: sum(pq.read_metadata(p).num_rows for p in Path("shapes-parquet").rglob(f"{split}*.parquet"))
                  for split in ("train", "test")}  # fmt: skip
        assert counts == {"train": 300, "test": 100}


def check_evaluate(words: list[str]) -> None:
    if "--output" in words:
        numbers, trained = _json("numbers.json"), _json("runs/first/summary.json")["test"]
        assert numbers["accuracy"] == trained["accuracy"] >= 0.85


def check_report(words: list[str]) -> None:
    assert [v["verdict"] for v in _json("report/report.json")["victims"]] == ["broken", "broken"]


def check_publish(words: list[str]) -> None:
    assert _json(f"{words[3]}/live.json")


def check_token(words: list[str]) -> None:
    assert "alice" in Path(words[words.index("--file") + 1]).read_text()


def check_serve(words: list[str]) -> None:
    assert words[words.index("--write") + 1] in {path.name for path in Path().iterdir()}


def check_config(words: list[str]) -> None:
    """Tests of the command line compare what it prints."""


CHECKS = {
    "train": check_train, "attack": check_attack, "tune": check_tune, "table1": check_table1, "protect": check_protect,
    "data": check_data, "evaluate": check_evaluate, "report": check_report, "publish": check_publish,
    "token": check_token, "serve": check_serve, "config": check_config,
}  # fmt: skip


@pytest.mark.ray
def test_the_commands_of_the_guides(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the guides ends with what its page says, not only with exit code 0."""
    for folder in ("images", "examples"):
        shutil.copytree(ROOT / "docs" / folder, tmp_path / "docs" / folder)
    monkeypatch.chdir(tmp_path)
    for page in GUIDES:
        for line in commands(page):
            words = shortened(line)
            assert words[0] == "raypp", line
            if words[1] in WITHOUT_RAY or "--local" in words:
                main(words[1:])  # a process of its own would spend most of its time on importing torch
            else:
                result = cluster.run(words, tmp_path)
                assert result.returncode == 0, f"{page}: {line}\n{result.stdout}\n{result.stderr}"
            CHECKS[words[1]](words)


def test_the_readme_begins_with_the_quickstart() -> None:
    """Which tests of Serve run in a fresh clone, with a smaller preset; the guides train its preset in full."""
    line = next(text for text in commands("README.md") if "quickstart" in text)
    assert shlex.split(line, comments=True) == ["pip", "install", "uv", "&&", "uv", "run", "raypp", "quickstart"]


def test_the_cluster_guide_submits_what_the_jobs_say() -> None:
    jobs = [re.search(r"jobs/\w+\.py", line) for line in commands("docs/cluster.md")]
    for line, job in zip(commands("docs/cluster.md"), jobs, strict=True):
        assert job is not None
        assert line in (ROOT / job[0]).read_text()
