"""Results of the Python API: numbers, tables and pictures that a notebook shows."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raypp.bundle.load import PrivateBundle, PublicBundle, load_private, load_public
from raypp.bundle.manifest import bundle_location
from raypp.client.offline import protect_images, read_image
from raypp.evaluation.evaluate import evaluate_bundle
from raypp.evaluation.report.figures import score_boxes
from raypp.evaluation.report.source import read_source
from raypp.evaluation.scorecard import reidentification_rate
from raypp.evaluation.training_curves import training_curves
from raypp.utils.errors import DataError
from raypp.utils.image_files import find_images
from raypp.utils.images import decode
from raypp.utils.keys import Key
from raypp.utils.paths import shown_path
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    import pandas as pd

Rows = list[tuple[str, ...]]
BATCH_SIZE = 500


class Result:
    """A document of results with a text and an HTML representation; subclasses add properties for its main numbers.

    Args:
        values: the results as plain data, as the command line stores them.
        path: folder or URI that holds them; empty for none.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values, self.path = values, path

    def to_dict(self) -> dict[str, Any]:
        """The results as plain data, which JSON can hold."""
        return self.values

    def _title(self) -> str:
        return type(self).__name__

    def _table(self) -> Rows:
        """The header and the rows of the main table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = self._table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        header, *rows = self._table()

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in rows)
        return f"<p><b>{html.escape(self._title())}</b></p><table>{line(header, 'th')}{body}</table>"


class Evaluation(Result):
    """Accuracy of a bundle, and similarity of protected to plain images."""

    @property
    def accuracy(self) -> float:
        """Share of protected test images, rounded to 8 bits, that the classifier reads correctly."""
        return float(self.values["accuracy"])

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy."""
        low, high = self.values["accuracy_interval"]
        return low, high

    def _title(self) -> str:
        return f"Evaluation on {self.values['num_images']:,} images"

    def _table(self) -> Rows:
        return [ACCURACY_HEADER, _accuracy_row("protected, 8 bit", self.values)]


ACCURACY_HEADER = ("images", "accuracy", "95% interval", "SSIM to plain")


