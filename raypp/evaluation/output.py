"""Figures and tables as files; Matplotlib runs without a display or global state."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


STYLE = Path(__file__).with_name("raypp.mplstyle")
"""Matplotlib style of all figures."""


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that draws a figure, to draw it in raypp's style."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib.style

        with matplotlib.style.context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float, num: int = 1, *, share_y: bool = False) -> tuple[Any, Any]:
    """A figure with a row of ``num`` empty axes; width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, num, sharey=share_y, squeeze=False)[0]


def as_png(figure: Any, dpi: int = 130) -> bytes:
    """Render a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_svg(figure: Any) -> bytes:
    """Render a figure as an SVG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def as_csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Write rows as a CSV file; missing values are empty, and keys that are no columns are ignored."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
