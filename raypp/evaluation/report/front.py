"""The front of the report: re-identification rate against accuracy, a point for each scorecard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypp.evaluation.output import as_png, new_figure, styled
from raypp.evaluation.report.figures import COLORS
from raypp.evaluation.report.source import Source, distinct_labels
from raypp.evaluation.scorecard import BROKEN_RATE, WEAK_RATE

WEAK, BROKEN = 100 * WEAK_RATE, 100 * BROKEN_RATE
BANDS = (
    ("holds", 0, WEAK, f"holds: below {WEAK:g}%"),
    ("weak", WEAK, BROKEN, f"weak: {WEAK:g} to {BROKEN:g}%"),
    ("broken", BROKEN, 105, f"broken: above {BROKEN:g}%"),
)
CHARACTER, LINE = 5.2, 12.0  # width and height of a label's text in points
NEUTRAL = "#444444"

Label = tuple[float, float, str]
"""Position in data coordinates, and text."""


def has_front(sources: Sequence[Source]) -> bool:
    """Whether two or more scorecards have an accuracy and a rate; one point is no front."""
    return len(_plotted(sources)) > 1


def _plotted(sources: Sequence[Source]) -> list[Source]:
    return [s for s in sources if s.card["accuracy"] is not None and s.card["reidentification_rate"] is not None]


@styled
def accuracy_leakage_front(sources: Sequence[Source]) -> bytes:
    """Draw the strongest attack (filled) and the strongest reconstruction attack (open) of each scorecard; a PNG.

    Bars are the 95% intervals of both axes.
    """
    figure, (panel,) = new_figure(8, 6)
    for verdict, low, high, _ in BANDS:
        panel.axhspan(low, high, color=COLORS[verdict], alpha=0.12, lw=0, zorder=0)
    plotted = _plotted(sources)
    names = distinct_labels(plotted)
    labels = [(*_plot_card(panel, source.card), name) for source, name in zip(plotted, names, strict=True)]
    accuracies = {float(accuracy) for source in plotted if (accuracy := source.card.get("reference_accuracy"))}
    plain = 100 * max(accuracies) if len(accuracies) == 1 else None  # one line for one set of images only
    if plain is not None:
        panel.axvline(plain, color=NEUTRAL, ls="--", lw=1.2)
    panel.margins(x=0.15)
    panel.set(
        ylim=(-3, 105),
        xlabel="test accuracy on protected images, % (better to the right)",
        ylabel=f"re-identification rate among {_gallery_sizes(plotted)} images, % (better below)",
    )
    clients = [client for source in plotted if (client := _client_with_gain(source.card))]
    figure.legend(handles=_legend(plain, clients), loc="outside lower center", ncols=2)
    figure.canvas.draw()  # lays the axes out, so that labels can avoid each other
    _add_labels(panel, labels, 72 / figure.dpi)
    return as_png(figure, dpi=120)


def _gallery_sizes(sources: Sequence[Source]) -> str:
    """Size of the galleries, or their range."""
    sizes = sorted({source.card["num_gallery"] for source in sources})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def _plot_card(panel: Any, card: dict[str, Any]) -> tuple[float, float]:
    """Plot the points of one scorecard with their intervals; returns the position of its label."""
    x, interval = 100 * card["accuracy"], card["accuracy_interval"]
    strongest, reconstruction = card["strongest_attack"], card["strongest_reconstruction"]
    bars = [[x - 100 * interval[0]], [100 * interval[1] - x]] if interval else None
    rates = []
    for name, fill in ((reconstruction, "white"), (strongest, None)):
        if name is not None and (fill is None or name != strongest):
            attack = card["attacks"][name]
            rates.append(100 * attack["reidentification_rate"])
            color = COLORS[attack["verdict"]]
            ends = attack["scores"]["reidentified"]
            spread = [[rates[-1] - 100 * ends["low"]], [100 * ends["high"] - rates[-1]]]
            panel.errorbar(
                x, rates[-1], xerr=bars, yerr=spread, fmt="o", ms=8, color=color, mfc=fill or color, elinewidth=1
            )
    panel.plot([x] * len(rates), rates, color="0.7", lw=1, zorder=1)
    if (client := _client_with_gain(card)) is not None:
        alone = 100 * client["alone"]["accuracy"]
        panel.plot([alone, x], [rates[-1]] * 2, color=NEUTRAL, ls=":", lw=1.2, zorder=1)
        panel.plot(alone, rates[-1], marker="|", ms=12, mew=2, color=NEUTRAL)
    return x, rates[0]


def _client_with_gain(card: dict[str, Any]) -> dict[str, Any] | None:
    """The client's section of a scorecard; None if the cloud gain was not measured."""
    client: dict[str, Any] | None = card.get("client")
    return None if client is None or client["cloud_gain"] is None else client


def _legend(plain: float | None, clients: Sequence[dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], marker="o", ls="", color=NEUTRAL, label="strongest attack"),
        Line2D([], [], marker="o", ls="", color=NEUTRAL, mfc="white", label="strongest reconstruction attack"),
    ]
    if clients:
        bound = ", or an upper bound of it" * any(client.get("cloud_gain_is_upper_bound") for client in clients)
        label = f"accuracy of the client alone; the dotted line is the cloud gain{bound}"
        handles.append(Line2D([], [], marker="|", ms=12, mew=2, ls=":", lw=1.2, color=NEUTRAL, label=label))
    if plain is not None:
        handles.append(Line2D([], [], ls="--", lw=1.2, color=NEUTRAL, label=f"accuracy on plain images: {plain:.1f}%"))
    handles.append(Line2D([], [], marker="o", ls="", color=COLORS["inconclusive"], label="verdict inconclusive"))
    return [*handles, *(Patch(color=COLORS[verdict], alpha=0.12, label=text) for verdict, _, _, text in BANDS)]


def _add_labels(panel: Any, labels: list[Label], points_per_pixel: float) -> None:
    """Write horizontal labels next to the points, moved down where another label is in the way."""
    placed: list[tuple[float, float, float]] = []
    right = panel.bbox.x1 * points_per_pixel
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        position, height = panel.transData.transform((x, y)) * points_per_pixel
        width = CHARACTER * len(text)
        left = position + 8 if position + 8 + width < right else position - 8 - width
        level = height + 6 if height + 6 + LINE < panel.bbox.y1 * points_per_pixel else height - 14
        while any(abs(level - other) < LINE and left < end and start < left + width for start, end, other in placed):
            level -= LINE
        placed.append((left, left + width, level))
        panel.annotate(
            text, (x, y), (left - position, level - height), textcoords="offset points", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.5} if abs(level - height) > 2 * LINE else None,
        )  # fmt: skip