def _accuracy_row(label: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    low, high = metrics["accuracy_interval"]
    similarity = f"{metrics['ssim']['mean']:.3f}" if metrics["ssim"] else "-"
    return label, f"{metrics['accuracy']:.2%}", f"{low:.1%} to {high:.1%}", similarity


class Bundle:
    """A trained protection (public part) with its classifier (private part, which the owner has).

    Args:
        location: path or URI of a bundle, of its ``public`` folder, or of a run that holds a bundle.
        key: key file of a keyed protection; a whole bundle has the key in its private part.

    Raises:
        BundleError: the bundle is missing, altered or incomplete.
    """

    def __init__(self, location: str | Path, key: str | Path | None = None) -> None:
        self.path = bundle_location(str(location))
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

    @torch.inference_mode()
    def classify(self, protected: Any) -> list[tuple[str, float]]:
        """Classify protected images uint8 (N, H, W, C); returns the class and its probability for each image."""
        pixels = self._check_channels(as_pixels(protected, "protected"))
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        logits = torch.cat([self.private.classifier(batch.float() / 255) for batch in images.split(BATCH_SIZE)])
        probabilities, classes = logits.softmax(1).max(1)
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

    def __repr__(self) -> str:
        height, width = self.image_size
        options = self.public.about["protection"]
        return f"Bundle({shown_path(self.path)!r}, protection={options['name']!r}, images={height} x {width})"


def as_pixels(images: Any, name: str) -> np.ndarray:
    """Convert images to NumPy uint8 (N, H, W, C); raises DataError that names the argument."""
    array = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise DataError(f"{name} is {array.dtype} {array.shape}; allowed is uint8 (N, H, W, C) with 1 or 3 channels")
    return array


class RunResult(Result):
    """A finished training run."""

    @property
    def accuracy(self) -> float:
        """Test accuracy on protected images after 8-bit rounding."""
        return float(self.values["test"]["accuracy"])

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return self.values

    @cached_property
    def bundle(self) -> Bundle:
        """The run's bundle."""
        return Bundle(Storage(self.path).folder("bundle").uri)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of each epoch."""
        return [json.loads(line) for line in Storage(self.path).read("metrics.jsonl").splitlines()]

    def to_pandas(self) -> pd.DataFrame:
        """Metrics of each epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def plot(self) -> Image.Image:
        """Loss and accuracy by epoch."""
        return _image(training_curves(self.history))

    def _title(self) -> str:
        return f"Run {shown_path(self.path)}"

    def _table(self) -> Rows:
        plain = self.values["plain_test"]
        rows = [_accuracy_row("plain", plain)] if plain is not None else []
        return [ACCURACY_HEADER, *rows, _accuracy_row("protected, 8 bit", self.values["test"])]


class Scorecard(Result):
    """Scores and verdicts of an attack run."""

    @property
    def verdict(self) -> str | None:
        """``holds``, ``weak``, ``broken`` or ``inconclusive``, by the strongest attack; None if no attack finished."""
        return self.values["verdict"]  # type: ignore[no-any-return]

    @property
    def strongest_attack(self) -> str | None:
        """The attack with the highest re-identification rate."""
        return self.values["strongest_attack"]  # type: ignore[no-any-return]

    @property
    def reidentification_rate(self) -> float | None:
        """Share of originals that the strongest attack re-identifies in the gallery."""
        return self.values["reidentification_rate"]  # type: ignore[no-any-return]

    def to_pandas(self) -> pd.DataFrame:
        """A row per attack and baseline: re-identification rate, mean scores, verdict."""
        import pandas as pd

        rows = [
            {
                "attack": name,
                "threat": attack["threat"],
                "status": attack["status"],
                "reidentification_rate": attack.get("reidentification_rate"),
                "lower_bound": attack.get("lower_bound"),
                "verdict": attack.get("verdict"),
                **{metric: numbers["mean"] for metric, numbers in attack.get("scores", {}).items()},
            }
            for name, attack in self.values["attacks"].items()
        ]
        for name, scores in self.values["baselines"].items():
            means = {metric: numbers["mean"] for metric, numbers in scores.items()}
            rate = reidentification_rate(scores)
            rows.append({"attack": f"baseline: {name}", "status": "done", "reidentification_rate": rate} | means)
        return pd.DataFrame(rows).set_index("attack")

    def plot(self) -> Image.Image:
        """PSNR and SSIM of all images under each attack (the paper's Fig. 5)."""
        return _image(score_boxes(read_source(self.path)))

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the report, one HTML page that needs no network; returns its path."""
        target = Path(path)
        Storage(target.absolute().parent).write(target.name, Storage(self.path).read("report.html"))
        return target

    def _title(self) -> str:
        reason = f": {self.values['verdict_reason']}" if self.values["verdict_reason"] else ""
        return f"{self.values['label']}: {self.verdict} by {self.strongest_attack}{reason}"

    def _table(self) -> Rows:
        rows: Rows = [("attack", "threat", "re-identified", "SSIM", "verdict")]
        for name, attack in self.values["attacks"].items():
            if attack["status"] == "done":
                rate = f"{'≥ ' if attack['lower_bound'] else ''}{attack['reidentification_rate']:.1%}"
                rows.append(
                    (name, attack["threat"], rate, f"{attack['scores']['ssim']['mean']:.3f}", attack["verdict"])
                )
            else:
                rows.append((name, attack["threat"], "-", "-", attack["status"]))
        for name, scores in self.values["baselines"].items():
            rate = f"{reidentification_rate(scores):.1%}"
            rows.append((f"baseline: {name}", "", rate, f"{scores['ssim']['mean']:.3f}", ""))
        return rows


class SearchResult(Result):
    """A finished search: the Pareto front and its best bundles."""

    @property
    def front(self) -> list[dict[str, Any]]:
        """Trials on the Pareto front with their settings, accuracy and leakage."""
        return list(self.values["front"])

    @cached_property
    def best(self) -> dict[str, Bundle]:
        """Bundles of the best ``accuracy``, the best ``privacy`` and the ``knee`` between them."""
        return {name: Bundle(Storage(self.path).folder(f"best/{name}").uri) for name in self.values["best"]}

    def to_pandas(self) -> pd.DataFrame:
        """A row per trial."""
        import pandas as pd

        return pd.read_csv(io.BytesIO(Storage(self.path).read("trials.csv")))

    def plot(self) -> Image.Image:
        """Leakage against accuracy of all trials."""
        return _image(Storage(self.path).read("front.png"))

    def _title(self) -> str:
        return f"Pareto front of {shown_path(self.path)}"

    def _table(self) -> Rows:
        rows: Rows = [("trial", "accuracy", "leakage", "re-identified")]
        for point in self.front:
            rate = f"{point['reidentification_rate']:.1%}"
            rows.append((point["trial"], f"{point['accuracy']:.1%}", f"{point['leakage']:.3f}", rate))
        return rows


class Table1(Result):
    """The paper's Table I: a row per dataset and method."""

    def to_pandas(self) -> pd.DataFrame:
        """A row per dataset and method."""
        import pandas as pd

        return pd.DataFrame(self.values["rows"])

    def to_markdown(self) -> str:
        """The table with its notes, as Markdown."""
        return Storage(self.path).read("table1.md").decode()

    def plot(self) -> Image.Image:
        """Accuracies with the paper's values."""
        return _image(Storage(self.path).read("table1.png"))

    def _title(self) -> str:
        return f"Table I in {shown_path(self.path)}"

    def _table(self) -> Rows:
        rows: Rows = [("data", "method", "paper", "ours, 8 bit", "seeds")]
        for row in self.values["rows"]:
            paper = "-" if row["paper"] is None else f"{row['paper']:.2f}%"
            mean = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
            rows.append((row["data"], row["method"], paper, mean, str(row["seeds"])))
        return rows


def _image(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
