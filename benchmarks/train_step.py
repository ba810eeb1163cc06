"""How fast one joint training step is: raypp's loop against the obvious way to write it, in one run, interleaved.

A step is forward, backward and optimiser for 128 images of 32 x 32 (Eq. 4: cross-entropy - alpha * feature distance),
batches included. Every contestant trains the same networks from random images; each round trains an epoch of about
``--seconds`` with each of them in turn.

- *obvious*: float32, NCHW, a torch DataLoader over PIL images (RandomCrop with padding 4, RandomHorizontalFlip,
  ToTensor), one forward pass of the feature network for each side. phi's parameters are frozen, as everybody's would
  be; its plain side then records no graph, so that ``torch.no_grad`` there would change nothing and is left out. It is
  measured with each number of DataLoader processes in ``--workers``; the better is the *reference* of all ratios.
  Starting those processes is not measured, filling their queues anew in each epoch is.
- the rows below it change one thing at a time, in raypp's real loop (``Trainer.train_epoch``): fed by the reference's
  DataLoader while precision and memory layout change, then by raypp's own loader, which is raypp as shipped.

Percentages of peak: a step's floating-point operations (torch's FlopCounterMode, which counts convolutions and matrix
products) per second, over those of a large matrix product in the same precision, the best of the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import (
    NUM_CLASSES,
    RayppLoop,
    describe,
    device_batches,
    feature_weights,
    finish,
    interleave,
    joint_config,
    machine,
    progress,
    quiet_sink,
    random_images,
    ratio,
    show_table,
)
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from raypp.config.schema import Config
from raypp.data.loader import BatchLoader
from raypp.models import CLASSIFIERS
from raypp.models.perceptual import StateDict, VGG16Features
from raypp.models.unet import UNet
from raypp.training.optim import bf16_is_fast
from raypp.training.reporter import Reporter

SIZES = ("cifar10-small", "cifar10")
PROBE_STEPS = 2
MAX_STEPS = 300
SHIPPED = "raypp as shipped (+ on-device augmentation)"


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them: an array, a PIL image per item, transforms on it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class PilBatches:
    """Batches of a torch DataLoader over `Pictures`, NCHW float32, as a :class:`~raypp.data.loader.BatchLoader`."""

    def __init__(self, steps: int, batch_size: int, workers: int, device: torch.device) -> None:
        self.num_batches, self.device = steps, device
        self.loader = DataLoader(
            Pictures(*random_images(steps * batch_size)),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        next(iter(self.loader))  # starts the processes, so that no round measures that

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in itertools.islice(self.loader, first, None):
            yield images.to(self.device), labels.to(self.device)


class ObviousLoop:
    """The training loop that one would write first."""

    def __init__(self, config: Config, phi: StateDict, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        options = config.protection.model_dump()
        self.unet = UNet(3, options["width"], options["depth"]).to(device)
        self.classifier: nn.Module = CLASSIFIERS.build(config.classifier, num_classes=NUM_CLASSES).to(device)
        self.phi = VGG16Features(phi).to(device)
        self.alpha = config.train.alpha
        wanted = config.train.optimizer
        self.optimizer = torch.optim.SGD(
            [*self.unet.parameters(), *self.classifier.parameters()],
            lr=wanted.lr,
            momentum=wanted.momentum,
            weight_decay=wanted.weight_decay,
        )
        self.batches: BatchLoader

    def feed(self, batches: BatchLoader) -> None:
        self.batches = batches

    def step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        protected = torch.sigmoid(self.unet(images))
        distance = F.mse_loss(self.phi(protected), self.phi(images))
        loss = F.cross_entropy(self.classifier(protected), labels) - self.alpha * distance
        loss.backward()
        self.optimizer.step()
        return float(loss.item())

    def epoch(self) -> float:
        """Train one epoch and return images/s."""
        self.unet.train()
        self.classifier.train()
        seen, total_loss, began = 0, 0.0, time.perf_counter()
        for images, labels in self.batches.epoch(0):
            total_loss += self.step(images, labels)
            seen += len(labels)
        return seen / (time.perf_counter() - began)


def count_flops(config: Config, phi: StateDict, device: torch.device) -> float:
    """Floating-point operations (a multiply-add is two) of one joint step, per image."""
    loop, num = ObviousLoop(config, phi, device), 4
    images = torch.rand(num, 3, 32, 32, device=device)
    with FlopCounterMode(display=False) as counter:
        loop.step(images, torch.zeros(num, dtype=torch.int64, device=device))
    return float(counter.get_total_flops()) / num


def peaks(device: torch.device) -> dict[str, Callable[[], float]]:
    """Measurements of what this machine can do, in GFLOP/s, at the current number of threads."""
    side = 2048 if device.type == "cpu" else 8192
    images = torch.rand(128, 64, 32, 32, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.rand(64, 64, 3, 3, device=device).to(torch.bfloat16, memory_format=torch.channels_last)

    def matmul(dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: rate(lambda: a @ b, 2 * side**3, device)

    return {
        "fp32 matmul": matmul(torch.float32),
        "bf16 matmul": matmul(torch.bfloat16),
        "bf16 conv 64->64 3x3": lambda: rate(
            lambda: F.conv2d(images, weight, padding=1), 2 * 128 * 32 * 32 * 64 * 64 * 9, device
        ),
    }


@torch.inference_mode()
def rate(operation: Callable[[], Tensor], flops: int, device: torch.device, repeats: int = 5) -> float:
    """GFLOP/s of the fastest of several calls after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return flops / best / 1e9


