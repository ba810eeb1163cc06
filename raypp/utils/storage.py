"""A folder on any pyarrow filesystem: a local path, ``s3://bucket/prefix``, and so on, through one interface.

On a local disk every write goes aside and is renamed, so a reader never sees half a file. Object stores make a written
object visible only when it is complete, which gives the same promise.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raypp.utils.errors import FAILURE, StorageError, first_line
from raypp.utils.paths import resolve_path

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a disk, and of nothing that the user wrote
JOBS_FOLDER = "/runtime_resources/working_dir_files/"  # where `ray job submit` unpacks what it was given


def sha256(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill beside ``target``, which is new or empty and then appears whole or, after an error, not at
    all; raises StorageError if it cannot be written."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.replace(target)  # also over an empty folder
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Storage:
    """One folder.

    Args:
        location: local path or pyarrow filesystem URI.

    Raises:
        StorageError: the URI's scheme is unknown to pyarrow; later, on each access that the filesystem refuses.
    """

    def __init__(self, location: str | Path) -> None:
        from pyarrow import fs

        try:
            self.uri = resolve_path(location)
        except ValueError as error:
            raise StorageError(f"storage is not understood: {error}") from error
        self.local = "://" not in self.uri or self.uri.startswith("file://")
        self._root: str
        try:
            self._fs, self._root = fs.FileSystem.from_uri(self.uri) if not self.local else _local(self.uri)
        except (ValueError, OSError) as error:
            raise StorageError(f"storage {self.uri!r} is not understood: {error}") from error

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def path(self) -> Path:
        """The local folder; only for local storage."""
        assert self.local, f"{self.uri} is not local"
        return Path(self._root)

    def folder(self, name: str) -> Storage:
        if self.local:
            return Storage(f"{self.uri.rstrip('/')}/{name}")
        parts = urlsplit(self.uri)  # the path may be followed by options, as in s3://bucket/runs?region=...
        return Storage(parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl())

    def create(self) -> None:
        """Make this folder where it is local and not there; object stores have none. Raises StorageError."""
        if self.local:
            if JOBS_FOLDER in self.path.as_posix():
                raise StorageError(
                    f"cannot create {self.uri}: it lies in a job's own folder, which Ray deletes; storage of a job is "
                    "an absolute path or a URI that every node sees"
                )
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot create {self.uri}: {error.strerror}") from error

    def exists(self, name: str = "") -> bool:
        from pyarrow import fs

        with self._refused("read", name):
            return bool(self._fs.get_file_info(self._at(name)).type != fs.FileType.NotFound)

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted; empty when this folder does not exist."""
        from pyarrow import fs

        with self._refused("list", ""):
            infos = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def names(self) -> list[str]:
        """Names of everything directly inside, sorted; empty when this folder does not exist."""
        from pyarrow import fs

        with self._refused("list", ""):
            infos = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def read(self, name: str) -> bytes:
        with self._refused("read", name), self._fs.open_input_stream(self._at(name)) as stream:
            data: bytes = stream.read()
            return data

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        """Write a whole file: it appears complete or not at all. A local ``secret`` is for its owner only (0600)."""
        target = self._at(name)
        aside = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.local else target
        with self._refused("write", name):
            if self.local:  # object stores have no folders
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            try:
                if secret and self.local:
                    Path(aside).touch(mode=0o600)
                with self._fs.open_output_stream(aside) as stream:
                    stream.write(data)
                if aside != target:
                    Path(aside).replace(target)
            except BaseException:
                if aside != target:
                    Path(aside).unlink(missing_ok=True)
                raise

    def upload(self, folder: Path, name: str, last: str | None = None) -> None:
        """Copy a local folder here under ``name``, replacing what was there.

        ``last`` names the file that is written after all others where a folder cannot be renamed into place; a reader
        that finds it knows the rest is complete.
        """
        from pyarrow import fs

        with self._refused("write", name):
            if self.local:
                target = Path(self._at(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                for was in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
                    if target.exists():
                        shutil.rmtree(was, ignore_errors=True)
                    else:
                        was.rename(target)
                # Closed to other users: until a file's mode is copied it has that of a new file, keys too.
                closed = Path(tempfile.mkdtemp(".tmp", f".{target.name}.", target.parent))
                aside = closed / target.name
                old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
                try:
                    shutil.copytree(folder, aside)
                    if target.exists():
                        target.rename(old)
                    try:
                        aside.rename(target)
                    except OSError:
                        if old.exists():
                            old.rename(target)
                        raise
                finally:
                    shutil.rmtree(closed, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
                return
            root = self._at(name)
            files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
            for file in sorted(files - {last}):
                fs.copy_files(str(folder / file), f"{root}/{file}", destination_filesystem=self._fs)
            for info in self._fs.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True)):
                if info.type == fs.FileType.File and info.path.removeprefix(f"{root}/") not in files:
                    self._fs.delete_file(info.path)  # an earlier upload's
            if last in files:
                fs.copy_files(str(folder / last), f"{root}/{last}", destination_filesystem=self._fs)

    @contextmanager
    def download(self, name: str) -> Iterator[Path]:
        """Give a folder as a local path: itself when local, else a temporary copy."""
        from pyarrow import fs

        if self.local:
            yield Path(self._at(name))
            return
        with tempfile.TemporaryDirectory() as scratch:
            with self._refused("read", name):
                fs.copy_files(self._at(name), scratch, source_filesystem=self._fs)
            yield Path(scratch)

    def delete(self, name: str) -> None:
        with self._refused("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(self._at(name))

    def remove(self, name: str) -> None:
        """Delete one file; nothing happens where there is none."""
        with self._refused("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _refused(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.folder(name).uri if name else self.uri
            # copytree collects (source, target, reason) of every file that it could not copy.
            causes = error.args[0] if isinstance(error, shutil.Error) and error.args else ()
            reason = OSError(causes[0][2]) if causes else OSError(error.strerror) if error.strerror else error
            code = FAILURE if error.errno in FAULTS else None
            raise StorageError(f"cannot {verb} {where}: {first_line(reason)}", exit_code=code) from error


def _local(uri: str) -> tuple[Any, str]:
    from pyarrow import fs

    return fs.LocalFileSystem(), uri.removeprefix("file://")
