"""Every command and every snippet of the documentation is run, in one folder, in the order of the pages below.

Blocks that begin with ```bash or ```python run. The info string ``skip-test`` leaves a block out; a comment above it
says why. Settings from ``SHORT`` shrink what would take minutes.

A ```text block is the output of the block before it. Numbers differ in a shrunken run. So the words of each line up to
a number, bound, verdict, ``<placeholder>`` or ``...`` must stand in one printed line; leading ones do not count.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Cluster
from pages import ROOT, all_blocks, command_lines
from PIL import Image

import raypp.api
from raypp.bundle.manifest import verify
from raypp.cli.main import main
from raypp.metrics.statistics import chance_error

FIRST_PAGES = ("docs/tutorials/first-run.md", "docs/tutorials/attack-your-own.md", "docs/tutorials/serve-and-call.md")
PAGES = tuple(dict.fromkeys((*FIRST_PAGES, *sorted(
    str(path.relative_to(ROOT)) for folder in ("how-to", "reference", "explanation", "results")
    for path in (ROOT / "docs" / folder).glob("*.md")
))))  # fmt: skip
VARIABLE = re.compile(r"[^\w(]*\d|[<≥]|(broken|weak|holds|inconclusive)\b")
"""Beginning of a word of an output that another run may print otherwise: number, bound, placeholder or verdict."""
ON_RAY = re.compile(r"\btune\b|num_workers 2|stream[ =]true|--ray\b")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, text and shown output of each block of a page that tests run."""
    matches = all_blocks(page)
    for (language, info, text), (next_language, _, shown) in zip(matches, [*matches[1:], ("", "", "")], strict=False):
        if language != "text" and info != "skip-test":
            assert not info, f"{page}: unknown info string {info!r}"
            yield language, text, shown if next_language == "text" else ""


def fixed_words(line: str) -> str:
    """The words of a line of output that every run prints."""
    words = line.partition("...")[0].split()
    return " ".join(takewhile(lambda word: not VARIABLE.match(word), dropwhile(VARIABLE.match, words)))


def check_output(shown: str, printed: str, where: str) -> None:
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown.splitlines():
        assert any(fixed_words(line) in other for other in lines), f"{where} shows {line!r}; printed was:\n{printed}"


SMALL = {"--data.image_size": "[16, 16]"}
FEW = {"--data.source.num_train": "200", "--data.num_val": "50", "--data.source.num_test": "100"}
SHORT_TRAINING = SMALL | FEW | {"--train.epochs": "1", "--train.plain_epochs": "1"}
IN_FULL = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
FIRST_IN_SHORT = SMALL | {
    "--data.source.num_train": "800",
    "--data.num_val": "100",
    "--data.source.num_test": "200",
    "--protection.width": "4",
    "--protection.depth": "2",
    # Learns more from few images: 61%, 92% and 93% with three seeds. With 0.02 and batches of 32, 21% and less.
    "--train.optimizer": "{name: muon, lr: 0.04}",
    "--train.batch_size": "16",
}
FIRST = {} if IN_FULL else FIRST_IN_SHORT
FIRST_ACCURACY = 0.8 if IN_FULL else 0.4  # of ten classes
FROM_PARQUET = {"--train.epochs": "1", "--train.plain_epochs": "1", "--data.num_val": "50"}
SHORT: dict[str, dict[str, str]] = {
    "--dry-run": {},
    "data convert": {"--num_train": "300", "--num_test": "100"},
    "--name first-search": SHORT_TRAINING
    | {
        "--search.num_trials": "2",
        "--search.scheduler": "none",
        "--search.num_attacked": "1",
        "--search.attack": "{width: 4, train: {epochs: 1}}",
    },
    "--name first-itn": {"--itn.train.epochs": "1", "--num_queries": "50"},
    "--name first-attack": {"--inverse.train.epochs": "1", "--inverse.width": "8"},
    "train quickstart --name first": FIRST,
    "--name alpha-0": FIRST | {"--train.epochs": "1"},  # on the images of the first run
    "--name own": FROM_PARQUET,
    "--name large": FROM_PARQUET
    | {
        "--data.image_size": "[16, 16]",
        "--train.mode": "plain",
        "--protection": "plain",
        "--train.eval_batch_size": "50",
    },
    "--name few": {"--inverse.train.epochs": "1", "--curve": "false"},
    "--name mine": SMALL | {"--data.source.num_train": "600", "--data.source.num_test": "250"},
    "--resume --train.epochs 6": SHORT_TRAINING | {"--train.epochs": "2"},
    "quickstart --name": SHORT_TRAINING,
    "train quickstart": SHORT_TRAINING,
    "table1": SHORT_TRAINING,
}
"""Settings by a part of the command; the first part that a command has counts."""


