"""Speed of the classifier's service, compared with the same model in this process and with other servers, in one run.

The service checks a token, validates each image and runs the guard. The others do not:

- the model, called in this process on full batches;
- LitServe, with batches and the same fused model, if it is installed (``uv run --with litserve``);
- a FastAPI server with torch as one writes it first: one process, one request, one pass.

Each gets the same protected images over keep-alive connections: NumPy files, for LitServe in JSON (base64), its own
format. The load generator is a process, which takes its share of the machine as clients on it would. Servers are
measured one after the other in every round, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from raypp.serve.auth import add_token

NPY, JSON = "application/x-npy", "application/json"
SMALL_CLIENTS = (1, 8, 64)
LARGE_IMAGES, LARGE_CLIENTS = (32, 128), 4
PROXIES = {"haproxy": "raypp serve", "own": "raypp serve --no-haproxy"}
LITSERVE, NAIVE = "LitServe", "naive"


# The other servers


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
            top = shares.topk(5, dim=1)
        return {
            "images": [
                [{"class": private.classes[k], "probability": p} for k, p in zip(places, probabilities, strict=True)]
                for places, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        }

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def fused(bundle: str) -> torch.nn.Module:
    """The classifier as the service optimizes it."""
    private = load_private(bundle)
    network = fuse_conv_bn(private.classifier, private.sample[:8].float() / 255)
    return network.to(memory_format=torch.channels_last)


# Load


def load(target: Target, body: bytes, clients: int, seconds: float, answers: Any) -> None:
    """Ask with so many clients for so long; puts the milliseconds of every answer and the time it all took."""
    try:
        answers.put(asyncio.run(_load(target, body, clients, seconds)))
    except Exception as error:  # whatever it is, the other process waits for it
        answers.put(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Target:
    """A server: the URL that classifies, the media type of a body, and a token."""

    url: str
    media_type: str = NPY
    token: str | None = None

    def body(self, images: np.ndarray) -> bytes:
        file = npy(images)
        return file if self.media_type == NPY else json.dumps({"image": base64.b64encode(file).decode()}).encode()


class Connections:
    """Keep-alive connections, straight on sockets: a client library would take as much of the two cores as what is
    measured."""

    def __init__(self, target: Target) -> None:
        self._url = httpx.URL(target.url)
        headers = {"Host": f"{self._url.host}:{self._url.port}", "Content-Type": target.media_type}
        headers |= {} if target.token is None else {"Authorization": f"Bearer {target.token}"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._head = f"POST {self._url.raw_path.decode()} HTTP/1.1\r\n{lines}Content-Length: "
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
        writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
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


async def _load(target: Target, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    connections = Connections(target)
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            status, answer = await connections.post(body)
            assert status == 200, answer
            latencies.append(1000 * (time.perf_counter() - started))

    await asyncio.gather(*(client() for _ in range(clients)))
    connections.close()
    return latencies, time.perf_counter() - began


# What is measured


@contextmanager
def served(bundle: str, port: int, *, haproxy: bool) -> Iterator[Target]:
    """``raypp serve`` with a token, on a separate Ray."""
    with tempfile.TemporaryDirectory(prefix="raypp-bench-") as folder:
        tokens = Path(folder) / "tokens.json"
        token = add_token(tokens, "bench", ["classify"])
        command = [str(Path(sys.executable).parent / "raypp"), "serve", bundle, "--port", str(port)]
        command += ["--token-file", str(tokens), *([] if haproxy else ["--no-haproxy"])]
        process = subprocess.Popen(
            command, env=own_ray(Path(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}/classifier/v1"
        try:
            _wait(f"{url}/model", process, token)
            yield Target(f"{url}/classify", token=token)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


@contextmanager
def other_server(kind: str, bundle: str, port: int) -> Iterator[Target]:
    """The naive server, or LitServe."""
    script = (
        [str(Path(__file__).with_name("litserve_server.py")), bundle]
        if kind == "litserve"
        else [__file__, bundle, "--naive"]
    )
    process = subprocess.Popen([sys.executable, *script, str(port)], start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/docs", process)
        yield Target(f"http://127.0.0.1:{port}/classify", JSON if kind == "litserve" else NPY)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[Any], token: str | None = None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server for {url} ended with {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, headers=headers, timeout=5).status_code == 200:
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

    def __init__(self, target: Target, images: np.ndarray, clients: int, seconds: float) -> None:
        self.target, self.body, self.clients, self.seconds = target, target.body(images), clients, seconds
        self.latencies: list[list[float]] = []

    def __call__(self) -> float:
        context = multiprocessing.get_context("fork")  # the child touches no torch, and importing it takes seconds
        answers = context.SimpleQueue()
        process = context.Process(target=load, args=(self.target, self.body, self.clients, self.seconds, answers))
        process.start()
        answer = answers.get()
        process.join()
        if isinstance(answer, str):
            raise SystemExit(f"{self.target.url} with {self.clients} clients: {answer}")
        latencies: list[float]
        seconds: float
        latencies, seconds = answer
        self.latencies.append(latencies)
        return len(latencies) / seconds

    def percentile(self, share: float) -> Spread:
        return Spread(tuple(float(np.percentile(latencies, share)) for latencies in self.latencies))

    @property
    def tail(self) -> Spread:
        """p99 over p50, round by round."""
        return ratio(self.percentile(99), self.percentile(50))


def in_process(bundle: str, images: np.ndarray, threads: int, seconds: float) -> Callable[[], float]:
    """Batches of the model in this process, per second; as the service computes it."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2)
    classifier = fused(bundle)

    def measure() -> float:
        torch.set_num_threads(threads)
        count, began = 0, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() - began < seconds:
                torch.softmax(classifier(values.float() / 255), dim=1)
                count += 1
        return count / (time.perf_counter() - began)

    return measure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle to serve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement")
    parser.add_argument("--clients", nargs="+", type=int, default=list(SMALL_CLIENTS), help="with one image a body")
    parser.add_argument("--single", action="store_true", help="single images only")
    parser.add_argument(
        "--proxies",
        nargs="+",
        choices=list(PROXIES),
        default=["haproxy"],
        help="what takes raypp serve's requests; with one of them a single Ray shares the cores with the other servers",
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--naive", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.naive is not None:
        naive(options.bundle, options.naive)
        return
    start = machine()
    print(describe(start) + "\n")
    sample = load_private(options.bundle).sample.permute(0, 2, 3, 1).numpy()
    tiled = np.concatenate([sample] * (max(LARGE_IMAGES) // len(sample) + 1))
    large = () if options.single else LARGE_IMAGES
    runs: dict[str, Measured] = {}
    contestants: dict[str, Callable[[], float]] = {}
    loads = [(1, clients) for clients in options.clients] + [(images, LARGE_CLIENTS) for images in large]
    cases: list[tuple[str, str]] = []  # of a server, and what it is compared with
    with contextlib.ExitStack() as stack:
        targets = {
            PROXIES[proxy]: stack.enter_context(served(options.bundle, free_port(), haproxy=proxy == "haproxy"))
            for proxy in options.proxies
        }
        if importlib.util.find_spec("litserve") is not None:
            targets[LITSERVE] = stack.enter_context(other_server("litserve", options.bundle, free_port()))
        else:
            print("LitServe is not installed: uv run --with litserve python benchmarks/serve.py ...\n")
        targets[NAIVE] = stack.enter_context(other_server("naive", options.bundle, free_port()))
        others = [name for name in targets if name not in PROXIES.values()]
        for images, clients in loads:
            for name, target in targets.items():
                if images > 1 and name == LITSERVE:
                    continue  # its batches are of requests
                case = f"{name}, {images} a body, {clients} clients"
                runs[case] = contestants[case] = Measured(target, tiled[:images], clients, options.seconds)
                if images > 1:
                    cases.append((case, f"in this process, {images} a batch"))
                else:
                    cases += [(case, f"{other}, 1 a body, {clients} clients") for other in others if other != name]
        # A replica computes with one thread (args.threads): that is what its model may be compared with.
        for images in large:
            contestants[f"in this process, {images} a batch"] = in_process(
                options.bundle, tiled[:images], 1, options.seconds
            )
        for target in targets.values():  # warm up
            Measured(target, tiled[:1], 8, 2.0)()
        rates = interleave(contestants, options.rounds)
    ratios = {f"{case} / {other}": ratio(rates[case], rates[other]) for case, other in cases}
    show(options, loads, runs, rates, ratios)
    finish(
        options.json,
        "serve",
        start,
        {
            "per_s": {name: spread.to_json() for name, spread in rates.items()},
            "ratio": {name: spread.to_json() for name, spread in ratios.items()},
            "latency_ms": {
                name: {str(share): run.percentile(share).to_json() for share in (50, 95, 99)}
                for name, run in runs.items()
            },
        },
    )


def show(
    options: argparse.Namespace,
    loads: list[tuple[int, int]],
    runs: dict[str, Measured],
    rates: dict[str, Spread],
    ratios: dict[str, Spread],
) -> None:
    rows = []
    for case, run in runs.items():
        images = int(case.split(", ")[1].split()[0])
        rows.append(
            [
                case,
                f"{rates[case].median:,.0f}",
                str(rates[case]),
                f"{rates[case].median * images:,.0f}",
                *(f"{run.percentile(share).median:,.1f}" for share in (50, 95, 99)),
                f"{run.tail.median:.1f}",
            ]
        )
    title = f"{options.rounds} rounds of {options.seconds:g} s"
    show_table(title, ["", "requests/s", "min - max", "images/s", "p50 ms", "p95 ms", "p99 ms", "p99/p50"], rows)
    pairs = [[name, f"{r.median:.2f}", f"{min(r.values):.2f} - {max(r.values):.2f}"] for name, r in ratios.items()]
    show_table("ratio, round by round", ["", "median", "min - max"], pairs)
    for images in sorted({images for images, _ in loads if images > 1}):
        rate = rates[f"in this process, {images} a batch"]
        print(f"in this process, {images} a batch: {rate.median * images:,.0f} images/s")


if __name__ == "__main__":
    main()
