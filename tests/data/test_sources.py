"""Sources read what is there, refuse by name what is not right, and survive a round trip through Parquet."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cifar_files import noise, write_cifar
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from raypp.data import SOURCES, base, memory, parquet
from raypp.data.base import DataSource, Example, ImageDataset, Split, stratified_split
from raypp.data.cifar import Cifar10, Cifar100
from raypp.data.convert import check, convert, describe
from raypp.data.folder import Folder
from raypp.data.parquet import Parquet
from raypp.data.shapes import Shapes
from raypp.utils.errors import ConfigError, DataError, StorageError
from raypp.utils.images import encode_png, write_png

SHARED = ROOT.parent / "shared" / "data" / "cifar10"


def build(name: str, size: tuple[int, int] | None = None, channels: int = 3, **options: Any) -> DataSource:
    source: DataSource = SOURCES.build(SOURCES.options(name)(**options), size=size, channels=channels)
    return source


# The base


def test_fingerprint_sees_content_and_nothing_else() -> None:
    images, labels, classes = noise(4), np.arange(4) % 2, ("a", "b")
    known = ImageDataset(images, labels, classes).fingerprint()
    transposed = np.ascontiguousarray(images.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    assert ImageDataset(transposed, labels.astype(np.int32), classes).fingerprint() == known
    changed = images.copy()
    changed[3, 3, 3, 2] ^= 1
    others = [
        ImageDataset(changed, labels, classes),
        ImageDataset(images, 1 - labels, classes),
        ImageDataset(images, labels, ("a", "c")),
        ImageDataset(images.reshape(4, 2, 8, 3), labels, classes),
        ImageDataset(images[:3], labels[:3], classes),
    ]
    assert len({known, *(other.fingerprint() for other in others)}) == 6


def test_subset_keeps_pairs() -> None:
    whole = ImageDataset(noise(5), np.arange(5), tuple("abcde"))
    part = whole.subset([4, 1])
    assert len(part) == 2
    assert part.labels.tolist() == [4, 1]
    assert np.array_equal(part.images, whole.images[[4, 1]])


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), data=st.data(), seed=st.integers(0, 3))
def test_stratified_split_is_exact(labels: list[int], data: st.DataObject, seed: int) -> None:
    num_val = data.draw(st.integers(0, len(labels) - 1))
    train, val = stratified_split(labels, num_val, seed)
    assert len(val) == num_val
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    for label in set(labels):
        exact = labels.count(label) * num_val / len(labels)
        assert abs(sum(labels[i] == label for i in val) - exact) < 1
    assert np.array_equal(stratified_split(labels, num_val, seed)[1], val)


def test_stratified_split_depends_on_the_seed_and_refuses_the_impossible() -> None:
    labels = np.arange(100) % 10
    assert not np.array_equal(stratified_split(labels, 20, 0)[1], stratified_split(labels, 20, 1)[1])
    for num_val in (-1, 100):
        with pytest.raises(DataError, match=f"cannot set {num_val} of 100 images aside; allowed is 0 to 99"):
            stratified_split(labels, num_val, 0)


def test_check_memory_names_the_way_out() -> None:
    memory.check_memory(10, (32, 32, 3))
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo on this machine")
    with pytest.raises(DataError, match=r"10000000 images of 4000 x 4000 x 3 need 960000\.0 GB .*data\.stream=true"):
        memory.check_memory(10_000_000, (4000, 4000, 3))


def test_load_checks_the_memory_of_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(base, "check_memory", lambda num, shape: calls.append((num, shape)))
    build("shapes", num_train=20, size=(16, 24)).load("train")
    assert calls == [(20, (16, 24, 3))]


def test_registry() -> None:
    assert list(SOURCES) == ["shapes", "cifar10", "cifar100", "parquet", "folder"]
    for name in SOURCES:
        assert SOURCES.options(name).model_fields["name"].default == name
    with pytest.raises(ConfigError, match=r"unknown data source 'cifar' \(did you mean 'cifar1"):
        SOURCES.get("cifar")


# CIFAR


@pytest.mark.parametrize(("source", "dataset"), [(Cifar10, datasets.CIFAR10), (Cifar100, datasets.CIFAR100)])
def test_cifar_reads_torchvisions_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, dataset: Any
) -> None:
    images = write_cifar(tmp_path, monkeypatch, dataset)
    cifar = source(source.Options(root=tmp_path))
    train, test = cifar.load("train"), cifar.load("test")
    assert np.array_equal(np.concatenate([train.images, test.images]), images)
    assert test.labels.tolist() == [2, 0, 1]
    assert test.classes == ("ant", "bee", "cow")
    assert cifar.num_images("train") == len(images) - 3
    assert source(source.Options(root=tmp_path), size=(16, 8), channels=1).load("test").images.shape == (3, 16, 8, 1)


def test_cifar_damaged_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"data_batch_3 is damaged \(its md5 .*data\.source\.download is false"):
        build("cifar10", root=tmp_path, download=False).load("train")


def test_cifar_missing_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py/test_batch is missing and .*can point at an existing copy"
    ):
        build("cifar10", root=tmp_path, download=False).load("train")


@pytest.mark.parametrize("damaged_archive", [False, True])
def test_cifar_without_network_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged_archive: bool
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    if damaged_archive:
        (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"half a download")
    with pytest.raises(DataError) as caught:
        build("cifar100", root=tmp_path).load("train")
    message = str(caught.value)
    assert ("cifar-100-python.tar.gz is damaged" if damaged_archive else "cifar-100-python does not exist") in message
    assert "downloading https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz failed" in message
    assert "no route to host" in message
    assert "data.source.root can point at an existing copy" in message


def test_cifar_is_downloaded_once_by_processes_that_start_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "origin", monkeypatch, datasets.CIFAR10)
    calls = tmp_path / "calls"

    def download(url: str, root: Path, **_: object) -> None:
        with calls.open("a") as file:
            file.write("x")
        for name in sorted(os.listdir(tmp_path / "origin" / "cifar-10-batches-py")):
            target = Path(root) / "cifar-10-batches-py" / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(b"half a file")
            time.sleep(0.02)
            target.write_bytes((tmp_path / "origin" / "cifar-10-batches-py" / name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def read() -> None:
        try:
            results.put(build("cifar10", root=tmp_path / "data").load("test").labels.tolist())
        except Exception as error:
            results.put(repr(error))

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[2, 0, 1]] * 3
    for process in processes:
        process.join()
    assert calls.read_text() == "x"


def test_cifar_files_that_cannot_be_unpickled_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    for content in (b"", b"no pickle"):
        path.write_bytes(content)
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
        with pytest.raises(DataError, match=r"cifar-10-batches-py"):
            build("cifar10", root=tmp_path, download=False).load("test")


def test_cifar_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    (tmp_path / ".download.lock").mkdir()  # as in a read-only folder, which root could write all the same
    assert build("cifar10", root=tmp_path).load("test").labels.tolist() == [2, 0, 1]


# Memory


@pytest.mark.parametrize("path", ["/", "/pod/container"])
@pytest.mark.parametrize("version", [1, 2])
def test_files_in_the_page_cache_are_memory_that_may_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, path: str
) -> None:
    limit, used, cached = memory.CGROUP_FILES[version]
    root = tmp_path / "memory" if version == 1 else tmp_path
    folder = root / path.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    own = tmp_path / "own"
    own.write_text(f"3:cpu:/\n2:memory:{path}\n" if version == 1 else f"0::{path}\n")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    (folder / limit).write_text("1000000\n")
    (folder / used).write_text("900000\n")
    assert memory.available_memory() == 100_000
    (folder / "memory.stat").write_text(f"anon 5\n{cached} 700000\n")
    assert memory.available_memory() == 800_000
    (folder / "memory.stat").write_text("damaged")
    assert memory.available_memory() == 100_000
    (folder / limit).write_text("max\n")
    assert (memory.available_memory() or 0) > 1_000_000
    if folder != root:
        (root / limit).write_text("500000")
        (root / used).write_text("400000")
        assert memory.available_memory() == 100_000, "the outer group's limit holds too"


# Classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], r"x has the single class 'a'; allowed are two classes or more"),
        ([], r"x has no class; allowed are two"),
        (["a", "b", "a"], r"x has the class name 'a' twice"),
        (["cat", "cat "], r"x has the class names 'cat' and 'cat ', which look the same"),
        (["caf\u00e9", "cafe\u0301"], r"which look the same"),
        (["a", ""], r"allowed are names in UTF-8 without control"),
        (["a", "b\nc"], r"'b\\nc'; allowed are names in UTF-8 without control"),
        (["a", "b\udce9"], r"'b\\xe9'; allowed are names in UTF-8 without control"),
    ],
)
def test_class_names_that_cannot_be_told_apart_or_written_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        base.check_names(names, "x")


def test_class_names_that_differ_in_case_are_two() -> None:
    assert base.check_names(["a", "A"], "x") == ("a", "A")


# Parquet


def write_parquet(
    path: Path, images: Any, labels: Any, features: Any = None, image: str = "img", **columns: Any
) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: images, **({"label": labels} if labels is not None else {}), **columns})
    views = "view" in str(table.schema)  # which pyarrow cannot cut
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=len(table) or 1 if views else 2)


def structs(images: np.ndarray) -> pa.Array:
    return pa.array([{"bytes": encode_png(image), "path": f"{i}.png"} for i, image in enumerate(images)])


def both(root: Path, images: Any, labels: Any, **more: Any) -> None:
    write_parquet(root / "train-00000-of-00001.parquet", images, labels, **more)
    write_parquet(root / "test-00000-of-00001.parquet", images, labels, **more)


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    images = noise(5)
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    write_parquet(tmp_path / "test-of-time/train-00000-of-00002.parquet", structs(images[:3]), [0, 1, 0], features)
    write_parquet(tmp_path / "test-of-time/train-00001-of-00002.parquet", structs(images[3:]), [1, 1], features)
    write_parquet(tmp_path / "test-of-time/validation-00000-of-00001.parquet", structs(images[:2]), [1, 0], features)
    write_parquet(tmp_path / "test-of-time/.train-copy.parquet", structs(images), [0] * 5, features)
    source = build("parquet", path=str(tmp_path))
    assert isinstance(source, Parquet)
    assert source.columns() == ("img", "label")
    assert [Path(file).name for file in source.files("train")] == [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    train = source.load("train")
    assert np.array_equal(train.images, images)
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert train.classes == ("ant", "bee")
    assert source.load("test").labels.tolist() == [1, 0], "validation stands in where there is no test"
    write_parquet(tmp_path / "test/0.parquet", structs(images[:2]), [1, 0], features)
    assert build("parquet", path=tmp_path.as_uri()).load("test").labels.tolist() == [1, 0]


def test_parquet_plain_bytes_names_and_options(tmp_path: Path) -> None:
    images = noise(3)
    pngs = pa.array([encode_png(image) for image in images], pa.large_binary())
    both(tmp_path, pngs, ["bee", "ant", "bee"], image="picture", fine=[2, 0, 2])
    with pytest.raises(
        DataError, match=r"no column 'img' or 'image'; set data\.source\.image_column to one of picture, "
    ):
        build("parquet", path=str(tmp_path)).load("train")
    named = build("parquet", path=str(tmp_path), image_column="picture").load("train")
    assert (named.classes, named.labels.tolist()) == (("ant", "bee"), [1, 0, 1])
    assert np.array_equal(named.images, images)
    options: dict[str, Any] = {"path": str(tmp_path), "image_column": "picture", "label_column": "fine"}
    assert build("parquet", **options).load("train").classes == ("0", "1", "2")
    chosen = build("parquet", **options, classes=("x", "y", "z", "w")).load("train")
    assert (chosen.classes, chosen.labels.tolist()) == (("x", "y", "z", "w"), [2, 0, 2])


def test_parquet_dictionary_labels(tmp_path: Path) -> None:
    both(tmp_path, structs(noise(3)), pa.array(["b", "a", "b"]).dictionary_encode())
    assert build("parquet", path=str(tmp_path)).load("test").labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None], r"test-.*\.parquet row 2: label is null"),
        ([0, -1, 1], r"test-.*\.parquet row 1: label -1 is not one of 0 to 1"),
        ([0, 1, 2], r"test-.*\.parquet row 2: label 2 is not one of 0 to 1"),
        ([0.0, 1.0, 1.0], r"test-.*\.parquet row 0: label column 'label' is double, allowed are integers and strings"),
        (["a", "b", "c"], r"test-.*\.parquet row 2: label 'c' is not one of a, b"),
    ],
)
def test_parquet_wrong_labels_are_named(tmp_path: Path, labels: list[Any], message: str) -> None:
    good = ["a", "b", "a"] if isinstance(labels[0], str) else [0, 1, 0]
    write_parquet(tmp_path / "train-0.parquet", structs(noise(3)), good)
    write_parquet(tmp_path / "test-0.parquet", structs(noise(3)), labels)
    with pytest.raises(DataError, match=message):
        build("parquet", path=str(tmp_path)).load("test")


def test_parquet_wrong_images_are_named(tmp_path: Path) -> None:
    pngs = [encode_png(image) for image in noise(5)]
    both(tmp_path, pa.array([{"bytes": b, "path": ""} for b in (*pngs[:3], b"no", None)]), [0, 1] * 2 + [0])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet row 3 is not an image"):
        build("parquet", path=str(tmp_path)).load("train")
    both(tmp_path, pa.array([*[{"bytes": b, "path": ""} for b in pngs[:4]], None]), [0, 1] * 2 + [0])
    with pytest.raises(DataError, match="row 4 holds no image bytes"):
        build("parquet", path=str(tmp_path)).load("train")
    both(tmp_path, pa.array([encode_png(noise(1, side)[0]) for side in (4, 4, 4, 5, 5)]), [0, 1] * 2 + [0])
    with pytest.raises(DataError, match=r"row 3 is 5 x 5 pixels where .* are 4 x 4; set data\.image_size"):
        build("parquet", path=str(tmp_path)).load("train")
    assert build("parquet", path=str(tmp_path), size=(4, 4)).load("train").images.shape == (5, 4, 4, 3)
    both(tmp_path, pa.array([[1, 2]] * 5), [0, 1] * 2 + [0])
    with pytest.raises(DataError, match=r"image column 'img' is list<.*>, allowed is binary or a struct with bytes"):
        build("parquet", path=str(tmp_path)).load("train")


def test_parquet_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing cannot be read"):
        build("parquet", path=str(tmp_path / "missing")).load("train")
    with pytest.raises(DataError, match="nowhere://x cannot be read"):
        build("parquet", path="nowhere://x").load("train")
    with pytest.raises(DataError, match="has no Parquet file with 'train' in its name"):
        build("parquet", path=str(tmp_path)).load("train")
    (tmp_path / "train.parquet").write_bytes(b"not Parquet at all")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet \("):
        build("parquet", path=str(tmp_path)).load("train")
    write_parquet(tmp_path / "train.parquet", structs(noise(2)), None)
    with pytest.raises(DataError, match="no column 'label' or 'fine_label' or 'labels'"):
        build("parquet", path=str(tmp_path)).load("train")
    write_parquet(tmp_path / "train.parquet", structs(noise(40, 32)), [0] * 40)
    data = bytearray((tmp_path / "train.parquet").read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.parquet"):
        build("parquet", path=str(tmp_path / "train.parquet")).load("train")


def test_parquet_labels_in_folder_names(tmp_path: Path) -> None:
    """Hive's layout, as Spark writes it: the files lack the column; where they have it, they are right."""
    for split in ("train", "test"):
        for label in ("cat", "test", "d%20g"):
            write_parquet(tmp_path / f"a/{split}/label={label}/part-0.parquet", structs(noise(2)), None)
            write_parquet(tmp_path / f"b/{split}/label={label}/part-0.parquet", structs(noise(2)), [0, 1])
        for label in ("1", "0"):
            write_parquet(tmp_path / f"c/split={split}/label={label}/part-0.parquet", structs(noise(2)), None)
    words = build("parquet", path=str(tmp_path / "a")).load("train")
    assert (words.classes, words.labels.tolist()) == (("cat", "d g", "test"), [0, 0, 1, 1, 2, 2])
    columns = build("parquet", path=str(tmp_path / "b")).load("test")
    assert (columns.classes, columns.labels.tolist()) == (("0", "1"), [0, 1] * 3)
    numbers = build("parquet", path=str(tmp_path / "c")).load("train")
    assert (numbers.classes, numbers.labels.tolist()) == (("0", "1"), [0, 0, 1, 1])
    write_parquet(tmp_path / f"a/train/label={parquet.HIVE_NULL}/part-0.parquet", structs(noise(2)), None)
    with pytest.raises(DataError, match="row 0: label is null"):
        build("parquet", path=str(tmp_path / "a")).load("train")
    for split in ("train", "test"):
        write_parquet(tmp_path / f"d/{split}/label=0/label=1/part-0.parquet", structs(noise(2)), None)
    with pytest.raises(DataError, match=r"label=0/label=1.* two folders give column 'label', one '0', one '1'"):
        build("parquet", path=str(tmp_path / "d")).load("train")


