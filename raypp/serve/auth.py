"""Bearer tokens with scopes. The token file holds only hashes; a token is printed once, when it is created.

Services read the file from a path, from a URI, or from an environment variable that holds its text.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raypp.serve.admission import RequestError
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.paths import resolve_path
from raypp.utils.storage import Storage

logger = logging.getLogger("raypp.serve")
SCOPES = ("classify", "attack")
PREFIX = "raypp_"
VARIABLE = "env:"  # prefix of an environment variable's name
POLL_SECONDS = 2.0  # between two reads of a token file on object storage
NUM_BYTES = 32  # 256 random bits cannot be guessed, so a fast hash is enough


@dataclass(frozen=True)
class Tokens:
    """Hashes of tokens, with their names and scopes."""

    entries: tuple[tuple[str, bytes, frozenset[str]], ...]

    @classmethod
    def read(cls, location: str) -> Tokens:
        """Read the token file at a path or URI, or the text of one in the variable NAME of ``env:NAME``.

        Raises:
            ConfigError: it is missing or damaged.
        """
        name = _describe(location)
        try:
            tokens = json.loads(_read_text(location))["tokens"]
            entries = tuple((str(e["name"]), bytes.fromhex(e["sha256"]), frozenset(e["scopes"])) for e in tokens)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{name} is damaged; create tokens with raypp token") from error
        if not entries:
            raise ConfigError(f"{name} holds no token; create one with raypp token")
        return cls(entries)

    def check(self, authorization: str | None, scope: str) -> str:
        """Return the name of the token in an Authorization header.

        Raises RequestError: 401 if the token is missing or unknown, 403 if it lacks the scope.
        """
        kind, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        match = None
        for entry in self.entries:  # without an early exit, so that the duration reveals nothing
            if hmac.compare_digest(entry[1], digest):
                match = entry
        challenge = 'Bearer realm="raypp"'
        if kind.lower() != "bearer" or match is None:
            raise RequestError(401, "no-token", "a valid bearer token is required", {"WWW-Authenticate": challenge})
        name, _, scopes = match
        if scope not in scopes:
            challenge += f', error="insufficient_scope", scope="{scope}"'
            reason = f"this token does not have the scope {scope!r}"
            raise RequestError(403, "wrong-scope", reason, {"WWW-Authenticate": challenge})
        return name


def token_location(location: str) -> str:
    """Make a path of a token file absolute; URIs and ``env:NAME`` stay as they are; raises ConfigError."""
    if location.startswith(VARIABLE):
        return location
    try:
        return resolve_path(location)
    except ValueError as error:
        raise ConfigError(f"a token file's location is not understood: {error}") from error


def _describe(location: str) -> str:
    if location.startswith(VARIABLE):
        return f"the environment variable {location.removeprefix(VARIABLE)!r}"
    return f"token file {location!r}"


def _read_text(location: str) -> str:
    if location.startswith(VARIABLE):
        text = os.environ.get(location.removeprefix(VARIABLE))
        if text is None:
            raise ConfigError(f"{_describe(location)} is not set; put the text of a token file into it")
        return text
    try:
        return Storage(location).read("").decode() if "://" in location else Path(location).read_text()
    except OSError as error:
        raise ConfigError(f"{_describe(location)} cannot be read: {error.strerror}") from error
    except StorageError as error:
        raise ConfigError(f"{_describe(location)} cannot be read: {error}") from error


class TokenSource:
    """The tokens of a service. An environment variable cannot change; files can, see the subclasses.

    If a file later disappears or is damaged, the last valid tokens stay in force; at the start it is a ConfigError.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._tokens = Tokens.read(location)

    def current(self) -> Tokens:
        """Return the valid tokens. May access a file, so do not call it in an event loop."""
        return self._tokens


