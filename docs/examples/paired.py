"""Accuracy of one run's bundle beside another's on the same test images, and the difference image by image.

    python docs/examples/paired.py runs/plain runs/code

Both runs have read the same data; the interval is the 95% normal one of the mean difference.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from raypp.bundle.load import load_private, load_public
from raypp.config.presets import load_config
from raypp.data.splits import load_split

PART = 500  # images at a time


def right(run: str) -> tuple[Tensor, int]:
    """Which test images a run's bundle classifies rightly, (N,), and how many of their protected images differ."""
    test = load_split(load_config(f"{run}/config.yaml"), "test")
    protection = load_public(f"{run}/bundle").protection.eval()
    classifier = load_private(f"{run}/bundle").classifier.eval()
    images, labels = torch.as_tensor(test.images).permute(0, 3, 1, 2), torch.as_tensor(test.labels)
    found, different = [], set()
    with torch.inference_mode():
        for start in range(0, len(images), PART):
            protected = protection.protect(images[start : start + PART])
            different |= {image.numpy().tobytes() for image in protected}
            found.append(classifier(protected.float() / 255).argmax(1) == labels[start : start + PART])
    return torch.cat(found), len(different)


if __name__ == "__main__":
    (one, _), (other, different) = (right(run) for run in sys.argv[1:3])
    gain = other.double() - one.double()
    margin = 1.96 * gain.std().item() / len(gain) ** 0.5
    mean = gain.mean().item()
    print(f"{one.double().mean():.2%}, {other.double().mean():.2%}, {len(gain):,} images: "
          f"{100 * mean:+.2f} points ({100 * (mean - margin):+.2f} to {100 * (mean + margin):+.2f}); "
          f"the second has {different} different protected images")  # fmt: skip