def test_parquet_strings_in_one_split_and_integers_in_the_other_are_refused(tmp_path: Path) -> None:
    images = structs(noise(4))
    for first, second in ((["a", "b"] * 2, [0, 1] * 2), ([0, 1] * 2, ["0", "1"] * 2)):
        write_parquet(tmp_path / "train.parquet", images, first)
        write_parquet(tmp_path / "test.parquet", images, second)
        with pytest.raises(DataError, match=r"test\.parquet: column 'label' holds (integers|strings) where .*train"):
            build("parquet", path=tmp_path).load("test")
        with pytest.raises(DataError, match="holds"):
            build("parquet", path=tmp_path, classes=("0", "1")).load("test")


def test_parquet_class_names_twice_are_refused(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["x", "x", "z"]}}
    both(tmp_path, structs(noise(3)), [0, 1, 2], features=features)
    with pytest.raises(DataError, match=r"train-.*\.parquet has the class name 'x' twice"):
        build("parquet", path=tmp_path).load("train")
    both(tmp_path, structs(noise(3)), ["x", "x ", "z"])
    with pytest.raises(DataError, match=r"'x' and 'x ', which look the same"):
        build("parquet", path=tmp_path).load("train")


def test_parquet_views_and_other_storage_of_the_same_values(tmp_path: Path) -> None:
    pngs = [encode_png(image) for image in noise(4)]
    labels = ["b", "a", "b", "a"]
    size = max(map(len, pngs))
    kinds = {
        "view": (pa.array(pngs, pa.binary_view()), pa.array(labels, pa.string_view())),
        "large": (pa.array(pngs, pa.large_binary()), pa.array(labels, pa.large_string())),
        "fixed": (pa.array([png + bytes(size - len(png)) for png in pngs], pa.binary(size)), pa.array(labels)),
        "struct": (
            pa.array([{"bytes": png} for png in pngs], pa.struct([("bytes", pa.binary_view())])),
            pa.array(labels).dictionary_encode(),
        ),
        "dictionary": (pa.array(pngs).dictionary_encode(), pa.array(labels, pa.string_view())),
    }
    for name, columns in kinds.items():
        both(tmp_path / name, *columns)
        loaded = build("parquet", path=tmp_path / name).load("train")
        assert np.array_equal(loaded.images, noise(4)), name
        assert (loaded.classes, loaded.labels.tolist()) == (("a", "b"), [1, 0, 1, 0]), name