def shortened(line: str) -> list[str]:
    """The words of a page's command with the settings of ``SHORT``."""
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
    if "--dry-run" in words:
        return
    name = words[words.index("--name") + 1]
    summary = _json(f"runs/{name}/summary.json")
    verify(Path(f"runs/{name}/bundle"))
    if name == "first":
        assert summary["epochs"] == {"plain": 4, "joint": 4}
        assert summary["test"]["accuracy"] >= FIRST_ACCURACY
        assert summary["test"]["ssim"]["mean"] < 0.3
        assert "Error" not in Path("runs/first/bundle/MODEL_CARD.md").read_text()
    else:
        assert chance_error(summary["test"]) is None or "Error" in Path(f"runs/{name}/bundle/MODEL_CARD.md").read_text()


def check_attack(words: list[str]) -> None:
    if "--dry-run" in words:
        return
    name = words[words.index("--name") + 1]
    card = _json(f"runs/{name}/scorecard.json")
    assert (Path("runs") / name / "report.html").stat().st_size > 10_000
    if name == "first-attack":  # public and deterministic: whoever suspects an image can check it
        assert (card["verdict"], card["strongest_attack"]) == ("broken", "known_gallery")
        assert card["attacks"]["known_gallery"]["reidentification_rate"] == 1
        assert card["attacks"]["inverse"]["reidentification_rate"] > (0.2 if IN_FULL else 0.05)
        assert card["num_queries"] == (500 if IN_FULL else 200)
        assert "Verdict: **broken**" in Path("runs/first/bundle/MODEL_CARD.md").read_text()
    elif name == "first-itn":
        assert card["attacks"]["itn"]["status"] == "done"
    elif name == "few":
        attacks = {"inverse"} | ({"minimum_difference"} if "--resume" in words else set())
        assert {n for n, a in card["attacks"].items() if a["status"] == "done"} == attacks
    else:  # the negative of an image says everything
        assert name == "mine"
        assert card["verdict"] == "broken"
        assert card["attacks"]["chosen_plaintext"]["reidentification_rate"] > 0.9


def check_tune(words: list[str]) -> None:
    search = _json("runs/first-search/search.json")
    assert search["trials"] == {"done": 2}
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
    public = Path(words[2]) if words[2].endswith("public") else Path(words[2]) / "bundle" / "public"
    for path in images:
        with Image.open(path) as image:
            assert list(image.size) == _json(f"{public}/protection.json")["image_size"]


def check_data(words: list[str]) -> None:
    if words[2] == "convert":
        counts = {split: sum(pq.read_metadata(p).num_rows for p in Path(words[4]).rglob(f"{split}*.parquet"))
                  for split in ("train", "test")}  # fmt: skip
        assert counts == {"train": 300, "test": 100}


def check_evaluate(words: list[str]) -> None:
    if "--output" in words:
        numbers, trained = _json("numbers.json"), _json("runs/first/summary.json")["test"]
        assert numbers["accuracy"] == trained["accuracy"] >= FIRST_ACCURACY


def check_figure(words: list[str]) -> None:
    for kind in ("svg", "png"):
        assert (Path("figures") / f"figure{words[2]}.{kind}").stat().st_size > 10_000


