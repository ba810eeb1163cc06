"""Presets hold the paper's numbers; sources of settings merge as stated; every mistake is one sentence."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raypp.config.overrides import deep_merge, parse_overrides
from raypp.config.presets import load_config, load_tree, presets, read_yaml
from raypp.config.schema import Config
from raypp.config.validation import validate, validate_data
from raypp.utils.documents import DocumentError, load_json, load_yaml
from raypp.utils.errors import ConfigError, RayppError


def make(*flags: str, preset: str = "quickstart", file: Path | tuple[()] = ()) -> Config:
    return load_config(preset, file, flags)


def refusal(*flags: str, preset: str = "quickstart", file: Path | tuple[()] = ()) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(preset, file, flags)
    return str(raised.value)


# Presets


def test_presets_are_listed_and_parse() -> None:
    assert sorted(presets()) == ["cifar10", "cifar10-code", "cifar10-small", "cifar100", "quickstart"]
    for name, path in presets().items():
        config = load_config(name)
        assert validate(yaml.safe_load(config.to_yaml())) == config
        assert load_config(path) == config
        assert path.read_text().startswith("# "), "its first line is what `raypp config` prints"


@pytest.mark.parametrize(("name", "num_val"), [("cifar10", 5000), ("cifar100", 2500)])
def test_paper_presets_hold_section_3a(name: str, num_val: int) -> None:
    config = load_config(name)
    assert config.data.model_dump() == {
        "source": {"name": name, "root": str(Path("data").absolute()), "download": True},
        "image_size": None,
        "channels": 3,
        "num_val": num_val,  # of 50,000
        "num_train": None,
        "num_test": None,  # all 10,000
        "augment": {"crop_padding": 4, "flip": True},
        "stream": False,
        "shuffle_buffer": 10_000,
        "stream_mib_per_worker": 512,
    }
    assert config.protection.model_dump() == {
        "name": "learned", "width": 64, "depth": 4, "skips": None, "code": None, "jpeg": None,
        "adversary": None,
    }  # fmt: skip
    assert config.classifier.model_dump() == {"name": "resnet20", "width": 16}
    assert config.features.model_dump() == {
        "name": "vgg16", "weights": "torchvision", "layer": "relu2_2", "fallback": "refuse",
    }  # fmt: skip
    train = config.train
    assert (train.mode, train.epochs, train.batch_size) == ("joint", 200, 128)
    assert train.optimizer.model_dump() == {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}
    assert train.schedule.model_dump() == {"name": "multistep", "milestones": (60, 120, 160), "gamma": 0.2}
    assert train.alpha == 0.005


def test_paper_presets_state_the_papers_numbers_themselves() -> None:
    """A changed default in code must not change the paper's experiment."""
    for name in ("cifar10", "cifar100"):
        tree = read_yaml(presets()[name])
        assert {"seed", "data", "protection", "classifier", "features", "train", "search"} == tree.keys()
        assert tree["train"].keys() == {"mode", "alpha", "epochs", "batch_size", "optimizer", "schedule"}
        assert tree["train"]["optimizer"].keys() == {"name", "lr", "momentum", "weight_decay"}
        assert tree["data"].keys() == {"source", "num_val", "augment"}


# Merging


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {alpha: 0.25, epochs: 9}\nseed: 3\n")
    config = make("--train.alpha", "0.75", file=file)
    assert (config.train.alpha, config.train.epochs, config.seed) == (0.75, 9, 3)
    assert config.train.batch_size == make().train.batch_size


