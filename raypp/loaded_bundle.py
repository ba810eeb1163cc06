"""A bundle as an object: protect, classify and evaluate from Python."""

from __future__ import annotations

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raypp.bundle.load import PrivateBundle, PublicBundle, load_private, load_public
from raypp.bundle.locate import locate_bundle
from raypp.client.offline import protect_images, read_image
from raypp.evaluation.evaluate import evaluate_bundle
from raypp.models.layers import logits_in_batches
from raypp.result import Evaluation, Rows, TableRepr
from raypp.utils.errors import BundleError, DataError
from raypp.utils.image_files import find_images
from raypp.utils.images import as_pixels, decode
from raypp.utils.keys import Key
from raypp.utils.paths import shown_path
from raypp.utils.storage import Storage

MAX_CLASSES = 5  # in the representation


class Bundle(TableRepr):
    """A trained protection (public part) with its classifier (private part, which the owner has).

    Args:
        location: path or URI of a bundle or its ``public`` folder, of a run, of a model repository, of a search
            (``SEARCH#knee``, ``SEARCH#accuracy``), or a result path or checkpoint of Ray Train or Ray Tune.
        key: key file of a keyed protection; a whole bundle has the key in its private part.

    Raises:
        BundleError: the bundle is missing, altered or incomplete.
    """

    def __init__(self, location: str | Path, key: str | Path | None = None) -> None:
        self.path = locate_bundle(location)
        self.public: PublicBundle = load_public(self.path, None if key is None else Key.read(Path(key)))

    @cached_property
    def private(self) -> PrivateBundle:
        """The owner's part: the classifier, its classes and the measured numbers."""
        return load_private(self.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.private.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.public.image_size

    def protect(self, images: Any) -> np.ndarray:
        """Protect images as a client does.

        Args:
            images: NumPy or torch uint8 (H, W, C) or (N, H, W, C), a PIL image, the path of an image or of a folder,
                or a list of PIL images or paths. Files and PIL images are fitted to :attr:`image_size`.

        Returns:
            protected images uint8 (N, H, W, C).
        """
        return protect_images(self.public, self._pixels(images))

    def classify(self, protected: Any) -> list[tuple[str, float]]:
        """Classify protected images uint8 (N, H, W, C); returns the class and its probability for each image."""
        pixels = self._check_channels(as_pixels(protected, "protected"))
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        probabilities, classes = logits_in_batches(self.private.classifier, images).softmax(1).max(1)
        return [(self.classes[c], float(p)) for c, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]

    def evaluate(self, split: str = "test", jpeg: int | None = None) -> Evaluation:
        """Measure accuracy and similarity on the bundle's own data, see :func:`raypp.evaluate`."""
        return Evaluation(evaluate_bundle(self.path, (), split, jpeg), self.path)

    @property
    def card(self) -> str:
        """The model card in Markdown."""
        return Storage(self.path).read("MODEL_CARD.md").decode()

    def _pixels(self, images: Any) -> np.ndarray:
        if isinstance(images, list | tuple):
            parts = [self._pixels(image) for image in images]
            sizes = sorted({str(part.shape[1:]) for part in parts})
            if len(sizes) != 1:
                problem = f"have the sizes {', '.join(sizes)}" if sizes else "is empty"
                raise DataError(f"images {problem}; allowed are one or more images of one size")
            return np.concatenate(parts)
        if isinstance(images, str | Path):
            files = find_images(Path(images))
            return np.stack([read_image(file, self.image_size, self.public.channels) for file in files])
        if isinstance(images, Image.Image):
            buffer = io.BytesIO()
            images.convert("RGBA" if "A" in images.getbands() else "RGB").save(buffer, "PNG")
            size, channels = self.image_size, self.public.channels
            return decode(buffer.getvalue(), name="the image", size=size, channels=channels)[None]
        return self._check_channels(as_pixels(images, "images"))

    def _check_channels(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[3] != self.public.channels:
            raise DataError(f"images have {pixels.shape[3]} channels; the bundle reads {self.public.channels}")
        return pixels

    def _title(self) -> str:
        return f"Bundle {shown_path(self.path)}"

    def _table(self) -> Rows:
        height, width = self.image_size
        size = f"{height} x {width}"
        try:
            classes, test = self.private.classes, self.private.metrics["test"]
        except BundleError:  # the public part alone
            accuracy = interval = names = "-"
        else:
            low, high = test["accuracy_interval"]
            accuracy, interval = f"{test['accuracy']:.2%}", f"{low:.1%} to {high:.1%}"
            more = ", ..." if len(classes) > MAX_CLASSES else ""
            names = f"{len(classes)}: {', '.join(classes[:MAX_CLASSES])}{more}"
        header = ("protection", "image size", "accuracy", "95% interval", "classes")
        return [header, (self.public.about["protection"]["name"], size, accuracy, interval, names)]
