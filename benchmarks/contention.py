"""How much training, attacks and serving lose to another process that keeps the cores busy.

Each contestant is a process of its own that computes for ``--seconds`` on request, alone or contended by as many busy
processes as there are cores; rounds are interleaved. A scheduler that is fair to threads leaves a computation half of
the machine if as many other threads are busy (its *fair share*). As shipped, nothing should lose more than 5% alone,
and everything should keep at least half of its fair share: 0.25 of its speed alone.

- *train*: raypp's training loop, joint step of the preset ``cifar10-small`` in batches of 128, random images.
- *attack*: training steps of the inverse network of the suite ``quick`` in its batches, random images of 32 x 32.
- *serve*: ResNet-20 on one image at a time.

The settings: *shipped* (threads adapt in training and attacks, serving has one), *fixed* (all cores), *passive* (fixed,
and threads that wait sleep at once: ``OMP_WAIT_POLICY=PASSIVE``), *one thread*.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import (
    RayppLoop,
    Spread,
    describe,
    device_batches,
    feature_weights,
    finish,
    interleave,
    joint_config,
    machine,
    quiet_sink,
    ratio,
    show_table,
)

from raypp.attacks.inverse_network import InverseNetwork
from raypp.config.presets import load_config
from raypp.experiments.attack_plan import make_attack_plan
from raypp.models import CLASSIFIERS
from raypp.training.optim import build_optimizer
from raypp.training.threads import AdaptiveThreads
from raypp.utils import runtime

WORK = ("train", "attack", "serve")
SETTINGS = ("shipped", "fixed", "passive", "one thread")
CPU = torch.device("cpu")
STEPS = 1  # between two looks at the clock
SETTLE_SECONDS = 2.0  # before a measurement: threads adapt once a second

Steps = Callable[[], int]
"""Computes for a moment; returns the number of images."""


@contextmanager
def train_steps(adapt: bool) -> Iterator[Steps]:
    """raypp's own loop; it adapts its threads by itself."""
    config = joint_config("cifar10-small", adapt_threads=adapt)
    with quiet_sink(CPU) as sink, AdaptiveThreads(adapt) as threads:
        loop = RayppLoop(config, feature_weights(None), sink)
        loop.feed(device_batches(config, STEPS, sink))
        loop._loop.threads = threads

        def steps() -> int:
            loop.epoch()
            return STEPS * config.train.batch_size

        yield steps


@contextmanager
def attack_steps(adapt: bool) -> Iterator[Steps]:
    """Forward, L1 loss, backward and optimizer of an inverse network."""
    options: Any = make_attack_plan(bundle="none", suite="quick", name="none").suite.options("inverse")
    network = InverseNetwork((3, 32, 32), (3, 32, 32), options)
    groups = [{"params": list(network.parameters()), "factor": 1.0}]
    optimizer = build_optimizer(options.train.optimizer, groups)
    images = torch.rand(options.train.batch_size, 3, 32, 32)
    with AdaptiveThreads(adapt) as threads:

        def steps() -> int:
            optimizer.zero_grad()
            (network(images) - images).abs().mean().backward()
            optimizer.step()
            threads.update()
            return len(images)

        yield steps


@contextmanager
def serve_steps(adapt: bool) -> Iterator[Steps]:  # noqa: ARG001 (a replica has a fixed number of threads)
    """One image through a classifier."""
    network = CLASSIFIERS.build(load_config("cifar10-small").classifier, num_classes=10).eval()
    image = torch.rand(1, 3, 32, 32)

    def steps() -> int:
        with torch.inference_mode():
            network(image)
        return 1

    yield steps


KINDS = {"train": train_steps, "attack": attack_steps, "serve": serve_steps}


def compute(work: str, setting: str, seconds: float) -> None:
    """Compute for ``seconds`` at each line of standard input, and print images/s."""
    adapt = setting == "shipped" and work != "serve"
    if setting == "one thread" or (setting == "shipped" and work == "serve"):
        torch.set_num_threads(1)
    with KINDS[work](adapt) as steps:
        for _ in sys.stdin:
            settled = time.perf_counter() + SETTLE_SECONDS
            while time.perf_counter() < settled:
                steps()
            num, began = 0, time.perf_counter()
            while (taken := time.perf_counter() - began) < seconds:
                num += steps()
            print(num / taken, flush=True)


@contextmanager
def contestant(work: str, setting: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that runs :func:`compute`."""
    variables = {"OMP_WAIT_POLICY": "PASSIVE"} if setting == "passive" else {}
    command = [sys.executable, __file__, "--compute", work, setting, "--seconds", str(seconds)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=os.environ | variables, stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(process: subprocess.Popen[str], contended: bool) -> float:
    """Let a contestant compute once, alone or contended by busy processes; return images/s."""
    assert process.stdin is not None
    assert process.stdout is not None
    busy = [sys.executable, "-c", "while True: pass"]
    competitors = [subprocess.Popen(busy) for _ in range(runtime.num_cores() if contended else 0)]
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    finally:
        for competitor in competitors:
            competitor.kill()
            competitor.wait()


def compare(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one kind of work with every setting, print the table and return it."""
    with ExitStack() as stack:
        processes = {s: stack.enter_context(contestant(work, s, options.seconds)) for s in options.settings}
        for process in processes.values():
            measure(process, False)  # imports and warms up
        contestants: dict[str, Callable[[], float]] = {
            f"{setting}, {'contended' if contended else 'alone'}": partial(measure, process, contended)
            for setting, process in processes.items()
            for contended in (False, True)
        }
        speeds = interleave(contestants, options.rounds)
    best = speeds["fixed, alone"] if work != "serve" else speeds["shipped, alone"]
    ratios = {key: ratio(speed, best) for key, speed in speeds.items()}
    rows = [
        [key, f"{s.median:,.0f}", str(s), f"{ratios[key].median:.2f}", _range(ratios[key])] for key, s in speeds.items()
    ]
    reference = "of fixed, alone" if work != "serve" else "of shipped, alone"
    show_table(f"{work}: images/s, {options.rounds} rounds", ["", "median", "min - max", reference, "min - max"], rows)
    return {key: {"images_per_s": speeds[key].to_json(), "ratio": ratios[key].to_json()} for key in speeds}


def _range(values: Spread) -> str:
    return f"{min(values.values):.2f} - {max(values.values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="with fixed and shipped"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--compute", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        work, setting = options.compute
        compute(work, setting, options.seconds)
        return
    start = machine()
    print(describe(start) + "\n")
    finish(options.json, "contention", start, {work: compare(work, options) for work in options.work})


if __name__ == "__main__":
    main()
