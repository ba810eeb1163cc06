"""The command line: what each command prints, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Trained, tiny_flags, wait_until
from PIL import Image

import raypp
from raypp.attacks.base import AttackError
from raypp.bundle.manifest import verify
from raypp.cli.app import app
from raypp.cli.main import main
from raypp.client.session import RemoteError
from raypp.config.presets import presets
from raypp.data import SOURCES
from raypp.training.checkpoint import list_checkpoints
from raypp.utils.errors import (
    BundleError,
    ConfigError,
    DataError,
    NonRetryableError,
    RayppError,
    StorageError,
    TrainingError,
)
from raypp.utils.images import write_png
from raypp.utils.storage import Storage

Captured = pytest.CaptureFixture[str]
COMMANDS = [
    "train",
    "quickstart",
    "table1",
    "tune",
    "attack",
    "report",
    "figure",
    "evaluate",
    "protect",
    "serve",
    "publish",
    "token",
    "classify",
    "demo",
    "config",
    "data",
    "list",
    "doctor",
    "data convert",
    "data check",
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys: Captured, *arguments: object) -> tuple[str, str]:
    """Run a command that succeeds; returns what it printed, which holds no control characters: nobody is watching."""
    main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert not CONTROL.search(out)
    assert not CONTROL.search(err)
    return out, err


def refused(capsys: Captured, *arguments: object) -> str:
    """Run a command that must fail because of its user; returns the sentence."""
    with pytest.raises(SystemExit) as raised:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert raised.value.code == 2
    assert out == ""
    assert err.startswith("raypp: ")
    assert err.count("\n") == 1, err
    assert not CONTROL.search(err)
    assert "Traceback" not in err
    return err.removeprefix("raypp: ").rstrip("\n")


# Help


def test_every_command_is_listed_here() -> None:
    names = {name for name in app if not name.startswith("-")} | {f"data {n}" for n in app["data"] if n[0] != "-"}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_parameter(capsys: Captured, command: str) -> None:
    out, err = run(capsys, *command.split(), "--help")
    assert err == ""
    assert out.startswith(f"Usage: raypp {command}".strip())
    parser = app
    for word in command.split():
        parser = parser[word]
    function = parser.default_command
    if function is None:
        assert all(name in out for name in parser if not name.startswith("-"))
        return
    explained = dict(re.findall(r"^    (\w+): (.+)$", inspect.getdoc(function) or "", re.MULTILINE))
    parameters = inspect.signature(function).parameters
    required = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL}
    assert required <= explained.keys() <= parameters.keys()
    for name, text in explained.items():
        assert name.replace("_", "-") in out.lower()
        assert " ".join(text.split()[:3]) in out


def test_version(capsys: Captured) -> None:
    assert run(capsys, "--version") == (
        f"raypp {raypp.__version__} (torch {version('torch')}, ray {version('ray')})\n",
        "",
    )


QUICK = """
import sys
from raypp.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop
heavy = {"torch", "torchvision", "ray", "pyarrow", "pandas", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        pytest.param(["train", "--help"], marks=pytest.mark.slow),
        pytest.param(["config"], marks=pytest.mark.slow),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", QUICK, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "raypp" in result.stdout or "cifar10" in result.stdout


# Mistakes

MISTAKES = {
    "unknown command": ("trian cifar10", "trian"),
    "unknown data command": ("data lst", "lst"),
    "no preset": ("train", "PRESET is missing; `raypp train --help` shows the usage"),
    "no source": ("protect bundle", "SOURCE is missing; `raypp protect --help` shows the usage"),
    "too many arguments": ("protect a b c d", "d"),
    "unknown option": ("protect a b c --keep-siez", "--keep-siez"),
    "unknown preset": ("train cifra10", "unknown preset 'cifra10' (did you mean 'cifar10'?); allowed: "),
    "unknown key": ("train quickstart --train.alhpa 1", "unknown key 'train.alhpa' (did you mean 'alpha'?)"),
    "unknown section": ("train quickstart --trian.alpha 1", "--trian.alpha (did you mean --train.alpha?)"),
    "misspelt switch": ("train quickstart --locla", "unknown option --locla (did you mean --local?)"),
    "a setting without its section": ("train quickstart --epochs 3", "--epochs (did you mean --train.epochs?)"),
    "alpha without its section": ("train quickstart --alpha 3", "--alpha (did you mean --train.alpha?)"),
    "explain nothing": ("config --explain", "--explain needs a preset; `raypp config` lists them"),
    "list of nothing": ("list preset", "preset"),
    "a refused switch": ("tune quickstart --local", "unknown option --local; settings begin with"),
    "wrong value": ("config cifar10 --train.alpha much", "train.alpha is 'much': expected a number"),
    "missing value": ("config cifar10 --train.alpha", "--train.alpha needs a value, as in --train.alpha VALUE"),
    "flag twice": ("config cifar10 --train.alpha 0.1 --train.alpha 0.2", "train.alpha is given twice, first as 0.1"),
    "option of a source twice": ("data check shapes --num_train 3 --num-train 3", "num_train is given twice, first"),
    "an attack's flag twice": ("attack none --num_queries 3 --num_queries=4", "num_queries is given twice"),
    "a table's flag twice": ("table1 --seed=1 --seed=2 --presets quickstart", "seed is given twice"),
    "a search's flag twice": ("tune quickstart --search.num_trials 1 --search.num_trials 2", "is given twice"),
    "stray word": ("config cifar10 alpha 3", "unexpected argument 'alpha'; a setting is written --section.key VALUE"),
    "no file": ("config cifar10 --config none.yaml", "config file 'none.yaml' cannot be read: No such file"),
    "no preset among settings": ("train --train.alpha 1", "no preset is given; `raypp config` lists them"),
    "misspelt switch before": ("train --locla quickstart", "no preset is given"),
    "two presets": ("config cifar10 cifar100", "unexpected argument 'cifar100'; a setting is written --section.key"),
    "no such command": ("trian", 'Unknown command "trian" (did you mean "train"?); `raypp --help` shows the usage'),
    "resume without name": ("train quickstart --resume --local", "--resume needs --name, the run to continue"),
    "resume of nothing": ("train quickstart --resume --local --name x", "there is no run 'x' to resume under"),
    "bad name": ("train quickstart --local --name ../x", "run name '../x' is not allowed; use letters, digits"),
    "no data": (
        "train quickstart --local --name x --data.source folder --data.source.path none",
        "is not a folder",
    ),
    "no weights": ("train cifar10 --local --name x --features.weights none.pt", "none.pt' does not exist; allowed"),
    "too few images": (
        "train quickstart --local --name x --data.source.num_train 9",
        "cannot set 500 of 9 images aside",
    ),
    "no bundle": ("evaluate none", "bundle 'none' does not exist"),
    "no public bundle": ("protect none image.png out.png", "bundle 'none' does not exist"),
    "no image": ("protect none none.png out.png", "none.png does not exist"),
    "lossy target": ("protect none image.png out.jpg", "must end in .png: lossy formats destroy"),
    "unknown split": ("evaluate none --split validation", "validation"),
    "unknown source": ("data check cifar", "unknown data source 'cifar' (did you mean 'cifar1"),
    "unknown source option": ("data check shapes --num_tarin 3", "unknown key 'data.source.num_tarin'"),
    "no source path": ("data check folder", "data.source.path is missing; it has no default"),
    "bad source path": ("data check folder --path none", "is not a folder"),
    "no parquet": ("data check parquet --path none", "none"),
    "target taken": ("data convert shapes taken", "taken exists and is not an empty folder"),
    "target is here": ("data convert shapes .", "exists and is not an empty folder"),
    "no target": ("attack --local --name a", "name one target: a bundle, --function MODULE:NAME, or --folders PLAIN"),
    "no such target": ("attack none --local --name a", "none' does not exist"),
    "unknown attack": ("attack none --attacks invrese", "unknown attack 'invrese' (did you mean 'inverse'?); allowed"),
    "unknown suite": ("attack none --suite smal", "unknown suite 'smal' (did you mean 'small'?); allowed: quick"),
    "an attack's option": ("attack none --inverse.widht 3", "unknown key 'inverse.widht' (did you mean 'width'?)"),
    "a suite's setting": ("attack none --num_querys 3", "unknown option --num_querys (did you mean --num_queries?)"),
    "a key twice": ("config quickstart --config twice.yaml", "line 3: key 'train' is given twice, first in line 1"),
    "a key twice in a preset": ("train twice.yaml --local", "line 3: key 'train' is given twice"),
    "a key twice in a suite": ("attack none --suite twice.yaml", "line 3: key 'train' is given twice"),
    "a key twice in a search": ("tune quickstart --config twice.yaml", "line 3: key 'train' is given twice"),
    "a key twice in a table": ("table1 --presets twice.yaml --local", "line 3: key 'train' is given twice"),
    "resume no attack": ("attack none --resume --local", "--resume needs --name, the attack run to continue"),
    "report of nothing": ("report", "no source is given; name attack runs, or bundles that were attacked"),
    "report of none": ("report none", "'none' holds no scorecard; `raypp attack` makes one"),
    "figure without runs": ("figure 3", "no source is named; figure 3 takes runs, figures 4 and 5 take attack runs"),
    "size": ("data check shapes --image-size 8 8", "data.image_size 8 x 8 is too small"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: Captured, tmp_path: Path, kind: str) -> None:
    write_png(tmp_path / "image.png", np.zeros((4, 4, 3), dtype=np.uint8))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    (tmp_path / "twice.yaml").write_text("train: {alpha: 0.01}\nseed: 1\ntrain: {epochs: 1}\n")
    command, expected = MISTAKES[kind]
    assert expected in refused(capsys, *command.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *(f"train {preset} --local" for preset in ("cifar10", "cifar100", "cifar10-small")),
        "train cifar10-code --local --train.alpha 0.1",
        "table1 --presets cifar10 cifar100 --local",
        "table1 --presets cifar10-small --methods plain alpha-0.1 --local",
    ],
)
@pytest.mark.usefixtures("offline")
def test_the_papers_method_without_its_feature_network_is_refused_before_anything_is_written(
    capsys: Captured, tmp_path: Path, command: str
) -> None:
    sentence = refused(capsys, *command.split())
    assert "VGG-16's ImageNet weights, which the paper's method needs, are not available: no network" in sentence
    assert "--features.weights FILE" in sentence
    assert "--features.fallback allow" in sentence
    assert {path.name for path in tmp_path.iterdir()} <= {"hub"}, "neither a run nor data"


@pytest.mark.slow
def test_a_mistake_in_a_separate_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "raypp"), "config", "cifra"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("raypp: unknown preset 'cifra' (did you mean 'cifar10'?); allowed: cifar10")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "function", "continued"),
    [
        ("train quickstart --name=a --train.alpha 0.1", "train_config", "train quickstart --name=a --train.alpha 0.1"),
        ("train quickstart", "train_config", "train quickstart --name quickstart-"),
        ("quickstart --train.epochs 2", "train_config", "train quickstart --train.epochs 2 --name quickstart-"),
        ("tune quickstart", "tune", "tune quickstart --name tune-quickstart-"),
        ("table1 --presets quickstart", "table1", "table1 --presets quickstart --name table1"),
        ("attack runs/first", "run_attacks", "attack runs/first --name attack-"),
    ],
)
def test_an_interrupt_names_the_command_that_continues(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: str, function: str, continued: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raypp.api.attack_plan", lambda *_, **__: None)
    monkeypatch.setattr(f"raypp.api.{function}", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 130
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"interrupted; a run that was saved continues with --resume: raypp {continued}")
    assert err.endswith(" --resume")
    assert err.count("\n") == 0


def test_every_error_has_its_exit_code(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(error: BaseException) -> tuple[object, str]:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("raypp.config.presets.presets", fail)
        with pytest.raises(SystemExit) as stopped:
            main(["config"])
        return stopped.value.code, capsys.readouterr().err

    for kind, code in (
        (RayppError, 1), (ConfigError, 2), (DataError, 2), (BundleError, 2), (StorageError, 2), (TrainingError, 1),
        (NonRetryableError, 1), (RemoteError, 1), (AttackError, 1),
    ):  # fmt: skip
        assert outcome(kind("a reason")) == (code, "raypp: a reason\n")
        copied = copy.copy(kind("a reason"))  # by __reduce__, as Ray sends it between processes
        assert (str(copied), copied.exit_code) == ("a reason", code)
    assert outcome(NonRetryableError("the data", exit_code=2)) == (2, "raypp: the data\n")
    assert copy.copy(NonRetryableError("the data", exit_code=2)).exit_code == 2
    assert outcome(OSError(28, "No space left on device")) == (
        1, "raypp: OSError: [Errno 28] No space left on device; RAYPP_TRACEBACK=1 shows where\n"
    )  # fmt: skip
    assert outcome(ConnectionResetError("a line\nand more"))[0] == 1
    assert outcome(BrokenPipeError("of a service"))[0] == 1
    assert outcome(KeyboardInterrupt())[0] == 130
    monkeypatch.setenv("RAYPP_TRACEBACK", "1")
    for error in (OSError("a reason"), ConfigError("a reason")):
        code, text = outcome(error)
        assert code == (2 if isinstance(error, ConfigError) else 1)
        assert text.startswith("Traceback (most recent call last):\n")
        assert text.endswith("a reason\n")
        assert "in fail\n" in text


def test_a_full_disk_is_a_failure_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS):

        def fail(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "mkdir", fail)
        with pytest.raises(StorageError) as raised:
            Storage(tmp_path).write("file", b"")
        codes.append(raised.value.exit_code)
    assert codes == [1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [pytest.param(["config", "cifar10"], marks=pytest.mark.slow), ["config"]], ids=["text", "console"]
)
def test_a_reader_who_leaves_ends_a_command_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", "raypp.cli", *arguments]
        result = subprocess.run(command, stdout=closed, stderr=PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "")


def test_data_that_a_run_cannot_use_is_bad_input(capsys: Captured, tmp_path: Path) -> None:
    flags = tiny_flags(tmp_path / "runs", data__num_val=60)
    assert "cannot set 60 of 60 images aside" in refused(capsys, "train", "quickstart", "--local", *flags)


def test_a_loss_that_diverges_is_a_failure_at_run_time(capsys: Captured, tmp_path: Path) -> None:
    changes = {"train__schedule": "constant", "train__optimizer__lr": "1e30"}
    flags = tiny_flags(tmp_path / "runs", train__mode="plain", protection="plain", **changes)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "quickstart", "--local", *flags])
    assert stopped.value.code == 1
    assert "the loss is not a finite number" in capsys.readouterr().err