def test_a_new_name_replaces_its_section(tmp_path: Path) -> None:
    path = str(tmp_path)
    source = make("--data.source.name", "folder", "--data.source.path", path).data.source
    assert source.model_dump() == {"name": "folder", "path": path, "test_fraction": 0.1, "seed": 0}
    assert make("--train.schedule", "constant").train.schedule.model_dump() == {"name": "constant"}
    same = make("--train.schedule", "one_cycle").train.schedule
    assert same == make().train.schedule, "the same name changes nothing"
    for flags in (
        ["--data.source", "folder", "--data.source.path", path],
        ["--data.source.path", path, "--data.source", "folder"],
    ):
        assert make(*flags).data.source == source
    file = tmp_path / "mine.yaml"
    file.write_text("protection: {name: plain}\n")
    assert make(file=file).protection.model_dump() == {"name": "plain"}
    assert make("--protection", "learned", file=file).protection.model_dump()["width"] == 64


def test_merge_does_not_touch_its_arguments() -> None:
    base: dict[str, Any] = {"a": {"name": "x", "y": 1}, "b": {"c": 2}}
    over: dict[str, Any] = {"a": "z", "b": {"d": [3]}}
    assert deep_merge(base, over) == {"a": {"name": "z"}, "b": {"c": 2, "d": [3]}}
    assert base == {"a": {"name": "x", "y": 1}, "b": {"c": 2}}
    assert over == {"a": "z", "b": {"d": [3]}}


def test_flags_in_every_spelling() -> None:
    assert parse_overrides(["--train.alpha=0.5", "--train.batch-size", "8", "--data.num_test", "null"]) == {
        "train": {"alpha": "0.5", "batch_size": "8"},
        "data": {"num_test": None},
    }
    for text in ("a=b", "2020-99-99", "0x_", "[a", "1e3", "yes", "-1", "", "null.png"):
        assert parse_overrides([f"--data.source.path={text}"]) == {"data": {"source": {"path": text}}}
        assert parse_overrides(["--data.source.path", text]) == {"data": {"source": {"path": text}}}
    assert parse_overrides(["--data.source", "{name: folder, path: a=b}"])["data"]["source"]["path"] == "a=b"
    config = make("--train.optimizer.lr", "1e-3", "--data.augment.flip", "no", "--data.channels", "1")
    assert (config.train.optimizer.lr, config.data.augment.flip, config.data.channels) == (0.001, False, 1)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8)


@pytest.mark.slow
@given(data=st.data(), equals=st.booleans())
def test_any_value_survives_a_flag(data: st.DataObject, equals: bool) -> None:
    key, values = data.draw(
        st.sampled_from(
            [
                ("train.alpha", st.floats(0, 1e300)),
                ("train.epochs", st.integers(1, 10**6)),
                ("data.augment.flip", st.booleans()),
                ("data.num_test", st.none() | st.integers(1, 10**9)),
                ("data.image_size", st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999))),
                ("train.schedule.milestones", st.lists(st.integers(0, 500)).map(tuple)),
                ("data.source.image_column", WORDS.filter(lambda w: w != "null" and w[0] not in "[{")),
            ]
        )
    )
    value = data.draw(values)
    text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
    start = ["--data.source", "{name: parquet, path: x}", "--train.schedule", "multistep"]
    start += ["--train.epochs", "501"] if key != "train.epochs" else []
    if not equals and text.startswith("--"):
        return
    setting: Any = make(*start, *([f"--{key}={text}"] if equals else [f"--{key}", text]))
    for part in key.split("."):
        setting = getattr(setting, part)
    assert setting == value


@given(
    words=st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["--seed", "--train.alpha", "--data", "--train"])))
)
def test_no_command_line_breaks_the_parser(words: list[str]) -> None:
    """Every command line gives a configuration or a RayppError."""
    with contextlib.suppress(RayppError):
        make(*words)


# Mistakes

