"""Progress of runs: a live bar on a terminal, and one line per epoch."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

from rich import progress
from rich.console import Console
from rich.markup import escape

from raypp.utils.errors import TrainingInterrupted

Row = dict[str, Any]
LINE_SECONDS = 30.0  # between progress lines where there is no terminal
COUNT_SECONDS = 0.5  # between reports of a counter
RESUME_HINT = "stopped; continue with --resume, which uses finished results and checkpoints"


class ProgressListener:
    """Callbacks of a training run, which receive its progress and may request checkpoints; these ones do nothing."""

    def note(self, message: str) -> None:
        """Called with the current activity while there are no steps yet."""

    def step(self, info: Row) -> None:
        """Called a few times a second with phase, steps_done and steps_total.

        A training adds phase_end (the steps done at the end of the phase), epoch, epochs, images_per_s and the training
        metrics so far, among them loss.
        """

    def epoch(self, row: Row) -> None:
        """Called after every epoch, with its metrics."""

    def warn(self, message: str) -> None:
        """Called with a warning."""

    def should_save(self) -> bool:
        """Whether the run shall write a checkpoint and continue; called about once a second, true once per request."""
        return False

    def should_stop(self) -> bool:
        """Whether the run shall write a checkpoint and raise TrainingInterrupted; called about once a second."""
        return False


class StepCounter:
    """Reports the steps of work that is no training, such as descents on images, and ends it on request.

    Args:
        listener: receives the steps.
        phase: what the work is called.
        total: number of steps.
    """

    def __init__(self, listener: ProgressListener, phase: str, total: int) -> None:
        self._listener, self._phase, self._total = listener, phase, total
        self._done, self._last_report = 0, time.monotonic()

    def advance(self) -> None:
        """Count one step; report at most every ``COUNT_SECONDS``.

        Raises:
            TrainingInterrupted: the listener requested a stop. The work starts again on resume.
        """
        self._done += 1
        now = time.monotonic()
        if now - self._last_report < COUNT_SECONDS:
            return
        self._last_report = now
        self._listener.step({"phase": self._phase, "steps_done": self._done, "steps_total": self._total})
        if self._listener.should_stop():
            raise TrainingInterrupted(RESUME_HINT)


class _Display:
    """Base of the displays; a context manager.

    Args:
        console: default is standard error, so that standard output holds results only.
        quiet: print nothing but warnings.

    Attributes:
        stop: set it to have active runs write a checkpoint and end, and to start no others.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.stop = threading.Event()
        self._last_line = time.monotonic()
        self._begin: dict[str, tuple[str, int, float, int]] = {}  # of each run: phase, its end, its first time and step
        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=10),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bars.disable:  # stop() of some versions of rich prints an empty line without a terminal
            self._bars.stop()

    def _print_periodically(self, run: str, info: Row) -> None:
        """Print the progress of a run, at most every ``LINE_SECONDS``, where no bar shows it."""
        now, steps = time.monotonic(), info["steps_done"]
        start = (info["phase"], _phase_end(info), now, steps)
        *work, begin, first_step = self._begin.setdefault(run, start)
        if work != [*start[:2]] or steps < first_step:  # the run goes on with other work, which has another speed
            *_, begin, first_step = self._begin[run] = start
        if self.quiet or self.console.is_terminal or now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        rate = (steps - first_step) / (now - begin) if now > begin else 0
        scope = " in this phase" if _phase_end(info) < info["steps_total"] else ""
        left = f"  {(_phase_end(info) - steps) / rate:,.0f} s left{scope}" if rate > 0 else ""
        name = f"{run}: " if run else ""
        epoch = f" epoch {info['epoch']}/{info['epochs']}" if "epoch" in info else ""
        steps = f"step {info['steps_done']:,}/{info['steps_total']:,}"
        text = f"{name}{info['phase']}{epoch}  {steps}{_status(info)}{left}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


