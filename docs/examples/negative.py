"""A protection of one's own, to be attacked: see docs/tutorials/attack-your-own.md."""

import numpy as np


def protect(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) to uint8 (N, H, W, C): inverts images and mirrors them."""
    return 255 - images[:, :, ::-1]
