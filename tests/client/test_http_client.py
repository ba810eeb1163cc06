"""The client over real HTTP, against the service in a thread: what it sends, checks, retries and refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from conftest import Trained
from fastapi import FastAPI, Request, Response
from services import Here

import raypp
from raypp.bundle.load import PublicBundle, load_private, load_public
from raypp.bundle.manifest import MANIFEST, write_manifest
from raypp.cli.main import main
from raypp.cli.service import _printable
from raypp.client.http import AsyncClient, Client
from raypp.client.offline import protect_images
from raypp.client.session import RemoteError, retry_delay
from raypp.serve.api import classifier_api
from raypp.serve.model_store import publishing
from raypp.serve.publication import publish
from raypp.utils.errors import BundleError, ConfigError, DataError
from raypp.utils.images import encode_png, write_png
from raypp.utils.network import is_loopback


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Faulty:
    """The classifier below /classifier, whose next answers can be made faults; keeps what was uploaded."""

    def __init__(self, here: Here) -> None:
        self.faults: list[Response] = []
        self.bodies: list[bytes] = []
        self.answers: list[tuple[str, int]] = []
        self.app = FastAPI()

        @self.app.middleware("http")
        async def around(request: Request, call):  # type: ignore[no-untyped-def]
            self.bodies.append(await request.body())
            answer = self.faults.pop(0) if self.faults else await call(request)
            self.answers.append((request.url.path, answer.status_code))
            return answer

        self.app.mount("/classifier", classifier_api(lambda: here))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))


def expected(bundle: Path, images: list[np.ndarray]) -> list[str]:
    private = load_private(bundle)
    protected = protect_images(load_public(bundle), np.stack(images))
    logits = private.classifier(torch.from_numpy(protected).permute(0, 3, 1, 2).float() / 255)
    return [private.classes[i] for i in logits.argmax(1).tolist()]


def test_every_form_of_image_is_protected_and_classified(
    trained: Trained, tmp_path: Path, cache: Path, images: list[np.ndarray]
) -> None:
    faulty = Faulty(Here(trained.live))
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        write_png(file, image)
    inputs = [images[0], str(files[1]), files[2], files[3].read_bytes(), images[4]]
    with running(faulty.app) as url, raypp.Client(url, cache=cache) as client:
        predictions = client.classify(inputs)
        assert [p.label for p in predictions] == expected(trained.bundle, images)
        assert predictions[0].top[0] == (predictions[0].label, predictions[0].probability)
        assert [i for i, _ in client.stream(inputs, batch=2)] == inputs
        uploads = [np.load(io.BytesIO(body)) for body in faulty.bodies if body]
    plain = {image.tobytes() for image in images}
    assert sum(map(len, uploads)) == 10
    assert not any(sent.tobytes() in plain for upload in uploads for sent in upload)
    with running(faulty.app) as url, pytest.raises(SystemExit):
        main(["classify", url, str(tmp_path / "none.png")])


def test_the_asynchronous_client_does_the_same(trained: Trained, cache: Path, images: list[np.ndarray]) -> None:
    async def ask(url: str) -> list[list[str]]:
        async with AsyncClient(url, cache=cache) as client:
            both = await asyncio.gather(client.classify(images), client.classify(images[::-1]))
            return [[p.label for p in predictions] for predictions in both]

    with running(Faulty(Here(trained.live)).app) as url:
        first, second = asyncio.run(ask(url))
    assert first == second[::-1] == expected(trained.bundle, images)


def test_closing_a_client_ends_a_cancelled_call(cache: Path) -> None:
    async def cancel() -> None:
        async with AsyncClient("http://127.0.0.1:9", cache=cache, patience=60) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.model(), 0.3)

    start = time.monotonic()
    asyncio.run(cancel())  # waits for the thread of the call
    assert time.monotonic() - start < 10


def test_the_protection_is_fetched_once_and_kept(trained: Trained, cache: Path, images: list[np.ndarray]) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url:
        pin = None
        for _ in range(3):
            with Client(url, cache=cache, pin=pin) as client:
                client.classify(images)
                pin, _ = client.protection()
        fetched = [status for path, status in faulty.answers if path.endswith("/protection")]
        assert fetched == [200, 304, 304]
        (folder,) = cache.iterdir()
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (trained.bundle / "public").iterdir())
        (folder / "protection.safetensors").write_bytes(b"altered")
        with Client(url, cache=cache) as client, pytest.raises(BundleError, match="was altered"):
            client.classify(images)


def test_requests_keep_to_what_the_service_takes(trained: Trained, cache: Path) -> None:
    """Its limits are asked for, and each image is fitted as soon as it has been read."""
    here = Here(trained.live)
    here.limits = replace(here.limits, images=3)
    faulty = Faulty(here)
    many = list(np.random.default_rng(0).integers(0, 256, (7, 40, 30, 3), dtype=np.uint8))
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        assert len(client.classify(many)) == 7
        assert [len(np.load(io.BytesIO(body))) for body in faulty.bodies if body] == [3, 3, 1]
        with pytest.raises(DataError, match="image 2 is no file, bytes or uint8 array"):
            client.classify([many[0], np.zeros((4, 4, 3))])
        with pytest.raises(ConfigError, match="batch is 0"):
            list(client.stream(many, batch=0))


def test_a_service_that_is_none_is_said_to_be_so(trained: Trained, cache: Path, images: list[np.ndarray]) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        client.classify(images)
        for body in ("x", "[]", '{"images": 3}', '{"images": [], "model": "m"}'):
            faulty.faults = [Response(body)]
            with pytest.raises(RemoteError, match="answers with something else than a raypp service does"):
                client.classify(images)


@pytest.mark.slow
def test_faults_are_retried_and_patience_ends(
    trained: Trained, cache: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url:
        with Client(url, cache=cache) as client:
            client.protection()
            starting = "Path '/classifier/v1/classify' not found. Ping http://.../-/routes for available routes."
            faulty.faults = [
                Response(status_code=503, headers={"Retry-After": "0"}),
                Response(status_code=500),
                Response(starting, status_code=404),
            ]
            assert [p.label for p in client.classify(images)] == expected(trained.bundle, images)
        with Client(url, cache=cache, patience=0.2) as client:
            client.protection()
            faulty.faults = [Response("busy", status_code=503, headers={"Retry-After": "7"})]
            with pytest.raises(RemoteError, match="answers 503: busy") as raised:
                client.classify(images)
            assert raised.value.status == 503
    monkeypatch.setattr("raypp.client.session.SILENT_SECONDS", 0.2)
    waits: list[tuple[str, float]] = []
    patient = Client(url, cache=cache, patience=3, on_wait=lambda reason, seconds: waits.append((reason, seconds)))
    with patient as client, pytest.raises(RemoteError, match="does not answer"):
        client.classify(images)
    assert waits
    assert all(f"{url} does not answer" in reason and 0 < seconds < 2.8 for reason, seconds in waits)


class Picky:
    """A guard that takes every image whose first value is even for a plain one."""

    plain_refused = protected_refused = None

    def is_protected(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, 0] % 2 == 1


@pytest.mark.slow
def test_one_bad_image_of_a_folder_costs_no_other(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels = np.random.default_rng(1).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)  # of more than one request
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(pixels):
        write_png(folder / f"{i:02}.png", image)
    (folder / "03.png").write_bytes(b"no image")
    (folder / "69.png").write_bytes(b"")
    read = [i for i in range(70) if i not in (3, 69)]
    here = Here(trained.live)
    here.live._models = [replace(here.active_model(), guard=Picky())]  # type: ignore[arg-type]
    hidden = protect_images(load_public(trained.bundle), pixels)
    taken = [i for i in read if hidden[i, 0, 0, 0] % 2 == 1]
    assert 0 < len(taken) < len(read)
    with running(Faulty(here).app) as url, pytest.raises(SystemExit) as raised:
        main(["classify", url, str(folder)])
    assert raised.value.code == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [str(folder / f"{i:02}.png") for i in taken]
    labels = expected(trained.bundle, [pixels[i] for i in taken])
    assert [line.split()[1] for line in out.splitlines()] == labels
    *each, last = err.splitlines()
    assert len(each) == 70 - len(taken)
    assert sum("takes its protected form for a plain image" in line for line in each) == len(read) - len(taken)
    assert all(sum(f"{i:02}.png" in line for line in each) == 1 for i in (3, 69))
    assert last == f"raypp: {70 - len(taken)} of 70 images were not classified"


def test_an_untrue_list_of_refused_images_ends_it(trained: Trained, cache: Path, images: list[np.ndarray]) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        client.model(), client.protection()
        for places in ("[]", "[5]", '["0"]', "7"):
            document = f'{{"detail": "no", "type": "urn:raypp:problem:not-protected", "images": {places}}}'
            list(client.stream(images[:1]))
            faulty.faults = [Response(document, status_code=422)]
            with pytest.raises(RemoteError, match="answers"):
                list(client.stream(images, on_error=lambda *_: None))


@pytest.mark.slow
def test_a_bundle_that_takes_over_costs_no_request(trained: Trained, tmp_path: Path, images: list[np.ndarray]) -> None:
    other = shutil.copytree(trained.bundle, tmp_path / "other")
    about = other / "public" / "protection.json"
    about.write_text(about.read_text() + "\n")  # another public part, of the same answers
    for part in ("public", ""):
        write_manifest(other / part)
    with publishing(trained.bundle, tmp_path / "shelf"):
        pass
    here = Here(tmp_path / "shelf")
    with running(Faulty(here).app) as url, Client(url, cache=tmp_path / "cache") as client:
        first, _ = client.protection()
        with publishing(other, tmp_path / "shelf"):
            pass
        assert here.live.refresh()
        assert len(client.classify(images)) == 5  # uses the earlier protection; the response names the new one
        assert client.classify(images)[0].model == here.active_model().version
        second, _ = client.protection()
        assert second != first
        # A replica without the newest model answers 409, and the client fetches the protection again.
        here.live._models = here.live._models[:1]
        assert client.classify(images)[0].model == here.active_model().version


def test_a_pinned_client_takes_no_other_protection(trained: Trained, cache: Path, images: list[np.ndarray]) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url:
        with Client(url, cache=cache) as client:
            identifier, _ = client.protection()
        with Client(url, cache=cache, pin=identifier) as client:
            client.classify(images)
        with Client(url, cache=cache, pin="0" * 64) as client, pytest.raises(RemoteError, match="is pinned to"):
            client.classify(images)


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda files: archive(files)[:-30], "is damaged"),
        (lambda files: archive({"../evil": b"x"}), "holds files that no protection has"),
        (lambda files: archive({"a/b": b"x"}), "holds files that no protection has"),
        (lambda files: archive(files | {MANIFEST: b"{}"}), "is not the one that it names"),
        (lambda files: archive(files, zipfile.ZIP_LZMA), "holds files that no protection has"),
        (lambda files: archive(files).replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "holds files"),
        (lambda files: archive(files | {"protection.safetensors": b"x"}), "was altered"),
    ],
)
def test_a_protection_that_is_not_what_it_says_is_refused(
    trained: Trained, cache: Path, images: list[np.ndarray], change, sentence: str
) -> None:  # type: ignore[no-untyped-def]
    files = {p.name: p.read_bytes() for p in (trained.bundle / "public").iterdir()}
    here = Here(trained.live)
    tag = {"ETag": f'"{here.active_model().protection}"'}
    faulty = Faulty(here)
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        faulty.faults = [Response(change(files), headers=tag)]
        with pytest.raises(BundleError, match=sentence):
            client.classify(images)
    assert len(faulty.bodies) == 1  # nothing was sent


@pytest.mark.slow
def test_a_service_that_asks_for_plain_images_gets_none(cache: Path, images: list[np.ndarray], tmp_path: Path) -> None:
    """A cloud cannot talk its clients out of protecting."""
    from conftest import tiny_flags

    from raypp.config.presets import load_config
    from raypp.experiments.training_run import open_run, train_locally
    from raypp.utils.progress import ProgressDisplay

    flags = tiny_flags(tmp_path, protection="plain", train__mode="plain", train__epochs=1)
    with open_run(load_config("quickstart", flags=flags), "plain") as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
    faulty = Faulty(Here(tmp_path / "plain" / "bundle"))
    with (
        running(faulty.app) as url,
        Client(url, cache=cache) as client,
        pytest.raises(BundleError, match="asks for images without any protection; nothing was sent"),
    ):
        client.classify(images)
    assert faulty.bodies == [b""]


def test_what_comes_out_as_it_went_in_is_not_sent(
    trained: Trained, cache: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud may serve a network that does nothing, and a key may happen to leave an image as it is."""

    def leaves(bundle: PublicBundle, plain: np.ndarray) -> np.ndarray:
        hidden = protect_images(bundle, plain)
        hidden[3] = plain[3] ^ 1
        return hidden

    flat = np.full((16, 16, 3), 128, np.uint8)
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        monkeypatch.setattr("raypp.client.http.protect_images", leaves)
        with pytest.raises(DataError, match="image 4 is left unchanged by the protection; nothing was sent"):
            client.classify(images)
        assert not any(faulty.bodies)
        client.classify([*images[:3], flat])
        for none in ([], [images[0], np.zeros((0, 4, 3), np.uint8)]):
            with pytest.raises(DataError, match=r"no image was given|image 2 is 0 x 4; it has no pixel"):
                client.protect(none)


