"""What Ray costs: the same loop on Ray Train and under torchrun, one worker and two; a stream against memory.

Ray Train and torchrun each start their workers once, and the workers wait. Then they train in turn, in interleaved
rounds, the same number of steps of raypp's real loop (``Trainer.train_epoch``): batches of 128 random images, joint
training, one thread for each worker, gradients averaged by gloo. After the steps of a round each writes a checkpoint
to a local disk; its time is part of the round. On Ray Train they use ``raypp train``'s own reporter and Ray's watcher
of nodes, so that the round includes progress, the questions whether to stop and whether a node leaves, and the report
of the checkpoint. Each round gives a ratio. There are many short rounds, since a machine's speed changes by more than
the expected difference. Start-up is measured separately: from the command to the first step of the workers.

The second table trains a plain classifier by ``raypp train`` on the same Parquet file, read into memory and streamed
through Ray Data: images/s of the epochs after the first, one worker.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import (
    BATCH_SIZE,
    RayppLoop,
    Spread,
    describe,
    device_batches,
    feature_weights,
    finish,
    interleave,
    joint_config,
    machine,
    own_ray,
    progress,
    quiet_sink,
    ratio,
    show_table,
)

from raypp.training.reporter import Reporter
from raypp.utils import runtime

PATIENCE = 300.0
POLL_SECONDS = 0.02


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> str:
    """The text of a file, once it is there; ends the program where the process that should write it has ended."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if (process is not None and process.poll() is not None) or time.monotonic() > end:
            raise SystemExit(f"{path.name} never came")
        time.sleep(POLL_SECONDS)
    return path.read_text()


def write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def member(folder: Path, preset: str, sink: Reporter) -> None:
    """One worker, in a process group already: train as many steps as each file ``go_N`` says, until one says 0."""
    torch.set_num_threads(1)
    config = joint_config(preset)
    loop = RayppLoop(config, feature_weights(None), sink)
    loop.feed(device_batches(config, 1, sink))
    loop.epoch()
    if sink.rank == 0:
        write(folder / "ready", str(time.time()))
    number = 0
    while steps := int(wait_for(folder / f"go_{number}")):
        loop.feed(device_batches(config, steps, sink))
        began = time.monotonic()
        loop.epoch()
        loop.save()
        speed = steps * BATCH_SIZE / (time.monotonic() - began)
        if sink.rank == 0:
            write(folder / f"done_{number}", str(speed))
        number += 1