def test_parquet_files_of_different_storage_are_one_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", structs(noise(2)), pa.array(["b", "a"]))
    write_parquet(tmp_path / "train-1.parquet", structs(noise(2)), pa.array(["c", "a"]).dictionary_encode())
    write_parquet(tmp_path / "train-2.parquet", structs(noise(2)), pa.array(["b", "c"], pa.large_string()))
    write_parquet(tmp_path / "test.parquet", structs(noise(2)), pa.array(["a", "c"], pa.string_view()))
    source = build("parquet", path=tmp_path)
    assert source.load("train").labels.tolist() == [1, 0, 2, 0, 1, 2]
    assert source.load("test").labels.tolist() == [0, 2]


def test_parquet_without_rows_is_passed_over(tmp_path: Path) -> None:
    nothing = pa.array([], pa.null())
    write_parquet(tmp_path / "train-0.parquet", nothing, nothing)
    write_parquet(tmp_path / "train-1.parquet", structs(noise(3)), [0, 1, 2])
    write_parquet(tmp_path / "train-2.parquet", nothing, None)
    write_parquet(tmp_path / "test-0.parquet", structs(noise(3)), [0, 1, 2])
    write_parquet(tmp_path / "test-1.parquet", nothing, nothing)
    source = build("parquet", path=tmp_path)
    assert source.load("train").labels.tolist() == source.load("test").labels.tolist() == [0, 1, 2]
    for path in (tmp_path / "train-1.parquet", tmp_path / "test-0.parquet"):
        path.unlink()
    with pytest.raises(DataError, match=r"the train split has no images; allowed are images of two"):
        build("parquet", path=tmp_path).load("train")


