"""The validation set of a stream in its run's folder, so that only the first start reads the whole data set.

validation/images.safetensors   ``image`` uint8 (N, H, W, C) and ``label`` int64 (N,)
validation/validation.json      the fingerprint of the data, and the SHA-256 of the images
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from raypp.utils.documents import dump_json
from raypp.utils.storage import Storage, sha256

FOLDER = "validation"
IMAGES, DESCRIPTION = "images.safetensors", "validation.json"

Batch = dict[str, np.ndarray]


def save_validation_set(run: Storage, images: Batch, fingerprint: str) -> None:
    """Store the images of the data with this fingerprint; replaces an earlier set."""
    from safetensors.numpy import save_file

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(images, folder / IMAGES)
        description = {"fingerprint": fingerprint, "sha256": sha256(folder / IMAGES)}
        (folder / DESCRIPTION).write_bytes(dump_json(description))
        run.upload(folder, FOLDER, last=DESCRIPTION)


def load_validation_set(run: Storage, fingerprint: str) -> Batch | None:
    """Return the stored images; None if there are none, they are damaged, or the data has another fingerprint."""
    from safetensors.numpy import load_file

    if not run.exists(f"{FOLDER}/{DESCRIPTION}"):
        return None
    with run.download(FOLDER) as folder:
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            if description["fingerprint"] != fingerprint or description["sha256"] != sha256(folder / IMAGES):
                return None
            images: Batch = load_file(folder / IMAGES)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return images