def test_publishing_first_checks_which_bundle_a_service_serves(trained: Trained, tmp_path: Path) -> None:
    faulty = Faulty(Here(trained.live))
    with running(faulty.app) as url:
        for answer in (b"{}", b"[]"):
            faulty.faults = [Response(answer, media_type="application/json")]
            with pytest.raises(RemoteError, match="does not say which bundle it serves"):
                publish(trained.bundle, tmp_path / "shelf", url=url)
    assert not (tmp_path / "shelf").exists()


def test_labels_do_not_speak_to_the_terminal() -> None:
    assert _printable("ship\x1b[31m\n") == "ship?[31m?"


def test_arguments_are_checked(cache: Path) -> None:
    for url in ("ftp://x", "127.0.0.1:8000", "http://", "http://[::1", "http://host:abc"):
        with pytest.raises(ConfigError, match="url is"):
            Client(url)
    with pytest.raises(ConfigError, match="a token is sent over https only"):
        Client("http://example.org", token="x")
    for timeout in (0, float("nan")):
        with pytest.raises(ConfigError, match="timeout is"):
            Client("http://127.0.0.1:1", timeout=timeout)
    with pytest.raises(ConfigError, match="token holds characters that no token has"):
        Client("https://example.org", token="é")
    loopback = {"127.0.0.1": True, "::1": True, "[::1]": True, "localhost": True, "0.0.0.0": False, "x.org": False}
    assert {host: is_loopback(host) for host in loopback} == loopback