def test_parquet_without_rows_and_columns_is_passed_over(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({}), tmp_path / f"{split}-0.parquet")
        write_parquet(tmp_path / f"{split}-1.parquet", structs(noise(3)), [0, 1, 2])
        pq.write_table(pa.table({}), tmp_path / f"{split}-2.parquet")
    source = build("parquet", path=tmp_path)
    assert isinstance(source, Parquet)
    assert check(source).readable
    assert source.load("train").labels.tolist() == [0, 1, 2]
    # What a stream reads too.
    assert [Path(group.path).name for group in source.groups("train")] == ["train-1.parquet"] * 2
    (tmp_path / "train-1.parquet").unlink()
    with pytest.raises(DataError, match=r"has no rows in its training files"):
        check(build("parquet", path=tmp_path))


def test_a_split_without_images_is_a_problem(tmp_path: Path) -> None:
    """Training refuses it, and so does a check."""
    write_parquet(tmp_path / "train.parquet", structs(noise(3)), [0, 1, 2])
    write_parquet(tmp_path / "test.parquet", structs(noise(3))[:0], pa.array([], pa.int64()))
    report = check(build("parquet", path=tmp_path))
    assert report.test.problem == "the test split has no images; allowed are images of two classes or more"
    assert not report.readable


@pytest.mark.parametrize("uri", [False, True])
def test_parquet_files_that_are_not_read_are_named(tmp_path: Path, uri: bool) -> None:
    both(tmp_path, structs(noise(2)), [0, 1])
    names = ["part-0.parquet", "eval.parquet", "dev.pq", "validation.parquet", "train.parquet.gz"]
    for name in (*names, "README.md", "_x.parquet"):
        (tmp_path / name).write_bytes(next(tmp_path.glob("train*")).read_bytes())
    source = build("parquet", path=tmp_path.as_uri() if uri else tmp_path)
    assert source.num_images("train") == 2
    assert [Path(path).name for path in check(source).unused] == sorted(names)


