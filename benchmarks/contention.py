"""How much training, attacks and serving lose beside another process that keeps the cores busy.

Every measurement is a process of its own, alone or beside as many busy processes as there are cores; rounds are
interleaved. A scheduler that is fair to threads leaves half of the machine (the *fair share*) to a computation that has
as many threads. raypp as shipped should lose at most 5% alone, and keep at least half of its fair share beside others.

- *train*: `raypp train quickstart --local`, shortened; images/s of its plain and its joint epoch.
- *attack*: `raypp attack BUNDLE --attacks inverse --local` on the bundle of that run; images/s of its last epoch.
- *serve*: batches of one image through the classifier in one process, with a replica's number of threads.

The settings: *shipped* (threads adapt), *fixed* (`train.adapt_threads false`), *passive* (fixed, and threads that wait
sleep at once: `OMP_WAIT_POLICY=PASSIVE`), *one thread*. Serving knows shipped (one thread) and fixed (all cores).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Spread, describe, finish, interleave, machine, ratio, show_table

from raypp import env
from raypp.config import load_config
from raypp.nets import CLASSIFIERS

FIXED = ["--train.adapt_threads", "false"]
SETTINGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "shipped": ([], {}),
    "fixed": (FIXED, {}),
    "passive": (FIXED, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": ([], {"OMP_NUM_THREADS": "1"}),
}
SHORT = ["--train.epochs", "1", "--train.plain_epochs", "1", "--data.source.num_train", "2000"]
SERVE_SECONDS = 3.0


@contextmanager
def busy_processes(num: int) -> Iterator[None]:
    """Run ``num`` processes that do nothing but take a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(arguments: list[str], variables: dict[str, str]) -> str:
    """Run this Python with ``arguments`` and return what it prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout


def train(setting: str, folder: Path, beside: bool) -> float:
    """Return images/s over both epochs of a shortened quickstart run below ``folder``."""
    flags, variables = SETTINGS[setting]
    with tempfile.TemporaryDirectory(dir=folder) as storage, busy_processes(env.num_cores() if beside else 0):
        where = ["--name", "run", "--cluster.storage", storage]
        run(["-m", "raypp.cli", "train", "quickstart", "--local", "--quiet", *where, *SHORT, *flags], variables)
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    return sum(row["images_per_s"] * row["seconds"] for row in rows) / sum(row["seconds"] for row in rows)


def attack(setting: str, folder: Path, beside: bool) -> float:
    """Return images/s of the inverse network's last epoch against the bundle ``folder``/victim/bundle."""
    flags, variables = SETTINGS[setting]
    flags = [flag.replace("--train.", "--inverse.train.") for flag in flags]
    with tempfile.TemporaryDirectory(dir=folder) as storage, busy_processes(env.num_cores() if beside else 0):
        where = ["--name", "run", "--storage", storage, "--suite", "quick", "--attacks", "inverse"]
        bundle = str(folder / "victim" / "bundle")
        run(["-m", "raypp.cli", "attack", bundle, "--local", "--quiet", *where, *flags], variables)
        result = json.loads((Path(storage) / "run" / "attacks" / "inverse" / "result.json").read_text())
    return float(result["history"][-1]["images_per_s"])


def serve(setting: str, _: Path, beside: bool) -> float:
    """Return images/s of a classifier, one image at a time."""
    threads = 1 if setting == "shipped" else env.num_cores()
    with busy_processes(env.num_cores() if beside else 0):
        return float(run([__file__, "--classify", str(threads)], {}))


def classify(threads: int) -> float:
    """Classify one image after the other for some seconds; return images/s."""
    torch.set_num_threads(threads)
    net = CLASSIFIERS.build(load_config("cifar10-small").classifier, num_classes=10).eval()
    image, num = torch.rand(1, 3, 32, 32), 0
    with torch.inference_mode():
        for _ in range(20):
            net(image)
        began = time.perf_counter()
        while time.perf_counter() - began < SERVE_SECONDS:
            net(image)
            num += 1
    return num / (time.perf_counter() - began)


def measure(name: str, settings: list[str], work: Callable[[str, Path, bool], float], folder: Path, rounds: int) -> Any:
    """Measure one kind of work with every setting, alone and beside others, print the table and return it."""
    contestants = {
        f"{setting}, {'beside' if beside else 'alone'}": partial(work, setting, folder, beside)
        for setting in settings
        for beside in (False, True)
    }
    speeds = interleave(contestants, rounds)
    alone = speeds["fixed, alone"]
    ratios = {key: ratio(speed, alone) for key, speed in speeds.items()}
    rows = [[key, f"{speed.median:,.0f}", str(speed), f"{ratios[key].median:.2f}", _range(ratios[key])]
            for key, speed in speeds.items()]  # fmt: skip
    show_table(f"{name}: images/s, {rounds} rounds", ["", "median", "min - max", "of fixed, alone", "min - max"], rows)
    return {key: {"images_per_s": speeds[key].to_json(), "of_fixed_alone": ratios[key].to_json()} for key in speeds}


def _range(values: Spread) -> str:
    return f"{min(values.values):.2f} - {max(values.values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=["train", "attack", "serve"], default=["train", "attack", "serve"])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--classify", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.classify:
        print(classify(options.classify))
        return
    start = machine()
    print(describe(start) + "\n")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as scratch:
        folder = Path(scratch)
        if "train" in options.work:
            results["train"] = measure("train", list(SETTINGS), train, folder, options.rounds)
        if "attack" in options.work:
            where = ["--name", "victim", "--cluster.storage", scratch]
            run(["-m", "raypp.cli", "train", "quickstart", "--local", "--quiet", *where, *SHORT], {})
            results["attack"] = measure("attack", list(SETTINGS), attack, folder, options.rounds)
        if "serve" in options.work:
            results["serve"] = measure("serve", ["shipped", "fixed"], serve, folder, options.rounds)
    finish(options.json, "contention", start, results)


if __name__ == "__main__":
    main()