@pytest.mark.slow
def test_limits_are_those_of_the_bundle_that_is_live(
    trained: Trained, tmp_path: Path, cache: Path, images: list[np.ndarray]
) -> None:
    """Also where they change in the middle of a stream, and where the service learns of the bundle first."""
    other = shutil.copytree(trained.bundle, tmp_path / "other")
    about = other / "public" / "protection.json"
    about.write_text(about.read_text() + "\n")  # another public part
    for part in ("public", ""):
        write_manifest(other / part)
    with publishing(trained.bundle, tmp_path / "shelf"):
        pass
    here = Here(tmp_path / "shelf")
    faulty = Faulty(here)

    def sizes() -> list[int]:
        uploads = [np.load(io.BytesIO(body)) for body in faulty.bodies if body]
        faulty.bodies.clear()
        return [len(upload) for upload in uploads]

    with running(faulty.app) as url, Client(url, cache=cache) as client:
        stream = client.stream(images * 3, batch=5)
        assert len([next(stream) for _ in range(5)]) == 5
        with publishing(other, tmp_path / "shelf"):
            pass
        assert here.live.refresh()
        here.limits = replace(here.limits, images=2)  # as of larger images
        labels = [prediction.label for _, prediction in stream]
        assert labels == expected(trained.bundle, images) * 2
        # 5 before; 5 refused, and sent in halves until they fit; what is left by the new limit.
        assert sizes() == [5, 5, 2, 3, 1, 2, 2, 2, 1]
        assert [p.label for p in client.classify(images)] == expected(trained.bundle, images)
        assert sizes() == [2, 2, 1]


