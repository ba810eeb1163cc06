"""The paper's figures, drawn from tiny runs: which images, labels and values they show."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained
from matplotlib.axes import Axes
from PIL import Image
from safetensors.numpy import save

import raypp
from raypp.data.splits import load_split
from raypp.evaluation.output import as_csv
from raypp.evaluation.report.source import read_source
from raypp.experiments import figures
from raypp.experiments.figures import write_figure
from raypp.utils.errors import ConfigError
from raypp.utils.storage import Storage

Rows = list[tuple[str, np.ndarray, Sequence[str] | None]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The rows of images of the figures that a test draws."""
    rows: Rows = []
    draw = figures._draw_rows

    def record(of_figure: Rows) -> tuple[bytes, bytes]:
        rows.extend(of_figure)
        return draw(of_figure)

    monkeypatch.setattr(figures, "_draw_rows", record)
    return rows


def check_files(folder: Path, number: int) -> None:
    with Image.open(io.BytesIO((folder / f"figure{number}.png").read_bytes())) as image:
        assert min(image.size) > 100
    assert b"<svg" in (folder / f"figure{number}.svg").read_bytes()[:1000]


def test_figure_3_shows_plain_images_above_the_protected_ones_of_each_run(
    trained: Trained, drawn: Rows, tmp_path: Path
) -> None:
    runs = [str(trained.run), str(trained.bundle)]
    assert write_figure(3, runs, Storage(tmp_path), num_images=4) == ["figure3.svg", "figure3.png"]
    titles, images, captions = zip(*drawn, strict=True)
    assert titles == ("plain", "α = 0.005", "α = 0.005, tiny/bundle")
    assert captions == (None, None, None)
    test = load_split(trained.config, "test")
    pixels = images[0].transpose(0, 2, 3, 1)
    labels = [int(test.labels[(test.images == image).all(axis=(1, 2, 3)).argmax()]) for image in pixels]
    assert labels == [0, 1, 2, 3], "one image of each class"
    protected = raypp.Bundle(trained.run).protect(pixels).transpose(0, 3, 1, 2)
    assert np.array_equal(images[1], protected)
    assert np.array_equal(images[2], protected)
    check_files(tmp_path, 3)
    first = (tmp_path / "figure3.svg").read_bytes()
    write_figure(3, runs, Storage(tmp_path), num_images=4)
    assert (tmp_path / "figure3.svg").read_bytes() == first, "equal runs give equal files"