@pytest.mark.parametrize("name", ["train.parquet.1", "b-train.PARQUET?download=true", "test/x.parquet (1)"])
def test_parquet_downloaded_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    both(tmp_path, structs(noise(2)), [0, 1])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"is a download under another name; rename it to [-\w]+\.(parquet|PARQUET), or"
    ):
        build("parquet", path=tmp_path).num_images("train")


def test_parquet_without_a_test_file_lists_what_there_is(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_parquet(tmp_path / f"{name}.parquet", structs(noise(2)), [0, 1])
    with pytest.raises(DataError, match=r"no Parquet file with 'test' in its name; it has .*dev\.parquet"):
        build("parquet", path=tmp_path).load("test")


@pytest.mark.parametrize("word", ["SPLIT", "Split", "split"])
def test_parquet_splits_in_folder_names_of_any_case(tmp_path: Path, word: str) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{word}={split}/part-0.parquet", structs(noise(2)), [0, 1])
    source = build("parquet", path=tmp_path)
    assert (source.num_images("train"), source.num_images("test")) == (2, 2)


def test_parquet_files_linked_twice_count_once_and_in_one_split(tmp_path: Path) -> None:
    both(tmp_path, structs(noise(2)), [0, 1])
    train = next(tmp_path.glob("train*"))
    (tmp_path / "train-latest.parquet").symlink_to(train)
    assert build("parquet", path=tmp_path).num_images("train") == 2
    (tmp_path / "test-more.parquet").symlink_to(train)
    with pytest.raises(DataError, match=r"is a file of the test split too, by a link; remove the link"):
        build("parquet", path=tmp_path).num_images("train")


@pytest.mark.parametrize("place", ["_temporary/0/x.parquet", "_x.parquet", ".hidden/x.parquet", "a/_tmp/b/x.parquet"])
@pytest.mark.parametrize("uri", [False, True])
def test_parquet_that_a_writer_left_behind_is_passed_over(tmp_path: Path, place: str, uri: bool) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"_set/{split}/part-0.parquet", structs(noise(2)), [0, 1])
        write_parquet(tmp_path / f"_set/{split}/{place}", structs(noise(2)), [0, 1])
        (tmp_path / f"_set/{split}/_SUCCESS").touch()
    folder = tmp_path / "_set"
    source = build("parquet", path=folder.as_uri() if uri else folder)
    assert (source.num_images("train"), source.num_images("test")) == (2, 2)


@pytest.mark.parametrize("uri", [False, True])
def test_parquet_links(tmp_path: Path, uri: bool) -> None:
    """pyarrow alone follows a loop 40 deep and counts the files each time."""
    for place in ("set/train/a", "set/test/a", "more/b"):
        write_parquet(tmp_path / f"{place}.parquet", structs(noise(2)), [0, 1])
    (tmp_path / "set/train/linked").symlink_to(tmp_path / "more")
    (tmp_path / "set/train/loop").symlink_to("..")
    path = (tmp_path / "set").as_uri() if uri else tmp_path / "set"
    assert (build("parquet", path=path).num_images("train"), build("parquet", path=path).num_images("test")) == (4, 2)
    (tmp_path / "set/train/gone.parquet").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"train/gone\.parquet is a link to a file or folder that does not exist"):
        build("parquet", path=path).load("train")


def test_parquet_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    both(tmp_path, structs(noise(2)), [0, 1])
    (tmp_path / os.fsdecode(b"train-caf\xe9.parquet")).write_bytes((next(tmp_path.glob("train*"))).read_bytes())
    with pytest.raises(DataError, match=r"name is not UTF-8; rename it"):
        build("parquet", path=tmp_path).load("train")


def test_parquet_columns_twice_are_refused(tmp_path: Path) -> None:
    table = pa.table([structs(noise(2)), [0, 1], [1, 0]], names=["img", "label", "label"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet has the column 'label' twice"):
        build("parquet", path=tmp_path).load("train")
    write_parquet(tmp_path / "train.parquet", structs(noise(2)), [0, 1])
    images = pa.table([structs(noise(2)), structs(noise(2)), [1, 0]], names=["img", "img", "label"])
    pq.write_table(images, tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet has the column 'img' twice"):
        build("parquet", path=tmp_path).load("test")


def test_a_split_of_one_class_is_refused(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    write_parquet(tmp_path / "train.parquet", structs(noise(3)), [1, 1, 1], features)
    write_parquet(tmp_path / "test.parquet", structs(noise(3)), [0, 1, 1], features)
    source = build("parquet", path=tmp_path)
    with pytest.raises(DataError, match=r"every image of the train split has the class 'b'; allowed are two"):
        source.load("train")
    report = check(source)
    assert not report.readable
    assert report.train.problem is not None
    assert report.test.problem is None


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f"no CIFAR-10 at {SHARED}")
def test_parquet_reads_cifar10_as_published() -> None:
    source = build("parquet", path=str(SHARED))
    assert (source.num_images("train"), source.num_images("test")) == (50_000, 10_000)
    test = source.load("test")
    assert test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.classes[:2] == ("airplane", "automobile")


# Folder


def write_folder(root: Path, layout: dict[str, int], seed: int = 0) -> None:
    for i, (name, num) in enumerate(layout.items()):
        (root / name).mkdir(parents=True)
        for j, image in enumerate(noise(num, seed=seed + i)):
            write_png(root / name / f"{j}.png", image)


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "valid")])
def test_folder_splits_are_no_classes_however_they_are_spelt(tmp_path: Path, train: str, test: str) -> None:
    write_folder(tmp_path, {f"{train}/a": 2, f"{train}/b": 2, f"{test}/a": 1})
    source = build("folder", path=tmp_path)
    assert source.classes == ("a", "b")
    assert (source.num_images("train"), source.num_images("test")) == (4, 1)