class TokenFile(TokenSource):
    """A token file on a disk, which is read again after each change."""

    def __init__(self, location: str) -> None:
        self._lock = threading.Lock()  # requests check the file in parallel threads
        self._stamp = self._read_stamp(location)
        super().__init__(location)

    @staticmethod
    def _read_stamp(path: str) -> tuple[int, int, int] | None:
        try:
            stat = Path(path).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def current(self) -> Tokens:
        with self._lock:
            stamp = self._read_stamp(self._location)
            if stamp == self._stamp:
                return self._tokens
            self._stamp = stamp
            if stamp is None:  # a short outage of the storage locks no client out
                logger.error("token file %r is gone; its last tokens stay valid until it is back", self._location)
                return self._tokens
            try:
                self._tokens = Tokens.read(self._location)
            except ConfigError as error:
                logger.error("%s; its last valid tokens stay in force", error)
            return self._tokens


class TokenObject(TokenSource):
    """A token file on object storage, which a thread reads every :data:`POLL_SECONDS`: no request waits for it."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._problem: str | None = None
        threading.Thread(target=_poll, args=(weakref.ref(self),), name="raypp-tokens", daemon=True).start()

    def refresh(self) -> None:
        """Read the file again."""
        try:
            self._tokens, self._problem = Tokens.read(self._location), None
        except ConfigError as error:
            problem = str(error)
            if problem != self._problem:
                logger.error("%s; its last valid tokens stay in force", problem)
            self._problem = problem


def _poll(reference: weakref.ref[TokenObject]) -> None:
    while (source := reference()) is not None:
        source.refresh()
        del source  # else this thread would keep it alive
        time.sleep(POLL_SECONDS)


def open_tokens(location: str) -> TokenSource:
    """Open a token file by its path or URI, or the variable of ``env:NAME``; raises ConfigError."""
    if location.startswith(VARIABLE):
        return TokenSource(location)
    return TokenObject(location) if "://" in location else TokenFile(location)


def add_token(location: str | Path, name: str, scopes: Sequence[str]) -> str:
    """Create a token, store its hash in the file at a path (mode 0600) or URI, and return the token.

    Raises ConfigError if a scope is unknown, the name is not allowed or taken, or the file is damaged.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"unknown scope {scope!r}; allowed: {', '.join(SCOPES)}")
    if not name or not name.isprintable():
        raise ConfigError(f"token name {name!r} is not allowed; use printable characters")
    with _edit(location) as entries:
        if name in [entry["name"] for entry in entries]:
            raise ConfigError(f"token name {name!r} is taken in {str(location)!r}; choose another one")
        token = PREFIX + secrets.token_urlsafe(NUM_BYTES)
        digest, created = hashlib.sha256(token.encode()).hexdigest(), datetime.now(UTC).isoformat(timespec="seconds")
        entries.append({"name": name, "sha256": digest, "scopes": sorted(set(scopes)), "created": created})
    return token


def remove_token(location: str | Path, name: str) -> None:
    """Remove a token from the file; running services refuse it from their next request on.

    Raises ConfigError if no token has this name, it is the last one, or the file is damaged.
    """
    with _edit(location, must_exist=True) as entries:
        names = [entry["name"] for entry in entries]
        if name not in names:
            raise ConfigError(f"there is no token {name!r} in {str(location)!r}; it has {', '.join(names) or 'none'}")
        if len(names) == 1:
            raise ConfigError(f"token {name!r} is the last one in {str(location)!r}; create another one first")
        del entries[names.index(name)]


@contextmanager
def _edit(location: str | Path, *, must_exist: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Lock a token file, yield its entries for changes and write them back. Object storage has no locks."""
    if str(location).startswith(VARIABLE):
        raise ConfigError(f"{_describe(str(location))} cannot be changed; create a file and put its text into it")
    file = Storage(location)
    folder = file.parent
    if must_exist and not folder.exists(file.name):
        Tokens.read(str(file.path) if file.local else file.uri)  # raises: an edit would create the file's folder
    with _locked(folder.path, file.name) if file.local else contextlib.nullcontext():
        entries: list[dict[str, Any]] = []
        if folder.exists(file.name):
            text = folder.read(file.name)
            Tokens.read(str(file.path) if file.local else file.uri)  # checks the file
            entries = json.loads(text)["tokens"]
        yield entries
        folder.write(file.name, (json.dumps({"tokens": entries}, indent=1) + "\n").encode(), secret=True)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Lock a file that exists only during the edit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else the process before this one has deleted it
                try:
                    yield
                finally:
                    path.unlink()
                return
