"""Dry runs: the time of each part, measured on a few steps, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401 (an optimizer's first step imports it, for seconds that are no test's own)
from conftest import Trained, tiny_flags

from raypp.cli.main import main

DryRun = Callable[..., dict[str, Any]]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """Runs a command with ``--dry-run --json``; its estimates are positive and it writes nothing."""

    def run(*words: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        main([*words, "--dry-run", "--json"])
        plan: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert not list(tmp_path.iterdir())
        seconds = [estimate["seconds"] for estimate in plan["estimates"]]
        assert all(value is None or value >= 0 for value in seconds)
        assert plan["seconds"] == pytest.approx(sum(value or 0 for value in seconds))
        assert plan["seconds"] > 0
        return plan

    return run


def test_train(dry_run: DryRun, tmp_path: Path) -> None:
    """One estimate for the plain phase, one for the joint phase."""
    plan = dry_run("train", "quickstart", *tiny_flags(tmp_path / "runs", train__epochs=20))
    assert [estimate["name"] for estimate in plan["estimates"]] == ["plain", "joint"]
    assert plan["estimates"][1]["detail"] == "20 epochs of 40 images"
    assert "epochs: 20" in plan["config"]


def test_table1(dry_run: DryRun, tmp_path: Path) -> None:
    pairs = zip(*[iter(tiny_flags(tmp_path))] * 2, strict=True)
    flags = [word for pair in pairs for word in pair if pair[0] not in ("--train.alpha", "--cluster.storage")]
    methods = ["plain", "tanaka"]
    plan = dry_run("table1", "--presets", "quickstart", "--methods", *methods, "--seeds", "0", "1", *flags)
    assert [estimate["name"] for estimate in plan["estimates"]] == ["quickstart plain", "quickstart tanaka"]
    assert all(estimate["detail"].endswith("2 seeds") for estimate in plan["estimates"])


def test_tune(dry_run: DryRun, tmp_path: Path) -> None:
    flags = tiny_flags(tmp_path, protection__depth=3)[:-2]
    (estimate,) = dry_run("tune", "quickstart", *flags, "--search.num_trials", "3")["estimates"]
    assert estimate["detail"].startswith("3 trials of ")


@pytest.mark.slow
def test_attack(dry_run: DryRun, trained: Trained) -> None:
    """Attacks without training have no estimate; one that does not apply says why."""
    names = ["inverse", "known_gallery", "known_plaintext"]
    flags = ["--num_queries", "20", "--num_images", "60", "--curve", "true", "--inverse.train.epochs", "4"]
    plan = dry_run("attack", str(trained.bundle), "--local", "--attacks", *names, *flags)
    estimates = {estimate["name"]: estimate for estimate in plan["estimates"]}
    assert estimates["inverse"]["seconds"] > 0
    assert "4 epochs of" in estimates["inverse"]["detail"]
    assert "more trainings for its curve" in estimates["inverse"]["detail"]
    assert estimates["known_gallery"] == {"name": "known_gallery", "detail": "trains no network", "seconds": None}


def test_the_table_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "quickstart", *tiny_flags(tmp_path / "runs"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "estimated time" in printed
    assert "on one process of this machine at its present load; nothing started" in printed
    assert not list(tmp_path.iterdir())