def test_folder_with_a_test_split_alone_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"Test/a": 2, "data/a": 2})
    with pytest.raises(DataError, match="has a folder Test and none for training, allowed is train"):
        build("folder", path=tmp_path).load("train")


def test_folder_with_a_class_called_test_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, {"test": 10, "control": 10})
    assert build("folder", path=tmp_path).classes == ("control", "test")


def test_images_that_cannot_be_read_here_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1})
    (tmp_path / "train" / "a" / "photo.HEIC").write_bytes(b"x")
    with pytest.raises(DataError, match=r"photo\.HEIC is an image in a format that is not supported"):
        build("folder", path=tmp_path).load("train")
    (tmp_path / "train" / "a" / "photo.HEIC").unlink()
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png is a link to a file or folder that does not exist"):
        build("folder", path=tmp_path).load("train")


def test_parquet_files_that_name_classes_otherwise_are_refused(tmp_path: Path) -> None:
    images = structs(noise(4))
    named = [{"label": {"_type": "ClassLabel", "names": names}} for names in (["cat", "dog"], ["dog", "cat"])]
    write_parquet(tmp_path / "train-0.parquet", images, [0, 1, 0, 1], named[0])
    write_parquet(tmp_path / "test-0.parquet", images, [0, 1, 0, 1], named[1])
    with pytest.raises(DataError, match=r"test-0\.parquet names its classes dog, cat, the training files cat, dog"):
        build("parquet", path=tmp_path).load("test")
    with pytest.raises(DataError, match=r"data\.source\.classes is a, b, but .* names its classes cat, dog"):
        build("parquet", path=tmp_path, classes=("a", "b")).load("train")


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_folder_with_splits(tmp_path: Path, test_name: str) -> None:
    write_folder(tmp_path, {"train/dog": 2, "train/cat": 3, f"{test_name}/dog": 1, f"{test_name}/cat": 1})
    Image.fromarray(noise(1, 4, seed=9)[0]).save(tmp_path / "train/cat/photo.JPEG")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/.hidden.png").write_text("not an image")
    (tmp_path / "train/.cache").mkdir()
    source = build("folder", path=tmp_path)
    assert isinstance(source, Folder)
    train = source.load("train")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert np.array_equal(train.images[4:], noise(2))
    assert source.files("test")[1] == (str(tmp_path / test_name / "dog/0.png"), 1)
    assert source.load("test").labels.tolist() == [0, 1]


def test_folder_without_splits_is_divided_once_and_for_all(tmp_path: Path) -> None:
    write_folder(tmp_path, {"b": 20, "a": 10})
    source = Folder(Folder.Options(path=tmp_path, test_fraction=0.2))
    train, test = source.files("train"), source.files("test")
    assert len(test) == 6
    assert [label for _, label in test] == [0, 0, 1, 1, 1, 1]
    assert not set(train) & set(test)
    assert len(train) == 24
    assert Folder(Folder.Options(path=tmp_path, test_fraction=0.2)).files("test") == test
    assert Folder(Folder.Options(path=tmp_path, test_fraction=0.2, seed=1)).files("test") != test


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source\.path .*none is not a folder"):
        build("folder", path=tmp_path / "none").load("train")
    with pytest.raises(DataError, match="holds no folders, allowed is one per class"):
        build("folder", path=tmp_path).load("train")
    write_folder(tmp_path, {"train/a": 2, "train/b": 2})
    source = build("folder", path=tmp_path)
    with pytest.raises(DataError, match="has a train folder and no test folder, allowed is test, testing, val, valid"):
        source.load("test")
    write_folder(tmp_path, {"test/a": 1, "test/c": 1})
    with pytest.raises(DataError, match=r"test/c is a class that .*train does not have"):
        source.load("test")
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no image"):
        build("folder", path=tmp_path).load("train")
    write_folder(tmp_path / "flat", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"test_fraction 0\.1 of the 4 images .* leaves none for testing"):
        build("folder", path=tmp_path / "flat").load("train")


def test_folder_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a": 3, "train/b": 1, "test/a": 1})
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"train/a/1\.png is a damaged PNG image: it ends"):
        build("folder", path=tmp_path).load("train")


def test_large_images_are_read_in_threads_in_the_same_order(tmp_path: Path) -> None:
    images = noise(80, 40)  # noise does not compress: every file has over 4 KB, and there are more than one block
    for i, image in enumerate(images):
        path = tmp_path / f"train/{'ab'[i // 40]}/{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, image)
    assert (tmp_path / "train/a/000.png").stat().st_size > base.MIN_BYTES_FOR_THREADS
    assert np.array_equal(build("folder", path=tmp_path).load("train").images, images)


