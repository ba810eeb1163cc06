"""A folder on any pyarrow filesystem, such as a local path or ``s3://bucket/prefix``.

Writes are atomic, so a reader never sees half a file. On a local disk they go to a temporary file that is renamed.
Object stores show an object only when it is complete.
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
from urllib.parse import urlsplit

from raypp.utils.errors import FAILURE, StorageError, first_line
from raypp.utils.paths import resolve_path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # failures at run time, not wrong usage
JOBS_FOLDER = "/runtime_resources/working_dir_files/"  # where `ray job submit` unpacks the working directory


def sha256(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a local file atomically, with these permissions; raises OSError."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(mode)
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to ``target``, which is new or empty, unless an error occurs.

    StorageError is raised if the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(target)  # also over an empty folder
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Storage:
    """The folder at ``location``, a local path or a pyarrow filesystem URI.

    StorageError is raised if pyarrow does not know the URI's scheme, and by methods if the filesystem refuses access.
    """

    def __init__(self, location: str | Path) -> None:
        from pyarrow import fs

        try:
            self.uri = resolve_path(location)
        except ValueError as error:
            raise StorageError(f"storage is not understood: {error}") from error
        self.local = "://" not in self.uri or self.uri.startswith("file://")
        try:
            if self.local:
                self._fs, self._root = fs.LocalFileSystem(), self.uri.removeprefix("file://")
            else:
                self._fs, self._root = fs.FileSystem.from_uri(self.uri)
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

    @property
    def parent(self) -> Storage:
        """The folder that holds this one."""
        if self.local:
            return Storage(self.path.parent)
        parts = urlsplit(self.uri)
        return Storage(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl())

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self._root).rstrip("/").rpartition("/")[2]

    def create(self) -> None:
        """Create this folder if it is local, as object stores have no folders; raises StorageError."""
        if not self.local:
            return
        if JOBS_FOLDER in self.path.as_posix():
            raise StorageError(
                f"cannot create {self.uri}: Ray deletes this working directory of the job; set an absolute path or a "
                "URI that all nodes can access"
            )
        with self._convert_errors("create", ""):
            self.path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str = "") -> bool:
        with self._convert_errors("read", name):
            return bool(self._fs.get_file_info(self._full_path(name)).type.name != "NotFound")

    def names(self, *, folders_only: bool = False) -> list[str]:
        """Names of everything directly inside, sorted; empty when this folder does not exist."""
        from pyarrow import fs

        with self._convert_errors("list", ""):
            entries = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(e.base_name for e in entries if e.type.name == "Directory" or not folders_only)

    def folders(self) -> list[str]:
        return self.names(folders_only=True)

    def read(self, name: str) -> bytes:
        with self._convert_errors("read", name), self._fs.open_input_stream(self._full_path(name)) as stream:
            data: bytes = stream.read()
            return data

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        """Write a whole file atomically; only its owner can read a local ``secret`` (0600)."""
        target = self._full_path(name)
        with self._convert_errors("write", name):
            if not self.local:
                with self._fs.open_output_stream(target) as stream:
                    stream.write(data)
                return
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write_file(Path(target), data, 0o600 if secret else 0o666)

    def upload(self, folder: Path, name: str, last: str | None = None) -> None:
        """Copy a local folder to ``name`` and replace the previous content.

        Object stores cannot rename a folder. There, the file ``last`` is written after all others, and a reader that
        sees it knows that the rest is complete.
        """
        from pyarrow import fs

        target = self._full_path(name)
        with self._convert_errors("write", name):
            if self.local:
                _replace_folder(folder, Path(target))
                return
            files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
            for file in sorted(files - {last}):
                fs.copy_files(str(folder / file), f"{target}/{file}", destination_filesystem=self._fs)
            for info in self._fs.get_file_info(fs.FileSelector(target, recursive=True, allow_not_found=True)):
                if info.is_file and info.path.removeprefix(f"{target}/") not in files:
                    self._fs.delete_file(info.path)  # of an earlier upload
            if last in files:
                fs.copy_files(str(folder / last), f"{target}/{last}", destination_filesystem=self._fs)

    @contextmanager
    def download(self, name: str) -> Iterator[Path]:
        """Yield the local path of a folder, or of a temporary copy if it is not local."""
        from pyarrow import fs

        if self.local:
            yield Path(self._full_path(name))
            return
        with tempfile.TemporaryDirectory() as temporary:
            with self._convert_errors("read", name):
                fs.copy_files(self._full_path(name), temporary, source_filesystem=self._fs)
            yield Path(temporary)

    def delete(self, name: str) -> None:
        with self._convert_errors("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(self._full_path(name))

    def remove(self, name: str) -> None:
        """Delete one file if it exists."""
        with self._convert_errors("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._full_path(name))

    def _full_path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _convert_errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            location = self.folder(name).uri if name else self.uri
            # copytree collects (source, target, reason) of every file that it could not copy.
            causes = error.args[0] if isinstance(error, shutil.Error) and error.args else ()
            reason = OSError(causes[0][2]) if causes else OSError(error.strerror) if error.strerror else error
            code = FAILURE if error.errno in DISK_ERRORS else None
            raise StorageError(f"cannot {verb} {location}: {first_line(reason)}", exit_code=code) from error


def _replace_folder(source: Path, target: Path) -> None:
    """Copy a folder next to ``target`` and rename it; between two renames ``target`` is missing, never incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_interrupted_upload(target)
    # Other users cannot enter this folder: until copytree sets a file's mode, everyone could read a key in it.
    private = Path(tempfile.mkdtemp(".tmp", f".{target.name}.", target.parent))
    copy = private / target.name
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        shutil.copytree(source, copy)
        if target.exists():
            target.rename(old)
        try:
            copy.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up_interrupted_upload(target: Path) -> None:
    """Delete the copies of a process that was killed, and restore the old folder if the new one is missing."""
    for copy in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(copy, ignore_errors=True)
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
