"""The ideal end of protections for classification: nothing leaves but a class, painted as one grey per class.

The class is what a classifier of plain images says, of the bundle that ``PLAIN_BUNDLE`` names:
``raypp train PRESET --protection plain --train.mode plain`` makes one.
"""

import os

import numpy as np
import torch

from raypp.bundle.load import load_private

CLASSIFIER = load_private(os.environ["PLAIN_BUNDLE"]).classifier


@torch.inference_mode()
def protect(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) to uint8 (N, H, W, C)."""
    scores = CLASSIFIER(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    greys = scores.argmax(1).numpy() * (255 // (scores.shape[1] - 1))
    return np.broadcast_to(greys.astype(np.uint8)[:, None, None, None], images.shape).copy()
