"""Figures 3 to 5 of the paper, drawn from runs and attack runs.

Source: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section III. Figure 5 adds boxes of estimates without an attack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from raypp.attacks import ATTACKS
from raypp.bundle.load import load_private, load_public
from raypp.bundle.locate import locate_bundle
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.data.splits import load_split
from raypp.evaluation.output import as_png, as_svg, new_figure, styled
from raypp.evaluation.report.source import Source, distinct_labels, read_source
from raypp.experiments.attack_scores import NUM_EXAMPLES
from raypp.experiments.training_run import first_of_each_class
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.utils.errors import ConfigError
from raypp.utils.keys import Key
from raypp.utils.paths import short_name
from raypp.utils.storage import Storage

BASELINES = ("mean image", "class mean")
"""Estimates without an attack; the class mean knows the class."""
FIGURES = (3, 4, 5)
PAPER_ATTACK = "itn"
EXAMPLE_PARTS = ("plain", "protected", "estimate", "psnr")  # of an attack's examples
TILE = 0.62  # side of an image, in inches
BOX_COLOR, BASELINE_COLOR = "#1f6fb2", "#c9d0d8"

Row = tuple[str, np.ndarray, Sequence[str] | None]
"""Title, images uint8 (N, C, H, W), and a caption below each image."""


def write_figure(
    number: int, sources: Sequence[str], target: Storage, *, attacks: Sequence[str] = (), num_images: int = 10
) -> list[str]:
    """Draw a figure of the paper and write it as SVG and PNG; returns the names of the files.

    Args:
        number: 3, 4 or 5.
        sources: for figure 3 bundles or runs; for figures 4 and 5 attack runs or attacked bundles.
        target: folder of the files; files of the same figure are replaced.
        attacks: reconstruction attacks of figures 4 and 5; default: ``itn``, the paper's.
        num_images: number of images in figures 3 and 4; at most ``NUM_EXAMPLES`` in figure 4.

    Raises:
        ConfigError: the number is unknown, there is no source, there are too many images, an attack reconstructs no
            images, a source lacks an attack, or sources show different images.
        BundleError: a source holds no bundle, or is damaged.
    """
    if number not in FIGURES:
        raise ConfigError(f"figure is {number}; allowed: {', '.join(map(str, FIGURES))}")
    if not sources:
        raise ConfigError("no source is named; figure 3 takes runs, figures 4 and 5 take attack runs")
    if number == 3 and attacks:
        raise ConfigError("figure 3 shows protected images; --attacks belongs to figures 4 and 5")
    if number == 4 and num_images > NUM_EXAMPLES:
        raise ConfigError(
            f"num_images is {num_images}; figure 4 shows 1 to {NUM_EXAMPLES}, the images that an attack run stores"
        )
    for attack in attacks:
        if not ATTACKS.get(attack).draws:
            raise ConfigError(
                f"attack {attack!r} selects gallery images and estimates none; figure {number} shows reconstruction "
                f"attacks: {', '.join(_reconstruction_attacks(ATTACKS))}"
            )
    names = tuple(attacks) or (PAPER_ATTACK,)
    if number == 3:
        png, svg = protected_images(sources, num_images)
    elif number == 4:
        png, svg = estimated_images(sources, names, num_images)
    else:
        png, svg = psnr_boxes(sources, names)
    files = {f"figure{number}.svg": svg, f"figure{number}.png": png}
    for name, data in files.items():
        target.write(name, data)
    return list(files)


@styled
def protected_images(sources: Sequence[str], num_images: int) -> tuple[bytes, bytes]:
    """Figure 3: plain test images above the protected images of each source, such as runs with several alphas."""
    rows: list[Row] = []
    shown: np.ndarray | None = None
    for source in sources:
        location = locate_bundle(source)
        public, config = load_public(location), validate(load_private(location).config)
        test = load_split(config.model_copy(update={"data": config.data.model_copy(update={"stream": False})}), "test")
        plain = test.images[first_of_each_class(test.labels, num_images)].transpose(0, 3, 1, 2)
        if shown is None:
            shown = plain
            rows.append(("plain", plain, None))
        elif not np.array_equal(shown, plain):
            raise ConfigError(
                f"{source!r} has other test images than {sources[0]!r}; figure 3 compares runs on one set"
            )
        protection: Protection = public.protection
        if protection.needs_key(protection.options):  # plain and protected pixels together reveal a key
            protection = PROTECTIONS.build(protection.options, channels=public.channels, key=Key.generate()).eval()
        protected = protection.protect(torch.from_numpy(np.ascontiguousarray(plain))).numpy()
        rows.append((_row_title(config, source, [title for title, _, _ in rows]), protected, None))
    return _draw_rows(rows)


def _row_title(config: Config, source: str, titles: Sequence[str]) -> str:
    """Alpha, or the name of a protection without it; with the run's name if an earlier row has the same title."""
    has_alpha = PROTECTIONS.get(config.protection.name).uses_features(config.protection, 1.0)
    title = f"α = {config.train.alpha:g}" if has_alpha else config.protection.name
    return f"{title}, {short_name(locate_bundle(source))}" if title in titles else title


