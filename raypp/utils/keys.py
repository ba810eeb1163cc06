"""Secret keys of keyed protections, and the permutations and masks that are expanded from them.

A key is 256 bits from the system's cryptographic generator. A protection expands it by SHAKE-256 (FIPS 202) over the
key and a label. Two labels give independent streams, and no stream reveals the key. A key prints as its identifier.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import string
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raypp.utils.errors import ConfigError

NUM_BYTES = 32
FILE = "protection.key"


class Key:
    """One secret of 256 bits."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == NUM_BYTES
        self._secret = secret

    @classmethod
    def generate(cls) -> Key:
        return cls(secrets.token_bytes(NUM_BYTES))

    @classmethod
    def read(cls, path: str | Path) -> Key:
        """Read a key file; raises ConfigError if it is missing or invalid."""
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"key file {str(path)!r} cannot be read: {error.strerror}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Key:
        """Parse the text of a key file; messages name ``where`` and never repeat the text."""
        digits = text.strip()
        if len(digits) != 2 * NUM_BYTES or not set(digits) <= set(string.hexdigits):
            raise ConfigError(f"{where!r} holds no key; a key file is one line of {2 * NUM_BYTES} hexadecimal digits")
        return cls(bytes.fromhex(digits))

    def text(self) -> str:
        """The content of a key file."""
        return self._secret.hex() + "\n"

    def write(self, path: Path) -> None:
        """Write a new key file that only its owner may read (mode 0600)."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.text())

    @property
    def identifier(self) -> str:
        """Sixteen hexadecimal digits that distinguish keys and reveal nothing of them."""
        return hashlib.blake2b(self._secret, digest_size=8, person=b"raypp key id").hexdigest()

    def __repr__(self) -> str:
        return f"Key({self.identifier})"

    def stream(self, label: str, num: int) -> npt.NDArray[np.uint8]:
        """The first ``num`` bytes of the stream ``label``."""
        data = hashlib.shake_256(self._secret + label.encode()).digest(num)
        return np.frombuffer(data, dtype=np.uint8)

    def bits(self, label: str, num: int) -> npt.NDArray[np.uint8]:
        """``num`` fair bits, each 0 or 1."""
        return np.unpackbits(self.stream(label, -(-num // 8)))[:num]

    def integers(self, label: str, num: int, below: int) -> npt.NDArray[np.int64]:
        """``num`` integers in 0..below-1; the bias of 64 bits modulo ``below`` is under below / 2**64."""
        words = self.stream(label, 8 * num).view("<u8")
        return (words % np.uint64(below)).astype(np.int64)

    def permutations(self, label: str, num: int, length: int) -> npt.NDArray[np.int64]:
        """``num`` uniform permutations of 0..length-1, shape (num, length)."""
        words = self.stream(label, 8 * num * length).view("<u8").reshape(num, length)
        return np.argsort(words, axis=1, kind="stable")
