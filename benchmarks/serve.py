"""How fast the classifier's service is, beside the same model in this process and a naive server, in one run.

(a) is the model called in-process on full batches; (b) a FastAPI server with torch as one writes it first: one process,
one request, one pass. Each gets the same protected images as NumPy files over keep-alive connections, from a load
generator in a process of its own, which takes its share of the machine as real clients on it would. Servers run one
after the other in every round, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import multiprocessing
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from _common import Spread, describe, finish, interleave, machine, own_ray, ratio, show_table
from fastapi import FastAPI, Request

from raypp.bundle.load import load_private
from raypp.models.fusion import fuse_conv_bn

NPY = "application/x-npy"
SMALL_CLIENTS = (1, 8, 64)
LARGE_IMAGES, LARGE_CLIENTS = (32, 128), 4
PROXIES = {"own": "raypp serve", "haproxy": "raypp serve, HAProxy"}


# The naive server


def naive(bundle: str, port: int) -> None:
    """Serve a bundle as one writes it first."""
    torch.set_num_threads(1)
    private = load_private(bundle)
    classifier = private.classifier.eval()
    app = FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        images = np.load(io.BytesIO(await request.body()))
        with torch.inference_mode():
            values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            shares = torch.softmax(classifier(values), dim=1)
            found = shares.topk(5, dim=1)
        return {
            "images": [
                [{"class": private.classes[k], "probability": p} for k, p in zip(places, probabilities, strict=True)]
                for places, probabilities in zip(found.indices.tolist(), found.values.tolist(), strict=True)
            ]
        }

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


# Load


def load(url: str, body: bytes, clients: int, seconds: float, answers: Any) -> None:
    """Ask with so many clients for so long; puts the milliseconds of every answer and the time it all took."""
    try:
        answers.put(asyncio.run(_load(url, body, clients, seconds)))
    except Exception as error:  # whatever it is, the other process waits for it
        answers.put(f"{type(error).__name__}: {error}")


class Connections:
    """Keep-alive connections, straight on sockets: a client library would take as much of the two cores as what is
    measured."""

    def __init__(self, url: str) -> None:
        self._url = httpx.URL(url)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Send once, on an idle connection or a new one; the status and the answer's body.

        Raises:
            OSError, EOFError: there was no answer.
        """
        while self._idle and self._idle[-1][0].at_eof():  # closed by the server meanwhile
            self._idle.pop()[1].close()
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(self._url.host, self._url.port)
        )
        writer.write(
            f"POST {self._url.raw_path.decode()} HTTP/1.1\r\nHost: {self._url.host}:{self._url.port}\r\n"
            f"Content-Type: {NPY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines if line)
        answer = b""
        if b"content-length" in headers:
            answer = await reader.readexactly(int(headers[b"content-length"]))
        else:  # in chunks
            while size := int(await reader.readline(), 16):
                answer += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        if headers.get(b"connection") == b"close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(status.split()[1]), answer

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def _load(url: str, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    connections = Connections(url)
    found: list[float] = []
    began = time.perf_counter()
    end = began + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            asked = time.perf_counter()
            status, answer = await connections.post(body)
            assert status == 200, answer
            found.append(1000 * (time.perf_counter() - asked))

    await asyncio.gather(*(client() for _ in range(clients)))
    connections.close()
    return found, time.perf_counter() - began


# What is measured


@contextmanager
def served(bundle: str, port: int, *, haproxy: bool) -> Iterator[str]:
    """``raypp serve`` on a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as folder:
        command = [str(Path(sys.executable).parent / "raypp"), "serve", bundle, "--port", str(port), "--no-attack"]
        command += ["--haproxy"] if haproxy else []
        process = subprocess.Popen(
            command, env=own_ray(Path(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}/classifier/v1"
        try:
            _wait(f"{url}/model", process)
            yield f"{url}/classify"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


@contextmanager
def naively(bundle: str, port: int) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, bundle, "--naive", str(port)])
    try:
        _wait(f"http://127.0.0.1:{port}/docs", process)
        yield f"http://127.0.0.1:{port}/classify"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server for {url} ended with {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"{url} does not answer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def npy(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, images)
    return buffer.getvalue()


class Measured:
    """Requests per second of one server under one load, with the latencies of every round."""

    def __init__(self, url: str, body: bytes, clients: int, seconds: float) -> None:
        self.url, self.body, self.clients, self.seconds = url, body, clients, seconds
        self.latencies: list[list[float]] = []

    def __call__(self) -> float:
        context = multiprocessing.get_context("fork")  # the child touches no torch, and importing it takes seconds
        answers = context.SimpleQueue()
        process = context.Process(target=load, args=(self.url, self.body, self.clients, self.seconds, answers))
        process.start()
        answer = answers.get()
        process.join()
        if isinstance(answer, str):
            raise SystemExit(f"{self.url} with {self.clients} clients: {answer}")
        found: list[float]
        took: float
        found, took = answer
        self.latencies.append(found)
        return len(found) / took

    def percentile(self, share: float) -> Spread:
        return Spread(tuple(float(np.percentile(found, share)) for found in self.latencies))

    @property
    def tail(self) -> Spread:
        """p99 over p50, round by round."""
        return ratio(self.percentile(99), self.percentile(50))


def in_process(bundle: str, images: np.ndarray, threads: int, seconds: float) -> Callable[[], float]:
    """Batches of the model in this process, per second; as the service computes it."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2)
    classifier = fuse_conv_bn(load_private(bundle).classifier, values[:8].float() / 255).to(
        memory_format=torch.channels_last
    )

    def measure() -> float:
        torch.set_num_threads(threads)
        count, began = 0, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() - began < seconds:
                torch.softmax(classifier(values.float() / 255), dim=1)
                count += 1
        return count / (time.perf_counter() - began)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle to serve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement")
    parser.add_argument(
        "--proxies",
        nargs="+",
        choices=list(PROXIES),
        default=["own"],
        help="what takes raypp serve's requests; with one of them a single Ray shares the cores with the naive server",
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--naive", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.naive is not None:
        naive(given.bundle, given.naive)
        return
    start = machine()
    print(describe(start) + "\n")
    sample = load_private(given.bundle).sample.permute(0, 2, 3, 1).numpy()
    tiled = np.concatenate([sample] * (max(LARGE_IMAGES) // len(sample) + 1))
    with contextlib.ExitStack() as stack:
        urls = {
            PROXIES[proxy]: stack.enter_context(served(given.bundle, free_port(), haproxy=proxy == "haproxy"))
            for proxy in given.proxies
        }
        urls["naive"] = stack.enter_context(naively(given.bundle, free_port()))
        runs: dict[str, Measured] = {}
        contestants: dict[str, Callable[[], float]] = {}
        loads = [(1, clients) for clients in SMALL_CLIENTS] + [(images, LARGE_CLIENTS) for images in LARGE_IMAGES]
        for images, clients in loads:
            body = npy(tiled[:images])
            for name, url in urls.items():
                case = f"{name}, {images} a body, {clients} clients"
                runs[case] = contestants[case] = Measured(url, body, clients, given.seconds)
        # A replica computes with one thread (args.threads): that is what its model may be compared with.
        for images in LARGE_IMAGES:
            contestants[f"in this process, {images} a batch"] = in_process(
                given.bundle, tiled[:images], 1, given.seconds
            )
        for url in urls.values():  # warm up
            Measured(url, npy(tiled[:1]), 8, 2.0)()
        found = interleave(contestants, given.rounds)
    rows, ratios = [], {}
    for images, clients in loads:
        against = f"in this process, {images} a batch" if images > 1 else f"naive, 1 a body, {clients} clients"
        for name in urls:
            case = f"{name}, {images} a body, {clients} clients"
            run = runs[case]
            ratios[case] = ratio(found[case], found[against])
            rows.append(
                [
                    case,
                    f"{found[case].median:,.0f}",
                    str(found[case]),
                    f"{found[case].median * images:,.0f}",
                    *(f"{run.percentile(share).median:,.1f}" for share in (50, 95, 99)),
                    f"{run.tail.median:.1f}",
                    f"{ratios[case].median:.2f}",
                    f"{min(ratios[case].values):.2f} - {max(ratios[case].values):.2f}",
                ]
            )
    columns = ["", "requests/s", "min - max", "images/s", "p50 ms", "p95 ms", "p99 ms", "p99/p50", "ratio", "min - max"]
    show_table(f"{given.rounds} rounds of {given.seconds:g} s; ratio: to the naive server for single images, to the "
               "model in this process for batches", columns, rows)  # fmt: skip
    for images in LARGE_IMAGES:
        spread = found[f"in this process, {images} a batch"]
        print(f"in this process, {images} a batch: {spread.median * images:,.0f} images/s")
    finish(
        given.json,
        "serve",
        start,
        {
            "per_s": {name: spread.to_json() for name, spread in found.items()},
            "ratio": {name: spread.to_json() for name, spread in ratios.items()},
            "latency_ms": {
                name: {str(share): run.percentile(share).to_json() for share in (50, 95, 99)}
                for name, run in runs.items()
            },
        },
    )


if __name__ == "__main__":
    main()