class ProgressDisplay(_Display, ProgressListener):
    """Shows epochs and steps of one run."""

    _task: progress.TaskID | None = None
    _phase: str | None = None

    def note(self, message: str) -> None:
        self._update(description=message, status="")

    def step(self, info: Row) -> None:
        self._print_periodically("", info)
        if self._task is not None and info["phase"] != self._phase:
            self._bars.reset(self._task)  # forgets the speed of the phase before
        self._phase = info["phase"]
        self._update(
            description=f"{info['phase']} epoch {info['epoch']}/{info['epochs']}",
            total=_phase_end(info),
            completed=info["steps_done"],
            status=_status(info),
        )

    def _update(self, **fields: Any) -> None:
        if self._task is None:
            self._task = self._bars.add_task("", total=None, status="")
        self._bars.update(self._task, **fields)

    def epoch(self, row: Row) -> None:
        """Print one finished epoch."""
        if self.quiet:
            return
        self.console.print(
            f"{row['phase']:>6} epoch {row['epoch']:>3}/{row['epochs']}"
            f"  {_loss(row, 'train_', 4)}{_scores(row, 'train_')}"
            + (f"  val {_loss(row, 'val_', 4)}{_scores(row, 'val_')}" if "val_loss" in row else "")
            + f"  {row['images_per_s']:,.0f} images/s  {row['seconds']:.0f} s"
            + ("  best" if row["best"] else ""),
            soft_wrap=True,
            highlight=False,
        )

    def warn(self, message: str) -> None:
        self._warn(message)

    def should_stop(self) -> bool:
        return self.stop.is_set()


class MultiProgressDisplay(_Display):
    """Shows ``num`` runs: the number of finished ones (``done`` at the start), and a line for each active one.

    The noun for the runs is ``what``.
    """

    def __init__(
        self, num: int, done: int = 0, console: Console | None = None, quiet: bool = False, what: str = "runs"
    ) -> None:
        super().__init__(console, quiet)
        self._total = self._bars.add_task(what, total=num, completed=done, status="")
        self._tasks: dict[str, progress.TaskID] = {}

    def step(self, run: str, info: Row) -> None:
        """Show a step of a run; ``info`` as in :meth:`ProgressListener.step`."""
        if run not in self._tasks:
            self._tasks[run] = self._bars.add_task(run, total=None, status="")
        task, steps, total = self._tasks[run], info["steps_done"], info["steps_total"]
        self._bars.update(task, total=total, completed=steps, status=_status(info))
        self._print_periodically(run, info)

    def done(self, run: str, result: str) -> None:
        """Show that a run has ended with ``result``."""
        if run in self._tasks:
            self._bars.remove_task(self._tasks.pop(run))
        self._bars.advance(self._total)
        if not self.quiet:
            self.console.print(f"{run}: {result}", markup=False, highlight=False, soft_wrap=True)

    def warn(self, run: str, message: str) -> None:
        self._warn(f"{run}: {message}")

    def raise_if_stop_requested(self) -> None:
        if self.stop.is_set():
            raise TrainingInterrupted(RESUME_HINT)

    def of(self, run: str) -> ProgressListener:
        """Return a listener that shows one of the runs."""
        return _ChildProgress(self, run)


class _ChildProgress(ProgressListener):
    def __init__(self, display: MultiProgressDisplay, run: str) -> None:
        self._display, self._run = display, run

    def step(self, info: Row) -> None:
        self._display.step(self._run, info)

    def warn(self, message: str) -> None:
        self._display.warn(self._run, message)

    def should_stop(self) -> bool:
        return self._display.stop.is_set()


def _phase_end(info: Row) -> int:
    """Steps done at the end of the phase; of all work where it has no phases."""
    end: int = info["phase_end"] if "phase_end" in info else info["steps_total"]
    return end


def _status(info: Row) -> str:
    """Rate and metrics of a training, after two spaces; empty for other work."""
    if "images_per_s" not in info:
        return ""
    accuracy = f"  acc {info['accuracy']:.0%}" if "accuracy" in info else ""
    similarity = f"  ssim {info['ssim']:.3f}" if "ssim" in info else ""
    return f"  {info['images_per_s']:,.0f} images/s  {_loss(info, '', 2)}{accuracy}{similarity}"


def _loss(row: Row, split: str, digits: int) -> str:
    """Cross-entropy and feature distance where a loss combines them (Eq. 4), else the loss."""
    if row.get(f"{split}feature_distance"):
        entropy, distance = row[f"{split}classification_loss"], row[f"{split}feature_distance"]
        return f"CE {entropy:.{digits}f}  distance {distance:.{digits}f}"
    return f"loss {row[f'{split}loss']:.{digits}f}"


def _scores(row: Row, split: str) -> str:
    formats = {"accuracy": ".1%", "ssim": ".3f", "reidentified": ".1%"}
    prefix = split.replace("train_", "").replace("_", " ")
    return "".join(
        f"  {prefix}{metric} {row[split + metric]:{form}}" for metric, form in formats.items() if split + metric in row
    )
