"""Figure of a training: loss and accuracy by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypp.evaluation.output import as_png, new_figure, styled


@styled
def training_curves(history: Sequence[dict[str, Any]]) -> bytes:
    """Plot classification loss and accuracy of every epoch, training dashed and validation solid; a PNG.

    Args:
        history: metrics of the epochs, as in ``metrics.jsonl``; a phase of plain images comes first where there is one.
    """
    figure, panels = new_figure(8.0, 3.2, 2)
    epochs = range(1, len(history) + 1)
    for panel, metric, scale, label in (
        (panels[0], "classification_loss", 1, "cross-entropy"),
        (panels[1], "accuracy", 100, "accuracy, %"),
    ):
        for split, style in (("train", "--"), ("val", "-")):
            values = [scale * row.get(f"{split}_{metric}", float("nan")) for row in history]
            panel.plot(epochs, values, style, marker="o", ms=3, label={"train": "training", "val": "validation"}[split])
        starts = [i for i in range(1, len(history)) if history[i]["phase"] != history[i - 1]["phase"]]
        for start in starts:
            panel.axvline(start + 0.5, color="0.6", lw=1)
            panel.annotate(history[start]["phase"], (start + 0.6, 0.97), xycoords=("data", "axes fraction"), va="top")
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend()
    return as_png(figure)