def test_folder_one_level_too_high_or_too_low_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"photos/cat": 20, "photos/dog": 20})
    with pytest.raises(DataError, match=r"single class folder 'photos', .* it holds cat, dog: .* one level too high"):
        build("folder", path=tmp_path).load("train")
    with pytest.raises(DataError, match=r"holds no folders, .* it holds images: .* one level too low"):
        build("folder", path=tmp_path / "photos/cat").load("train")
    assert build("folder", path=tmp_path / "photos").num_images("train") == 36


@pytest.mark.parametrize(
    "above", ["{}", "train/{}", "{}/photos", "{0}/{0}"], ids=["alone", "in train", "deeper", "deeper by another name"]
)
@pytest.mark.parametrize("names", [("2023", "2024"), ("a", "b", "c")])
def test_class_folders_that_hold_the_same_class_folders_are_refused(
    tmp_path: Path, above: str, names: tuple[str, ...]
) -> None:
    write_folder(tmp_path, {f"{above.format(name)}/{label}": 10 for name in names for label in ("cat", "dog")})
    if above.startswith("train"):
        write_folder(tmp_path, {"test/cat": 1, "test/dog": 1})
    with pytest.raises(DataError, match=r"hold no images but folders of the same names \(cat, dog\): is .* too high"):
        build("folder", path=tmp_path).load("train")


@pytest.mark.parametrize(
    "layout",
    [
        {"cat/images": 10, "dog/images": 10},  # one folder in each
        {"cat/tabby": 10, "cat/siamese": 10, "dog/poodle": 10, "dog/pug": 10},
        {"cat": 10, "cat/old": 10, "cat/new": 10, "dog/old": 10, "dog/new": 10},  # images of a class itself
        {"cat/old": 10, "cat/new": 10, "dog/old": 10},
    ],
)
def test_class_folders_with_folders_of_their_own_are_read(tmp_path: Path, layout: dict[str, int]) -> None:
    write_folder(tmp_path, layout)
    source = build("folder", path=tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.num_images("train") + source.num_images("test") == sum(layout.values())


@pytest.mark.parametrize("inside", [("train", "test"), ("Training", "val"), ("test",), ("train", "test", "extra")])
@pytest.mark.parametrize("root", ["", "train"])
def test_splits_below_classes_are_refused(tmp_path: Path, inside: tuple[str, ...], root: str) -> None:
    write_folder(tmp_path / root, {f"{label}/{split}": 5 for label in ("cat", "dog") for split in inside})
    with pytest.raises(DataError, match=r"cat holds .*; split folders stand above class folders, as in .*/train/cat"):
        build("folder", path=tmp_path).load("train")


def test_folders_next_to_the_splits_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{split}/{label}": 1 for split in ("train", "test", "val", "more") for label in "ab"})
    (tmp_path / "overview.png").write_bytes(encode_png(noise(1)[0]))
    (tmp_path / "README.md").touch()
    source = build("folder", path=tmp_path)
    assert [Path(path).name for path in check(source).unused] == ["more", "overview.png", "val"]


def test_images_linked_twice_within_a_class_count_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"set/train/a": 2, "set/train/b": 2, "set/test/a": 1, "set/test/b": 1, "more": 3})
    for name in ("first", "second"):
        (tmp_path / "set/train/a" / name).symlink_to(tmp_path / "more")
    (tmp_path / "set/train/b/latest.png").symlink_to("0.png")
    assert build("folder", path=tmp_path / "set").num_images("train") == 7


def test_folder_images_without_a_class_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    (tmp_path / "overview.png").write_bytes(encode_png(noise(1)[0]))
    (tmp_path / "train" / "readme.txt").write_text("no image")
    assert build("folder", path=tmp_path).num_images("train") == 4
    (tmp_path / "train" / "loose.png").write_bytes(encode_png(noise(1)[0]))
    with pytest.raises(DataError, match=r"train/loose\.png is an image outside the class folders"):
        build("folder", path=tmp_path).load("train")


def test_folder_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/caf\u00e9": 2, "train/tea": 2, "test/cafe\u0301": 1, "test/tea": 1})
    source = build("folder", path=tmp_path)
    assert source.classes == ("caf\u00e9", "tea")
    assert source.load("test").labels.tolist() == [0, 1]
    write_folder(tmp_path, {"train/cafe\u0301": 1})
    with pytest.raises(DataError, match=r"'caf\u00e9' twice"):
        build("folder", path=tmp_path).load("train")


def test_folder_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "train/a" / name).mkdir()
    (tmp_path / "train/a" / name / f"{name}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"train/a/caf\\xe9/caf\\xe9\.png is not an image"):
        build("folder", path=tmp_path).load("train")
    write_folder(tmp_path, {f"train/{name}": 1})
    with pytest.raises(DataError, match=r"class name 'caf\\xe9'; allowed are names in UTF-8 without control"):
        build("folder", path=tmp_path).load("train")


def test_folder_links(tmp_path: Path) -> None:
    write_folder(tmp_path, {"set/train/a": 2, "set/train/b": 2, "set/test/a": 1, "set/test/b": 1, "more": 3})
    (tmp_path / "set/train/a/linked").symlink_to(tmp_path / "more")
    (tmp_path / "set/train/b/loop").symlink_to("..")
    (tmp_path / "set/train/all").symlink_to("..")
    (tmp_path / "set/test/c").symlink_to(tmp_path / "set")
    source = build("folder", path=tmp_path / "set")
    assert source.classes == ("a", "b")
    assert (source.num_images("train"), source.num_images("test")) == (7, 2)
    (tmp_path / "set/train/latest").symlink_to("a")
    with pytest.raises(DataError, match=r"train/a and .*train/latest are the same folder; remove the link"):
        build("folder", path=tmp_path / "set").load("train")
    (tmp_path / "set/train/latest").unlink()
    (tmp_path / "set/train/gone").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"train/gone is a link to a file or folder that does not exist"):
        build("folder", path=tmp_path / "set").load("train")


