"""Results of the Python API: numbers, tables and pictures that a notebook shows."""

from __future__ import annotations

import io
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from raypp.dispatch import import_from_ray
from raypp.evaluation.reidentification import rates_by_gallery_size
from raypp.evaluation.report.figures import score_boxes
from raypp.evaluation.report.source import read_source
from raypp.evaluation.training_curves import training_curves
from raypp.loaded_bundle import Bundle
from raypp.result import ACCURACY_HEADER, Evaluation, Result, Rows, accuracy_row
from raypp.utils.paths import shown_path
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    import pandas as pd


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

    def evaluate(self, split: str = "test", jpeg: int | None = None) -> Evaluation:
        """Measure accuracy and similarity of the bundle again, see :func:`raypp.evaluate`."""
        return self.bundle.evaluate(split, jpeg)

    def protect(self, images: Any) -> np.ndarray:
        """Protect images as a client does, see :meth:`raypp.Bundle.protect`."""
        return self.bundle.protect(images)

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
        rows = [accuracy_row("plain", plain)] if plain is not None else []
        return [ACCURACY_HEADER, *rows, accuracy_row("protected, 8 bit", self.values["test"])]


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
        """Share of originals that the strongest attack re-identifies in a gallery of ``num_gallery`` images."""
        return self.values["reidentification_rate"]  # type: ignore[no-any-return]

    @property
    def bits_identified(self) -> float | None:
        """Mean of log2 M - log2(rank) in a gallery of M images by the strongest attack, with rank 1 for the nearest."""
        return self.values["bits_identified"]  # type: ignore[no-any-return]

    @property
    def num_gallery(self) -> int:
        """Number of images in the gallery for which the verdict holds."""
        return self.values["num_gallery"]  # type: ignore[no-any-return]

    @property
    def rates_by_gallery_size(self) -> dict[int, float]:
        """Expected re-identification rate of the strongest attack in smaller galleries, by their size."""
        if self.strongest_attack is None:
            return {}
        scores = self.values["attacks"][self.strongest_attack]["scores"]
        return rates_by_gallery_size(scores)

    @property
    def cloud_gain(self) -> float | None:
        """Accuracy minus that of the classifier that the client could run alone; None if it was not measured.

        It is an upper bound if :attr:`cloud_gain_is_upper_bound` is true.
        """
        client = self.values.get("client")
        return None if client is None else client["cloud_gain"]

    @property
    def cloud_gain_is_upper_bound(self) -> bool | None:
        """Whether the client alone could be more accurate than was measured; None if no gain was measured.

        That is so if its classifier trained fewer epochs than the cloud's, or if it affords a much larger one.
        """
        client = self.values.get("client")
        return None if client is None else client.get("cloud_gain_is_upper_bound")

    def to_pandas(self) -> pd.DataFrame:
        """A row per attack and baseline: re-identification rate, mean scores, verdict."""
        import pandas as pd

        rows = [
            {
                "attack": name,
                "threat": attack["threat"],
                "status": attack["status"],
                "reidentification_rate": attack.get("reidentification_rate"),
                "matcher": attack.get("matcher"),
                "lower_bound": attack.get("lower_bound"),
                "verdict": attack.get("verdict"),
                **{metric: numbers["mean"] for metric, numbers in attack.get("scores", {}).items()},
            }
            for name, attack in self.values["attacks"].items()
        ]
        for name, scores in self.values["baselines"].items():
            means = {metric: numbers["mean"] for metric, numbers in scores.items()}
            rate = means["reidentified"]
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
        gallery = f" in a gallery of {self.num_gallery:,} images"
        return f"{self.values['label']}: {self.verdict} by {self.strongest_attack}{gallery}{reason}"

    def _table(self) -> Rows:
        rows: Rows = [("attack", "threat", "re-identified", "bits", "SSIM", "verdict")]
        for name, attack in self.values["attacks"].items():
            if attack["status"] == "done":
                rate = f"{'≥ ' if attack['lower_bound'] else ''}{attack['reidentification_rate']:.1%}"
                rows.append((name, attack["threat"], rate, *_bits_and_ssim(attack["scores"]), attack["verdict"]))
            else:
                rows.append((name, attack["threat"], "-", "-", "-", attack["status"]))
        for name, scores in self.values["baselines"].items():
            rate = f"{scores['reidentified']['mean']:.1%}"
            rows.append((f"baseline: {name}", "", rate, *_bits_and_ssim(scores), ""))
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

    @cached_property
    def result_grid(self) -> Any:
        """Ray Tune's results, a ``ray.tune.ResultGrid``; the checkpoint of each finished trial is its bundle."""
        return import_from_ray("raypp.cluster.tune", "load_result_grid")(self.path)

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


def _bits_and_ssim(scores: dict[str, dict[str, float]]) -> tuple[str, str]:
    return f"{scores['bits_identified']['mean']:.1f}", f"{scores['ssim']['mean']:.3f}"


def _image(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