def on_ray(folder: Path, preset: str, num: int) -> None:
    """Run ``num`` members on Ray Train."""
    from ray.train.torch import TorchTrainer

    from raypp.cluster.progress_actor import create_progress_actor, polling
    from raypp.cluster.session import ray_session
    from raypp.cluster.train import build_trainer_configs
    from raypp.cluster.waiting import ResourceNotice, SubmittedParts
    from raypp.config.schema import Cluster
    from raypp.utils.progress import ProgressListener
    from raypp.utils.storage import Storage

    results = Storage(folder / "results")

    def work(arguments: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        from scaling import member as run

        from raypp.cluster.train_reporter import RayTrainReporter, TrainWorkerProgress

        run(folder, preset, RayTrainReporter(results, TrainWorkerProgress(arguments["board"], watch=True)))

    parts = SubmittedParts()
    notice = ResourceNotice("training", {"CPU": num}, 60, parts.all_wait, print)
    with ray_session(), polling(board := create_progress_actor(), lambda _: ProgressListener(), parts, notice):
        TorchTrainer(
            work,
            train_loop_config={"board": board},
            **build_trainer_configs(Cluster(), num, False, results),
        ).fit()


class Side:
    """Workers started by one launcher, which train on a signal."""

    def __init__(self, launcher: str, num: int, folder: Path, preset: str) -> None:
        folder.mkdir()
        self._folder, self._number = folder, 0
        begin = [sys.executable] if launcher == "Ray Train" else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}",
        ]  # fmt: skip
        role = ["--ray-driver", str(num)] if launcher == "Ray Train" else ["--member"]
        began = time.time()
        self._process = subprocess.Popen(
            [*begin, __file__, *role, "--folder", str(folder), "--preset", preset],
            env=own_ray(folder) | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.start_up = float(wait_for(folder / "ready", self._process)) - began
        except SystemExit:
            self._kill()
            raise

    def run(self, steps: int) -> float:
        """Images/s of so many steps."""
        write(self._folder / f"go_{self._number}", str(steps))
        if not steps:
            return 0.0
        speed = float(wait_for(self._folder / f"done_{self._number}", self._process))
        self._number += 1
        return speed

    def end(self) -> None:
        self.run(0)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@contextmanager
def both(num: int, folder: Path, preset: str) -> Iterator[dict[str, Side]]:
    sides: dict[str, Side] = {}
    try:
        for launcher in ("torchrun", "Ray Train"):
            progress(f"{launcher} starts {num} worker{'s' if num > 1 else ''}")
            sides[launcher] = Side(launcher, num, folder / f"{launcher.split()[0]}{num}", preset)
        yield sides
    finally:
        for side in sides.values():
            side.end()


def streaming(folder: Path, num_images: int, epochs: int, rounds: int) -> dict[str, Spread]:
    """Images/s of a Parquet file in memory and as a stream."""
    size = ["--data.source.num_train", str(num_images), "--data.source.num_test", "200"]
    raypp = [sys.executable, "-m", "raypp.cli"]
    convert = [*raypp, "data", "convert", "shapes", str(folder / "set"), *(s.replace("data.source.", "") for s in size)]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    number = 0

    def train(*flags: str) -> float:
        nonlocal number
        number += 1
        settings = {
            "data.source.name": "parquet", "data.source.path": folder / "set", "data.num_val": 200,
            "train.mode": "plain", "protection": "plain", "train.epochs": epochs, "cluster.num_workers": 1,
            "cluster.storage": folder,
        }  # fmt: skip
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        command = [*raypp, "train", "quickstart", *words, *flags, "--name", f"s{number}", "--quiet"]
        subprocess.run(command, check=True, env=own_ray(folder))
        lines = (folder / f"s{number}" / "metrics.jsonl").read_text().splitlines()
        return float(statistics.median(json.loads(line)["images_per_s"] for line in lines[1:]))

    return interleave(
        {
            "in memory": train,
            "streamed": lambda: train("--data.stream", "true", "--data.image_size", "[32, 32]"),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-small")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers; default 1 2")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement with one worker")
    parser.add_argument("--stream-rounds", type=int, default=2, help="0 leaves the stream out")
    parser.add_argument("--stream-images", type=int, default=6000)
    parser.add_argument("--stream-epochs", type=int, default=4, help="the first is not counted")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ray-driver", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        dist.init_process_group("gloo")
        with quiet_sink(torch.device("cpu")) as sink:
            member(options.folder, options.preset, sink)
        dist.destroy_process_group()
        return
    if options.ray_driver:
        on_ray(options.folder, options.preset, options.ray_driver)
        return
    if runtime.num_cores() < 2:
        parser.error("needs two cores")
    if options.stream_epochs < 2:
        parser.error("--stream-epochs must be at least 2: the first epoch is not counted")
    torch.set_num_threads(1)
    start = machine()
    print(describe(start) + " (per worker)\n")
    results: dict[str, Any] = {}
    speeds: dict[int, dict[str, Spread]] = {}
    rows = []
    # A short name: Ray's sockets lie below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rs-") as name:
        for num in options.workers:
            with both(num, Path(name), options.preset) as sides:
                speed = sides["torchrun"].run(2)
                steps = max(2, round(options.seconds * speed / BATCH_SIZE))
                for side in sides.values():
                    side.run(2)
                speeds[num] = interleave({k: partial(s.run, steps) for k, s in sides.items()}, options.rounds)
                cost = ratio(speeds[num]["torchrun"], speeds[num]["Ray Train"])
                results[f"{num} workers"] = {
                    "steps": steps,
                    "time_per_step_ray_over_torchrun": cost.to_json(),
                    **{
                        k: {"images_per_s": v.to_json(), "start_up_seconds": sides[k].start_up}
                        for k, v in speeds[num].items()
                    },
                }
                for launcher, spread in speeds[num].items():
                    relative_time = (
                        "" if launcher == "torchrun" else "{:.3f} ({:.3f} - {:.3f})".format(cost.median, *cost.interval)
                    )
                    rows.append(
                        [
                            f"{num}, {launcher}",
                            f"{spread.median:,.1f}",
                            str(spread),
                            relative_time,
                            f"{sides[launcher].start_up:.1f}",
                        ]
                    )
        show_table(
            f"{options.preset}: joint steps and a checkpoint, batch {BATCH_SIZE} in all, "
            f"median of {options.rounds} rounds",
            ["workers", "images/s", "min - max", "time per step, Ray / torchrun (95%)", "start-up s"],
            rows,
        )
        for launcher in ("torchrun", "Ray Train") if {1, 2} <= speeds.keys() else ():
            gain = speeds[2][launcher].median / speeds[1][launcher].median  # their rounds lie minutes apart
            results[f"speed-up by two, {launcher}"] = gain
            print(f"{launcher}: two workers {gain:.2f} times as fast as one, by medians")
        if options.stream_rounds:
            inputs = streaming(Path(name), options.stream_images, options.stream_epochs, options.stream_rounds)
            results["stream"] = {k: v.to_json() for k, v in inputs.items()}
            print()
            show_table(
                f"plain classifier, {options.stream_images:,} images in Parquet, one worker, "
                f"median of {options.stream_rounds} rounds",
                ["input", "images/s", "min - max"],
                [[k, f"{v.median:,.1f}", str(v)] for k, v in inputs.items()],
            )
    finish(options.json, "scaling", start, results)


if __name__ == "__main__":
    main()
