"""Whether streaming's memory stays flat as the training set grows: peak memory of ``raypp train`` on N and 10 N images.

Each set is written as Parquet (random 64 x 64 PNGs, in the layout of ``raypp data convert``, in files so small that
even the smaller set has several) and trained on for one epoch by ``raypp train`` in a fresh process: plain mode, a
ResNet-20 of width 2 so that reading is what takes the time, one Ray Train worker; once streamed, once held in memory.
The smaller set has to be larger than all buffers (data.shuffle_buffer, 128 MiB of blocks in flight): what fills for the
first time is not growth. Peaks include everything that Ray starts.

The measure. Every ``--interval`` seconds, over all descendants of this process:

    sum of Pss_Anon + Pss_File (/proc/PID/smaps_rollup)  +  blocks of the /dev/shm files that they hold open

Pss divides a page among the processes that map it, so that shared libraries count once. The object store's pages are
taken from the store's file instead of from Pss_Shmem: a page that a finished task wrote is in memory, but in nobody's
Pss. The page cache of files that are merely read (the Parquet set) is not counted, as the system takes it back at will.
Ray's head processes and workers are descendants of the driver; should one lose its parent, it becomes a child of this
process (PR_SET_CHILD_SUBREAPER), so that the tree stays whole. Linux only.

Torch and Ray alone take gigabytes, which makes any ratio of peaks look flat; so the growth is also stated against that
of the decoded set. Peaks between two samples are missed: a peak is a lower bound, ``samples`` says how many stand
behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from _common import describe, finish, machine, own_ray, progress, show_table
from PIL import Image

from raypp.data.convert import ROWS_PER_GROUP

PR_SET_CHILD_SUBREAPER = 36
NUM_CLASSES = 10
NUM_VAL = 500
NUM_TEST = 200
ROWS_PER_FILE = 5_000
SIDE = 64
IMAGE_BYTES = SIDE * SIDE * 3
REAP_SECONDS = 60
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Memory of a process tree at one moment, in bytes."""

    anonymous: int
    files: int
    shared: int
    processes: int

    @property
    def total(self) -> int:
        return self.anonymous + self.files + self.shared


def write_set(folder: Path, num_train: int) -> None:
    """Write a train and a test split as Parquet, holding one row group in memory at a time."""
    folder.mkdir()
    names = [str(i) for i in range(NUM_CLASSES)]
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    random = np.random.default_rng(0)
    for split, num in (("train", num_train), ("test", NUM_TEST)):
        for index, start in enumerate(range(0, num, ROWS_PER_FILE)):
            end = min(start + ROWS_PER_FILE, num)
            with pq.ParquetWriter(folder / f"{split}-{index:05d}.parquet", schema, compression="none") as writer:
                for first in range(start, end, ROWS_PER_GROUP):
                    labels = np.arange(first, min(first + ROWS_PER_GROUP, end)) % NUM_CLASSES
                    rows = [{"bytes": png, "path": None} for png in pictures(labels, random)]
                    writer.write_table(pa.table([rows, labels.tolist()], schema=schema))
                    progress(f"writing {folder.name}: {first + len(labels):,} of {num:,} {split} images")
    progress("")


