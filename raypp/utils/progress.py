"""What a person sees while a run goes on: a live bar on a terminal, one line per epoch anywhere else."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from raypp.utils.errors import TrainingInterrupted

Row = dict[str, Any]


class ProgressListener(Protocol):
    """What watches one training run: it takes its reports, and may tell it to stop."""

    def step(self, info: Row) -> None: ...

    def epoch(self, row: Row) -> None: ...

    def warn(self, message: str) -> None: ...

    def should_stop(self) -> bool:
        """Whether to write a checkpoint and end, with ToldToStop; asked about once a second."""


class ProgressDisplay:
    """Shows epochs and steps; a context manager.

    Args:
        console: where to print; standard error is right for long work, so that standard output stays usable.
        quiet: print nothing but warnings.

    Attributes:
        stop: set by whoever wants the run to write a checkpoint and end.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.stop = threading.Event()
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal and not self.quiet:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, message: str) -> None:
        """Say what is going on while there are no steps yet."""
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task(message, total=None, status="")
            self._live.update(self._task, description=message, status="")

    def step(self, info: Row) -> None:
        """Show a step: needs phase, epoch, epochs, steps_done, steps_total, images_per_s, loss."""
        if self._live is None:
            return
        if self._task is None:
            self._task = self._live.add_task("", total=None, status="")
        self._live.update(
            self._task,
            description=f"{info['phase']} epoch {info['epoch']}/{info['epochs']}",
            total=info["steps_total"],
            completed=info["steps_done"],
            status=_status(info),
        )

    def epoch(self, row: Row) -> None:
        """Print one finished epoch."""
        if self.quiet:
            return
        self.console.print(
            f"{row['phase']:>6} epoch {row['epoch']:>3}/{row['epochs']}"
            f"  loss {row['train_loss']:.4f}{_scores(row, 'train_')}"
            + (f"  val loss {row['val_loss']:.4f}{_scores(row, 'val_')}" if "val_loss" in row else "")
            + f"  {row['images_per_s']:,.0f} images/s  {row['seconds']:.0f} s"
            + ("  best" if row["best"] else ""),
            soft_wrap=True,
            highlight=False,
        )

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)

    def should_stop(self) -> bool:
        return self.stop.is_set()


class MultiProgressDisplay:
    """Shows several runs side by side: how many are done, and a line for each that is under way; a context manager.

    Args:
        num: how many runs there are.
        done: how many of them were finished before.
        what: what they are called.

    Attributes:
        stop: set by whoever wants the runs under way to write a checkpoint and end, and no other to begin.
    """

    def __init__(
        self, num: int, done: int = 0, console: Console | None = None, quiet: bool = False, what: str = "runs"
    ) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.stop = threading.Event()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self._whole = self._bars.add_task(what, total=num, completed=done, status="")
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> MultiProgressDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def step(self, run: str, info: Row) -> None:
        """Show where a run is; ``info`` as in :meth:`Display.step`."""
        if run not in self._lines:
            self._lines[run] = self._bars.add_task(run, total=info["steps_total"], status="")
        self._bars.update(
            self._lines[run],
            completed=info["steps_done"],
            status=_status(info),
        )

    def done(self, run: str, result: str) -> None:
        """A run has ended; ``result`` says how."""
        if run in self._lines:
            self._bars.remove_task(self._lines.pop(run))
        self._bars.advance(self._whole)
        if not self.quiet:
            self.console.print(f"{run}: {result}", markup=False, highlight=False, soft_wrap=True)

    def warn(self, run: str, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(f'{run}: {message}')}", highlight=False, soft_wrap=True)

    def raise_if_stop_requested(self) -> None:
        """Raise ToldToStop if told to stop."""
        if self.stop.is_set():
            raise TrainingInterrupted("stopped, as told; --resume goes on from what is finished and from checkpoints")

    def of(self, run: str) -> ProgressListener:
        """A display of one run among the others."""
        return _ChildProgress(self, run)


class _ChildProgress:
    def __init__(self, grid: MultiProgressDisplay, run: str) -> None:
        self._grid, self._run = grid, run

    def step(self, info: Row) -> None:
        self._grid.step(self._run, info)

    def epoch(self, row: Row) -> None:
        """A run among many shows no epochs."""

    def warn(self, message: str) -> None:
        self._grid.warn(self._run, message)

    def should_stop(self) -> bool:
        return self._grid.stop.is_set()


def _status(info: Row) -> str:
    accuracy = f"  acc {info['accuracy']:.0%}" if "accuracy" in info else ""
    similarity = f"  ssim {info['ssim']:.3f}" if "ssim" in info else ""
    return f"{info['images_per_s']:,.0f} images/s  loss {info['loss']:.2f}{accuracy}{similarity}"


def _scores(row: Row, split: str) -> str:
    kinds = (("accuracy", ".1%"), ("ssim", ".3f"), ("reidentified", ".1%"))
    name = split.replace("train_", "").replace("_", " ")
    return "".join(f"  {name}{kind} {row[split + kind]:{form}}" for kind, form in kinds if split + kind in row)
