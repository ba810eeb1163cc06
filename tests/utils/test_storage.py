"""A folder on any filesystem: what is written appears whole or not at all, and refusals are one sentence."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from raypp.utils.errors import StorageError
from raypp.utils.paths import resolve_path
from raypp.utils.storage import Storage


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_write_read_exists_folders_delete(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "deep" / "run")
    assert not storage.exists()
    assert storage.folders() == []
    storage.write("a/b/c.bin", b"\0\1")
    storage.write("a/b/c.bin", b"\2")
    storage.write("d.txt", b"")
    assert storage.read("a/b/c.bin") == b"\2"
    assert storage.read("d.txt") == b""
    assert storage.exists()
    assert storage.exists("a/b")
    assert not storage.exists("a/c")
    storage.folder("z").write("x", b"")
    assert storage.folders() == ["a", "z"]
    storage.delete("a")
    storage.delete("a")
    assert storage.folders() == ["z"]
    assert everything(storage.path) == {"d.txt": b"", "z/x": b""}


def test_paths_and_file_uris_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_uri = Storage(f"file://{tmp_path}/run")
    by_uri.write("x", b"1")
    monkeypatch.chdir(tmp_path)
    for location in (tmp_path / "run", str(tmp_path / "run"), "run"):
        storage = Storage(location)
        assert storage.read("x") == b"1"
        assert storage.path == by_uri.path == tmp_path / "run"
        assert storage.local
    assert resolve_path("run") == str(tmp_path / "run")
    assert resolve_path("~") == str(Path.home())
    assert resolve_path("s3://bucket/key") == "s3://bucket/key"


@pytest.mark.parametrize("uri", ["foo://bucket/x", "://x", "s4://", "http://example.org/x"])
def test_unknown_schemes_are_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=f"storage '{uri}' is not understood: ") as raised:
        Storage(uri)
    assert "\n" not in str(raised.value)


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/x: No space left on device"):
        storage.write("x", b"new")
    assert everything(tmp_path) == {"x": b"old"}


def test_a_write_that_breaks_off_leaves_the_old_content(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"old")

    class Unreadable:
        """Not bytes: the stream refuses it after the file aside was opened."""

    with pytest.raises(TypeError):
        storage.write("x", Unreadable())  # type: ignore[arg-type]
    assert everything(tmp_path) == {"x": b"old"}


def test_upload_replaces_the_whole_folder(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run")
    for content in ({"a": b"1", "sub/b": b"2"}, {"a": b"3"}):
        source = tmp_path / f"source{len(content)}"
        for name, data in content.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        storage.upload(source, "checkpoints/one", last="a")
        assert everything(storage.path / "checkpoints" / "one") == content
        assert everything(source) == content
    assert storage.folder("checkpoints").folders() == ["one"]


def test_an_upload_cleans_up_after_one_that_was_killed(tmp_path: Path) -> None:
    """Between its renames the old folder lies aside; what could not be finished is done again by whoever resumes."""
    storage, source = Storage(tmp_path / "store"), tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"new")
    (tmp_path / "store" / ".x.1234abcd.old").mkdir(parents=True)
    (tmp_path / "store" / ".x.1234abcd.tmp").mkdir()
    storage.upload(source, "x")
    assert everything(tmp_path / "store") == {"x/f": b"new"}
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["x"]


@pytest.mark.parametrize("breaks_at", [0, 1, 2])
def test_an_upload_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks_at: int
) -> None:
    """Copying (0), moving the old folder away (1) or moving the new one in (2) may fail."""
    storage = Storage(tmp_path / "run")
    storage.write("one/a", b"old")
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"new")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if breaks_at == 0:

        def copy(*_: Any, **__: Any) -> None:
            raise full

        monkeypatch.setattr("shutil.copyfile", copy)
    else:
        calls: list[Path] = []
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            calls.append(self)
            if len(calls) == breaks_at:
                raise full
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/run/one: .*No space left on device") as raised:
        storage.upload(source, "one")
    assert "\n" not in str(raised.value)
    assert everything(storage.path) == {"one/a": b"old"}


def test_below_a_file_everything_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "source").mkdir()
    storage = Storage(tmp_path / "file" / "run")
    for verb, attempt in {
        "write": lambda: storage.write("x", b"1"),
        "read": lambda: storage.read("x"),
        "list": lambda: Storage(tmp_path / "file").folders(),
        "write ": lambda: storage.upload(tmp_path / "source", "x"),
    }.items():
        with pytest.raises(StorageError, match=f"cannot {verb.strip()} {tmp_path}/file") as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert not storage.exists("x")


def test_download_gives_a_local_folder_itself(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("one/a", b"1")
    with storage.download("one") as folder:
        assert folder == tmp_path / "one"


def test_another_filesystem_uploads_and_downloads_copies(tmp_path: Path) -> None:
    """pyarrow's view of a subtree stands for an object store: no local path, no renaming."""
    store = tmp_path / "store"
    store.mkdir()
    storage = Storage(tmp_path)
    storage.local, storage._root = False, "bucket"
    storage._fs = pyarrow.fs.SubTreeFileSystem(str(store), pyarrow.fs.LocalFileSystem())
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "manifest.json").write_bytes(b"{}")
    (source / "sub" / "z").write_bytes(b"1")
    storage._fs.create_dir("bucket/one/sub", recursive=True)  # object stores have no folders to create
    storage.upload(source, "one", last="manifest.json")
    storage.write("x", b"2")
    assert everything(store) == {"bucket/one/manifest.json": b"{}", "bucket/one/sub/z": b"1", "bucket/x": b"2"}
    with storage.download("one") as folder:
        assert everything(folder) == {"manifest.json": b"{}", "sub/z": b"1"}
        assert folder != store / "bucket" / "one"
    assert not folder.exists()
    assert storage.folders() == ["one"]


def test_an_upload_is_closed_to_others_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"1")
    left = tmp_path / "run" / ".one.dead.tmp"  # by a process that was killed
    left.mkdir(parents=True)
    seen: list[int] = []
    copytree = shutil.copytree

    def look(source: Path, target: Path) -> Path:
        seen.append(target.parent.stat().st_mode & 0o777)
        return copytree(source, target)

    monkeypatch.setattr("shutil.copytree", look)
    Storage(tmp_path / "run").upload(source, "one")
    assert seen == [0o700]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["one"]


def test_no_place_is_refused() -> None:
    with pytest.raises(StorageError, match="storage is not understood: '' is empty; allowed is a path or a URI"):
        Storage("")


def test_a_path_is_settled_even_where_the_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setenv("PWD", str(gone))
    gone.rmdir()
    assert resolve_path("runs") == f"{gone}/runs"
    assert resolve_path("/x") == "/x"


@pytest.mark.parametrize(
    ("location", "parent"),
    [
        ("/a b/c?d/run", "/a b/c?d"),
        ("file:///a/run/", "/a"),
        ("s3://bucket/runs/run?region=us-east-1", "s3://bucket/runs?region=us-east-1"),
    ],
)
def test_a_folder_knows_where_it_lies(location: str, parent: str) -> None:
    assert (Storage(location).parent.uri, Storage(location).name) == (parent, "run")
