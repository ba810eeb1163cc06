"""Progress of work that is no training: its reports, its lines without a terminal, and its end on request."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from methods import build
from rich.console import Console
from torch import Tensor

from raypp.attacks.base import Attack, AttackerKnowledge
from raypp.utils import progress
from raypp.utils.errors import TrainingInterrupted
from raypp.utils.progress import MultiProgressDisplay, ProgressDisplay, ProgressListener, Row, StepCounter


class Recorder(ProgressListener):
    """Records steps, and requests a stop after ``stop_after`` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: list[Row] = []
        self.stop_after = stop_after

    def step(self, info: Row) -> None:
        self.rows.append(info)

    def should_stop(self) -> bool:
        return len(self.rows) == self.stop_after


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters report every step, and displays print each report."""
    monkeypatch.setattr(progress, "COUNT_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)


@pytest.mark.usefixtures("every_step")
def test_a_counter_reports_steps_until_a_stop_is_requested() -> None:
    recorder = Recorder(stop_after=2)
    counter = StepCounter(recorder, "descent", 5)
    counter.advance()
    with pytest.raises(TrainingInterrupted, match="continue with --resume"):
        counter.advance()
    assert recorder.rows == [{"phase": "descent", "steps_done": done, "steps_total": 5} for done in (1, 2)]


def test_a_counter_reports_rarely() -> None:
    recorder = Recorder()
    counter = StepCounter(recorder, "descent", 100)
    for _ in range(100):
        counter.advance()
    assert len(recorder.rows) <= 1


@pytest.mark.usefixtures("every_step")
def test_lines_estimate_the_time_of_the_present_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    text = io.StringIO()
    with MultiProgressDisplay(1, console=Console(file=text, width=200), what="attacks") as display:
        training = {"phase": "attack", "epoch": 1, "epochs": 1, "steps_total": 300, "images_per_s": 50.0, "loss": 0.25}
        for step in (100, 200):
            display.step("flow_matching", training | {"steps_done": step})
        for step in (1, 2):
            display.step("flow_matching", {"phase": "sampling", "steps_done": step, "steps_total": 40})
    lines = text.getvalue().splitlines()
    assert lines[1] == "flow_matching: attack epoch 1/1  step 200/300  50 images/s  loss 0.25  10 s left"
    assert lines[2:] == ["flow_matching: sampling  step 1/40", "flow_matching: sampling  step 2/40  380 s left"]


@pytest.mark.usefixtures("every_step")
def test_the_time_left_is_that_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the joint phase take longer than those of the plain one."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    text = io.StringIO()
    step = {"epoch": 1, "epochs": 1, "steps_total": 40, "images_per_s": 5.0, "loss": 0.5}
    with ProgressDisplay(Console(file=text, width=200)) as display:
        for seconds, phase, end, done in (
            (0.0, "plain", 20, 1), (1.0, "plain", 20, 11), (2.0, "joint", 40, 21), (12.0, "joint", 40, 22)
        ):  # fmt: skip
            clock[0] = seconds
            display.step(step | {"phase": phase, "phase_end": end, "steps_done": done})
    lines = [line.partition("loss 0.50")[2].strip() for line in text.getvalue().splitlines()]
    assert lines[1] == "1 s left in this phase"
    assert lines[2:] == ["", "180 s left"]


def noisy(images: Tensor) -> Tensor:
    return (images + torch.randint(0, 100, images.shape)).clamp(0, 255).to(torch.uint8)


def inverted(images: Tensor) -> Tensor:
    return 1 - images


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(
    ("name", "knowledge", "options", "steps"),
    [
        ("white_box", {"gradients": inverted}, {"steps": 3, "restarts": 1, "batch_size": 4}, 2 * 2 * 3),
        ("known_gallery", {"protect": noisy}, {"num_draws": 3, "batch_size": 4}, 2 * 3),
    ],
)
def test_attacks_of_minutes_count_their_steps_and_stop(
    name: str, knowledge: dict[str, Any], options: dict[str, Any], steps: int
) -> None:
    gallery = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def run(listener: ProgressListener) -> Attack:
        attack = build(name, AttackerKnowledge((3, 8, 8), gallery=gallery, **knowledge), **options)
        attack.listener = listener
        attack.prepare()
        attack.reconstruct(gallery)
        return attack

    recorder = Recorder()
    run(recorder)
    assert [row["steps_done"] for row in recorder.rows] == list(range(1, steps + 1))
    assert {row["steps_total"] for row in recorder.rows} == {steps}
    with pytest.raises(TrainingInterrupted):
        run(Recorder(stop_after=2))