MISTAKES = {
    "unknown key": (
        ["--train.alhpa", "1"],
        "unknown key 'train.alhpa' (did you mean 'alpha'?); allowed there: epochs, ",
    ),
    "unknown key of a method": (["--protection.widht", "3"], "unknown key 'protection.widht' (did you mean 'width'?)"),
    "unknown key of a schedule": (
        ["--train.schedule.warm_up", "0"],
        "unknown key 'train.schedule.warm_up' (did you mean 'warmup'?); allowed there: name, warmup, final",
    ),
    "key of another schedule": (
        ["--train.schedule.milestones", "[1]"],
        "unknown key 'train.schedule.milestones'; allowed there: name, warmup, final",
    ),
    "unknown section": (
        ["--trian.alpha", "1"],
        "--trian.alpha (did you mean --train.alpha?); settings begin",
    ),
    "no flag": (["alpha", "1"], "unexpected argument 'alpha'; a setting is written --section.key VALUE"),
    "bare dashes": (["--"], "unexpected argument '--'"),
    "missing value": (["--train.alpha"], "--train.alpha needs a value, as in --train.alpha VALUE"),
    "missing value before a flag": (["--train.alpha", "--seed", "1"], "--train.alpha needs a value"),
    "wrong type": (["--train.alpha", "much"], "train.alpha is 'much': expected a number"),
    "not whole": (["--train.epochs", "1.5"], "train.epochs is 1.5: expected a whole number"),
    "null": (["--train.alpha", "null"], "train.alpha is None: expected a number"),
    "not finite": (["--train.alpha", "inf"], "train.alpha is 'inf': input should be a finite number"),
    "not a number": (["--train.optimizer.lr", "nan"], "train.optimizer.lr is 'nan'"),
    "out of range": (["--train.alpha", "-1"], "train.alpha is -1; allowed is at least 0"),
    "out of range in a method": (["--protection.depth", "9"], "protection.depth is 9; allowed is at most 6"),
    "out of range in a source": (
        ["--data.source.num_train", "0"],
        "data.source.num_train is 0; allowed is at least 1",
    ),
    "a limit of a number": (["--train.optimizer.lr", "0"], "train.optimizer.lr is 0; allowed is greater than 0"),
    "a limit of an integer": (["--seed", "2147483648"], "seed is 2147483648; allowed is less than 2,147,483,648"),
    "no such choice": (["--train.mode", "both"], "train.mode is 'both': input should be 'joint', 'frozen' or 'plain'"),
    "no such number": (["--data.channels", "2"], "data.channels is 2: input should be 1 or 3"),
    "unknown method": (
        ["--protection", "lerned"],
        "protection: unknown protection 'lerned' (did you mean 'learned'?); allowed: plain, learned",
    ),
    "unknown classifier": (
        ["--classifier", "resnet"],
        "unknown classifier 'resnet' (did you mean 'resnet20'?); allowed:",
    ),
    "unknown source": (["--data.source", "cifar"], "data.source: unknown data source 'cifar' (did you mean 'cifar1"),
    "unknown features": (
        ["--features", "vgg"],
        "unknown feature network 'vgg' (did you mean 'vgg16'?); allowed: vgg16, ",
    ),
    "unknown schedule": (
        ["--train.schedule", "cosine"],
        "'cosine' found using 'name' does not match any of the expected",
    ),
    "no name": (["--protection", "[5]"], "protection: a protection needs a name; allowed: plain, learned"),
    "missing option": (["--data.source", "parquet"], "data.source.path is missing; it has no default"),
    "a list for a section": (["--train", "[5]"], "train is [5]: expected a section of settings"),
    "too many skips": (["--protection.skips", "4"], "protection: skips is 4, allowed is at most depth = 3"),
    "a number for a size": (["--data.image_size", "32"], "data.image_size is 32: expected a list"),
    "three sides": (
        ["--data.image_size", "[1, 2, 3]"],
        "data.image_size is [1, 2, 3]: tuple should have at most 2 items",
    ),
    "an empty image": (["--data.image_size", "[0, 16]"], "data.image_size.0 is 0; allowed is at least 1"),
    "batch and workers": (
        ["--train.batch_size", "10", "--cluster.num_workers", "4"],
        "train.batch_size 10 cannot be divided among cluster.num_workers 4; allowed is a multiple of it",
    ),
    "one image a worker": (
        ["--train.batch_size", "4", "--cluster.num_workers", "4"],
        "train.batch_size 4 leaves each of cluster.num_workers 4 one image; allowed are two and more",
    ),
    "a class twice": (
        ["--data.source", "{name: parquet, path: x, classes: [cat, dog, cat]}"],
        "classes: 'cat' is given twice; allowed are names that differ",
    ),
    "no storage": (["--cluster.storage", ""], "cluster.storage: '' is empty; allowed is a path or a URI"),
    "epochs without end": (
        ["--train.epochs", "99999999999"],
        "allowed is at most 1,000,000",
    ),
    "blocks of two sides": (
        ["--protection", "{name: etc, block: 8}"],
        "protection.block 8 is not 4, the side of the blocks that adaptation 'shuffled_block' reads",
    ),
    "plain mode with a protection": (
        ["--train.mode", "plain"],
        "train.mode 'plain' trains no protection, but protection is 'learned'; allowed: 'plain'",
    ),
    "an unknown fallback": (
        ["--features", "vgg16", "--features.fallback", "alow"],
        "features.fallback is 'alow': input should be 'refuse' or 'allow'",
    ),
    "a milestone after the end": (
        ["--train.schedule", "{name: multistep, milestones: [2, 4]}"],
        "train.schedule.milestones is [2, 4], but training ends after train.epochs 4; allowed are milestones less than",
    ),
    "frozen mode with nothing to train": (
        ["--train.mode", "frozen", "--protection", "plain"],
        "train.mode 'frozen' trains the protection alone, and 'plain' has nothing to train",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence(kind: str) -> None:
    flags, expected = MISTAKES[kind]
    sentence = refusal(*flags)
    assert expected in sentence
    assert "\n" not in sentence


def test_a_key_of_another_method_names_that_method() -> None:
    for flag, owners in (
        ("features.fallback", "features is 'plain_classifier', and only 'vgg16' has that key"),
        ("data.source.path", "data.source is 'shapes', and only 'parquet' or 'folder' has that key"),
    ):
        with pytest.raises(ConfigError, match=rf"^unknown key '{flag}'; allowed there: name.*; {owners}$"):
            load_config("quickstart", flags=[f"--{flag}", "x"])
    with pytest.raises(ConfigError, match=r"allowed there: name$"):
        load_config("quickstart", flags=["--features.nothing", "x"])


def test_the_weights_option_names_itself() -> None:
    sentence = refusal("--features.weights", "[5]", preset="cifar10")
    assert sentence == "features.weights is [5]: expected text"


def test_unknown_presets() -> None:
    sentence = refusal(preset="cifra10")
    assert sentence.startswith("unknown preset 'cifra10' (did you mean 'cifar10'?); allowed: cifar10")
    assert "or the path of a .yaml file" in sentence


FILES = {
    "a: [": "is no valid YAML",
    "train: {alpha: 1": "is no valid YAML",
    "\tx: 1": "is no valid YAML",
    "train: !!python/object/apply:os.getcwd []": "is no valid YAML",
    "seed: 2020-99-99": "seed is 2020-99-99: expected a whole number",
    "- 1\n- 2": "holds a list; allowed is a mapping of sections",
    "just text": "holds a str; allowed is a mapping of sections",
    "1: 2": "line 1: key '1' is no text; allowed are names, or text in quotes",
    "data: {on: 1, true: 2}": "line 1: key 'on' is no text",
    "? [a]\n: 1": "line 1: key a list or mapping is no text",
    "train: {alpha: 1}\nseed: 1\ntrain: {epochs: 1}": "line 3: key 'train' is given twice, first in line 1",
    "train:\n  alpha: 1\n  epochs: 2\n  alpha: 1": "line 4: key 'alpha' is given twice, first in line 2",
    "data: {source: {name: shapes, 'name': shapes}}": "line 1: key 'name' is given twice",
    "a: [{b: 1, c: 2,\n b: 3}]": "line 2: key 'b' is given twice, first in line 1",
    "a: &a {x: 1}\ntrain:\n  <<: *a\n  <<: *a": "line 4: key '<<' is given twice",
    "seed: 1\n---\nseed: 2": "is no valid YAML: line 2, column 1: but found another document",
    "train:\n\talpha: 1": "is no valid YAML: line 2, column 1: found character '\\t' that cannot start any token",
    "train: &t {alpha: *t}": "line 1: it contains itself by an alias",
    "train: &t [*t]": "line 1: it contains itself by an alias",
    "train: *t": "is no valid YAML: line 1, column 8: found undefined alias 't'",
    "\0": "is no valid YAML: byte 1 is not valid",
    "[" * 500: "is no valid YAML: its sections are nested too deeply",
    "\n".join(["x0: &x0 [1]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9))]): (
        "its aliases stand for more than 100,000 values"
    ),
    "trian: {alpha: 1}": "unknown key 'trian' (did you mean 'train'?); allowed there: seed, data, protection",
    "train: {alpha: {}}": "train.alpha is {}: expected a number",
    "data: {source: {name: shapes, num_tran: 3}}": "unknown key 'data.source.num_tran' (did you mean 'num_train'?)",
    "protection: 5": "protection: a protection needs a name; allowed: plain, learned",
    "data: null": "data is None: expected a section of settings",
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    sentence = refusal(file=file)
    assert FILES[text] in sentence
    assert "\n" not in sentence
    if "YAML" in sentence or "holds" in sentence or "line" in sentence:
        assert str(file) in sentence


def test_unreadable_files(tmp_path: Path) -> None:
    assert refusal(file=tmp_path / "none.yaml").endswith("cannot be read: No such file or directory")
    assert refusal(preset=str(tmp_path / "none.yaml")).endswith("cannot be read: No such file or directory")
    assert refusal(file=tmp_path).endswith("cannot be read: Is a directory")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "is no valid YAML" in refusal(file=tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert make(file=tmp_path / "empty.yaml") == make()
    assert "data is missing; it has no default" in refusal(preset=str(tmp_path / "empty.yaml"))


def test_what_editors_and_shells_write_is_read(tmp_path: Path) -> None:
    text = "train: {alpha: 0.25}\r\ndata: {source: {name: folder, path: 2024-01-05}}\r\n"
    file = tmp_path / "mine.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        file.write_bytes(text.encode(encoding))
        config = make(file=file)
        assert config.train.alpha == 0.25
        assert config.data.source.model_dump()["path"] == str(Path("2024-01-05").absolute())
    file.write_bytes("train: {alpha: 0.25}  # Größe".encode("latin-1"))
    assert refusal(file=file) == f"config file {str(file)!r} is no valid YAML: byte 27 is not valid utf-8"


def test_merge_keys_and_aliases_are_no_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: &train {alpha: 0.25, epochs: 3}\n")
    tree = load_yaml("one: &one {alpha: 0.25, epochs: 3}\ntwo: {<<: *one, alpha: 0.5}\nthree: *one\n")
    assert tree["two"] == {"alpha": 0.5, "epochs": 3}
    assert tree["three"] == tree["one"] == {"alpha": 0.25, "epochs": 3}


def test_a_key_twice_in_a_flag_or_a_json_file_is_refused() -> None:
    flags = ["--train.schedule", "{name: multistep, milestones: [1], milestones: [2]}"]
    assert "line 1: key 'milestones' is given twice" in refusal(*flags)
    with pytest.raises(DocumentError, match=r"^key 'a' is given twice$"):
        load_json('{"b": {"a": 1, "c": 2, "a": 1}}')
    with pytest.raises(DocumentError, match=r"line 1 column 2"):
        load_json("{")
    assert load_json(json.dumps({"a": {"b": [1, "\U0001f600"]}})) == {"a": {"b": [1, "\U0001f600"]}}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("--train.alpha 0.1 --train.alpha 0.2", "train.alpha"),
        ("--train.alpha=0.1 --train.alpha=0.1", "train.alpha"),
        ("--train.batch-size 1 --train.epochs 2 --train.batch_size 3", "train.batch_size"),
        ("--train.alpha 0.1 --train {alpha:\xa00.2}", "train.alpha"),
        ("--train {alpha:\xa00.2,epochs:\xa03} --train.epochs 0.1", "train.epochs"),
        ("--protection tanaka --protection ele", "protection"),
        ("--protection tanaka --protection.name ele", "protection.name"),
        ("--protection {name:\xa0ele,block:\xa04} --protection tanaka", "protection.name"),
        ("--protection null --protection.name ele", "protection.name"),
        ("--data.image_size [8,8] --data.image_size null", "data.image_size"),
    ],
)
def test_a_setting_twice_is_refused(words: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is given twice, first as .*, then as .*; allowed is once$"):
        parse_overrides([word.replace("\xa0", " ") for word in words.split(" ")])


def test_different_settings_of_one_section_are_taken_together() -> None:
    words = ["--protection", "ele", "--protection.block", "8", "--train", "{alpha: 1}", "--train", "{epochs: 2}"]
    together = {"protection": {"name": "ele", "block": "8"}, "train": {"alpha": 1, "epochs": 2}}
    assert parse_overrides(words) == together
    assert parse_overrides([*words[2:], *words[:2]]) == together


def test_data_sections_are_validated_alone() -> None:
    assert validate_data({"source": {"name": "shapes", "num_train": 5}}).source.model_dump()["num_train"] == 5
    with pytest.raises(ConfigError, match=r"^unknown key 'data.source.nmu_train' \(did you mean 'num_train'\?\)"):
        validate_data({"source": {"name": "shapes", "nmu_train": 5}})


# The tree


def test_configurations_are_frozen() -> None:
    config = make()
    for section, key in ((config, "seed"), (config.train, "alpha"), (config.protection, "width")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 1)


def test_relative_paths_are_settled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make("--data.source", "{name: folder, path: images}", "--cluster.storage", "runs/x")
    assert config.data.source.model_dump()["path"] == str(tmp_path / "images")
    assert config.cluster.storage == str(tmp_path / "runs" / "x")
    assert make().cluster.storage == str(tmp_path / "runs"), "the default too, in the current folder"
    assert make(preset="cifar10").data.source.model_dump()["root"] == str(tmp_path / "data")
    assert make("--cluster.storage", "s3://bucket/x").cluster.storage == "s3://bucket/x"


@pytest.mark.slow
@given(
    alpha=st.floats(0, 1e6),
    milestones=st.lists(st.integers(0, 500), max_size=4),
    size=st.none() | st.tuples(st.integers(1, 512), st.integers(1, 512)),
    skips=st.none() | st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_yaml_round_trip(
    alpha: float, milestones: list[int], size: tuple[int, int] | None, skips: int | None, seed: int
) -> None:
    tree = load_tree("quickstart")
    over = {
        "seed": seed,
        "data": {"image_size": size},
        "protection": {"skips": skips},
        "train": {"alpha": alpha, "schedule": {"name": "multistep", "milestones": milestones}},
    }
    config = validate(deep_merge(tree, over))
    again = validate(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert (again.train.alpha, again.data.image_size, again.seed) == (alpha, size, seed)


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("10", 10), ("0", 0), ("-3", -3), ("0x10", 16),
     ("0.5", 0.5), ("1.0e-3", 0.001)],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    assert load_yaml(f"a: {text}\n") == {"a": value}


def test_a_number_with_zeros_before_it_is_decimal_in_a_file_and_in_a_flag(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 010\n")
    assert (
        load_config("quickstart", tmp_path / "a.yaml").seed
        == load_config("quickstart", flags=["--seed", "010"]).seed
        == 10
    )
    (tmp_path / "b.yaml").write_text("seed: 1:30\n")
    with pytest.raises(ConfigError, match=r"seed is '1:30'"):
        load_config("quickstart", tmp_path / "b.yaml")