@pytest.mark.slow
def test_an_image_that_is_left_out_is_named_when_a_batch_is_halved(
    trained: Trained, cache: Path, images: list[np.ndarray]
) -> None:
    here = Here(trained.live)
    faulty = Faulty(here)
    errors: list[object] = []
    with running(faulty.app) as url, Client(url, cache=cache) as client:
        client.classify(images)  # knows the limits
        here.limits = replace(here.limits, images=2)
        mixed = [images[0], b"no image", images[2], images[3], b"none either"]
        results = list(client.stream(mixed, on_error=lambda image, error: errors.append(image)))
    assert errors == [b"no image", b"none either"]
    assert [p.label for _, p in results] == [expected(trained.bundle, images)[i] for i in (0, 2, 3)]
    assert all(image is mixed[i] for (image, _), i in zip(results, (0, 2, 3), strict=True))


def test_one_image_that_is_too_large_is_no_endless_loop(
    trained: Trained, cache: Path, images: list[np.ndarray]
) -> None:
    here = Here(trained.live)
    here.limits = replace(here.limits, body=100)
    with running(Faulty(here).app) as url, Client(url, cache=cache) as client, pytest.raises(RemoteError) as raised:
        client.classify(images)
    assert raised.value.status == 413


@pytest.mark.parametrize("tries", [0, 1, 7, 1024, 10**6])
def test_the_wait_between_two_tries_has_a_limit(tries: int) -> None:
    assert 0.05 <= retry_delay(None, tries) <= 5
    assert 2 <= retry_delay(httpx.Response(503, headers={"Retry-After": "2"}), tries) <= 7