def pictures(labels: np.ndarray, random: np.random.Generator) -> Iterator[bytes]:
    """PNGs of random blocks with noise, brighter with the label: about 10 kB each, no two alike."""
    blocks = random.integers(0, 150, (len(labels), SIDE // 4, SIDE // 4, 3)) + 8 * labels[:, None, None, None]
    whole = blocks.repeat(4, axis=1).repeat(4, axis=2) + random.integers(0, 24, (len(labels), SIDE, SIDE, 3))
    for pixels in whole.astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png", compress_level=1)
        yield file.getvalue()


def descendants(root: int) -> list[int]:
    """All processes below ``root``, without it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    processes, open_ends = [], [root]
    while open_ends:
        below = children.get(open_ends.pop(), [])
        processes += below
        open_ends += below
    return processes


def sample(root: int) -> Sample:
    """Measure the tree below ``root`` once."""
    anonymous = files = processes = 0
    shared: dict[tuple[int, int], int] = {}
    for pid in descendants(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            fields = {key: int(rest.split()[0]) * 1024 for key, rest in (line.split(":") for line in lines)}
            open_files = list(Path(f"/proc/{pid}/fd").iterdir())
        except (OSError, KeyError):  # it has ended meanwhile
            continue
        for file in open_files:
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if str(file.readlink()).startswith("/dev/shm/"):
                    stat = file.stat()
                    shared[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
        anonymous += fields["Pss_Anon"]
        files += fields["Pss_File"]
        processes += 1
    return Sample(anonymous, files, sum(shared.values()), processes)


def train(folder: Path, dataset: Path, stream: bool, shuffle_buffer: int, interval: float) -> dict[str, Any]:
    """Train one epoch in a fresh process; its peak memory, images/s and seconds."""
    name = f"{dataset.name}-{'stream' if stream else 'memory'}"
    tree = {
        "data": {
            "source": {"name": "parquet", "path": str(dataset)},
            "image_size": [SIDE, SIDE],
            "num_val": NUM_VAL,
            "stream": stream,
            "shuffle_buffer": shuffle_buffer,
        },
        "protection": {"name": "plain"},
        "classifier": {"name": "resnet20", "width": 2},
        "features": {"name": "plain_classifier"},
        "train": {"mode": "plain", "epochs": 1},
        "cluster": {"num_workers": 1, "storage": str(folder)},
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "raypp.cli", "train", str(config), "--name", name, "--quiet"]
    samples: list[Sample] = []
    began = time.monotonic()
    process = subprocess.Popen(command, env=own_ray(folder))
    while process.poll() is None:
        samples.append(sample(os.getpid()))
        progress(f"{name}: {time.monotonic() - began:.0f} s, {samples[-1].total / MIB:,.0f} MiB")
        time.sleep(interval)
    progress("")
    if process.returncode:
        raise SystemExit(f"raypp train {config} failed with exit code {process.returncode}")
    reap()
    peak = max(samples, key=lambda s: s.total)
    row = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "peak_mib": peak.total / MIB,
        "at_peak": asdict(peak),
        "peak_object_store_mib": max(s.shared for s in samples) / MIB,
        "images_per_s": row["images_per_s"],
        "epoch_seconds": row["seconds"],
        "command_seconds": time.monotonic() - began,
        "samples": len(samples),
    }


def reap() -> None:
    """Wait for what ended children have left to this process, so that the next run starts from nothing."""
    until = time.monotonic() + REAP_SECONDS
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
        except ChildProcessError:  # none is left
            return
    raise SystemExit(f"processes {descendants(os.getpid())} did not end within {REAP_SECONDS} s of raypp train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20_000, help="training images of the small set")
    parser.add_argument("--factor", type=int, default=10, help="how many times larger the large set is")
    parser.add_argument("--shuffle-buffer", type=int, default=2_000, help="data.shuffle_buffer")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples; one costs tens of ms")
    parser.add_argument("--modes", nargs="+", choices=["stream", "memory"], default=["stream", "memory"])
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start = machine()
    print(describe(start) + "\n")
    sizes = (options.num, options.num * options.factor)
    measurements: dict[str, dict[int, dict[str, Any]]] = {mode: {} for mode in options.modes}
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as name:
        folder = Path(name)
        sets = {num: folder / f"set-{num}" for num in sizes}
        for num, path in sets.items():
            write_set(path, num)
        on_disk = {num: sum(f.stat().st_size for f in path.iterdir()) / MIB for num, path in sets.items()}
        for num in sizes:
            for mode in options.modes:
                measurements[mode][num] = train(
                    folder, sets[num], mode == "stream", options.shuffle_buffer, options.interval
                )
    rows = [
        [
            f"{mode}, {num:,} images",
            f"{on_disk[num]:,.0f}",
            f"{num * IMAGE_BYTES / MIB:,.0f}",
            f"{run['peak_mib']:,.0f}",
            f"{run['peak_object_store_mib']:,.0f}",
            f"{run['images_per_s']:,.0f}",
            f"{run['command_seconds']:,.0f}",
            str(run["samples"]),
        ]
        for mode in options.modes
        for num, run in measurements[mode].items()
    ]
    columns = ["", "set MiB", "decoded MiB", "peak MiB", "object store MiB", "images/s", "command s", "samples"]
    show_table("peak memory of raypp train with all of Ray, one run each", columns, rows)
    more_decoded = (sizes[1] - sizes[0]) * IMAGE_BYTES / MIB
    growth = {}
    for mode, runs in measurements.items():
        small, large = (runs[num]["peak_mib"] for num in sizes)
        growth[mode] = {"peak_ratio": large / small, "mib_per_decoded_mib": (large - small) / more_decoded}
        print(
            f"{mode}: {options.factor} times the images take {large / small:.2f} times the memory: "
            f"{large - small:+,.0f} MiB for {more_decoded:,.0f} MiB more of decoded images"
        )
    results = {"num_images": sizes, "set_mib": on_disk, "runs": measurements, "growth": growth}
    finish(options.json, "streaming_memory", start, results)


if __name__ == "__main__":
    main()