@pytest.mark.parametrize(
    ("number", "sources", "options", "sentence"),
    [
        (6, ["run"], {}, "figure is 6; allowed: 3, 4, 5"),
        (4, [], {}, "no source is named"),
        (3, ["run"], {"attacks": ["itn"]}, "--attacks belongs to figures 4 and 5"),
        (5, ["none"], {}, "'none' holds no scorecard"),
        (4, ["run"], {"attacks": ["itn", "learned_matcher"]}, "attack 'learned_matcher' selects gallery images"),
        (5, ["run"], {"attacks": ["known_gallery"]}, "figure 5 shows reconstruction attacks: .*inverse, .*codebook"),
        (5, ["run"], {"attacks": ["iverse"]}, "unknown attack 'iverse'"),
        (4, ["run"], {"num_images": 11}, "num_images is 11; figure 4 shows 1 to 10, the images that an attack run"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_one_sentence(
    tmp_path: Path, number: int, sources: list[str], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        write_figure(number, sources, Storage(tmp_path), **options)


def test_figure_3_refuses_runs_on_other_images(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter((30, 20))

    def other_split(config: Any, split: str) -> Any:
        data = load_split(config, split)
        return data.subset(np.arange(next(sizes))[::-1].copy())

    monkeypatch.setattr(figures, "load_split", other_split)
    with pytest.raises(ConfigError, match="has other test images than"):
        write_figure(3, [str(trained.run), str(trained.run)], Storage(tmp_path))


def store_scorecard(folder: Path, num_images: dict[str, int]) -> str:
    """Store a scorecard of attacks and baselines with a PSNR for each of so many images; returns the folder."""
    attacks = {name: {"status": "done"} for name in num_images if not name.startswith("baseline: ")}
    baselines: dict[str, Any] = {name.removeprefix("baseline: "): {} for name in num_images.keys() - attacks}
    card = {"target": "first", "label": "first", "attacks": attacks, "baselines": baselines}
    card |= dict.fromkeys(("strongest_attack", "strongest_reconstruction", "bits_identified"))
    rows = [{"attack": name, "psnr": 10 + i / 4} for name, num in num_images.items() for i in range(num)]
    storage = Storage(folder)
    storage.write("scorecard.json", json.dumps(card).encode())
    storage.write("scores.csv", as_csv(("attack", "psnr"), rows))
    storage.write("examples.safetensors", save({"plain": np.zeros(1)}))
    return str(folder)


def test_figure_5_names_the_number_of_images_of_each_box(tmp_path: Path) -> None:
    """An attack may have fewer images than the others of its run."""
    run = store_scorecard(tmp_path / "run", {"itn": 1500, "white_box": 30, "baseline: mean image": 2000})
    write_figure(5, [run], Storage(tmp_path), attacks=["itn", "white_box"])
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "figure5.svg").read_text(), re.DOTALL)
    labels = " ".join(texts)
    assert re.findall(r"n = ([\d,]+)", labels) == ["1,500", "30", "2,000"]
    assert "PSNR, dB" in labels


def test_a_missing_attack_is_refused_with_the_reconstruction_attacks_of_the_run(tmp_path: Path) -> None:
    run = store_scorecard(tmp_path / "run", {"itn": 3, "learned_matcher": 3, "baseline: mean image": 3})
    with pytest.raises(ConfigError, match=r"has no estimates of 'inverse'; it has those of itn; `raypp attack"):
        write_figure(5, [run], Storage(tmp_path), attacks=["inverse"])


@pytest.mark.slow
def test_figures_4_and_5_show_the_estimates_and_their_psnr(
    trained: Trained, drawn: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(trained.bundle, tmp_path / "run" / "bundle")
    itn = {"width": 2, "depth": 1, "train": {"epochs": 1}}
    card = raypp.attack(
        bundle, "quick", attacks="itn", itn=itn, num_queries=20, storage=tmp_path, name="attack", ray=False, quiet=True
    )
    write_figure(4, [card.path], Storage(tmp_path / "figures"), num_images=3)
    titles, images, captions = zip(*drawn, strict=True)
    assert titles == ("plain", "protected", "itn")
    assert [len(row) for row in images] == [3, 3, 3]
    assert np.array_equal(images[0], read_source(card.path).pictures["plain"][:3]), "the first images, not the best"
    squared = torch.from_numpy((images[2] / 255.0 - images[0] / 255.0) ** 2).mean(dim=(1, 2, 3))
    assert captions[2] == [f"{psnr:.1f} dB" for psnr in (-10 * squared.log10()).tolist()]
    check_files(tmp_path / "figures", 4)

    boxes: dict[str, Any] = {}
    draw = Axes.boxplot

    def record(self: Axes, values: Any, **options: Any) -> Any:
        boxes.update(values=values, **options)
        return draw(self, values, **options)

    monkeypatch.setattr(Axes, "boxplot", record)
    write_figure(5, [card.path, str(bundle)], Storage(tmp_path / "figures"))
    scores = read_source(card.path).scores
    expected = [scores["itn"]["psnr"]] * 2 + [
        scores[f"baseline: {name}"]["psnr"] for name in ("mean image", "class mean")
    ]
    assert not boxes["showfliers"], "the paper leaves outliers out"
    assert all(np.array_equal(a, b) for a, b in zip(boxes["values"], expected, strict=True))
    check_files(tmp_path / "figures", 5)
    with pytest.raises(ConfigError, match="has no estimates of 'inverse'; it has those of itn"):
        write_figure(5, [card.path], Storage(tmp_path), attacks=["inverse"])
