"""The classifier's service at four times what it can do: what is answered, how, and how much memory that takes.

First the capacity is measured: as many requests as a few clients get answered. Then requests are sent at four times
that rate whatever becomes of them (an open loop), each with images drawn for it from the bundle's sample, and each
answer is checked: classes and probabilities must be those of its own images. What is neither 200 nor 503 nor 408 is
counted and fails the benchmark, as does a wrong answer or a request without one. Every request is sent once: a client
that tries again would hide it. The load comes several times: memory that a first one takes may serve the next.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _common import describe, finish, machine, show_table
from serve import Connections, Target, free_port, npy, served

from raypp.bundle.load import load_private

NUM_BODIES = 64  # different ones, sent in turn
CLIENTS = 16  # for the capacity
TOLERANCE = 1e-3  # of a probability: batches are summed in another order
ALLOWED = {200, 408, 503}
REPLICAS = "replicas"
LONGEST = 120.0  # seconds; no answer by then is none
SERVING = ("ProxyActor", "ServeReplica", "HAProxyManager", "bin/haproxy")  # in a process's title
MOST_OPEN = 2000  # requests on their way at once, more than all queues hold


class Outcomes:
    """What became of the requests of one load."""

    def __init__(self) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.milliseconds: list[float] = []  # of those answered with 200
        self.refused: list[float] = []  # milliseconds until a refusal
        self.wrong = 0


def percentile(milliseconds: list[float], share: float) -> float:
    return float(np.percentile(milliseconds, share)) if milliseconds else float("nan")


@dataclass(frozen=True)
class Query:
    """A body, and the probabilities (images, classes) that answer it."""

    body: bytes
    expected: np.ndarray


async def ask(connections: Connections, query: Query, outcomes: Outcomes) -> None:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(LONGEST):
            status, answer = await connections.post(query.body)
    except (OSError, EOFError) as error:  # a TimeoutError is an OSError
        outcomes.statuses[type(error).__name__] += 1
        return
    outcomes.statuses[status] += 1
    if status == 200:
        outcomes.milliseconds.append(1000 * (time.perf_counter() - began))
        probabilities = np.zeros_like(query.expected)
        for row, image in zip(probabilities, json.loads(answer)["images"], strict=True):
            for entry in image["top"]:
                row[entry["index"]] = entry["probability"]
        outcomes.wrong += bool(np.abs(probabilities - query.expected).max() > TOLERANCE)
    else:
        outcomes.refused.append(1000 * (time.perf_counter() - began))


async def capacity(target: Target, queries: list[Query], seconds: float) -> float:
    """Requests per second that clients, each waiting for its answer, get answered."""
    outcomes = Outcomes()
    connections = Connections(target)
    began = time.perf_counter()

    async def one(number: int) -> None:
        while time.perf_counter() - began < seconds:
            number = (number + 1) % NUM_BODIES
            await ask(connections, queries[number], outcomes)

    await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    took = time.perf_counter() - began
    connections.close()
    if outcomes.wrong or set(outcomes.statuses) - ALLOWED:
        raise SystemExit(f"already at capacity: {dict(outcomes.statuses)}, {outcomes.wrong} wrong answers")
    return outcomes.statuses[200] / took


async def overload(target: Target, queries: list[Query], rate: float, seconds: float, outcomes: Outcomes) -> int:
    """Send requests at a rate until all of them are answered; return how many there were."""
    sent = 0
    began = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    connections = Connections(target)
    while (now := time.perf_counter() - began) < seconds:
        while sent < now * rate and len(tasks) < MOST_OPEN:
            task = asyncio.create_task(ask(connections, queries[sent % NUM_BODIES], outcomes))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    connections.close()
    return sent


async def watch(samples: list[dict[str, float]], stop: asyncio.Event) -> None:
    """Memory (Pss, MiB) of all processes that answer, by what they are, and how many of them are replicas."""
    while not stop.is_set():
        usage = dict.fromkeys((*SERVING, REPLICAS), 0.0)
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                for kind in SERVING:
                    if kind in title:
                        usage[kind] += process.memory_full_info().pss / 2**20
                        usage[REPLICAS] += kind == "ServeReplica"
            except psutil.Error:
                continue
        samples.append(usage)
        await asyncio.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle to serve")
    parser.add_argument("--images", type=int, default=1, help="images in a body")
    parser.add_argument("--factor", type=float, default=4.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--loads", type=int, default=3, help="how often, with a pause of five seconds behind each")
    parser.add_argument("--no-haproxy", action="store_true", help="behind Serve's own proxy")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    start = machine()
    print(describe(start) + "\n")
    private = load_private(options.bundle)
    sample = private.sample
    with torch.inference_mode():
        shares = torch.softmax(private.classifier.eval()(sample.float() / 255), dim=1).numpy()
    random = np.random.default_rng(0)
    # In turn rather than at random where a body is one image: neighbours in time then differ.
    drawn = [
        np.array([number % len(sample)]) if options.images == 1 else random.integers(len(sample), size=options.images)
        for number in range(NUM_BODIES)
    ]
    queries = [Query(npy(sample[places].permute(0, 2, 3, 1).numpy()), shares[places]) for places in drawn]
    unlike = [np.abs(a.expected - b.expected).max() > 2 * TOLERANCE for i, a in enumerate(queries) for b in queries[:i]]
    print(f"a mix-up of two of the bodies would be seen in {np.mean(unlike):.1%} of cases\n")
    with served(options.bundle, free_port(), haproxy=not options.no_haproxy) as target:
        target = replace(target, url=f"{target.url}?top={shares.shape[1]}")
        results = asyncio.run(_run(target, queries, options.factor, options.seconds, options.loads))
    outcomes, memory = results.pop("outcomes"), results["memory_mib"]
    show_table(
        f"{options.factor:g} times the capacity of {results['capacity_per_s']:,.0f} requests/s for "
        f"{options.seconds:g} s, {options.loads} times; "
        f"reached: {results['sent_per_s'] / results['capacity_per_s']:.1f} times",
        [
            "sent",
            *map(str, outcomes.statuses),
            "wrong",
            "p50 ms",
            "p99 ms",
            "refused: p50 ms",
            "p99 ms",
            "MiB before",
            *(f"at most, load {n + 1}" for n in range(options.loads)),
            "after",
            "replicas before",
            "after",
        ],
        [
            [
                f"{results['sent']:,}",
                *(f"{num:,}" for num in outcomes.statuses.values()),
                str(outcomes.wrong),
                *(
                    f"{percentile(took, share):,.0f}"
                    for took in (outcomes.milliseconds, outcomes.refused)
                    for share in (50, 99)
                ),
                *(f"{mib:,.0f}" for mib in (memory["before"], *memory["most"], memory["after"])),
                *(f"{results['replicas'][when]:.0f}" for when in ("before", "after")),
            ]
        ],
    )
    finish(options.json, "overload", start, results)
    if set(outcomes.statuses) - ALLOWED or outcomes.wrong or sum(outcomes.statuses.values()) != results["sent"]:
        raise SystemExit("requests were lost, mixed up or answered otherwise than documented")


async def _run(target: Target, queries: list[Query], factor: float, seconds: float, loads: int) -> dict[str, Any]:
    await capacity(target, queries, 5.0)  # warm up
    able = await capacity(target, queries, 10.0)
    samples: list[dict[str, float]] = []
    stop = asyncio.Event()
    watching = asyncio.create_task(watch(samples, stop))
    await asyncio.sleep(3)
    starts, outcomes, sent = [len(samples)], Outcomes(), 0
    for _ in range(loads):
        sent += await overload(target, queries, factor * able, seconds, outcomes)
        await asyncio.sleep(5)
        starts.append(len(samples))
    stop.set()
    await watching
    mib = [sum(sample[kind] for kind in SERVING) for sample in samples]
    return {
        "outcomes": outcomes,
        "capacity_per_s": able,
        "sent": sent,
        "sent_per_s": sent / seconds / loads,
        "statuses": {str(status): num for status, num in outcomes.statuses.items()},
        "wrong": outcomes.wrong,
        "latency_ms": {str(share): percentile(outcomes.milliseconds, share) for share in (50, 95, 99)},
        "refused_ms": {str(share): percentile(outcomes.refused, share) for share in (50, 95, 99)},
        "memory_mib": {
            "before": mib[starts[0] - 1],
            "most": [max(mib[start:end]) for start, end in itertools.pairwise(starts)],
            "after": mib[-1],
        },
        "replicas": {"before": samples[starts[0] - 1][REPLICAS], "after": samples[-1][REPLICAS]},
        "memory_mib_each_2_s": samples,
    }


if __name__ == "__main__":
    main()
