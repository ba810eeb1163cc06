"""Bearer tokens with scopes. The token file holds only hashes; a token is printed once, when it is created."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raypp.serve.admission import RequestError
from raypp.utils.errors import ConfigError
from raypp.utils.storage import Storage

logger = logging.getLogger("raypp.serve")
SCOPES = ("classify", "attack")
PREFIX = "raypp_"
NUM_BYTES = 32  # 256 random bits cannot be guessed, so a fast hash is enough


@dataclass(frozen=True)
class Tokens:
    """Hashes of tokens, with their names and scopes."""

    entries: tuple[tuple[str, bytes, frozenset[str]], ...]

    @classmethod
    def read(cls, path: str) -> Tokens:
        """Read a token file; raises ConfigError if it is missing or damaged."""
        try:
            tokens = json.loads(Path(path).read_text())["tokens"]
            entries = tuple((str(e["name"]), bytes.fromhex(e["sha256"]), frozenset(e["scopes"])) for e in tokens)
        except OSError as error:
            raise ConfigError(f"token file {path!r} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"token file {path!r} is damaged; create tokens with raypp token") from error
        if not entries:
            raise ConfigError(f"token file {path!r} holds no token; create one with raypp token")
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


class TokenFile:
    """A token file that is read again after each change.

    If the file later disappears or is damaged, the last valid tokens stay in force; at the start it is a ConfigError.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()  # requests check the file in parallel threads
        self._stamp = self._read_stamp()
        self._tokens = Tokens.read(path)

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = Path(self._path).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def current(self) -> Tokens:
        """Return the valid tokens. Accesses the file, so do not call it in an event loop."""
        with self._lock:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return self._tokens
            self._stamp = stamp
            if stamp is None:  # a short outage of the storage locks no client out
                logger.error("token file %r is gone; its last tokens stay valid until it is back", self._path)
                return self._tokens
            try:
                self._tokens = Tokens.read(self._path)
            except ConfigError as error:
                logger.error("%s; its last valid tokens stay in force", error)
            return self._tokens


def add_token(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Create a token, store its hash in the file (mode 0600) and return the token.

    Raises ConfigError if a scope is unknown, the name is not allowed or taken, or the file is damaged.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"unknown scope {scope!r}; allowed: {', '.join(SCOPES)}")
    if not name or not name.isprintable():
        raise ConfigError(f"token name {name!r} is not allowed; use printable characters")
    with _edit(path) as entries:
        if name in [entry["name"] for entry in entries]:
            raise ConfigError(f"token name {name!r} is taken in {str(path)!r}; choose another one")
        token = PREFIX + secrets.token_urlsafe(NUM_BYTES)
        digest, created = hashlib.sha256(token.encode()).hexdigest(), datetime.now(UTC).isoformat(timespec="seconds")
        entries.append({"name": name, "sha256": digest, "scopes": sorted(set(scopes)), "created": created})
    return token


def remove_token(path: Path, name: str) -> None:
    """Remove a token from the file; running services refuse it from their next request on.

    Raises ConfigError if no token has this name, it is the last one, or the file is damaged.
    """
    Tokens.read(str(path.expanduser()))  # an edit would create the folder of a missing file
    with _edit(path) as entries:
        names = [entry["name"] for entry in entries]
        if name not in names:
            raise ConfigError(f"there is no token {name!r} in {str(path)!r}; it has {', '.join(names) or 'none'}")
        if len(names) == 1:
            raise ConfigError(f"token {name!r} is the last one in {str(path)!r}; create another one first")
        del entries[names.index(name)]


@contextmanager
def _edit(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Lock a token file, yield its entries for changes and write them back."""
    storage = Storage(path.expanduser().absolute().parent)
    storage.path.mkdir(parents=True, exist_ok=True)
    with _locked(storage.path / f".{path.name}.lock"):
        entries: list[dict[str, Any]] = []
        if storage.exists(path.name):
            Tokens.read(str(storage.path / path.name))  # checks the file
            entries = json.loads(storage.read(path.name))["tokens"]
        yield entries
        storage.write(path.name, (json.dumps({"tokens": entries}, indent=1) + "\n").encode(), secret=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file that exists only during the edit."""
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else the process before this one has deleted it
                try:
                    yield
                finally:
                    path.unlink()
                return