@pytest.mark.slow
@pytest.mark.parametrize("form", ['W/"{}"', ' W/"{}" ', '"{}"'])
def test_an_entity_tag_that_a_proxy_has_weakened_names_the_protection(
    trained: Trained, cache: Path, images: list[np.ndarray], form: str
) -> None:
    faulty = Faulty(Here(trained.live))

    @faulty.app.middleware("http")
    async def weaken(request: Request, call):  # type: ignore[no-untyped-def]
        answer = await call(request)
        if "etag" in answer.headers:
            answer.headers["etag"] = form.format(answer.headers["etag"].strip('"'))
        return answer

    with running(faulty.app) as url, Client(url, cache=cache) as client:
        assert [p.label for p in client.classify(images)] == expected(trained.bundle, images)
        client._protection = None
        client._pin = next(path.name for path in cache.iterdir())
        assert client.protection()[0] == client._pin  # by If-None-Match
        assert faulty.answers[-1] == ("/classifier/v1/protection", 304)


@pytest.mark.slow
def test_a_demo_that_does_not_start_leaves_no_client_open(
    trained: Trained, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with a later service: it does not answer, its name is taken, its URL is none."""
    from raypp.client import demo

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    opened: list[Client] = []

    class Watched(Client):
        def __init__(self, url: str, **options: object) -> None:
            super().__init__(url, **options)
            opened.append(self)

    monkeypatch.setattr(demo, "Client", Watched)
    here = Here(trained.live)
    app = FastAPI()
    app.mount("/classifier", classifier_api(lambda: here))
    with running(app) as url:
        for second in ("b=http://", f"a={url}", f"b={url}/elsewhere"):
            with pytest.raises((ConfigError, RemoteError)):
                demo.open_services([f"a={url}", second])
        assert len(opened) >= 4
        assert all(client._session.http.is_closed for client in opened)
        (client,) = demo.open_services([url]).values()
        assert not client._session.http.is_closed
        client.close()


@pytest.mark.slow
def test_the_page_of_the_demo_shows_what_is_sent_and_answered(
    trained: Trained, cache: Path, images: list[np.ndarray]
) -> None:
    """The picture of the protected image is the one that is uploaded."""
    from raypp.client import demo

    app = FastAPI()
    app.mount("/classifier", classifier_api(lambda: Here(trained.live)))
    with running(app) as url, Client(url, cache=cache) as client:
        html = demo.page("first", client, images[0])
        (prediction,) = client.classify([images[0]])
        sent = client.protect([images[0]])[1][0]
    assert prediction.label in html
    assert "This service offers no attacks." in html
    assert base64.b64encode(encode_png(sent)).decode() in html
