"""The base of all results of the Python API, and the result of an evaluation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Rows = list[tuple[str, ...]]


class TableRepr:
    """A mixin for a text and an HTML representation with a title and a table, which subclasses define."""

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


class Result(TableRepr):
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
        return [ACCURACY_HEADER, accuracy_row("protected, 8 bit", self.values)]


ACCURACY_HEADER = ("images", "accuracy", "95% interval", "SSIM to plain")


def accuracy_row(label: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    """A row of a table with the header ``ACCURACY_HEADER``."""
    low, high = metrics["accuracy_interval"]
    similarity = f"{metrics['ssim']['mean']:.3f}" if metrics["ssim"] else "-"
    return label, f"{metrics['accuracy']:.2%}", f"{low:.1%} to {high:.1%}", similarity
