"""The client's cost per image, and the gain in accuracy from the cloud's classifier.

The cloud gain is the accuracy on protected images minus that of the largest classifier of plain images that the client
could run alone within the multiply-accumulates of the protection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raypp.metrics.statistics import difference_interval

MUCH_LARGER = 1.5  # times the multiply-accumulates of the client's classifier, from which the gain is an upper bound
NUM_WARMUP, MIN_REPEATS, MAX_REPEATS, MAX_SECONDS = 2, 5, 25, 1.0


@torch.no_grad()
def multiply_accumulates(network: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Multiply-accumulates of one pass over images N x C x H x W: convolutions and matrix products, nothing else.

    PyTorch's ``FlopCounterMode`` counts two operations for each.
    """
    with FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops() // 2)


def time_per_image(protect: Callable[[Tensor], Tensor], image: Tensor) -> dict[str, float]:
    """Time calls on one image with one thread of torch; returns ``median``, ``q1``, ``q3`` in ms, and ``num``.

    Args:
        image: uint8 (1, C, H, W).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(NUM_WARMUP):
            protect(image)
        seconds: list[float] = []
        while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and sum(seconds) < MAX_SECONDS):
            start = time.perf_counter()
            protect(image)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    q1, median, q3 = (round(1000 * float(value), 4) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return {"median": median, "q1": q1, "q3": q3, "num": len(seconds)}


def cloud_gain(test: dict[str, Any], alone: dict[str, Any] | None, macs: int | None) -> dict[str, Any]:
    """``cloud_gain``, its 95% interval, and whether it is an upper bound; all None if an accuracy is not measured.

    Args:
        test: ``accuracy`` and ``accuracy_interval`` on protected images.
        alone: the same of the classifier that the client could run alone, with its ``macs``, ``epochs``
            and ``cloud_epochs``.
        macs: multiply-accumulates of the protection.
    """
    if alone is None or alone.get("accuracy") is None or test.get("accuracy") is None:
        return dict.fromkeys(("cloud_gain", "cloud_gain_interval", "cloud_gain_is_upper_bound"))
    pairs = [(numbers["accuracy"], numbers["accuracy_interval"]) for numbers in (test, alone)]
    low, high = difference_interval(*pairs[0], *pairs[1])
    return {
        "cloud_gain": pairs[0][0] - pairs[1][0],
        "cloud_gain_interval": [low, high],
        "cloud_gain_is_upper_bound": bool(reasons_for_upper_bound(alone, macs)),
    }


def reasons_for_upper_bound(alone: dict[str, Any], macs: int | None) -> list[str]:
    """Why the client alone could be more accurate than the classifier that was measured; empty without a reason."""
    reasons = []
    if alone["epochs"] is not None and alone["epochs"] < alone["cloud_epochs"]:
        reasons.append(f"the client's classifier trained {alone['epochs']} epochs, the cloud's {alone['cloud_epochs']}")
    if macs and alone["macs"] and macs > MUCH_LARGER * alone["macs"]:
        reasons.append(f"the client affords {format_products(macs)}, and no larger classifier was tried")
    return reasons


def describe_cost(client: dict[str, Any]) -> str:
    """The client's cost per image in one or two sentences."""
    times, macs = client["milliseconds"], client["macs"]
    quartiles = f"(quartiles {times['q1']:.3g} to {times['q3']:.3g}, n = {times['num']})"
    needs, uploads = f"needs {times['median']:.3g} ms", f"and uploads {client['bytes']:,} bytes."
    if macs is None:
        return (
            f"Per image the client's function {needs} on the device and threads that it uses {quartiles} {uploads} Its "
            "multiply-accumulates are not known."
        )
    return f"Per image the client computes {format_products(macs)}, {needs} on one CPU thread {quartiles} {uploads}"


def format_products(macs: int) -> str:
    """A number of multiply-accumulates in words."""
    for size, unit in ((10**6, " million"), (10**3, " thousand")):
        if macs >= size:
            return f"{macs / size:,.1f}{unit} multiply-accumulates"
    return f"{macs:,} multiply-accumulates" if macs else "no multiply-accumulates"


def describe_gain(client: dict[str, Any]) -> str:
    """The client's accuracy alone and the cloud gain, in a few sentences; a negative gain is called negative."""
    alone = client["alone"]
    if alone is None:
        return "The cloud gain is not known; it is measured for bundles only."
    if alone["classifier"] is None:
        could = "No classifier fits into so few; the client alone could name the most frequent class"
    else:
        could = f"For {format_products(alone['macs'])} it could run {alone['classifier']} alone, on plain images"
    if alone["accuracy"] is None:
        reason = f" ({alone['note']})" if alone.get("note") else ""
        return f"{could}. Its accuracy was not measured{reason}, so the cloud gain is not known."
    low, high = alone["accuracy_interval"]
    epochs = f" after {alone['epochs']} epochs" if alone["epochs"] else ""
    return f"{could}: {alone['accuracy']:.1%} correct{epochs} ({low:.1%} to {high:.1%}). {_describe_difference(client)}"


def _describe_difference(client: dict[str, Any]) -> str:
    alone, gain = client["alone"], 100 * client["cloud_gain"]
    low, high = (100 * bound for bound in client["cloud_gain_interval"])
    numbers = f"{gain:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
    if reasons := reasons_for_upper_bound(alone, client["macs"]):
        numbers = f"at most {numbers}, an upper bound: {'; '.join(reasons)}"
    if high < 0:
        return f"The cloud gain is negative, {numbers}. The client alone is more accurate and does not need the cloud."
    if low <= 0:
        return f"The cloud gain is {numbers}. It does not differ from zero: the cloud adds nothing measurable."
    return f"The cloud gain is {numbers}."
