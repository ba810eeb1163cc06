"""How the joint step scales from one worker to two, with one core and one thread for each.

Three processes stay alive for the whole run: one trains alone (world 1), two train together by gloo (world 2); each is
pinned to one core (``os.sched_setaffinity``), and the lone one shares its core with a member of the pair. Only one
side works at a time, in interleaved rounds; the other waits on a queue and takes no CPU. Both sides run raypp's real
loop (``Loop.train_epoch``) over the same number of batches of 128 images in all, random images, cifar10-small's
networks. Efficiency is (images/s with two) / (2 x images/s with one), round by round.

``--ray`` adds the same networks through ``raypp train`` on Ray Train with one and with two workers, one CPU and one
thread each, on shapes: images/s are the median of raypp's own epochs but the first (2 epochs per run, so one, by
default), and the start-up is the time from the command to the first epoch's row in metrics.jsonl, less that epoch's own
training: it contains interpreter and Ray start, workers, data, and one validation. Ray's processes are not pinned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
from safetensors.torch import save_file

from raypp import env

PRESET = "cifar10-small"
POLL_SECONDS = 0.1


def worker(
    index: int,
    cores: list[int],
    store: str,
    features: Path | None,
    inboxes: list[mp.SimpleQueue[int]],
    outbox: mp.SimpleQueue[float],
) -> None:
    """Train as many steps as each message from the inbox says, until it says 0.

    Args:
        index: 0 trains alone, 1 and 2 together.
        outbox: takes images/s from process 0 and from rank 0 of the pair.
    """
    os.sched_setaffinity(0, {cores[max(index - 1, 0)]})
    torch.set_num_threads(1)
    if index:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=index - 1, world_size=2)
    with quiet_sink(torch.device("cpu")) as sink:
        config = joint_config(PRESET)
        loop = RayppLoop(config, feature_weights(features), sink)
        while steps := inboxes[index].get():
            loop.feed(device_batches(config, steps, sink))
            speed = loop.epoch()
            if sink.rank == 0:
                outbox.put(speed)
    if index:
        dist.destroy_process_group()


def measure(cores: list[int], features: Path | None, rounds: int, seconds: float) -> dict[str, Spread]:
    """Images/s of one worker and of two, a value per round."""
    context = mp.get_context("spawn")
    inboxes, outbox = [context.SimpleQueue() for _ in range(3)], context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as folder:
        arguments = (cores, f"{folder}/store", features, inboxes, outbox)
        processes: Any = mp.spawn(  # type: ignore[attr-defined,no-untyped-call]
            worker, args=arguments, nprocs=3, join=False
        )

        def run(members: list[int], steps: int) -> float:
            for member in members:
                inboxes[member].put(steps)
            while outbox.empty():
                processes.join(timeout=POLL_SECONDS)  # raises what a worker raised
            speed: float = outbox.get()
            return speed

        progress("warming up")
        run([1, 2], 2)
        run([0], 2)
        steps = max(2, round(seconds * run([0], 2) / BATCH_SIZE))
        found = interleave({"1 worker": lambda: run([0], steps), "2 workers": lambda: run([1, 2], steps)}, rounds)
        for inbox in inboxes:
            inbox.put(0)
        while not processes.join():
            pass
    return found


def through_ray(num_workers: int, features: Path | None, num_images: int, epochs: int) -> dict[str, Any]:
    """Run ``raypp train`` in a process of its own; images/s of its later epochs and its start-up in seconds."""
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as folder:
        weights = features
        if weights is None:
            weights = Path(folder) / "features.safetensors"
            save_file(feature_weights(None), weights)
        num_val = 500
        settings = {
            "data.source": f"{{name: shapes, num_train: {num_images + num_val}, num_test: 200}}",
            "data.num_val": num_val,
            "features.weights": weights,
            "train.epochs": epochs,
            "train.batch_size": BATCH_SIZE,
            "cluster.num_workers": num_workers,
            "cluster.storage": folder,
        }
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        began = time.time()
        command = [sys.executable, "-m", "raypp.cli", "train", PRESET, *flags, "--name", "r", "--quiet"]
        process = subprocess.Popen(command, env=own_ray(Path(folder)))
        metrics, first_row_at = Path(folder) / "r" / "metrics.jsonl", 0.0
        while process.poll() is None:
            if not first_row_at and metrics.exists():
                first_row_at = time.time()
            time.sleep(POLL_SECONDS)
        if process.returncode:
            raise SystemExit(f"raypp train with {num_workers} workers failed with exit code {process.returncode}")
        total = time.time() - began
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "images_per_s": statistics.median(row["images_per_s"] for row in rows[1:]),
        "epochs_measured": len(rows) - 1,
        "start_up_seconds": first_row_at - began - rows[0]["seconds"],
        "command_seconds": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement with one worker")
    parser.add_argument("--features", type=Path, help="VGG-16 weights (.safetensors or .pt); by default random")
    parser.add_argument("--ray", action="store_true", help="also measure through Ray Train (a minute and more)")
    parser.add_argument("--ray-images", type=int, default=6400, help="training images per epoch through Ray")
    parser.add_argument("--ray-epochs", type=int, default=2, help="epochs through Ray; the first is not counted")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if options.ray and options.ray_epochs < 2:
        parser.error("--ray-epochs must be at least 2: the first epoch is not counted")
    if env.num_cores() < 2:
        parser.error("needs two cores")
    torch.set_num_threads(1)
    start = machine()
    print(describe(start) + " (per worker)\n")
    found = measure(sorted(os.sched_getaffinity(0))[:2], options.features, options.rounds, options.seconds)
    speedup = ratio(found["2 workers"], found["1 worker"])
    efficiency = Spread(tuple(value / 2 for value in speedup.values))
    rows = [[name, f"{speed.median:,.1f}", str(speed)] for name, speed in found.items()]
    show_table(
        f"{PRESET}: joint step, batch {BATCH_SIZE} in all, one core each, median of {options.rounds} rounds",
        ["", "images/s", "min - max"],
        rows,
    )
    low, high = min(efficiency.values), max(efficiency.values)
    print(f"speed-up {speedup.median:.2f}; efficiency {efficiency.median:.0%} ({low:.0%} - {high:.0%})\n")
    results: dict[str, Any] = {
        "torch": {name: speed.to_json() for name, speed in found.items()},
        "speedup": speedup.to_json(),
        "efficiency": efficiency.to_json(),
    }
    if options.ray:
        progress("raypp train on Ray")
        ray_runs = {n: through_ray(n, options.features, options.ray_images, options.ray_epochs) for n in (1, 2)}
        progress("")
        results["ray"] = ray_runs
        show_table(
            "the same through Ray Train, one run each",
            ["workers", "images/s", "start-up s", "whole command s"],
            [
                [str(n), f"{r['images_per_s']:,.1f}", f"{r['start_up_seconds']:.1f}", f"{r['command_seconds']:.1f}"]
                for n, r in ray_runs.items()
            ],
        )
        print(f"efficiency through Ray {ray_runs[2]['images_per_s'] / ray_runs[1]['images_per_s'] / 2:.0%}")
    finish(options.json, "workers", start, results)


if __name__ == "__main__":
    main()
