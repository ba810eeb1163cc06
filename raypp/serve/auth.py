"""Bearer tokens: who may classify, who may attack. The file holds hashes only; a token is shown once, when made."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
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
NUM_BYTES = 32  # of a token: 256 bits need no slow hash, nobody guesses them


@dataclass(frozen=True)
class Tokens:
    """Hashes of tokens, with their names and scopes."""

    entries: tuple[tuple[str, bytes, frozenset[str]], ...]

    @classmethod
    def read(cls, path: str) -> Tokens:
        """Read a token file; raises ConfigError if it is missing or damaged."""
        try:
            listed = json.loads(Path(path).read_text())["tokens"]
            entries = tuple((str(e["name"]), bytes.fromhex(e["sha256"]), frozenset(e["scopes"])) for e in listed)
        except OSError as error:
            raise ConfigError(f"token file {path!r} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"token file {path!r} is damaged; make tokens with raypp token") from error
        if not entries:
            raise ConfigError(f"token file {path!r} holds no token; make one with raypp token")
        return cls(entries)

    def check(self, authorization: str | None, scope: str) -> str:
        """The name of the token in an Authorization header, if it has the scope; raises RefusedError (401 or 403)."""
        kind, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        found = None
        for entry in self.entries:  # all of them, so that the time taken says nothing
            if hmac.compare_digest(entry[1], digest):
                found = entry
        if kind.lower() != "bearer" or found is None:
            raise RequestError(
                401, "no-token", "a valid bearer token is required", {"WWW-Authenticate": 'Bearer realm="raypp"'}
            )
        if scope not in found[2]:
            raise RequestError(
                403, "wrong-scope", f"this token does not have the scope {scope!r}",
                {"WWW-Authenticate": f'Bearer realm="raypp", error="insufficient_scope", scope="{scope}"'},
            )  # fmt: skip
        return found[0]


class TokenFile:
    """The tokens of a file as it is now: one that was added or taken out counts from the next request on.

    Raises:
        ConfigError: at first, the file is missing or damaged; later, what it held stays.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()  # several requests look at the same time, each in a thread
        self._mark = self._look()
        self._tokens = Tokens.read(path)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = Path(self._path).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def now(self) -> Tokens:
        """The tokens; looks at the file, so not for an event loop."""
        with self._lock:
            mark = self._look()
            if mark is None and self._mark is not None:  # a store that is away for a moment locks nobody out
                self._mark = None
                logger.error("token file %r is gone; the tokens it held stay valid until it is back", self._path)
            if mark not in (None, self._mark):
                self._mark = mark
                try:
                    self._tokens = Tokens.read(self._path)
                except ConfigError as error:
                    logger.error("%s; the tokens it held before stay valid", error)
            return self._tokens


def add_token(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Make a token, keep its hash in the file (0600) and return it: nobody can read it from there again.

    Raises:
        ConfigError: a scope is unknown, the name is taken, or the file is damaged.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"unknown scope {scope!r}; allowed: {', '.join(SCOPES)}")
    if not name or not name.isprintable():
        raise ConfigError(f"token name {name!r} is not allowed; use printable characters")
    with _changing(path) as listed:
        if name in [entry["name"] for entry in listed]:
            raise ConfigError(f"token name {name!r} is taken in {str(path)!r}; allowed is another one")
        token = PREFIX + secrets.token_urlsafe(NUM_BYTES)
        listed.append(
            {
                "name": name,
                "sha256": hashlib.sha256(token.encode()).hexdigest(),
                "scopes": sorted(set(scopes)),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    return token


def remove_token(path: Path, name: str) -> None:
    """Take a token out of the file; a running service refuses it from its next request on.

    Raises:
        ConfigError: there is none of this name, it is the last one, or the file is missing or damaged.
    """
    with _changing(path) as listed:
        names = [entry["name"] for entry in listed]
        if name not in names:
            raise ConfigError(f"there is no token {name!r} in {str(path)!r}; it has {', '.join(names) or 'none'}")
        if len(names) == 1:
            raise ConfigError(f"token {name!r} is the last one in {str(path)!r}; make another one first")
        del listed[names.index(name)]


@contextmanager
def _changing(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of a token file, to be changed; written back at the end, while nobody else writes."""
    storage = Storage(path.expanduser().absolute().parent)
    storage.path.mkdir(parents=True, exist_ok=True)
    with (storage.path / f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        listed: list[dict[str, Any]] = []
        if storage.exists(path.name):
            Tokens.read(str(storage.path / path.name))  # refuses a damaged one
            listed = json.loads(storage.read(path.name))["tokens"]
        yield listed
        storage.write(path.name, (json.dumps({"tokens": listed}, indent=1) + "\n").encode(), secret=True)
