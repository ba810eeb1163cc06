"""The protection of a client: verify and cache a public part, prepare images, detect unprotected ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from raypp.bundle.load import PublicBundle, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.client.offline import read_image
from raypp.client.session import RemoteError
from raypp.utils.errors import BundleError, DataError, RayppError
from raypp.utils.images import Pixels, decode, resize_and_center_crop, to_grayscale
from raypp.utils.keys import Key
from raypp.utils.storage import new_folder, sha256

SHA256 = re.compile("[0-9a-f]{64}")
MAX_UNPACKED = 2**30  # bytes of a public part
MIN_DIFFERENCE = 2.0  # mean absolute difference between an image and its protected form, of 255
MAX_FLAT_RANGE = 8  # range of the values of an image without content, of 255

Image = str | Path | bytes | Pixels
"""A file, the content of one, or uint8 (H, W, C)."""


class ProtectionCache:
    """Folder of public parts, each in a subfolder named by the SHA-256 of its manifest.

    It lies below the user's cache folder by default; ``key`` is the key file of a keyed protection.
    """

    def __init__(self, folder: str | Path | None, key: str | Path | None) -> None:
        user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = Path(folder) if folder is not None else Path(user_cache) / "raypp" / "protections"
        self._key = Key.read(key) if key is not None else None

    def __contains__(self, identifier: str) -> bool:
        return (self._folder / identifier / MANIFEST).is_file()

    def load(self, identifier: str, archive: bytes, url: str) -> PublicBundle:
        """Load a protection from the cache, or verify the service's archive and store it first.

        Args:
            identifier: SHA-256 of the manifest.
            archive: ZIP file of the public part; unused if the cache holds the protection.
            url: of the service, for messages.

        Raises:
            RemoteError: the identifier is none.
            BundleError: the archive or the cached folder does not match it, or the protection changes nothing.
        """
        if not SHA256.fullmatch(identifier):
            raise RemoteError(f"{url} names no protection; is it a raypp classifier?")
        if identifier not in self:
            self._store(identifier, archive, url)
        folder = self._folder / identifier
        altered = f"{str(folder)!r} was altered; remove it, and the client fetches it again"
        if sha256(folder / MANIFEST) != identifier:
            raise BundleError(altered)
        try:
            is_keyed = json.loads((folder / "protection.json").read_text()).get("key") is not None
        except (OSError, ValueError, AttributeError) as error:
            raise BundleError(altered) from error
        bundle = load_public(folder, self._key if is_keyed else None)
        if not bundle.protection.hides:
            raise BundleError(f"{url} asks for images without any protection; nothing was sent")
        return bundle

    def _store(self, identifier: str, archive: bytes, url: str) -> None:
        files = _unpack(archive, url)
        if hashlib.sha256(files.get(MANIFEST, b"")).hexdigest() != identifier:
            raise BundleError(f"the protection from {url} is not the one that it names; nothing was sent")
        try:
            with new_folder(self._folder / identifier) as temporary:
                for name, data in files.items():
                    (temporary / name).write_bytes(data)
        except RayppError:
            if identifier not in self:  # otherwise another client has stored it in the meantime
                raise


def _unpack(archive: bytes, url: str) -> dict[str, bytes]:
    """Files of a public part by name. Allowed are flat, unique names and ``MAX_UNPACKED`` bytes in all."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            infos = opened.infolist()
            names = [info.filename for info in infos]
            is_allowed = all(name == Path(name).name and name not in ("", ".", "..") for name in names)
            # Services store without compression; some decompressors raise undocumented errors.
            is_allowed &= all(info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1 for info in infos)
            is_allowed &= len(set(names)) == len(names) and sum(info.file_size for info in infos) <= MAX_UNPACKED
            if not is_allowed:
                raise BundleError(f"the protection from {url} holds files that no protection has; nothing was sent")
            return {info.filename: opened.read(info) for info in infos}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError) as error:
        raise BundleError(f"the protection from {url} is damaged: {error}; nothing was sent") from error


def load_image(image: Image, bundle: PublicBundle, name: str) -> Pixels:
    """Read an image, fitted to the bundle's size and channels, as uint8 (H, W, C).

    Raises DataError if it cannot be read; the message has ``name``, or the path of a file.
    """
    if isinstance(image, str | Path):
        pixels = read_image(Path(image))
    elif isinstance(image, bytes):
        pixels = decode(image, name=name)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3):
        if not image.size:
            raise DataError(f"{name} is {image.shape[0]} x {image.shape[1]}; it has no pixel")
        pixels = image
    else:
        raise DataError(f"{name} is no file, bytes or uint8 array (H, W, C) with 1 or 3 channels")
    if pixels.shape[2] != bundle.channels:
        pixels = to_grayscale(pixels) if bundle.channels == 1 else np.repeat(pixels, 3, axis=2)
    return resize_and_center_crop(pixels, bundle.image_size)


def find_unprotected(plain: Pixels, protected: Pixels) -> list[int]:
    """Indices of images that a protection has left (nearly) unchanged.

    An untrustworthy service may serve such a protection, and a key may leave an image unchanged by chance. Images of
    one color have no content to protect.
    """
    if plain.shape != protected.shape:
        return []
    values = plain.reshape(len(plain), -1).astype(np.int16)
    difference = np.abs(values - protected.reshape(len(plain), -1)).mean(1)
    has_content = values.max(1) - values.min(1) > MAX_FLAT_RANGE
    indices: list[int] = np.flatnonzero((difference < MIN_DIFFERENCE) & has_content).tolist()
    return indices
