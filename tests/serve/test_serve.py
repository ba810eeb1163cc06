"""The services on a real Ray Serve, over HTTP: they start, answer, take bundles over, and outlive a killed replica."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
import torch
import yaml
from browser import chromium, write_video
from conftest import ROOT, Cluster, Trained, free_port, tiny_flags, wait_until
from full_bodies import BODY_IMAGES, serve_full_bodies
from pages import all_blocks, command_lines
from playwright.sync_api import Locator
from services import attack_copy
from zygote import ProcessTree, variables

from raypp.bundle.load import load_private
from raypp.bundle.manifest import write_manifest
from raypp.cli.main import main
from raypp.client.http import Client
from raypp.client.session import RemoteError
from raypp.config.presets import load_config
from raypp.experiments.run_folder import point_latest
from raypp.serve.auth import add_token
from raypp.serve.loaded_model import load_model
from raypp.serve.model_store import publishing
from raypp.utils.images import decode, write_png
from raypp.utils.storage import Storage

pytestmark = pytest.mark.ray
PROGRAM = str(Path(sys.executable).parent / "raypp")


@dataclass
class Service:
    url: str
    repository: Path
    bundle: Path
    token: str | None
    cache: Path

    def client(self, **options: float) -> Client:
        return Client(self.url, token=self.token, cache=self.cache, **options)


@pytest.fixture(scope="module")
def service(cluster: Cluster, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """``raypp serve`` of a model repository with an attacked bundle, on the test cluster, with tokens."""
    root = tmp_path_factory.mktemp("serve")
    inverse = {"width": 4, "depth": 2, "train": {"epochs": 1, "batch_size": 10}}
    bundle = attack_copy(trained.bundle, root, {"feature_reconstruction": {}, "inverse": inverse})
    with publishing(bundle, root / "repository"):
        pass
    token = add_token(root / "tokens.json", "test", ["classify", "attack"])
    port = free_port()
    arguments = [
        "raypp",
        "serve",
        str(root / "repository"),
        "--port",
        str(port),
        "--token-file",
        str(root / "tokens.json"),
        "--with-attacks",
    ]
    process = cluster.popen(arguments)
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(f"{url}/classifier/v1/model") and answers(f"{url}/attack/v1"), process)
    yield Service(url, root / "repository", bundle, token, root / "cache")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    assert not answers(f"{url}/classifier/v1/model")


def answers(url: str, status: int = 401) -> bool:
    try:
        return httpx.get(url, timeout=5, verify=False).status_code == status  # to read certificates takes 30 ms
    except httpx.HTTPError:
        return False


def images(num: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (num, 16, 16, 3), dtype=np.uint8))


def test_images_are_classified_as_in_this_process(service: Service) -> None:
    private = load_private(service.bundle)
    sample = private.sample.permute(0, 2, 3, 1).numpy()
    buffer = io.BytesIO()
    np.save(buffer, sample)
    headers = {"Authorization": f"Bearer {service.token}", "Content-Type": "application/x-npy"}
    answer = httpx.post(f"{service.url}/classifier/v1/classify", content=buffer.getvalue(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert [image["index"] for image in answer.json()["images"]] == private.sample_classes.tolist()
    assert answer.json()["model"] == load_model(service.bundle).version
    assert httpx.get(f"{service.url}/classifier/docs").status_code == 200
    attack = httpx.post(f"{service.url}/attack/v1/inverse", content=buffer.getvalue(), headers=headers, timeout=60)
    assert attack.status_code == 200, attack.text
    assert len(attack.json()["reconstructions"]) == len(sample)
    number = secrets.token_hex(8)
    refused = httpx.post(
        f"{service.url}/classifier/v1/classify",
        content=b"x",
        headers=headers | {"Content-Type": "", "X-Request-ID": number},
    )
    end = time.monotonic() + 30  # each request has its line in the replica's log
    while not any(number in log.read_text() for log in Path("/tmp/ray").glob("session_*/logs/serve/replica_*")):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers.get_list("X-Request-ID") == [number]


def test_the_command_line_classifies(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, image in enumerate(images(3)):
        write_png(tmp_path / f"{i}.png", image)
    file = tmp_path / "token"
    file.write_text(service.token)
    main(["classify", service.url, str(tmp_path), "--token-file", str(file), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / f"{i}.png") for i in range(3)]
    with service.client() as client:
        assert [line.split()[1] for line in lines] == [prediction.label for prediction in client.classify(images(3))]


def local_replica(service: Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a replica is, in this process; what it sets for a process of its own is left as it is."""
    from raypp.serve import deployments

    monkeypatch.setattr(deployments, "http_host", lambda: "127.0.0.1")
    monkeypatch.setattr(deployments, "_log_as_serve", lambda: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    return deployments._Replica(
        deployments.DeploymentConfig(bundle=str(service.bundle), threads=torch.get_num_threads())
    )


def test_health_is_checked_while_something_is_computed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks take long, and Serve ends a replica whose health it hears nothing of."""
    replica = local_replica(service, monkeypatch)

    async def check() -> None:
        released = threading.Event()
        computing = asyncio.ensure_future(replica.compute(released.wait))
        await asyncio.wait_for(replica.check_health(), 20)
        replica.limits = replace(replica.limits, seconds=0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="one computation has taken"):
            await replica.check_health()
        released.set()
        await computing
        await replica.check_health()

    asyncio.run(check())


def test_requests_wait_for_the_bundle_that_is_being_loaded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first alone: the others would be refused as of an unknown protection."""
    replica = local_replica(service, monkeypatch)
    released, model = threading.Event(), replica.live.active

    def slow() -> bool:
        replica.live.last_poll = time.monotonic()
        assert released.wait(30)
        monkeypatch.setattr(replica.live, "get", lambda _: model)
        return True

    monkeypatch.setattr(replica.live, "refresh", slow)

    async def check() -> None:
        tasks = []
        for _ in range(4):
            tasks.append(asyncio.ensure_future(replica.find_model("0" * 64)))
            await asyncio.sleep(0.02)
        released.set()
        assert await asyncio.gather(*tasks) == [model] * 4

    replica.live.last_poll = 0.0
    asyncio.run(check())


class Load(threading.Thread):
    """A client that asks all the time and checks every answer against its own image."""

    def __init__(self, service: Service, seed: int, expected: dict[int, list[str]]) -> None:
        super().__init__(daemon=True)
        self.service, self.seed, self.expected = service, seed, expected
        self.stop, self.patience = threading.Event(), 90.0
        self.outcomes: Counter[str] = Counter()
        self.models: set[str] = set()

    def run(self) -> None:
        with self.service.client(patience=self.patience) as client:
            while not self.stop.is_set():
                try:
                    predictions = client.classify(images(4, self.seed))
                except RemoteError as error:
                    self.outcomes[str(error)] += 1
                    continue
                self.models |= {prediction.model for prediction in predictions}
                right = [prediction.label for prediction in predictions] == self.expected[self.seed]
                self.outcomes["right" if right else "wrong"] += 1


def another(service: Service, root: Path) -> Path:
    """A bundle with another public part that gives the same answers."""
    made = shutil.copytree(service.bundle, root)
    about = made / "public" / "protection.json"
    about.write_text(about.read_text() + "\n")
    for part in ("public", ""):
        write_manifest(made / part)
    return made


def test_nothing_is_lost_while_bundles_change_and_a_replica_dies(
    service: Service, cluster: Cluster, tmp_path: Path
) -> None:
    with service.client() as client:
        expected = {seed: [p.label for p in client.classify(images(4, seed))] for seed in range(4)}
        before = client.model()["version"]
    loads = [Load(service, seed, expected) for seed in range(4)]
    for load in loads:
        load.start()
    token = tmp_path / "token"
    token.write_text(service.token)
    newer = another(service, tmp_path / "newer")
    end = time.monotonic() + 120
    while not all(load.models for load in loads):
        assert time.monotonic() < end, [load.outcomes for load in loads]
        time.sleep(0.1)
    main(["publish", str(newer), str(service.repository), "--url", service.url, "--token-file", str(token)])
    after = load_model(newer).version
    while not all(after in load.models for load in loads):
        assert time.monotonic() < end, [load.outcomes for load in loads]
        time.sleep(0.1)
    done = sum(load.outcomes["right"] for load in loads)
    (replica,) = cluster.head.processes("ServeReplica:classifier:")
    replica.kill()
    end = time.monotonic() + 120
    while sum(load.outcomes["right"] for load in loads) < done + 40:
        assert time.monotonic() < end, [load.outcomes for load in loads]
        time.sleep(0.2)
    for load in loads:
        load.stop.set()
    for load in loads:
        load.join(timeout=120)
        assert set(load.outcomes) == {"right"}, load.outcomes
        assert load.models == {before, after}


def test_a_bundle_that_does_not_work_never_becomes_live(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(service.bundle, tmp_path / "broken")
    from services import break_classifier

    break_classifier(broken)
    live = (service.repository / "live.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["publish", str(broken), str(service.repository)])
    assert "fails its self-check" in capsys.readouterr().err
    assert (service.repository / "live.json").read_bytes() == live
    # Put there by hand, it is seen, refused by the service itself, and said so.
    shutil.copytree(broken, service.repository / "versions" / "bad")
    (service.repository / "live.json").write_text('{"version": "bad"}')
    with service.client() as client:
        end = time.monotonic() + 30
        while (client.model()["rejected"] or {}).get("version") != "bad":
            assert time.monotonic() < end
            time.sleep(0.2)
        assert "fails its self-check" in client.model()["rejected"]["reason"]
        assert len(client.classify(images(2))) == 2
    (service.repository / "live.json").write_bytes(live)


def test_clients_outlast_a_restart_of_the_whole_service(zygote: Path, trained: Trained, tmp_path: Path) -> None:
    """A service on a separate Ray, killed with its head under load and started again: no request fails."""
    rest = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    service = Service(url, trained.bundle, trained.bundle, None, tmp_path / "cache")
    running: list[ProcessTree] = []

    def start() -> None:
        arguments = [PROGRAM, "serve", str(trained.bundle), "--port", str(port)]
        running.append(ProcessTree(zygote, arguments, rest | variables(zygote)))
        wait_until(lambda: answers(f"{url}/classifier/v1/model", 200), running[-1])

    start()
    try:
        with service.client() as client:
            expected = {seed: [p.label for p in client.classify(images(4, seed))] for seed in range(2)}
        loads = [Load(service, seed, expected) for seed in range(2)]
        for load in loads:
            load.patience = 240
            load.start()
        time.sleep(3)
        done = [load.outcomes["right"] for load in loads]
        assert min(done) > 0
        running[-1].kill()  # all at once: the driver would tidy up
        assert not answers(f"{url}/classifier/v1/model", 200)
        start()
        wait_until(
            lambda: all(load.outcomes["right"] > n + 5 for load, n in zip(loads, done, strict=True)), running[-1]
        )
        for load in loads:
            load.stop.set()
        for load in loads:
            load.join(timeout=300)
            assert set(load.outcomes) == {"right"}, load.outcomes
    finally:
        if running[-1].poll() is None:
            for process in running[-1].processes():  # all of Ray too, as a service manager does
                with contextlib.suppress(psutil.Error):
                    process.terminate()
            out, err = running[-1].communicate(timeout=60)
            assert running[-1].returncode in {0, 130}, out + err  # 130 where it had not yet said that it runs
            assert not re.search(r"^\[20|Traceback", out + err, re.MULTILINE), out + err  # logs of Ray
            running[-1].kill()


def test_too_many_requests_get_retry_after(service: Service) -> None:
    """More than the queue holds: every answer is 200 or 503 with Retry-After, and the service goes on."""
    sample = load_private(service.bundle).sample.permute(0, 2, 3, 1).numpy()
    buffer = io.BytesIO()
    np.save(buffer, sample[:32])
    body = buffer.getvalue()
    headers = {"Authorization": f"Bearer {service.token}", "Content-Type": "application/x-npy"}
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def ask() -> None:
        with httpx.Client(timeout=60, verify=False) as client:
            for _ in range(3):
                answer = client.post(f"{service.url}/attack/v1/inverse", content=body, headers=headers)
                with lock:
                    statuses[answer.status_code] += 1
                if answer.status_code == 503:
                    assert int(answer.headers["Retry-After"]) >= 1

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(statuses.values()) == 180
    assert set(statuses) <= {200, 503}
    assert statuses[503] > 0
    assert statuses[200] > 0
    with service.client() as client:
        assert len(client.classify(images(2))) == 2


@pytest.mark.browser
def test_the_demo_shows_what_is_sent_and_what_attackers_see(service: Service, cluster: Cluster, tmp_path: Path) -> None:
    """Clicked through in a browser; the page asks nobody but this machine."""
    write_png(tmp_path / "picture.png", images(1)[0])
    reddish = images(2)[1] // 2 + np.array([127, 0, 64], dtype=np.uint8)
    write_video(tmp_path / "camera.y4m", reddish)
    (tmp_path / "token").write_text(str(service.token))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    arguments = ["raypp", "demo", f"one={service.url}", f"two={service.url}", "--port", str(port)]
    process = cluster.popen([*arguments, "--token-file", str(tmp_path / "token")])
    try:
        wait_until(lambda: answers(address, 200), process)
        with service.client() as client, chromium(tmp_path / "camera.y4m") as browser:
            plain, hidden = client.protect(images(1))
            (expected,) = client.classify(images(1))
            (made,) = client.reconstruct("inverse", images(1))
            page = browser.new_page()
            requested: list[str] = []
            page.on("request", lambda request: requested.append(request.url))
            page.goto(address)
            page.locator("#image input[type=file]").set_input_files(tmp_path / "picture.png")
            page.locator(".raypp-class").first.wait_for(timeout=60_000)
            assert page.locator(".raypp-class span").first.inner_text() == expected.label
            assert len(page.locator(".raypp-attack[data-attack]").all()) == 2
            pictures = page.locator(".raypp-row .raypp-picture").all()
            assert [np.array_equal(shown(picture), image) for picture, image in
                    zip(pictures, (plain[0], hidden[0]), strict=True)] == [True, True]  # fmt: skip
            inverse = page.locator("[data-attack=inverse]")
            assert np.array_equal(shown(inverse.locator("img")), made)
            assert "re-identification rate" in inverse.inner_text()
            assert "mean image" in page.locator(".raypp-attacks").inner_text()
            assert "one, accuracy" in page.locator(".raypp-classes").inner_text()
            page.locator("#service input").click()
            page.get_by_role("option", name="two").click()
            page.get_by_text("two, accuracy").wait_for(timeout=60_000)
            page.screenshot(path=tmp_path / "demo.png", full_page=True)
            before = pictures[0].get_attribute("src")
            page.get_by_label("Capture from camera").click()
            page.get_by_text("Click to Access Webcam").click()
            page.wait_for_function("document.querySelector('#image video')?.videoWidth > 0", polling=200)
            page.get_by_label("capture photo").click()
            page.wait_for_function(
                """before => {
                    const picture = document.querySelector(".raypp-row .raypp-picture");
                    return picture !== null && picture.src !== before;
                }""",
                arg=before, polling=200, timeout=60_000,
            )  # fmt: skip
            photo = shown(page.locator(".raypp-row .raypp-picture").first)  # cropped and mirrored: its colours remain
            assert np.abs(photo.mean((0, 1)) - reddish.mean((0, 1))).max() < 20
            assert np.abs(photo.mean((0, 1)) - plain[0].mean((0, 1))).max() > 40
            assert len(page.locator(".raypp-attack[data-attack] img").all()) == 2
            local = (address, "data:", "blob:")
            assert [url for url in requested if not url.startswith(local)] == []
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err


def test_a_service_that_does_not_answer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "image.png", images(1)[0])
    to_classify = ["classify", "http://127.0.0.1:9", str(tmp_path / "image.png")]
    monkeypatch.setattr("raypp.client.session.SILENT_SECONDS", 0.05)
    for words, said, code in (
        (["demo", "ftp://x"], "url is 'ftp://x'; allowed is http:// or https:// with a host", 2),
        (["demo", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer", 1),
        ([*to_classify, "--pin", "abc"], "pin is 'abc'; allowed is a SHA-256, 64 hexadecimal digits", 2),
        ([*to_classify, "--patience", "1"], "[Errno 111] Connection refused; retrying for up to 1 s", 1),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == code
        assert said in capsys.readouterr().err


def shown(picture: Locator) -> np.ndarray:
    """The pixels of a picture on a page."""
    source = picture.get_attribute("src")
    assert source is not None
    return decode(base64.b64decode(source.partition(",")[2]), name="picture")


def test_monitoring_counts_requests_images_and_batches(service: Service, cluster: Cluster) -> None:
    """On Ray's metrics endpoint, by route and status. It also names the active bundle."""

    def counted(name: str, **labels: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith(f"ray_{name}{{")]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))

    here = {"route": "/v1/classify", "status": "200"}
    before = counted("raypp_images_total", **here)
    with service.client() as client:
        client.classify(images(3))
        version = client.model()["version"]
    end = time.monotonic() + 60
    while counted("raypp_images_total", **here) < before + 3:
        assert time.monotonic() < end, "the images of a request are not counted"
        time.sleep(1)
    assert counted("raypp_requests_total", **here) > 0
    assert counted("raypp_request_duration_seconds_count", route="/v1/classify") > 0
    assert counted("raypp_batch_images_count", deployment="Classifier") > 0
    assert counted("raypp_batch_images_sum", deployment="Classifier") >= 3
    assert counted("raypp_waiting_images", deployment="Classifier") == 0
    assert counted("raypp_bundle_info", deployment="Classifier", version=version) >= 1
    assert counted("raypp_bundle_info", deployment="Attack", version=version) == 1


def test_full_bodies_start_a_second_replica_and_each_answers_for_both_protections(
    service: Service, cluster: Cluster, trained: Trained, processes: ForkServerContext, tmp_path: Path
) -> None:
    """Nothing is refused: three clients keep 768 images waiting where 1,024 may; 48 requests are far away."""
    bundles, repository = [trained.bundle, another(service, tmp_path / "newer")], tmp_path / "repository"
    for bundle in bundles:
        with publishing(bundle, repository):
            pass
    versions = {model.protection: model.version for model in map(load_model, bundles)}
    sample = load_private(trained.bundle).sample.permute(0, 2, 3, 1).numpy()
    full = np.resize(sample, (BODY_IMAGES, *sample.shape[1:]))
    results = processes.SimpleQueue()
    arguments = cluster.client, service.url, repository, full, list(versions), results
    process = processes.Process(target=serve_full_bodies, args=arguments)
    process.start()
    process.join(180)
    process.kill()  # if it still runs
    assert process.exitcode == 0
    for outcomes in results.get():
        assert set(outcomes) == {(200, protection, version) for protection, version in versions.items()}


def test_nothing_listens_beyond_this_machine(service: Service, cluster: Cluster) -> None:
    port = httpx.URL(service.url).port
    listening = {
        (c.laddr.ip, c.laddr.port)
        for process in cluster.head.processes()
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {("127.0.0.1", port)}


def test_haproxy_takes_the_requests_and_listens_here_only(zygote: Path, trained: Trained, tmp_path: Path) -> None:
    """On a separate Ray, without a flag. Its manager killed, HAProxy goes too, and another answers."""
    surroundings = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    port = free_port()
    arguments = [PROGRAM, "serve", str(trained.bundle), "--port", str(port)]
    surroundings["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"
    process = ProcessTree(zygote, arguments, surroundings | variables(zygote))
    address = f"http://127.0.0.1:{port}"

    def running(title: str) -> list[psutil.Process]:
        processes = []
        for child in process.processes():
            with contextlib.suppress(psutil.Error):
                if title in "".join(child.cmdline()[:1]) and child.status() != psutil.STATUS_ZOMBIE:
                    processes.append(child)
        return processes

    def listening_sockets(processes: list[psutil.Process]) -> Iterator[tuple[str, Any]]:
        for one in processes:
            with contextlib.suppress(psutil.Error):  # it may end meanwhile, as an HAProxy whose configuration changes
                yield from [
                    (one.name(), c.laddr) for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN
                ]

    def classifies() -> None:
        with Client(address, cache=tmp_path) as client:
            assert len(client.classify(images(3))) == 3

    try:
        wait_until(lambda: answers(f"{address}/classifier/v1/model", 200), process)
        classifies()
        beyond = {  # of all of Ray
            where.port: name
            for name, where in listening_sockets(process.processes())
            if not ipaddress.ip_address(where.ip.removeprefix("::ffff:")).is_loopback
        }
        assert set(beyond.values()) == {
            "ray::ServeReplica:classifier:Classifier"
        }  # where other deployments call, and what asks for a token
        for port_of_replica in beyond:
            with grpc.insecure_channel(f"127.0.0.1:{port_of_replica}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"", timeout=10)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with socket.create_connection(("127.0.0.1", port), timeout=15) as silent:  # a request that does not go on
            silent.sendall(b"POST /classifier/v1/classify HTTP/1.1\r\nHost: x\r\nX-A: ")
            began = time.monotonic()
            assert silent.recv(12) in {b"HTTP/1.1 408", b""}
            assert time.monotonic() - began < 10
        haproxy = running("haproxy")
        listening = {where for _, where in listening_sockets(haproxy)}
        assert {host for host, _ in listening} == {"127.0.0.1"}
        assert port in {number for _, number in listening}
        assert len(listening) >= 3  # statistics and metrics too
        (manager,) = running("HAProxyManager")
        manager.kill()
        _, alive = psutil.wait_procs(haproxy, timeout=30)
        assert alive == []
        wait_until(lambda: bool(running("haproxy")) and answers(f"{address}/classifier/v1/model", 200), process)
        classifies()
        before = "".join(process.output())  # among it what Ray says of the killed manager
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=90)
        process.kill()
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    assert (out + err).count("failed") == before.count("failed"), "Ray says that Serve's end failed"


def test_the_written_configuration_is_what_serve_deploys(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from raypp.serve import deployments

    main(["serve", str(trained.bundle), "--output", str(tmp_path / "default.yaml")])
    default = yaml.safe_load((tmp_path / "default.yaml").read_text())
    assert [application["name"] for application in default["applications"]] == ["classifier"]
    assert capsys.readouterr().err.startswith("wrote ")
    assert "deployments" not in default["applications"][0]
    main(["serve", str(trained.bundle), "--output", str(tmp_path / "quiet.yaml"), "--quiet"])
    assert capsys.readouterr().err == ""
    flags = ["--port", "9000", "--with-attacks", "--num-gpus", "0.25"]
    main(["serve", str(trained.bundle), "--output", str(tmp_path / "serve.yaml"), *flags])
    assert f"no attack is served; `raypp attack {trained.bundle}` adds them" in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    for application in schema.applications:  # as Ray builds them from the file
        module, _, name = application.import_path.partition(":")
        built = call_user_app_builder_with_args_if_necessary(getattr(import_module(module), name), application.args)
        assert isinstance(built, Application)
    for application, written in zip(schema.applications, config["applications"], strict=True):  # both ways to start it
        (deployment,) = application.deployments
        assert deployment.ray_actor_options.num_gpus == 0.25
        started = deployments.deployment(application.name, written["deployments"])
        assert (started.name, started.ray_actor_options["num_gpus"]) == (deployment.name, 0.25)
    assert deployments.deployment("classifier").ray_actor_options == {"num_cpus": 1}
    assert [application.name for application in schema.applications] == ["classifier", "attack"]
    assert {application.args["bundle"] for application in schema.applications} == {str(trained.bundle)}
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("127.0.0.1", 9000)


@dataclass
class Checkout:
    """A copy of the repository as a clone has it, whose preset ``quickstart`` is tiny, and a user of it."""

    root: Path
    surroundings: dict[str, str]

    def run(self, *words: str, seconds: float = 300) -> str:
        """The standard output of a command that must end well."""
        done = subprocess.run(
            words, env=self.surroundings, cwd=self.root, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        applications: dict[str, Any] = yaml.safe_load(self.run("serve", "status"))["applications"]
        return applications


@pytest.fixture
def checkout(zygote: Path, tmp_path: Path) -> Checkout:
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("raypp", "serve_config.yaml", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    preset = load_config("quickstart", flags=tiny_flags(tmp_path / "unused"))
    (root / "raypp" / "presets" / "quickstart.yaml").write_text(preset.to_yaml())
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    surroundings |= variables(zygote)
    surroundings |= {
        "HOME": str(tmp_path / "home"),  # a user who has never started Ray
        "PYTHONPATH": f"{root}{os.pathsep}{surroundings['PYTHONPATH']}",
        # A Ray below the `uv run` that runs the tests would take a copy of the folder for each application.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{surroundings['PATH']}",
    }
    (tmp_path / "home").mkdir()
    return Checkout(root, surroundings)


def test_the_four_commands_of_a_fresh_clone(checkout: Checkout, tmp_path: Path) -> None:
    """Nothing is edited but the port. Then another bundle, by the one setting, and a wrong one."""
    port, dashboard = free_port(), free_port()
    checkout.surroundings["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    shipped = (checkout.root / "serve_config.yaml").read_text()
    assert shipped.count("port: 8000") == 1
    mine = shipped.replace("port: 8000", f"port: {port}")
    config = checkout.root / "serve_config.yaml"
    config.write_text(mine)
    write_png(tmp_path / "image.png", images(1)[0])
    url = f"http://127.0.0.1:{port}"

    output = checkout.run("raypp", "quickstart")
    assert "protected, 8 bit" in output
    assert "\nNext\n" in output
    (run,) = {path.resolve() for path in (checkout.root / "runs").iterdir()}  # `latest` is a link to it
    assert (run / "bundle" / "public" / "protection.safetensors").exists()
    assert (run / "protected.png").exists()
    assert set(json.loads((run / "attack" / "scorecard.json").read_text())["attacks"]) == {
        "protected_image", "feature_reconstruction", "inverse", "known_gallery",
    }  # fmt: skip
    start = ["ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip
    head = ProcessTree(Path(checkout.surroundings["ZYGOTE"]), start, checkout.surroundings, checkout.root)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/version", 200), head)

        def deploy(text: str) -> None:
            config.write_text(text)
            checkout.run("serve", "deploy", "serve_config.yaml")

        deploy(mine)
        wait_until(lambda: answers(f"{url}/classifier/v1/model", 200), head)
        out = checkout.run("raypp", "classify", url, str(tmp_path / "image.png"))
        assert out.startswith(f"{tmp_path / 'image.png'}  ")
        assert httpx.get(f"{url}/classifier/v1/model").json()["bundle"] == f"{run.name}/bundle"

        index = httpx.get(f"{url}/")
        assert index.status_code == 200
        assert [service["docs"] for service in index.json()["services"]] == ["/classifier/docs"]
        assert "--with-attacks" in index.json()["hint"]
        assert httpx.head(f"{url}/").headers["Content-Length"] == index.headers["Content-Length"]
        assert httpx.get(f"{url}/classifier").headers["Location"] == "/classifier/docs"
        assert httpx.get(f"{url}/attack/v1").json()["type"] == "urn:raypp:problem:attack-service-off"

        follow_the_tutorial(checkout, url, run)

        # A run that finishes later is taken over.
        second = shutil.copytree(run, run.with_name("second"))
        for path in ("public/protection.json", "MODEL_CARD.md"):
            (second / "bundle" / path).write_text((second / "bundle" / path).read_text() + "\n")
        for part in ("public", ""):
            write_manifest(second / "bundle" / part)
        point_latest(Storage(second))
        wait_until(lambda: answers_with_bundle(url, "second/bundle"), head)

        # Another bundle is one setting, and a wrong one is one sentence.
        bundle = "bundle: &bundle runs/latest/bundle"
        assert mine.count(bundle) == 1
        deploy(mine.replace(bundle, f"bundle: {run}/bundle"))
        wait_until(lambda: answers_with_bundle(url, f"{run.name}/bundle"), head)
        deploy(mine.replace(bundle, "bundle: runs/none"))
        wait_until(lambda: checkout.status()["classifier"]["status"] == "DEPLOY_FAILED", head)
        _, sentence = checkout.status()["classifier"]["message"].strip().splitlines()
        assert f"there is no 'runs/none' in {checkout.root}; `raypp quickstart` makes a first bundle" in sentence
    finally:
        head.kill()


def follow_the_tutorial(checkout: Checkout, url: str, run: Path) -> None:
    """Run what a client runs in the page on serving, with another port, run and image size."""
    answers = []
    for language, _, text in all_blocks("docs/tutorials/serve-and-call.md"):
        text = (
            text.replace("http://127.0.0.1:8000", url).replace("runs/first", str(run)).replace("(32, 32)", "(16, 16)")
        )
        if language == "python":
            answers.append(checkout.run(sys.executable, "-c", text))
        elif language == "bash":
            commands = [shlex.split(line) for line in command_lines(text)]
            answers += [
                checkout.run(*words) for words in commands if words[:2] not in (["raypp", "serve"], ["raypp", "demo"])
            ]
    _, printed, from_python, _, classified, _ = answers  # the guard of so small a bundle may accept the last image
    label = json.loads(classified)["images"][0]["class"]
    assert printed.startswith(f"circle.png  {label} ")
    assert from_python.startswith(f"{label} ")
    assert "other.png" in from_python  # which cannot be read


def test_a_bundle_in_a_copy_that_ray_made_gets_a_warning(trained: Trained, tmp_path: Path) -> None:
    """Ray gives one to an application below `uv run ray start --block`; later runs do not replace it."""
    from raypp.serve import deployments

    copied = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0" / "runs" / "latest" / "bundle"
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ray.serve").addHandler(handler)
    try:
        deployments.build_classifier({"bundle": str(trained.bundle)})
        assert not any("RAY_ENABLE_UV_RUN_RUNTIME_ENV=0" in record for record in records)
        deployments.build_classifier({"bundle": str(shutil.copytree(trained.bundle, copied))})
        assert any("RAY_ENABLE_UV_RUN_RUNTIME_ENV=0" in record for record in records)
    finally:
        logging.getLogger("ray.serve").removeHandler(handler)


def answers_with_bundle(url: str, name: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/classifier/v1/model", timeout=5, verify=False).json()["bundle"] == name)
    except (httpx.HTTPError, ValueError, KeyError):
        return False
