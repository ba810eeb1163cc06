"""The classifier's service at four times what it can do: what is answered, how, and how much memory that takes.

First the capacity is measured: as many requests as a few clients get answered. Then requests are sent at four times
that rate whatever becomes of them (an open loop), each with an image of its own, and each answer is checked: classes
and probabilities must be those of its own image. What is neither 200 nor 503 nor 408 is counted and fails the
benchmark, as does a wrong answer or a request without one. Every request is sent once: a client that tries again would
hide it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from _common import describe, finish, machine, show_table
from serve import HEADERS, free_port, npy, served

from raypp.bundle import load_private

NUM_IMAGES = 64  # different ones, asked for in turn
TOLERANCE = 1e-3  # of a probability: batches are summed in another order
ALLOWED = {200, 408, 503}
MOST_OPEN = 2000  # requests on their way at once, more than all queues hold


class Asked:
    """What became of the requests of one load."""

    def __init__(self) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.milliseconds: list[float] = []
        self.wrong = 0

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.milliseconds, share)) if self.milliseconds else float("nan")


async def ask(client: httpx.AsyncClient, url: str, body: bytes, expected: list[float], asked: Asked) -> None:
    began = time.perf_counter()
    try:
        answer = await client.post(f"{url}?top={len(expected)}", content=body, headers=HEADERS)
    except httpx.HTTPError as error:
        asked.statuses[type(error).__name__] += 1
        return
    asked.statuses[answer.status_code] += 1
    if answer.status_code == 200:
        asked.milliseconds.append(1000 * (time.perf_counter() - began))
        (image,) = json.loads(answer.content)["images"]
        found = {entry["index"]: entry["probability"] for entry in image["top"]}
        asked.wrong += any(abs(found[k] - share) > TOLERANCE for k, share in enumerate(expected))


def http(connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(timeout=60, limits=limits)


async def capacity(url: str, bodies: list[bytes], expected: list[list[float]], seconds: float) -> float:
    """Requests per second that 16 clients, each waiting for its answer, get answered."""
    asked = Asked()
    end = time.perf_counter() + seconds
    async with http(16) as client:

        async def one(number: int) -> None:
            while time.perf_counter() < end:
                number = (number + 1) % NUM_IMAGES
                await ask(client, url, bodies[number], expected[number], asked)

        await asyncio.gather(*(one(number) for number in range(16)))
    if asked.wrong or set(asked.statuses) - ALLOWED:
        raise SystemExit(f"already at capacity: {dict(asked.statuses)}, {asked.wrong} wrong answers")
    return asked.statuses[200] / seconds


async def overload(
    url: str, bodies: list[bytes], expected: list[list[float]], rate: float, seconds: float
) -> tuple[Asked, int, float]:
    """What became of requests sent at a rate, how many there were, and how long it took until all were answered."""
    asked = Asked()
    sent = 0
    began = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    async with http(MOST_OPEN) as client:
        while (now := time.perf_counter() - began) < seconds:
            while sent < now * rate and len(tasks) < MOST_OPEN:
                number = sent % NUM_IMAGES
                task = asyncio.create_task(ask(client, url, bodies[number], expected[number], asked))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
    return asked, sent, time.perf_counter() - began


async def watch(samples: list[int], stop: asyncio.Event) -> None:
    """Memory (Pss) of all processes that answer."""
    while not stop.is_set():
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                if "ServeReplica" in title or "ProxyActor" in title:
                    total += process.memory_full_info().pss
            except psutil.Error:
                continue
        samples.append(total)
        await asyncio.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle to serve")
    parser.add_argument("--factor", type=float, default=4.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--haproxy", action="store_true", help="behind Ray's HAProxy, as in production")
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    start = machine()
    print(describe(start) + "\n")
    private = load_private(given.bundle)
    sample = private.sample
    images = torch.cat([sample] * (NUM_IMAGES // len(sample) + 1))[:NUM_IMAGES].clone()
    # Each has other rows turned over, so that an answer tells whose it is.
    rows = images.shape[2]
    for number, image in enumerate(images):
        for row in (number % rows, (7 * number + number // rows) % rows, (3 * number + 5) % rows):
            image[:, row] = 255 - image[:, row]
    with torch.inference_mode():
        expected = torch.softmax(private.classifier.eval()(images.float() / 255), dim=1).tolist()
    least = min(
        max(abs(x - y) for x, y in zip(a, b, strict=True)) for i, a in enumerate(expected) for b in expected[:i]
    )
    if least < 2 * TOLERANCE:
        print(f"some images have answers that differ by {least:.1g} only: a mix-up between them would go unseen\n")
    bodies = [npy(image.permute(1, 2, 0).numpy()) for image in images]
    with served(given.bundle, free_port(), haproxy=given.haproxy) as url:
        results = asyncio.run(_run(url, bodies, expected, given.factor, given.seconds))
    asked, memory = results.pop("asked"), results["memory_mib"]
    show_table(
        f"{given.factor:g} times the capacity of {results['capacity_per_s']:,.0f} requests/s for {given.seconds:g} s; "
        f"reached: {results['sent_per_s'] / results['capacity_per_s']:.1f} times",
        ["sent", *map(str, asked.statuses), "wrong", "p50 ms", "p99 ms", "MiB before", "MiB at most", "MiB after"],
        [
            [
                f"{results['sent']:,}",
                *(f"{num:,}" for num in asked.statuses.values()),
                str(asked.wrong),
                f"{asked.percentile(50):,.0f}",
                f"{asked.percentile(99):,.0f}",
                *(f"{memory[key]:,.0f}" for key in ("before", "most", "after")),
            ]
        ],
    )
    finish(given.json, "overload", start, results)
    if set(asked.statuses) - ALLOWED or asked.wrong or sum(asked.statuses.values()) != results["sent"]:
        raise SystemExit("requests were lost, mixed up or answered otherwise than documented")


async def _run(
    url: str, bodies: list[bytes], expected: list[list[float]], factor: float, seconds: float
) -> dict[str, Any]:
    await capacity(url, bodies, expected, 5.0)  # warm up
    able = await capacity(url, bodies, expected, 10.0)
    samples: list[int] = []
    stop = asyncio.Event()
    watching = asyncio.create_task(watch(samples, stop))
    await asyncio.sleep(3)
    quiet = len(samples)
    asked, sent, took = await overload(url, bodies, expected, factor * able, seconds)
    await asyncio.sleep(5)
    stop.set()
    await watching
    mib = [sample / 2**20 for sample in samples]
    return {
        "asked": asked,
        "capacity_per_s": able,
        "sent": sent,
        "sent_per_s": sent / seconds,
        "seconds": took,
        "statuses": {str(status): num for status, num in asked.statuses.items()},
        "wrong": asked.wrong,
        "latency_ms": {str(share): asked.percentile(share) for share in (50, 95, 99)},
        "memory_mib": {"before": mib[quiet - 1], "most": max(mib), "after": mib[-1]},
    }


if __name__ == "__main__":
    main()
