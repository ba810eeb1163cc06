"""The search without Ray: spaces, fronts, constraints, tables and pictures, and the quick attack on real bundles."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Trained, override, tiny_flags
from PIL import Image

from raypp.cli.main import main
from raypp.cli.render import print_search
from raypp.config.presets import load_config
from raypp.config.schema import Config
from raypp.evaluation.reidentification import MatcherChoice
from raypp.experiments import pareto, plots, search, search_results, search_trial
from raypp.experiments.search import Range, make_search_plan
from raypp.experiments.training_run import open_run, train_locally
from raypp.loaded_bundle import Bundle
from raypp.results import SearchResult
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage


def plan(tmp_path: Path, *flags: str, name: str = "s") -> search.SearchPlan:
    base_flags = [flag for flag in tiny_flags(tmp_path) if flag not in ("--cluster.storage", str(tmp_path))]
    base_flags += ["--search.space.protection.skips", "[0, 1, 2]"]  # of a U-Net of depth 2
    return make_search_plan("quickstart", (), override(base_flags, flags), storage=str(tmp_path), name=name)


def record(trial: str, accuracy: float, leakage: float, **others: Any) -> dict[str, Any]:
    return {
        "trial": trial,
        "status": "done",
        "explanation": "",
        "accuracy": accuracy,
        "leakage": leakage,
        "leakage_baseline": 0.2,
        "reidentification_rate": 0.5,
        "settings": {"train.alpha": accuracy, "protection.skips": 1},
        **others,
    }


# What may be searched


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search.space.train.alhpa", "[1]"], "search.space.train.alhpa: unknown key"),
        (["--search.space.train.alpha", "{low: 3, high: 1}"], "low 3 and high 1 leave an empty range"),
        (["--search.space.train.alpha", "[]"], "train.alpha is []"),
        (["--search.space.train.alpha", "5"], "train.alpha is '5'"),
        (["--search.space.train.alpha", "{low: 1, hihg: 2}"], "train.alpha.high"),
        (["--search.space.train.alpha", "{low: 0, high: 1, log: true}"], "must be greater than 0"),
        (["--search.space.train.alpha", "{low: -1, high: 1}"], "train.alpha is -1"),
        (["--search.space.protection.skips", "[0, 9]"], "skips is 9"),
        (["--search.num_trials", "0"], "search.num_trials is 0"),
        (["--search.sampler", "tpee"], "search.sampler is 'tpee'"),
        (["--search.min_accuracy", "plane"], "search.min_accuracy"),
        (["--search.min_accuracy", "1.5"], "search.min_accuracy"),
        (["--search.attack", "{widht: 3}"], "search.attack.widht"),
        (["--search.scheduler", "pbt"], "set objective to 'accuracy'"),
        (["--search.scheduler", "pbt", "--search.objective", "accuracy"], "cannot change; allowed in its space"),
        (["--data.stream", "true"], "data.stream is True"),
        (["--search.nmu_trials", "3"], "unknown key 'search.nmu_trials' (did you mean 'num_trials'?)"),
    ],
)
def test_an_invalid_search_is_refused_before_it_starts(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^(?!.*\n)") as caught:
        plan(tmp_path, *flags)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "quickstart", "--storage", str(tmp_path), "--search.num_trials", "none"])
    assert stopped.value.code == 2
    assert "search.num_trials is 'none'" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--search.num_trials", "3"])
    assert "unknown option --search.num_trials" in " ".join(capsys.readouterr().err.split())


def test_a_space_is_changed_by_flags(tmp_path: Path) -> None:
    search_plan = plan(
        tmp_path, "--search.space.train.alpha", "{low: 1, high: 2}", "--search.space.protection.skips", "null"
    )
    assert search_plan.search.space["train.alpha"] == Range(low=1, high=2)
    assert "protection.skips" not in search_plan.search.space
    assert search_plan.config_at({"train.alpha": 1.5, "protection.skips": 0}).train.alpha == 1.5
    assert search.restore_search_plan(search_plan.dump()).dump() == search_plan.dump()


@pytest.mark.parametrize("preset", ["quickstart", "cifar10-small", "cifar10-code", "cifar10", "cifar100"])
def test_every_preset_has_a_space_that_may_be_searched(preset: str, tmp_path: Path) -> None:
    search_plan = make_search_plan(preset, storage=str(tmp_path), name="s")
    assert "train.optimizer.lr" in search_plan.search.space
    assert "search" not in load_config(preset).model_dump()


def test_a_preset_without_a_space_says_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_config("quickstart").to_yaml())
    with pytest.raises(ConfigError, match="has no section search"):
        make_search_plan(str(file), storage=str(tmp_path), name="s")


# Ranking of trials


def test_the_front_and_what_is_chosen_of_it(tmp_path: Path) -> None:
    records = [
        record("a", 0.9, 0.8), record("b", 0.8, 0.3), record("c", 0.5, 0.2), record("d", 0.7, 0.5),
        record("e", 0.95, 0.1, status="stopped early"),
        record("f", 0.5, 0.2),
    ]  # fmt: skip
    front = pareto.pareto(records)
    assert [r["trial"] for r in front] == ["a", "b", "c"]
    assert pareto.knee(front)["trial"] == "b"
    both = plan(tmp_path).search
    assert {k: r["trial"] for k, r in pareto.select_best(records, both, None).items()} == {
        "accuracy": "a", "privacy": "c", "knee": "b",
    }  # fmt: skip
    assert {r["trial"] for r in pareto.pareto(records, 0.75)} == {"a", "b"}
    assert pareto.select_best(records, both, 0.99) == {}
    # By hand: 0.9 from leakage 1 to 0.8, 0.8 on to 0.3, 0.5 on to 0.2 ... below each its own accuracy.
    assert pareto.hypervolume(records) == pytest.approx(0.9 * 0.2 + 0.8 * 0.5 + 0.5 * 0.1)


def test_hypervolume_is_the_share_that_the_front_dominates() -> None:
    records = [record("a", 0.9, 0.8), record("b", 0.8, 0.3), record("c", 0.5, 0.2)]
    points = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dominated = torch.zeros(len(points), dtype=torch.bool)
    for r in records:
        dominated |= (points[:, 0] <= r["accuracy"]) & (points[:, 1] >= r["leakage"])
    assert pareto.hypervolume(records) == pytest.approx(dominated.double().mean().item(), abs=0.005)


def test_missing_the_constraint_is_worse_than_any_leakage(tmp_path: Path) -> None:
    settings = plan(tmp_path, "--search.min_accuracy", "0.7", "--search.objective", "leakage").search
    feasible = pareto.objectives(0.7, 0.99, settings, 0.7)
    missed = pareto.objectives(0.69, 0.0, settings, 0.7)
    further = pareto.objectives(0.5, 0.0, settings, 0.7)
    assert feasible["objective_score"] > missed["objective_score"] > further["objective_score"]
    assert feasible["objective_leakage"] < missed["objective_leakage"] < further["objective_leakage"]


def test_constraints_are_shares_or_below_plain(tmp_path: Path) -> None:
    below = plan(tmp_path, "--search.min_accuracy", "plain - 0.01").search
    assert search_results.min_accuracy(below, 0.75) == pytest.approx(0.74)
    assert search_results.min_accuracy(plan(tmp_path, "--search.min_accuracy", "0.6").search, None) == 0.6
    assert search_results.min_accuracy(plan(tmp_path).search, None) is None


@pytest.mark.slow
def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    pairs = [(0.1, 3.0), (0.4, 1.0), (0.2, 2.0), (0.4, 5.0), (0.9, 4.0)]
    assert pareto.rank_correlation(pairs) == pytest.approx(spearmanr(pairs).statistic)
    assert pareto.rank_correlation(pairs[:2]) is None
    assert pareto.rank_correlation([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


@pytest.mark.slow
def test_table_and_pictures(tmp_path: Path) -> None:
    records = [record(str(i), 0.1 * i, 0.05 * i, psnr=12.0) for i in range(1, 8)]
    schedules = [{"name": "constant"}, {"name": "one_cycle", "warmup": 0.5}]
    for i, r in enumerate(records):
        r["settings"] = r["settings"] | {"train.schedule": schedules[i % 2]}
    records.append({"trial": "x", "status": "diverged", "explanation": "too fast", "settings": {"train.alpha": 2.0}})
    search_results.write_table(Storage(tmp_path), records, None)
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == [r["trial"] for r in records]
    assert table[1]["train.schedule"] == "one_cycle (warmup 0.5)"
    assert table[-1]["explanation"] == "too fast"
    assert (tmp_path / "trials.csv").read_text().count("\n") == len(records) + 1
    flags = ["--search.space.train.schedule", '[{name: constant}, {name: one_cycle, warmup: 0.5}]',
             "--search.space.train.optimizer", "null", "--search.space.train.optimizer.lr", "null",
             "--search.space.protection.skips", "[1, 2]"]  # fmt: skip
    settings = plan(tmp_path, *flags).search
    pictures = (
        plots.front_figure({"one": records, "other": records[:3]}, 0.3),
        plots.parallel_figure(records, 0.3),
        plots.importance_figure(records, settings),
    )
    for picture in pictures:
        assert picture is not None
        assert min(Image.open(io.BytesIO(picture)).size) > 200
    assert plots.importance_figure(records[:3], settings) is None
    assert plots.parallel_figure(records[-1:]) is None


@pytest.mark.slow
def test_the_best_bundles_are_exported(tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """The most accurate trial, the most private one and the knee, with figures, a summary and a table."""
    searched = plan(tmp_path, "--search.suite", "null")
    records = [record("a", 0.9, 0.8), record("b", 0.8, 0.3), record("c", 0.5, 0.2)]
    for r in records:
        shutil.copytree(trained.bundle, tmp_path / "s" / "trials" / r["trial"] / "bundle")
    attacked: list[str] = []

    def attack(bundle: str, suite: str, name: str) -> dict[str, Any]:
        attacked.append(name)
        return {}

    values = search_results.export_best(searched, records, None, attack)
    assert attacked == []  # no suite
    assert values["best"] == {"accuracy": "a", "privacy": "c", "knee": "b"}
    result = SearchResult(values, str(tmp_path / "s"))
    assert {name: bundle.classes for name, bundle in result.best.items()} == dict.fromkeys(
        values["best"], Bundle(str(trained.bundle)).classes
    )
    assert list(result.to_pandas()["trial"]) == ["a", "b", "c"]
    assert min(result.plot().size) > 200
    assert [point["trial"] for point in result.front] == ["a", "b", "c"]
    print_search(values, "runs/s")
    printed = capsys.readouterr().out
    assert "best knee      runs/s/best/knee  (trial b)" in printed
    assert "Pareto front of" in str(result)


# Trials


def train(run: Any, display: Any) -> dict[str, Any]:
    return train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))


@pytest.mark.slow
def test_a_trial_is_trained_attacked_and_kept(tmp_path: Path) -> None:
    search_plan = plan(tmp_path, "--search.attack", "{width: 4, train: {epochs: 1}}")
    display = ProgressDisplay(quiet=True)
    first = search_trial.run_trial(search_plan, "t1", {"train.alpha": 0.1}, display, train)
    assert first["status"] == "done"
    assert -1 <= first["leakage"] <= 1
    assert first["num_queries"] == 20
    again = search_trial.run_trial(
        search_plan, "t1", {"train.alpha": 0.1}, display, lambda *_: pytest.fail("trained again")
    )
    assert again == first
    diverged = search_trial.run_trial(search_plan, "t2", {"train.optimizer.lr": 1e12}, display, train)
    assert diverged["status"] == "diverged"
    assert "not a finite number" in diverged["explanation"]
    impossible = search_trial.run_trial(search_plan, "t3", {"protection.skips": 9}, display, train)
    assert impossible["status"] == "not possible"
    assert [r["trial"] for r in search.trial_records(search_plan)] == ["t1", "t2", "t3"]


@pytest.mark.slow
def test_the_quick_attack_tells_protections_apart(tmp_path: Path, trained: Trained) -> None:
    """Images that are not protected at all leak everything, and more than the class tells."""
    config = plain_run(tmp_path)
    attack = "{width: 8, train: {epochs: 20, batch_size: 10, optimizer: {lr: 0.04}}}"
    leaks = {
        name: quick_attack(bundle, config, tmp_path / f"leak-{name}", attack)
        for name, bundle in (("plain", tmp_path / "plain" / "bundle"), ("learned", trained.bundle))
    }
    assert leaks["plain"]["leakage"] > 0.6
    assert leaks["plain"]["leakage"] > leaks["learned"]["leakage"] + 0.03
    assert leaks["plain"]["reidentification_rate"] > 0.8
    assert leaks["plain"]["leakage_baseline"] == leaks["learned"]["leakage_baseline"] < 0.5


def plain_run(folder: Path) -> Config:
    """Train a classifier of plain images as the run ``plain``; returns its configuration."""
    flags = tiny_flags(folder, protection="plain", train__mode="plain", train__epochs=1)
    with open_run(load_config("quickstart", flags=flags), "plain") as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
        return run.config


def quick_attack(bundle: Path, config: Config, folder: Path, attack: str) -> dict[str, Any]:
    settings = plan(folder, "--search.attack", attack).search
    return search_trial.proxy_leakage(str(bundle), config, settings, Storage(folder), ProgressDisplay(quiet=True))


def test_the_quick_attack_matches_by_the_selected_matcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = plain_run(tmp_path)
    rates = {}
    for matcher in ("cosine", "edges"):
        choice = MatcherChoice(matcher, 20, {})
        monkeypatch.setattr(search_trial, "select_matcher", lambda *_, choice=choice: choice)
        attack = "{width: 4, train: {epochs: 1, batch_size: 10}}"
        leak = quick_attack(tmp_path / "plain" / "bundle", config, tmp_path / matcher, attack)
        assert leak["matcher"] == matcher
        rates[matcher] = leak["reidentification_rate"]
    assert rates["cosine"] != rates["edges"]  # of the same estimates


def test_a_search_is_resumed_with_the_same_settings_only(tmp_path: Path) -> None:
    first = plan(tmp_path)
    with pytest.raises(StorageError, match="no search to resume"), search.open_search(first, resume=True):
        pass
    with search.open_search(first, resume=False) as has_started:
        assert not has_started
        with pytest.raises(StorageError, match="in use"), search.open_search(first, resume=True):
            pass
    with pytest.raises(StorageError, match="exists already"), search.open_search(first, resume=False):
        pass
    with search.open_search(first, resume=True) as has_started:
        assert has_started
    for flags in (["--search.num_trials", "3"], ["--train.epochs", "9"]):
        other = plan(tmp_path, *flags)
        with pytest.raises(StorageError, match="was started with another"), search.open_search(other, resume=True):
            pass


@pytest.mark.usefixtures("offline")
def test_a_search_without_its_feature_network_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    plan = make_search_plan("cifar10-small", storage=str(tmp_path / "runs"), name="s")
    with pytest.raises(ConfigError, match=r"features.fallback allow"), search.open_search(plan, resume=False):
        pass
    assert not (tmp_path / "runs").exists()
    # Alpha is 0 in the preset, and above 0 at one end of the space.
    flags = ["--search.space.train.alpha", "{low: 0, high: 0.1}"]
    plan = make_search_plan("cifar10-code", flags=flags, storage=str(tmp_path), name="c")
    with pytest.raises(ConfigError, match=r"features.fallback allow"), search.open_search(plan, resume=False):
        pass
    allowed = make_search_plan("cifar10-small", flags=["--features.fallback", "allow"], storage=str(tmp_path), name="s")
    with search.open_search(allowed, resume=False) as has_started:
        assert not has_started
    with search.open_search(allowed, resume=True) as has_started:
        assert has_started


def test_milestones_of_a_search_belong_to_its_epochs(tmp_path: Path) -> None:
    plan = make_search_plan("cifar10", flags=["--train.epochs", "50"], storage=str(tmp_path), name="s")
    first, second = (plan.config_at({"train.schedule": choice}) for choice in plan.search.space["train.schedule"])
    assert first.train.schedule.model_dump()["milestones"] == (15, 30, 40)
    assert second.train.schedule.name == "one_cycle"
    shorter = plan.config_at({"train.schedule": {"name": "multistep"}, "train.epochs": 10})
    assert shorter.train.schedule.model_dump()["milestones"] == (3, 6, 8)
    late = ["--search.space.train.schedule", "[{name: multistep, milestones: [60]}]", "--train.epochs", "50"]
    with pytest.raises(ConfigError, match=r"^search.space.train.schedule: train.schedule.milestones is \[60\], but"):
        make_search_plan("cifar10", flags=late, storage=str(tmp_path), name="s")


def test_a_search_does_not_begin_in_a_folder_of_something_else(tmp_path: Path) -> None:
    search_plan = plan(tmp_path)
    search_plan.storage.write("run.json", b"{}")
    for resume in (False, True):
        with pytest.raises(StorageError) as raised, search.open_search(search_plan, resume=resume):
            pass
        expected = (
            "is no search to resume" if resume else "holds 'run.json', which a search has not written; take another"
        )
        assert expected in str(raised.value)
    assert search_plan.storage.names() == ["run.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7", 0.7), (" 0.7", 0.7), ("0.7\n", 0.7), ("7e-1", 0.7), (0.7, 0.7), (1, 1.0), (None, None),
        ("plain-0.01", "plain - 0.01"), (" plain  -\t0.01 ", "plain - 0.01"), ("plain - 1e-05", "plain - 1e-05"),
    ],
)  # fmt: skip
def test_white_space_in_the_minimum_accuracy_does_not_matter(text: Any, expected: Any) -> None:
    settings = search.validate_search({"space": {"seed": [1, 2]}, "min_accuracy": text})
    assert settings.min_accuracy == expected
    assert settings.margin == (float(expected.partition("-")[2]) if isinstance(expected, str) else None)