@styled
def estimated_images(sources: Sequence[str], attacks: Sequence[str], num_images: int) -> tuple[bytes, bytes]:
    """Figure 4: plain images, protected images and estimates of the attacks, with the PSNR below each estimate."""
    rows: list[Row] = []
    loaded = [_read(source, attacks) for source in sources]
    shown: np.ndarray | None = None
    for source, label in zip(loaded, distinct_labels(loaded), strict=True):
        suffix = f", {label}" if len(loaded) > 1 else ""
        for attack in attacks:
            part = {name: source.pictures[f"{attack}/first/{name}"][:num_images] for name in EXAMPLE_PARTS}
            if shown is None or not np.array_equal(shown, part["plain"]):
                shown = part["plain"]
                rows.append(("plain", shown, None))
            if attack == attacks[0]:
                rows.append((f"protected{suffix}", part["protected"], None))
            rows.append((f"{attack}{suffix}", part["estimate"], [f"{psnr:.1f} dB" for psnr in part["psnr"]]))
    return _draw_rows(rows)


@styled
def psnr_boxes(sources: Sequence[str], attacks: Sequence[str]) -> tuple[bytes, bytes]:
    """Figure 5: PSNR of the n attacked images, as boxes without outliers, and of the baselines."""
    loaded = [_read(source, attacks) for source in sources]
    boxes: list[tuple[str, np.ndarray]] = []
    baselines: list[tuple[str, np.ndarray]] = []
    for source, label in zip(loaded, distinct_labels(loaded), strict=True):
        suffix = f"\n{label}" if len(loaded) > 1 else ""
        boxes += [(f"{attack}{suffix}", source.scores[attack]["psnr"]) for attack in attacks]
        for name in (name for name in BASELINES if name in source.card["baselines"]):
            values = source.scores[f"baseline: {name}"]["psnr"]
            if any(np.array_equal(values, other) for _, other in baselines):  # once for runs on the same images
                continue
            title = f"baseline:\n{name}"
            is_taken = any(title == other for other, _ in baselines)
            baselines.append((f"{title}{suffix}" if is_taken else title, values))
    titles, values_of_boxes = zip(*boxes, *baselines, strict=True)
    figure, (panel,) = new_figure(1.6 + 1.1 * len(titles), 3.6)
    plot = panel.boxplot(values_of_boxes, showfliers=False, patch_artist=True, medianprops={"color": "#1d2530"})
    for index, box in enumerate(plot["boxes"]):
        box.set(facecolor=BOX_COLOR if index < len(boxes) else BASELINE_COLOR, alpha=0.75)
    labels = [f"{title}\nn = {len(values):,}" for title, values in zip(titles, values_of_boxes, strict=True)]
    panel.set_xticks(range(1, len(labels) + 1), labels)
    panel.set_ylabel("PSNR, dB")
    panel.grid(visible=False, axis="x")
    return as_png(figure), as_svg(figure)


def _read(location: str, attacks: Sequence[str]) -> Source:
    """Read a scorecard; raises ConfigError if an attack has not run."""
    source = read_source(location)
    available = _reconstruction_attacks(
        name for name in source.finished_attacks if "psnr" in source.scores.get(name, {})
    )
    for attack in attacks:
        if attack not in available:
            raise ConfigError(
                f"{location!r} has no estimates of {attack!r}; it has those of {', '.join(available) or 'no attack'}; "
                f"`raypp attack BUNDLE --attacks {attack}` adds them"
            )
    return source


def _reconstruction_attacks(names: Iterable[str]) -> list[str]:
    return [name for name in names if ATTACKS.get(name).draws]


def _draw_rows(rows: Sequence[Row]) -> tuple[bytes, bytes]:
    """Draw rows of images with their titles on the left and captions below the images."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(len(images) for _, images, _ in rows)
    titles_width = 0.085 * max(len(title) for title, _, _ in rows)
    heights = [TILE * (1.3 if captions else 1.0) for _, _, captions in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(titles_width + TILE * columns, sum(heights)), layout=layout)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (title, images, captions), line in zip(rows, panels, strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for panel in line:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for index, image in enumerate(images):
            pixels = image.transpose(1, 2, 0)
            line[index].imshow(
                np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, interpolation="nearest"
            )
            if captions is not None:
                line[index].set_xlabel(captions[index], fontsize=7, labelpad=1)
    return as_png(figure, dpi=200), as_svg(figure)