# Commands


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_cluster_that_does_not_answer_is_reported_at_once(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    storage = "--cluster.storage" if command == "train" else "--storage"
    with pytest.raises(SystemExit) as stopped:
        main([command, "quickstart", storage, str(tmp_path / "runs"), "--name", "lost"])
    assert stopped.value.code == 2
    assert "no Ray cluster answers at RAY_ADDRESS '127.0.0.1:1': Connection refused" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_config_lists_presets_and_prints_what_a_run_would_use(capsys: Captured, tmp_path: Path) -> None:
    out, _ = run(capsys, "config")
    assert [line.split()[0] for line in out.splitlines()] == list(presets())
    (tmp_path / "mine.yaml").write_text("train: {alpha: 0.25, epochs: 7}\n")
    out, err = run(
        capsys, "config", "cifar10", "--config", "mine.yaml", "--train.alpha", "0.5", "--train.batch-size=64"
    )
    tree = yaml.safe_load(out)
    assert (tree["train"]["alpha"], tree["train"]["epochs"], tree["train"]["batch_size"]) == (0.5, 7, 64)
    assert err == ""
    (tmp_path / "printed.yaml").write_text(out)
    assert run(capsys, "config", "printed.yaml")[0] == out, "what it prints is a preset"


def test_explanations_wrap_with_an_indent(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    out, _ = run(capsys, "config", "cifar10", "--explain")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 50
    assert all(re.match(r" {4}\S|[a-z0-9_.]+ = ", line) for line in lines)


def test_settings_may_stand_before_the_preset(capsys: Captured, tmp_path: Path) -> None:
    expected, _ = run(capsys, "config", "cifar10", "--train.epochs", 50, "--seed=3")
    for words in (
        ["--train.epochs", 50, "cifar10", "--seed=3"],
        ["--seed=3", "--train.epochs", 50, "cifar10"],
        ["--train.epochs", 50, "cifar10", "--seed", 3],
    ):
        assert run(capsys, "config", *words)[0] == expected
    sentence = refused(capsys, "tune", "--search.num_trials", "none", "--name", "x", "quickstart")
    assert "search.num_trials is 'none'" in sentence
    sentence = refused(capsys, "train", "--train.epochs", "none", "--local", "--name", "x", "quickstart")
    assert "train.epochs is 'none'" in sentence


def test_a_service_that_stays_needs_a_cluster(
    capsys: Captured, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "--detach needs a running cluster in RAY_ADDRESS" in refused(capsys, "serve", trained.run, "--detach")
    sentence = refused(capsys, "serve", trained.run, "--detach", "--output", "serve.yaml")
    assert sentence == "--detach deploys on a running cluster; leave --output out"


def test_list_names_every_source_and_option(capsys: Captured) -> None:
    out, _ = run(capsys, "list", "sources")
    for name in SOURCES:
        assert re.search(rf"^  {name}  +\S", out, re.MULTILINE)
        assert all(f"--{key}" in out for key in SOURCES.options(name).model_fields if key != "name")
    assert "required" in out


def test_data_convert_and_check(capsys: Captured, tmp_path: Path) -> None:
    out, err = run(
        capsys, "data", "convert", "shapes", "set", "--num_train", 30, "--num_test", 10, "--image-size", 16, 18
    )
    assert (out, err) == ("", "wrote set\n")
    few = ["--num_train", 30, "--num_test", 10, "--image-size", 16, 16]
    assert run(capsys, "data", "convert", "shapes", "quiet", *few, "--quiet") == ("", "")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    out, err = run(capsys, "data", "check", "parquet", "--path", "set")
    assert err == ""
    train, test = (line.split() for line in out.splitlines()[1:3])
    assert train[:6] == ["train", "30", "16", "x", "18", "x"]
    assert test[:2] == ["test", "10"]
    source = SOURCES.build(SOURCES.options("parquet")(path=str(tmp_path / "set")))
    assert train[-1] == source.load("train").fingerprint()[:16]
    assert "test images that are also training images: 0" in out


def test_data_check_reports_what_is_unreadable_with_exit_code_1(capsys: Captured, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            write_png(tmp_path / "set" / name / f"{i}.png", np.full((4, 4, 3), i, dtype=np.uint8))
    bad = tmp_path / "set" / "dog" / "3.png"
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit) as raised:
        main(["data", "check", "folder", "--path", "set"])
    out, err = capsys.readouterr()
    assert raised.value.code == 1
    assert err == ""
    assert f"{bad} is not an image" in out
    assert not CONTROL.search(out)


def test_data_check_lists_every_file_that_the_source_refuses(capsys: Captured, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "photo.heic").touch()
        (tmp_path / "set" / name / "gone.png").symlink_to("nowhere.png")
    for i in range(20):
        write_png(tmp_path / "set" / f"{i}.png", np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(SystemExit) as raised:
        main(["data", "check", "folder", "--path", "set"])
    lines = capsys.readouterr().out.splitlines()
    assert raised.value.code == 1
    assert sum("is an image outside the class folders" in line for line in lines) == len(lines) - 1 == 20
    assert lines[-1] == "and 4 more"
    with pytest.raises(SystemExit):
        main(["data", "check", "folder", "--path", "set", "--json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert sum("photo.heic is an image in a format that is not supported" in problem for problem in problems) == 2
    assert sum("gone.png is a link to a file or folder that does not exist" in problem for problem in problems) == 2


def test_data_check_names_what_is_not_read_and_refuses_an_empty_split(capsys: Captured, tmp_path: Path) -> None:
    run(capsys, "data", "convert", "shapes", "set", "--num_train", 30, "--num_test", 10, "--image-size", 16, 16)
    test = tmp_path / "set" / "test-00000-of-00001.parquet"
    shutil.copy(test, tmp_path / "set" / "part-0.parquet")
    out, _ = run(capsys, "data", "check", "parquet", "--path", "set")
    assert f"not read, since they belong to no split that is used: {tmp_path / 'set' / 'part-0.parquet'}" in out
    pq.write_table(pq.read_table(test)[:0], test)
    with pytest.raises(SystemExit) as raised:
        main(["data", "check", "parquet", "--path", "set"])
    assert raised.value.code == 1
    assert "the test split has no images; allowed are images of two classes or more" in capsys.readouterr().out


@pytest.mark.slow
def test_train_publishes_what_it_trained(capsys: Captured, tmp_path: Path, trained: Trained) -> None:
    """A run that is finished is published too; later models replace it."""
    shutil.copytree(trained.run, tmp_path / "runs" / "one")
    flags = ["train", "quickstart", "--name", "one", "--resume", "--local", *tiny_flags(tmp_path / "runs")]
    out, err = run(capsys, *flags, "--publish", "models", "--json")
    active = json.loads((tmp_path / "models" / "live.json").read_text())
    assert f"{active['version']} is active\n" in err
    assert json.loads(out)["path"] == f"{tmp_path}/runs/one"
    verify(tmp_path / "models" / "versions" / active["version"])
    raypp.train("quickstart", flags[6:], name="one", resume=True, publish="others", quiet=True)
    assert json.loads((tmp_path / "others" / "live.json").read_text())["version"] == active["version"]


def test_a_publication_is_checked_before_the_training(capsys: Captured, tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    flags = ["train", "quickstart", "--name", "one", "--local", *tiny_flags(tmp_path / "runs")]
    for more, sentence in (
        (["--publish", "bundle"], f"{tmp_path}/bundle is a bundle itself; allowed is a new or empty folder, or"),
        (["--publish", "photos"], f"{tmp_path}/photos holds 'cat.png'; allowed is a new or empty folder, or a model"),
        (["--publish", "photos/cat.png"], f"{tmp_path}/photos/cat.png is a file; allowed is a new or empty folder"),
        (["--publish", "/proc/models"], "cannot create /proc/models: "),
        (["--url", "http://127.0.0.1:9"], "--url belongs to --publish REPOSITORY"),
        (["--token-file", "token"], "--token-file belongs to --publish REPOSITORY"),
        (["--publish", "models", "--token-file", "token"], "token file 'token' cannot be read"),
    ):
        assert sentence in refused(capsys, *flags, *more)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_train_evaluate_protect(capsys: Captured, tmp_path: Path, trained: Trained) -> None:
    out, err = run(capsys, "train", "quickstart", "--name", "one", "--local", *tiny_flags(tmp_path / "runs"))
    folder = tmp_path / "runs" / "one"
    assert err.count(" epoch ") == 3, "one line per epoch"
    # Three epochs on 60 images teach nothing: that is an error, also with --quiet, in the command and on the card.
    sentences = re.findall(r"error: accuracy on (plain|protected) images is at chance: .*\n", err)
    assert sentences == ["plain", "protected"]
    assert "Error: accuracy on protected images is at chance" in (folder / "bundle" / "MODEL_CARD.md").read_text()
    assert "joint epoch   2/2" in err
    results = json.loads((folder / "summary.json").read_text())
    assert f"{results['test']['accuracy']:.2%}" in out
    assert f"{results['plain_test']['accuracy']:.2%}" in out
    for name in ("protected.png", "bundle", "metrics.jsonl"):
        assert f"{folder}/{name}" in out
        assert (folder / name).exists()
    verify(folder / "bundle")
    weights = "public/protection.safetensors"
    assert (folder / "bundle" / weights).read_bytes() == (trained.bundle / weights).read_bytes()

    out, err = run(capsys, "evaluate", folder / "bundle", "--output", "deep/numbers.json")
    assert json.loads((tmp_path / "deep" / "numbers.json").read_text()) == results["test"]
    assert re.fullmatch(r"error: accuracy on protected images is at chance: .*\n", err)
    assert f"{results['test']['accuracy']:.2%}" in out
    out, _ = run(capsys, "evaluate", folder / "bundle", "--split", "train", "--data.source.num_train", "40")
    assert "40 test images" not in out, "the training split is not called test"

    write_png(tmp_path / "in.png", np.zeros((20, 30, 3), dtype=np.uint8))
    assert run(capsys, "protect", folder / "bundle", "in.png", "out.png") == (
        "",
        "protected 1 image at 16 x 16: out.png\n",
    )
    assert run(capsys, "protect", folder / "bundle", "in.png", "big.png", "--keep-size", "--quiet") == ("", "")
    assert Image.open("big.png").size == (30, 20)

    again = refused(capsys, "train", "quickstart", "--name", "one", "--local", *tiny_flags(tmp_path / "runs"))
    assert "exists already" in again
    out, err = run(
        capsys, "train", "quickstart", "--name", "one", "--local", "--resume", *tiny_flags(tmp_path / "runs")
    )
    assert err.splitlines()[0] == "run 'one' is finished: nothing left to train"
    assert f"{results['test']['accuracy']:.2%}" in out
    latest = tmp_path / "runs" / "latest"  # what `serve deploy serve_config.yaml` serves
    assert latest.readlink() == Path("one")
    latest.unlink()
    latest.symlink_to("gone")
    run(capsys, "train", "quickstart", "--name", "two", "--local", *tiny_flags(tmp_path / "runs", train__epochs=1))
    assert latest.readlink() == Path("two")


@pytest.mark.parametrize("command", ["train quickstart", "quickstart", "table1", "tune quickstart", "attack runs/none"])
def test_quiet_and_verbose_exclude_each_other(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--quiet", "--verbose"])
    assert end.value.code == 2
    assert "--quiet and --verbose exclude each other; give one of them" in capsys.readouterr().err
    assert "RAYPP_VERBOSE" not in os.environ


def test_quiet_training_prints_only_errors_and_its_settings_may_stand_anywhere(
    capsys: Captured, tmp_path: Path
) -> None:
    flags = tiny_flags(tmp_path / "runs", train__mode="plain", protection="plain", train__epochs=1)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    out, err = run(
        capsys, "train", "quickstart", *flags[:4], "--local", "--quiet", *flags[4:], "--config", "mine.yaml", "--name=q"
    )
    assert out == ""
    assert re.fullmatch(r"error: accuracy on protected images is at chance: .*\n", err)  # it has seen 60 images once
    stored = yaml.safe_load((tmp_path / "runs" / "q" / "config.yaml").read_text())
    assert (stored["seed"], stored["data"]["source"]["num_train"]) == (3, 60)


@pytest.mark.slow
def test_quickstart_says_what_to_do_next(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own sizes take minutes, so the preset of that name is made tiny."""
    main(["config", "quickstart", *tiny_flags(tmp_path / "unused")])
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "quickstart.yaml").write_text(capsys.readouterr().out)
    small = {"quickstart": tmp_path / "presets" / "quickstart.yaml"}
    monkeypatch.setattr("raypp.config.presets.presets", lambda: presets() | small)
    out, _ = run(capsys, "quickstart", "--local", "--name", "first", "--storage", "runs")
    assert "protected, 8 bit" in out
    next_steps = [line.split() for line in out.splitlines() if line.startswith("  raypp ")]
    assert [words[1] for words in next_steps] == ["protect", "evaluate", "attack", "serve", "train", "config"]
    write_png(tmp_path / "in.png", np.zeros((16, 16, 3), dtype=np.uint8))
    run(capsys, "protect", next_steps[0][2], "in.png", "out.png")
    run(capsys, "evaluate", next_steps[1][2])
    assert next_steps[2][2] + "/bundle/public" == next_steps[0][2]
    run(capsys, "serve", next_steps[3][2], "--output", "served.yaml")
    assert next_steps[4][2] in presets()
    run(capsys, "config", *next_steps[5][2:4])


@pytest.mark.slow
def test_a_local_run_that_is_stopped_writes_a_checkpoint_first(tmp_path: Path) -> None:
    flags = ["--local", "--name", "stopped", *tiny_flags(tmp_path, train__epochs=100_000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "raypp.cli", "train", "quickstart", *flags], stderr=PIPE, text=True
    )
    run = Storage(tmp_path / "stopped")
    wait_until(lambda: len(list_checkpoints(run)) == 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    message, _, command = err.strip().splitlines()[-1].partition(" --resume: ")
    assert message.endswith(f"stopped after checkpoint {list_checkpoints(run)[0]}; continue with")
    assert command == shlex.join(["raypp", "train", "quickstart", *flags, "--resume"])