def calibrate(loop: RayppLoop | ObviousLoop, batches: Callable[[int], BatchLoader], seconds: float, batch: int) -> None:
    """Warm up, then feed the loop with epochs that take about ``seconds``."""
    loop.feed(batches(PROBE_STEPS))
    loop.epoch()
    steps = round(seconds * loop.epoch() / batch)
    loop.feed(batches(min(max(steps, PROBE_STEPS), MAX_STEPS)))


def measure(size: str, phi: StateDict, sink: Reporter, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all contestants at one size, print the tables and return what was measured."""
    device = sink.device
    config = joint_config(size)
    batch = config.train.batch_size
    flops = count_flops(config, phi, device)
    loops: dict[str, RayppLoop | ObviousLoop] = {}

    def pil(workers: int) -> Callable[[int], BatchLoader]:
        return lambda steps: PilBatches(steps, batch, workers, device)

    speeds: dict[int, float] = {}
    for workers in options.workers:
        progress(f"warming up: obvious, {workers} loader processes")
        loop = loops[f"obvious, {workers} loader processes"] = ObviousLoop(config, phi, device)
        calibrate(loop, pil(workers), options.seconds, batch)
        speeds[workers] = loop.epoch()
    best_workers = max(speeds, key=lambda w: speeds[w])

    variants = {
        "fp32, channels-last": {"precision": "fp32", "channels_last": True},
        "bf16, NCHW": {"precision": "bf16", "channels_last": False},
        "bf16, channels-last": {"precision": "bf16", "channels_last": True},
        SHIPPED: {},
    }
    if options.compile:
        variants["raypp + torch.compile"] = {"compile": True}
    for name, train in variants.items():
        progress(f"warming up: {name}")
        changed = joint_config(size, **train)
        loops[name] = RayppLoop(changed, phi, sink)
        own = "precision" not in train
        calibrate(
            loops[name],
            (lambda steps: device_batches(config, steps, sink)) if own else pil(best_workers),
            options.seconds,
            batch,
        )

    limits = peaks(device)
    spreads = interleave({name: loop.epoch for name, loop in loops.items()} | limits, options.rounds)
    obvious = [name for name in loops if name.startswith("obvious")]
    reference = max(obvious, key=lambda name: spreads[name].median)
    rows, results = [], {}
    shipped_is_bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and bf16_is_fast(device))
    for name in loops:
        speed, gain = spreads[name], ratio(spreads[name], spreads[reference])
        gflops = speed.median * flops / 1e9
        is_bf16 = name.startswith("bf16") or (name.startswith("raypp") and shipped_is_bf16)
        peak = "bf16 matmul" if is_bf16 else "fp32 matmul"
        share = gflops / max(spreads[peak].values)
        rows.append(
            [
                name + (" (reference)" if name == reference else ""),
                f"{speed.median:,.1f}",
                str(speed),
                f"{gain.median:.2f}",
                f"{min(gain.values):.2f} - {max(gain.values):.2f}",
                f"{gflops:,.0f}",
                f"{share:.0%} of {peak}",
            ]
        )
        results[name] = {
            "images_per_s": speed.to_json(),
            "ratio_to_reference": gain.to_json(),
            "gflops": gflops,
            "share_of_peak": share,
            "peak": peak,
        }
    show_table(
        f"{size}: joint step, batch {batch}, {flops / 1e9:.2f} GFLOP per image, median of {options.rounds} rounds",
        ["", "images/s", "min - max", "ratio", "min - max", "GFLOP/s", "share of peak"],
        rows,
    )
    show_table(
        "what the machine can do",
        ["", "best GFLOP/s", "min - max"],
        [[name, f"{max(spreads[name].values):,.0f}", str(spreads[name])] for name in limits],
    )
    shown = profiled(loops[SHIPPED]) if options.profile else []
    return {
        "batch_size": batch,
        "rounds": options.rounds,
        "seconds_per_measurement": options.seconds,
        "gflop_per_image": flops / 1e9,
        "reference": reference,
        "loader_processes_of_intermediate_rows": best_workers,
        "contestants": results,
        "peaks_gflops": {name: spreads[name].to_json() for name in limits},
        "profile": shown,
    }


def profiled(loop: RayppLoop | ObviousLoop, top: int = 8) -> list[dict[str, Any]]:
    """Print and return the operations of one epoch that take the most time of their own."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        loop.epoch()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: getattr(e, own), reverse=True)
    total = sum(getattr(e, own) for e in events)
    operations = [
        {"op": e.key, "calls": e.count, "milliseconds": getattr(e, own) / 1e3, "share": getattr(e, own) / total}
        for e in events[:top]
    ]
    show_table(
        "profile of raypp's step: self time",
        ["operation", "calls", "ms", "share"],
        [[f["op"], f"{f['calls']:,}", f"{f['milliseconds']:,.1f}", f"{f['share']:.1%}"] for f in operations],
    )
    return operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement (at least two steps)")
    parser.add_argument("--threads", type=int, help="torch's threads; by default as many as torch takes")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="DataLoader processes of the reference")
    parser.add_argument("--features", type=Path, help="VGG-16 weights (.safetensors or .pt); by default random")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--profile", action="store_true", help="also show where raypp's step spends its time")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a smoke test: short, two rounds, numbers mean little")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 0.5
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = machine()
    print(describe(start) + "\n")
    phi = feature_weights(options.features)
    with quiet_sink(device) as sink:
        sizes = SIZES if options.size == "both" else (options.size,)
        results = {size: measure(size, phi, sink, options) for size in sizes}
    finish(options.json, "train_step", start, results)


if __name__ == "__main__":
    main()