def test_folder_of_file_managers_is_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 10, "b": 10, "__MACOSX/a": 3, "@eaDir": 2})
    assert build("folder", path=tmp_path).classes == ("a", "b")


# ls, convert, check


def test_describe_lists_every_source_with_its_options() -> None:
    entries = {entry["name"]: entry for entry in describe()}
    assert set(entries) == set(SOURCES)
    assert entries["shapes"]["options"] == {"num_train": "6000", "num_test": "1000", "seed": "0"}
    assert entries["folder"]["options"] == {"path": "required", "test_fraction": "0.1", "seed": "0"}
    assert entries["parquet"]["options"]["image_column"] == "None"
    assert all(entry["doc"].endswith(".") for entry in entries.values())


@pytest.mark.parametrize("channels", [1, 3])
def test_convert_round_trip_is_exact(tmp_path: Path, channels: int) -> None:
    source = Shapes(Shapes.Options(num_train=70, num_test=30), channels=channels)
    calls: list[tuple[str, int, int]] = []
    convert(source, tmp_path / "out", rows_per_file=32, progress=lambda *call: calls.append(call))
    assert sorted(os.listdir(tmp_path / "out")) == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
    ]
    assert os.listdir(tmp_path) == ["out"]
    assert calls[-2:] == [("train", 70, 70), ("test", 30, 30)]
    back = build("parquet", path=str(tmp_path / "out"), channels=channels)
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        assert back.load(split).fingerprint() == source.load(split).fingerprint()


def test_convert_writes_the_layout_of_the_hub(tmp_path: Path) -> None:
    convert(Shapes(Shapes.Options(num_train=10, num_test=10)), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/train-00000-of-00001.parquet")
    assert table.schema.field("img").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("label").type == pa.int64()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["img"] == {"_type": "Image"}
    assert features["label"]["_type"] == "ClassLabel"
    assert features["label"]["names"][0] == "circle"
    first = Image.open(io.BytesIO(table["img"][0].as_py()["bytes"]))
    assert (first.format, first.size) == ("PNG", (32, 32))


def test_convert_refuses_what_is_taken_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", {"train/a": 3, "train/b": 1, "test/a": 1})
    source = build("folder", path=tmp_path / "in")
    with pytest.raises(StorageError, match="in exists and is not an empty folder"):
        convert(source, tmp_path / "in")
    (tmp_path / "in/test/a/0.png").write_bytes(b"broken")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"test/a/0\.png is not an image"):
        convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert os.listdir(tmp_path / "out") == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/out: Not a directory"):
        convert(source, tmp_path / "file" / "out")


def test_check_counts_and_lists_instead_of_stopping(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a": 30, "train/b": 3, "test/a": 1, "test/b": 2}, seed=1)
    same = (tmp_path / "train/a/0.png").read_bytes()
    for copy in ("train/a/1.png", "train/b/0.png", "test/b/1.png"):
        (tmp_path / copy).write_bytes(same)
    source = build("folder", path=tmp_path)
    report = check(source)
    assert report.readable
    assert report.train.counts == {"a": 30, "b": 3}
    assert report.test.counts == {"a": 1, "b": 2}
    assert (report.train.num_images, report.train.shape) == (33, (4, 4, 3))
    assert (report.train.num_duplicates, report.test.num_duplicates, report.num_shared) == (2, 0, 1)
    assert report.train.fingerprint == source.load("train").fingerprint()

    for i in range(5, 30):
        (tmp_path / f"train/a/{i}.png").write_bytes(b"broken")
    write_png(tmp_path / "train/b/2.png", noise(1, 6)[0])
    report = check(build("folder", path=tmp_path))
    assert not report.readable
    assert report.train.num_unreadable == 26
    assert len(report.train.unreadable) == 20
    assert "train/a/10.png is not an image" in report.train.unreadable[0]
    assert report.train.num_images == 7
    assert report.train.fingerprint is None
    assert report.test.fingerprint is not None


class Fixed(DataSource):
    """A source of fixed examples."""

    examples_of_test: list[Example]
    classes = ("a",)

    def num_images(self, split: Split) -> int:
        return len(self.examples_of_test)

    def _read(self, split: Split) -> Any:
        return iter(self.examples_of_test)


def test_an_empty_split_is_refused_and_checked() -> None:
    source = Fixed(Shapes.Options())
    source.examples_of_test = []
    with pytest.raises(DataError, match="the train split has no images; allowed are images of two"):
        source.load("train")
    assert check(source).train.shape is None


def test_a_link_gives_no_image_a_second_class_or_split(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            write_png(tmp_path / split / label / "0.png", pixels)
    source = SOURCES.build(SOURCES.options("folder").model_validate({"name": "folder", "path": str(tmp_path)}))
    assert [source.num_images(split) for split in ("train", "test")] == [2, 2]
    link = tmp_path / "train" / "dog" / "more"
    link.symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(DataError, match=r"more/0\.png is an image of .*cat too, by a link; an image has one class"):
        SOURCES.build(source.options).num_images("train")
    link.unlink()
    link.symlink_to(tmp_path / "test" / "dog")
    with pytest.raises(DataError, match="is an image of the training split too, by a link"):
        SOURCES.build(source.options).num_images("test")