def check_publish(words: list[str]) -> None:
    assert _json(f"{words[3]}/live.json")


def check_token(words: list[str]) -> None:
    text = Path(words[words.index("--token-file") + 1]).read_text()
    assert ("alice" in text) == ("--revoke" not in words)


def check_serve(words: list[str]) -> None:
    assert words[words.index("--output") + 1] in {path.name for path in Path().iterdir()}


def check_quickstart(words: list[str]) -> None:
    assert _json(f"runs/{words[words.index('--name') + 1]}/attack/scorecard.json")["verdict"] in (
        "broken",
        "inconclusive",
    )


def check_printed(words: list[str]) -> None:
    """Tests of the command line compare what it prints."""


CHECKS = {
    "train": check_train, "attack": check_attack, "tune": check_tune, "table1": check_table1, "protect": check_protect,
    "data": check_data, "evaluate": check_evaluate, "publish": check_publish, "token": check_token,
    "serve": check_serve, "quickstart": check_quickstart, "config": check_printed, "list": check_printed,
    "doctor": check_printed, "--version": check_printed, "figure": check_figure,
}  # fmt: skip


@pytest.mark.ray
def test_the_commands_of_the_pages(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command ends with what its page says, not only with exit code 0; every snippet runs after them."""
    for folder in ("images", "examples"):
        shutil.copytree(ROOT / "docs" / folder, tmp_path / "docs" / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    _shrink_python(monkeypatch)
    for page in PAGES:
        names: dict[str, Any] = {"__name__": "__main__"}
        for language, text, shown in blocks(page):
            printed = ""
            capsys.readouterr()
            if language == "python":
                exec(compile(text, f"{page}", "exec"), names)
            else:
                printed = "".join(_run(line, page, cluster, tmp_path) for line in command_lines(text))
            check_output(shown, printed + "".join(capsys.readouterr()), f"{page}: {text.strip()}")


def _run(line: str, page: str, cluster: Cluster, folder: Path) -> str:
    """Run a command and check its outcome; returns what it printed in another process."""
    words = shortened(line)
    printed = ""
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, timeout=300)
        return printed
    assert words[0] == "raypp", line
    if ON_RAY.search(line):
        result = cluster.run(words, folder)
        printed = result.stdout + result.stderr
        assert result.returncode == 0, f"{page}: {line}\n{result.stdout}\n{result.stderr}"
    else:
        try:
            main(words[1:])  # another process would spend most of its time on importing torch
        except SystemExit as stop:
            pytest.fail(f"{page}: {line} ended with exit code {stop.code}")
    CHECKS[words[1]](words)
    return printed


def _shrink_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``raypp.train`` and ``raypp.table1`` of a snippet train for a moment, and ``raypp.attack`` attack little."""
    settings = {key.removeprefix("--"): value for key, value in SHORT_TRAINING.items()}
    train, table, attack = raypp.api.train, raypp.api.table1, raypp.api.attack
    monkeypatch.setattr("raypp.api.train", lambda *a, **k: train(*a, **(k | {"settings": settings, "epochs": 1})))
    # The command line passes its settings, which are small already, by position.
    monkeypatch.setattr(
        "raypp.api.table1", lambda *a, **k: table(*a, **({"settings": settings} if not a[3:] else {}), **k)
    )
    small: dict[str, Any] = {
        "inverse": {"width": 4, "train": {"epochs": 1}},
        "inverse_own_keys": {"width": 4, "train": {"epochs": 1}},
        "learned_matcher": {"width": 4, "train": {"epochs": 1}},
        "white_box": {"steps": 5, "restarts": 0},
    }

    def attack_little(*arguments: Any, **keywords: Any) -> Any:
        attacks = keywords.get("attacks", ["inverse"])
        options = {name: value for name, value in small.items() if name in attacks}
        return attack(*arguments, **(keywords | options | {"num_queries": 50, "curve": False}))

    monkeypatch.setattr("raypp.api.attack", attack_little)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs; tests of the API run cells twice."""
    monkeypatch.chdir(tmp_path)
    _shrink_python(monkeypatch)
    notebook = json.loads((ROOT / "docs/tutorials/quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell.replace("(1, 32, 32, 3)", "(1, 16, 16, 3)"), "quickstart.ipynb", "exec"), names)
    assert names["mine"].verdict in ("broken", "inconclusive")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1,000 test images  accuracy     95% interval", "test images accuracy"),
        ("inverse                 T4            ≥ 99.5%   0.672", "inverse T4"),
        ("protected 1 image at 32 x 32: keyed.png", "protected"),
        ("<version> is active", "is active"),
        ("best knee      .../best/knee      ...", "best knee"),
        ("broken, strongest attack inverse", "strongest attack inverse"),
        ("(2, 32, 32, 3) uint8", "(2,"),
        ("...", ""),
    ],
)
def test_the_words_of_an_output_that_every_run_prints(line: str, words: str) -> None:
    assert fixed_words(line) == words


def test_an_output_that_is_not_printed_fails() -> None:
    check_output("wrote   set in 3 s\n...\n", "a line\nwrote set in 4 s\n", "page")
    with pytest.raises(AssertionError, match="page shows 'wrote set'"):
        check_output("wrote set\n", "wrote other\n", "page")


def test_the_readme_begins_with_the_quickstart() -> None:
    """Which tests of Serve run in a fresh clone, with a smaller preset; the tutorial trains its preset."""
    line = next(line for _, text, _ in blocks("README.md") for line in command_lines(text))
    assert shlex.split(line, comments=True) == ["pip", "install", "uv", "&&", "uv", "run", "raypp", "quickstart"]


def test_the_readmes_other_commands_are_those_of_the_tutorials() -> None:
    """Which tests run: in this file, and those of a running service in the tests of Serve."""
    tutorials = {line for page in FIRST_PAGES for language, _, text in all_blocks(page) if language == "bash"
                 for line in command_lines(text)}  # fmt: skip
    (text,) = (text for language, info, text in all_blocks("README.md") if (language, info) == ("bash", "skip-test"))
    assert len(command_lines(text)) == 3
    for line in command_lines(text):
        assert any(other.startswith(line) for other in tutorials), line


def test_lines_links_and_skipped_blocks() -> None:
    """Lines have at most 120 characters, tables excepted; links lead somewhere; a skipped block has its reason."""
    problems = []
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if "decisions" in path.parts:
            continue
        text, name = path.read_text(), path.relative_to(ROOT)
        is_generated = text.startswith("<!-- Generated")
        long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
        problems += [f"{name}: {len(line)} characters: {line[:60]}" for line in long if not is_generated]
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "mailto:")):
                file, _, anchor = target.partition("#")
                linked = (path.parent / file).resolve() if file else path
                if not linked.exists():
                    problems.append(f"{name}: no {target}")
                elif anchor and linked.suffix == ".md" and anchor not in _anchors(linked.read_text()):
                    problems.append(f"{name}: no heading {target}")
        problems += [f"{name}: no reason above a skipped block" for _ in re.findall(
            r"(?<!-->)\n+```(?:bash|python) skip-test", text)]  # fmt: skip
    assert not problems, "\n".join(problems)


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["docs/generate_reference.py", "benchmarks/results.py"])
def test_generated_pages_are_current(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr()
    assert "stale" not in printed.out + printed.err, f"python {script}: {printed.err}"


def test_the_cluster_guide_submits_what_the_jobs_say() -> None:
    page = (ROOT / "docs/how-to/run-on-a-cluster.md").read_text()
    for job in (ROOT / "jobs").glob("*.py"):
        if job.name != "__init__.py":
            assert f"jobs/{job.name}" in page
            assert f"python jobs/{job.name}" in job.read_text()
