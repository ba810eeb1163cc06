"""The services' HTTP, without Ray: answers, refusals as problem documents, tokens, bundles that replace each other."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import shutil
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained, tiny_flags
from PIL import Image
from safetensors.torch import load, save
from services import NPY, PNG, Here, attack_copy, break_classifier, npy, protected
from starlette.testclient import TestClient
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.target import TargetSpec, load_target
from raypp.bundle import guard
from raypp.bundle.load import load_private, load_public
from raypp.bundle.manifest import write_manifest
from raypp.cli.main import main
from raypp.config.presets import load_config
from raypp.data.splits import load_split
from raypp.experiments import attack_run
from raypp.experiments.run_folder import point_latest
from raypp.experiments.training_run import open_run, train_locally
from raypp.serve import auth, loaded_model, model_store, schemas
from raypp.serve.admission import AdmissionControl, RequestError
from raypp.serve.api import attack_api, classifier_api
from raypp.serve.attack_catalog import load_attacks
from raypp.serve.auth import TokenFile, Tokens, add_token, open_tokens, remove_token
from raypp.serve.loaded_model import LoadedModel, classify, load_model, pad_to_bucket
from raypp.serve.model_store import ModelManager, publishing, resolve_model
from raypp.utils.errors import BundleError, ConfigError, StorageError
from raypp.utils.images import encode_png
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage


@pytest.fixture(scope="module")
def attacked(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that a quick suite has attacked."""
    root = tmp_path_factory.mktemp("attacked")
    inverse = {"width": 4, "depth": 2, "train": {"epochs": 1, "batch_size": 10}}
    return attack_copy(
        trained.bundle,
        root,
        {"feature_reconstruction": {}, "inverse": inverse, "white_box": {"steps": 2}, "known_gallery": {}},
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another bundle of the same shape."""
    storage = tmp_path_factory.mktemp("other")
    with open_run(load_config("quickstart", flags=tiny_flags(storage, seed=1, train__epochs=1)), "run") as run:
        train_locally(run, ProgressDisplay(quiet=True), torch.device("cpu"))
    return storage / "run" / "bundle"


@pytest.fixture
def here(trained: Trained) -> Here:
    return Here(trained.live)


@pytest.fixture
def client(here: Here) -> TestClient:
    return TestClient(classifier_api(lambda: here, here.observe))


@pytest.mark.slow
def test_few_sizes_of_batches_reach_a_network() -> None:
    """The output for the padding is dropped."""
    sizes = set()

    def network(images: torch.Tensor) -> torch.Tensor:
        sizes.add(len(images))
        return images.flatten(1).sum(1)

    for num in range(1, 257):
        images = torch.rand(num, 1, 2, 2)
        torch.testing.assert_close(pad_to_bucket(network, images), images.flatten(1).sum(1))
        assert num <= max(sizes) <= 1.25 * num
    assert len(sizes) == 28


def test_classes_are_those_of_the_classifier(client: TestClient, trained: Trained, here: Here) -> None:
    images = protected(trained.bundle)
    answer = client.post("/v1/classify?top=2", content=npy(images), headers=NPY)
    assert answer.status_code == 200
    payload = answer.json()
    private = load_private(trained.bundle)
    logits = private.classifier(private.sample[:4].float() / 255)
    shares = torch.softmax(logits, 1)
    for i, image in enumerate(payload["images"]):
        assert image["index"] == int(logits[i].argmax())
        assert image["class"] == private.classes[image["index"]]
        assert image["probability"] == pytest.approx(float(shares[i].max()), abs=1e-4)
        assert [entry["index"] for entry in image["top"]] == logits[i].topk(2).indices.tolist()
    schemas.Classification.model_validate(payload, extra="forbid")
    assert set(payload["timing_ms"]) == {"read", "model", "total"}
    assert payload["model"] == here.active_model().version == answer.headers["Raypp-Model"]
    single = client.post("/v1/classify", content=encode_png(images[1]), headers=PNG).json()["images"]
    assert single[0]["index"] == payload["images"][1]["index"]
    files = [("image", encode_png(images[0])), ("image", npy(images[1:]))]
    form = client.post("/v1/classify", files=files).json()["images"]
    assert [image["index"] for image in form] == [image["index"] for image in payload["images"]]
    assert ("/v1/classify", 200, 4) in here.seen


@pytest.mark.slow  # imports scikit-learn
def test_an_image_that_does_not_look_protected_is_refused(trained: Trained) -> None:
    """The tiny run has too few images for a guard, so one is fitted here."""
    config = load_config("quickstart", flags=tiny_flags(trained.run, data__source__num_train=500))
    shapes = torch.from_numpy(load_split(config, "train").images).permute(0, 3, 1, 2)
    hidden = load_public(trained.bundle).protection.protect(shapes)
    fitted = guard.calibrate_detector(shapes[:400], hidden[:400], shapes[400:], hidden[400:])
    assert fitted is not None
    here = Here(trained.live)
    here.live._models = [replace(here.active_model(), guard=fitted)]
    client = TestClient(classifier_api(lambda: here))
    good = fitted.is_protected(hidden).nonzero().flatten()
    bad = (~fitted.is_protected(shapes)).nonzero().flatten()
    assert len(good) >= 495
    assert len(bad) > 0
    sent = client.post("/v1/classify", content=npy(hidden[good[:3]].permute(0, 2, 3, 1).numpy()), headers=NPY)
    assert sent.status_code == 200
    images = torch.cat((hidden[good[:1]], shapes[bad[:1]])).permute(0, 2, 3, 1).numpy()
    answer = client.post("/v1/classify", content=npy(images), headers=NPY)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:raypp:problem:not-protected"
    assert "image 2 of 2 does not look protected" in problem["detail"]
    assert "raypp protect" in problem["detail"]
    assert problem["images"] == [1]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("POST", "/v1/classify", b"x", PNG, 422, "not-png"),
        ("POST", "/v1/classify", b"x", {}, 415, "unsupported-type"),
        ("POST", "/v1/classify?top=0", b"x", PNG, 422, "bad-parameter"),
        ("POST", "/v1/classify/", b"x", PNG, 404, "not-found"),  # no redirect to where the Host header says
        ("POST", "/v1/classify", b"x" * 300_000, NPY, 413, "body-too-large"),
        ("POST", "/v1/classify", b"x", NPY | {"Raypp-Protection": "0" * 64}, 409, "other-protection"),
        ("GET", "/v1/classify", None, {}, 405, "method-not-allowed"),
        ("GET", "/v1/nothing", None, {}, 404, "not-found"),
    ],
)
def test_problems(
    client: TestClient, method: str, path: str, content: bytes | None, headers: dict[str, str], status: int, code: str
) -> None:
    answer = client.request(method, path, content=content, headers=headers | {"X-Request-ID": "abc"})
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:raypp:problem:{code}")
    assert answer.json()["instance"] == "urn:raypp:request:abc"
    assert "X-Request-ID" not in answer.headers  # Serve adds it


def test_images_that_would_wait_too_long_are_refused(here: Here) -> None:
    """A replica's queue counts requests; 128 full ones would wait longer than a request may."""
    client = TestClient(classifier_api(lambda: here))
    body = npy(protected(Path(here.live.location))[:4])
    with here.waiting.acquire(17):
        answer = client.post("/v1/classify", content=body, headers=NPY)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:raypp:problem:busy")
        assert answer.headers["Retry-After"] == "1"
        assert "17 images wait already, and 4 more exceed the limit of 20" in answer.json()["detail"]
    here.waiting.num_images = 16
    assert client.post("/v1/classify", content=body, headers=NPY).status_code == 200
    assert here.waiting.num_images == 16
    alone = AdmissionControl(2)
    with alone.acquire(3), pytest.raises(RequestError), alone.acquire(1):
        pass
    assert alone.num_images == 0


def test_a_defect_says_nothing_but_its_number(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(served: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a secret")

    here.predict = fail  # type: ignore[method-assign]
    client = TestClient(classifier_api(lambda: here))
    body = npy(protected(Path(here.live.location)))
    answer = client.post("/v1/classify", content=body, headers=NPY | {"X-Request-ID": "a\nb"})
    assert answer.status_code == 500
    assert "a secret" not in answer.text
    number = answer.json()["instance"].removeprefix("urn:raypp:request:")
    assert "a\nb" not in number
    assert number in caplog.text


def test_logs_have_a_line_per_request_and_nothing_of_the_image(
    client: TestClient, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raypp.serve")
    images = protected(trained.bundle)
    client.post("/v1/classify", content=npy(images), headers=NPY | {"X-Request-ID": "r1"})
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if r.name == "raypp.serve"]
    assert line | {"ms": 0} == {
        "request": "r1", "method": "POST", "route": "/v1/classify", "status": 200, "images": 4, "ms": 0,
    }  # fmt: skip


def test_the_protection_is_the_public_part_and_nothing_else(
    client: TestClient, trained: Trained, tmp_path: Path
) -> None:
    answer = client.get("/v1/protection")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "public")
    names = sorted(path.name for path in (tmp_path / "public").iterdir())
    assert names == sorted(path.name for path in (trained.bundle / "public").iterdir())
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ours, theirs = (load_public(part).protection.protect(image) for part in (trained.bundle, tmp_path / "public"))
    assert torch.equal(ours, theirs)
    again = client.get("/v1/protection", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_model_says_what_it_is(attacked: Path) -> None:
    here = Here(attacked)
    about = TestClient(classifier_api(lambda: here)).get("/v1/model").json()
    schemas.ModelInfo.model_validate(about, extra="forbid")
    assert about["upload"] == {"height": 16, "width": 16, "channels": 3, "bits": 8}
    assert len(about["classes"]) == 10
    assert about["card"].startswith("# Model card")
    assert set(about["scorecard"]["attacks"]) == {"feature_reconstruction", "inverse", "white_box", "known_gallery"}
    assert 0 <= about["scorecard"]["attacks"]["inverse"]["ssim"] <= 1
    assert about["rejected"] is None


@pytest.mark.slow
def test_attacks_are_listed_and_carried_out(attacked: Path) -> None:
    here = Here(attacked)
    client = TestClient(attack_api(lambda: here, here.observe))
    attack_list = client.get("/v1").json()
    schemas.AttackList.model_validate(attack_list, extra="forbid")
    listed = {entry["attack"]: entry for entry in attack_list["attacks"]}
    assert set(listed) == {"feature_reconstruction", "inverse", "white_box"}  # a gallery is not the service's to search
    assert listed["inverse"]["threat"] == "T4"
    assert listed["inverse"]["measured"]["verdict"] == "inconclusive"  # of so few images
    images = protected(attacked)
    for name in listed:
        answer = client.post(f"/v1/{name}", content=npy(images[:2]), headers=NPY)
        assert answer.status_code == 200, answer.text
        payload = answer.json()
        schemas.Reconstructions.model_validate(payload, extra="forbid")
        reconstructions = payload["reconstructions"]
        assert len(reconstructions) == 2
        assert Image.open(io.BytesIO(base64.b64decode(reconstructions[0]["png"]))).size == (16, 16)
        assert "psnr" not in reconstructions[0]
    reconstruct = attack_run.load_network(
        Storage(attacked.parent / "a" / "attacks" / "inverse"),
        ATTACKS.options("inverse").model_validate(here.active_model().scorecard["attacks"]["inverse"]["options"]),  # type: ignore[index]
        load_target(TargetSpec(bundle=str(attacked)), num_queries=10).access,
    )
    expected = reconstruct(torch.from_numpy(images[:1]).permute(0, 3, 1, 2))[0].permute(1, 2, 0).numpy()
    picture = client.post("/v1/inverse", content=encode_png(images[0]), headers=PNG | {"Accept": "image/png"})
    assert picture.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.content))), expected)
    files = [("image", encode_png(images[0])), ("plain", encode_png(expected))]
    scores = client.post("/v1/inverse", files=files).json()["reconstructions"][0]
    assert (scores["psnr"], scores["ssim"]) == (60.0, 1.0)


@pytest.mark.slow
def test_attacks_that_are_not_there_or_ask_too_much_are_refused(attacked: Path, trained: Trained) -> None:
    client = TestClient(attack_api(lambda: Here(attacked)))
    images = protected(attacked, 8)
    unknown = client.post("/v1/known_gallery", content=npy(images), headers=NPY)
    assert unknown.status_code == 404
    assert "served are feature_reconstruction, inverse, white_box" in unknown.json()["detail"]
    assert client.post("/v1/white_box", content=npy(images), headers=NPY).status_code == 413
    other_shape = [("image", encode_png(images[0])), ("plain", npy(images[:2]))]
    answer = client.post("/v1/inverse", files=other_shape)
    assert answer.status_code == 422
    assert "'plain' holds 2 images" in answer.json()["detail"]
    none = TestClient(attack_api(lambda: Here(trained.live)))
    assert none.get("/v1").json()["attacks"] == []


def test_attacks_refuse_plain_images_and_other_protections(attacked: Path) -> None:
    here = Here(attacked)

    class Nothing:
        """A guard to whom nothing looks protected."""

        def is_protected(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), dtype=torch.bool)

    client = TestClient(attack_api(lambda: here))
    images = npy(protected(attacked, 2))
    other = client.post("/v1/inverse", content=images, headers=NPY | {"Raypp-Protection": "0" * 64})
    assert (other.status_code, other.json()["type"]) == (409, "urn:raypp:problem:other-protection")
    here.live._models = [replace(here.active_model(), guard=Nothing())]
    plain = client.post("/v1/inverse", content=images, headers=NPY)
    assert (plain.status_code, plain.json()["type"]) == (422, "urn:raypp:problem:not-protected")


def test_a_slow_request_times_out(here: Here) -> None:
    async def slow(served: LoadedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits for this")

    here.predict, here.limits = slow, replace(here.limits, seconds=0.05)  # type: ignore[method-assign]
    client = TestClient(classifier_api(lambda: here))
    answer = client.post("/v1/classify", content=npy(protected(Path(here.live.location))), headers=NPY)
    assert (answer.status_code, answer.json()["type"]) == (408, "urn:raypp:problem:too-slow")


def test_the_classifier_reads_no_plain_image(client: TestClient, trained: Trained, here: Here) -> None:
    image = encode_png(protected(trained.bundle)[0])
    answer = client.post("/v1/classify", files=[("image", image), ("plain", image)])
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:raypp:problem:unknown-field")


def test_who_hangs_up_is_no_defect(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    api = classifier_api(lambda: here, here.observe)
    sent: list[object] = []

    async def ask() -> None:
        messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
        scope = {
            "type": "http", "method": "POST", "path": "/v1/classify", "raw_path": b"/v1/classify", "query_string": b"",
            "headers": [(b"content-type", b"application/x-npy")], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip

        async def receive() -> dict[str, object]:
            return next(messages)

        async def send(message: object) -> None:
            sent.append(message)

        await api(scope, receive, send)  # type: ignore[arg-type]

    with caplog.at_level(logging.ERROR):
        asyncio.run(ask())
    assert not sent
    assert not caplog.records
    assert here.seen == [("/v1/classify", 499, 0)]


# Tokens


def test_tokens_open_what_they_are_for(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    reader, attacker = add_token(file, "reader", ["classify"]), add_token(file, "attacker", ["attack", "classify"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert reader not in file.read_text()
    here = Here(trained.live, Tokens.read(str(file)))
    classifier, attacks = TestClient(classifier_api(lambda: here)), TestClient(attack_api(lambda: here))
    for path in ("/v1/model", "/v1/protection"):
        assert classifier.get(path).status_code == 401
        assert classifier.get(path, headers={"Authorization": f"Bearer {reader}x"}).status_code == 401
        assert classifier.get(path, headers={"Authorization": f"Basic {reader}"}).status_code == 401
        assert classifier.get(path, headers={"Authorization": f"Bearer {reader}"}).status_code == 200
    refused = classifier.post(
        "/v1/classify?top=0", content=b"x", headers=PNG
    )  # who has no token learns of no other fault
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="raypp"')
    assert attacks.get("/v1", headers={"Authorization": f"Bearer {reader}"}).status_code == 403
    assert attacks.get("/v1", headers={"Authorization": f"Bearer {attacker}"}).status_code == 200


def test_token_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"
    add_token(file, "a", ["classify"])
    with pytest.raises(ConfigError, match="token name 'a' is taken"):
        add_token(file, "a", ["classify"])
    with pytest.raises(ConfigError, match="unknown scope 'all'; allowed: classify, attack"):
        add_token(file, "b", ["all"])
    file.write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        Tokens.read(str(file))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Tokens.read(str(tmp_path / "none"))
    main(["token", "me", "--token-file", str(tmp_path / "new.json"), "--scopes", "classify", "attack"])
    printed = capsys.readouterr().out.strip()
    assert Tokens.read(str(tmp_path / "new.json")).check(f"Bearer {printed}", "attack") == "me"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        remove_token(tmp_path / "no-folder" / "tokens.json", "me")
    add_token(tmp_path / "new.json", "other", ["classify"])
    main(["token", "me", "--token-file", str(tmp_path / "new.json"), "--revoke"])
    assert capsys.readouterr().out == f"revoked the token 'me' in {tmp_path / 'new.json'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "tokens.json"]  # no locks remain


def test_edits_of_a_token_file_exclude_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_token(tmp_path / "tokens.json", f"t{i}", ["classify"]), range(24)))
    assert len(Tokens.read(str(tmp_path / "tokens.json")).entries) == 24


def test_tokens_come_from_a_variable_or_a_uri(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The text of a variable is that of the file; a service reads a URI again, whatever its requests do."""
    path = tmp_path / "tokens.json"
    first = add_token(path, "first", ["classify"])
    monkeypatch.setenv("RAYPP_TOKENS", path.read_text())
    assert open_tokens("env:RAYPP_TOKENS").current().check(f"Bearer {first}", "classify") == "first"
    for text, sentence in (
        ("{", "the environment variable 'RAYPP_TOKENS' is damaged; create tokens with raypp token"),
        ('{"tokens": []}', "the environment variable 'RAYPP_TOKENS' holds no token; create one with raypp token"),
        (None, "the environment variable 'RAYPP_TOKENS' is not set; put the text of a token file into it"),
    ):
        monkeypatch.setenv("RAYPP_TOKENS", text) if text else monkeypatch.delenv("RAYPP_TOKENS")
        with pytest.raises(ConfigError, match=sentence):
            open_tokens("env:RAYPP_TOKENS")
    with pytest.raises(SystemExit):
        main(["token", "a", "--token-file", "env:RAYPP_TOKENS"])
    assert "'RAYPP_TOKENS' cannot be changed; create a file" in " ".join(capsys.readouterr().err.split())

    monkeypatch.setattr(auth, "POLL_SECONDS", 0.01)
    tokens = open_tokens(f"file://{path}")
    main(["token", "second", "--token-file", f"file://{path}"])
    end = time.monotonic() + 10
    while len(tokens.current().entries) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    path.unlink()
    while not any("stay in force" in record.getMessage() for record in caplog.records):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(tokens.current().entries) == 2
    del tokens
    while any(thread.name == "raypp-tokens" for thread in threading.enumerate()):  # a service that ends reads no more
        assert time.monotonic() < end
        time.sleep(0.01)


def test_tokens_count_as_the_file_has_them_now(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens.json"
    first = add_token(path, "first", ["classify"])
    tokens = TokenFile(str(path))

    class WithTokenFile(Here):
        async def tokens(self) -> Tokens | None:
            return tokens.current()

    here = WithTokenFile(trained.bundle)
    client = TestClient(classifier_api(lambda: here))

    def status(token: str) -> int:
        return client.get("/v1/model", headers={"Authorization": f"Bearer {token}"}).status_code

    second = add_token(path, "second", ["classify"])
    assert (status(first), status(second)) == (200, 200)
    main(["token", "first", "--token-file", str(path), "--revoke"])
    assert (status(first), status(second)) == (401, 200)
    path.write_text("half a fi")
    assert status(second) == 200  # what it held stays
    path.unlink()
    caplog.clear()
    assert [status(second), status(second)] == [200, 200]
    assert [record.getMessage() for record in caplog.records if "is gone" in record.getMessage()] == [
        f"token file {str(path)!r} is gone; its last tokens stay valid until it is back"
    ]
    third = add_token(path, "third", ["classify"])
    assert (status(second), status(third)) == (401, 200)
    add_token(tmp_path / "one.json", "only", ["classify"])
    for name, sentence in (("nobody", "there is no token 'nobody' in"), ("only", "is the last one in")):
        with pytest.raises(SystemExit):
            main(["token", name, "--token-file", str(tmp_path / "one.json"), "--revoke"])
        assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_slow_token_file_holds_up_no_other_request(trained: Trained, tmp_path: Path) -> None:
    """A replica reads the file in a thread, so the event loop runs while a read hangs."""
    from raypp.serve.deployments import _Replica

    path = tmp_path / "tokens.json"
    add_token(path, "first", ["classify"])
    reading, done = threading.Event(), threading.Event()

    class Slow(TokenFile):
        def current(self) -> Tokens:
            reading.set()
            assert done.wait(10)
            return super().current()

    replica = _Replica.__new__(_Replica)
    replica._tokens, replica._valid_tokens, replica._token_expiry = Slow(str(path)), None, 0.0

    async def ask() -> list[str]:
        task = asyncio.create_task(replica.tokens())
        while not reading.is_set() and not task.done():
            await asyncio.sleep(0.001)
        done.set()  # reached only if the loop runs meanwhile
        tokens = await task
        assert tokens is not None
        return [name for name, _, _ in tokens.entries]

    assert asyncio.run(ask()) == ["first"]
    replica._tokens = replica._valid_tokens = None
    assert asyncio.run(replica.tokens()) is None


def test_a_service_that_others_can_reach_needs_tokens(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(trained.bundle), "--host", "0.0.0.0"])
    assert "--host 0.0.0.0 can be reached from elsewhere, so --token-file FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize("num_gpus", ["-1", "1.5"])
def test_a_replica_has_a_share_of_a_gpu_or_whole_ones(
    trained: Trained, capsys: pytest.CaptureFixture[str], num_gpus: str
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(trained.bundle), "--num-gpus", num_gpus])
    assert f"--num-gpus is {num_gpus}; allowed is a share of one GPU" in " ".join(capsys.readouterr().err.split())


# What is live


@pytest.mark.slow
def test_a_published_bundle_takes_over_and_the_one_before_still_answers(
    trained: Trained, other: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository) as first:
        assert first.previous is None
    here = Here(repository)
    client = TestClient(classifier_api(lambda: here))
    before = here.active_model()
    with publishing(other, repository) as second:
        assert second.previous == before.version == first.version
    assert here.live.refresh()
    assert not here.live.refresh()
    after = here.active_model()
    assert after.version == second.version != before.version
    images = protected(trained.bundle)
    old = client.post("/v1/classify", content=npy(images), headers=NPY | {"Raypp-Protection": before.protection})
    assert old.status_code == 200
    assert old.json()["model"] == before.version
    assert old.headers["Raypp-Protection"] == after.protection  # so that the client fetches it
    images = protected(other)
    new = client.post("/v1/classify", content=npy(images), headers=NPY | {"Raypp-Protection": after.protection})
    assert new.json()["model"] == after.version
    with publishing(trained.bundle, repository) as back:  # an older one can be made live again
        assert back.version == first.version
    assert here.live.refresh()
    assert here.active_model() is before


@pytest.mark.slow
def test_damaged_attacks_are_not_published(attacked: Path, tmp_path: Path) -> None:
    """Else the classifier would take over and the attack service would not."""
    broken = shutil.copytree(attacked, tmp_path / "broken")
    (broken / "private" / "attacks" / "inverse.safetensors").write_bytes(b"x" * 100)
    for part in ("private", ""):
        write_manifest(broken / part)
    with publishing(attacked, tmp_path / "repository", check=load_attacks):
        pass
    live = (tmp_path / "repository" / "live.json").read_bytes()
    with (
        pytest.raises(BundleError, match=r"attacks of bundle .* do not load"),
        publishing(broken, tmp_path / "repository", check=load_attacks),
    ):
        pass
    assert (tmp_path / "repository" / "live.json").read_bytes() == live


@pytest.mark.slow
def test_a_bundle_that_does_not_work_is_not_published(trained: Trained, other: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository):
        pass
    live = (repository / "live.json").read_bytes()
    broken = shutil.copytree(other, tmp_path / "broken")
    break_classifier(broken)
    with (
        pytest.raises(BundleError, match="fails its self-check: it gives the recorded answer for"),
        publishing(broken, repository),
    ):
        pass
    altered = shutil.copytree(other, tmp_path / "altered")
    (altered / "private" / "classifier.json").write_text("{}")
    with pytest.raises(BundleError, match="was altered"), publishing(altered, repository):
        pass
    with pytest.raises(RuntimeError), publishing(other, repository):
        raise RuntimeError("the service refuses")
    assert (repository / "live.json").read_bytes() == live

    def refused_after_another() -> None:
        with publishing(other, repository):
            (repository / "live.json").write_text('{"version": "somebody else\'s"}')
            raise RuntimeError("the service refuses")

    with pytest.raises(RuntimeError):
        refused_after_another()
    assert "somebody else's" in (repository / "live.json").read_text()


@pytest.mark.slow
def test_what_becomes_live_and_does_not_work_is_not_taken_over(trained: Trained, other: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository):
        pass
    here = Here(repository)
    before = here.active_model()
    broken = shutil.copytree(other, repository / "versions" / "0123")
    break_classifier(broken)
    (repository / "live.json").write_text('{"version": "0123"}')
    assert not here.live.refresh()
    assert here.active_model() is before
    about = TestClient(classifier_api(lambda: here)).get("/v1/model").json()
    assert about["rejected"]["version"] == "0123"
    assert "fails its self-check" in about["rejected"]["reason"]
    shutil.rmtree(repository)  # storage that is away takes nothing down
    assert not here.live.refresh()
    assert here.active_model() is before


@pytest.mark.slow
def test_a_replica_that_starts_with_a_damaged_bundle_serves_the_previous_one(
    trained: Trained, other: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    for bundle in (trained.bundle, other):
        with publishing(bundle, repository) as published:
            pass
    break_classifier(repository / "versions" / published.version)
    here = Here(repository)
    assert here.active_model().version == published.previous
    assert here.rejected()["version"] == published.version  # type: ignore[index]


@pytest.mark.slow
def test_storage_that_fails_when_a_replica_starts_is_read_again(
    trained: Trained, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    for bundle in (trained.bundle, other):
        with publishing(bundle, repository) as published:
            pass
    loads = ModelManager._load

    def away(live: ModelManager, where: str) -> LoadedModel:
        if published.version in where:
            raise StorageError("the store does not answer")
        return loads(live, where)

    monkeypatch.setattr(ModelManager, "_load", away)
    live = ModelManager(repository)
    assert live.active.version == published.previous
    assert not live.refresh()
    monkeypatch.undo()
    assert live.refresh()
    assert (live.active.version, live.rejected) == (published.version, None)


@pytest.mark.slow
def test_a_disk_that_fails_once_costs_no_bundle(
    trained: Trained, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository):
        pass
    live = ModelManager(repository)
    with publishing(other, repository) as published:
        pass

    def fails(*_: object) -> LoadedModel:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(ModelManager, "_load", fails)
        assert not live.refresh()
    assert live.rejected is not None
    assert live.refresh()
    assert (live.active.version, live.rejected) == (published.version, None)


@pytest.mark.slow
def test_publishing_what_is_live_keeps_what_was_before_it(trained: Trained, other: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository) as first:
        pass
    for _ in range(2):
        with publishing(other, repository) as second:
            pass
        assert second.previous == first.version
    (repository / "live.json").write_text("{}")
    with publishing(trained.bundle, repository) as back:
        pass
    assert (resolve_model(repository).version, back.previous) == (first.version, None)


@pytest.mark.slow
def test_attacks_on_the_bundle_before_are_answered_while_one_takes_over(
    attacked: Path, other: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    with publishing(attacked, repository):
        pass
    here = Here(repository)
    body, before = npy(protected(attacked, 2)), here.active_model()
    client = TestClient(attack_api(lambda: here))
    with publishing(other, repository):
        pass
    assert here.live.refresh()
    headers = NPY | {"Raypp-Protection": before.protection}
    answer = client.post("/v1/feature_reconstruction", content=body, headers=headers)
    assert (answer.status_code, answer.json()["model"]) == (200, before.version)
    assert client.post("/v1/feature_reconstruction", content=body, headers=NPY).status_code == 404
    late = Here(repository).live.get(before.protection)  # a replica that starts later answers for them too
    assert late is not None
    assert late.version == before.version


@pytest.mark.slow
def test_a_bundle_that_breaks_its_loader_is_not_taken_over(
    trained: Trained, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a service makes of a bundle fails before the bundle takes over, not after."""
    repository = tmp_path / "repository"
    with publishing(trained.bundle, repository):
        pass
    names: list[str] = []

    def prepare(served: LoadedModel) -> int:
        names.append(served.version)
        if len(names) > 1:
            raise RuntimeError("of no kind that anybody expects")
        return 7

    live = ModelManager(repository, prepare=prepare)
    before = live.active
    with publishing(other, repository):
        pass
    assert not live.refresh()
    assert live.active is before
    assert before.attachment == 7
    assert live.rejected is not None
    assert (live.rejected["version"], live.rejected["reason"]) == (names[1], "RuntimeError while it was loaded")
    assert not live.refresh()  # not loaded again at each poll
    assert len(names) == 2
    monkeypatch.setattr(model_store, "RETRY_SECONDS", 0.0)
    with publishing(other, repository):  # published again, it is
        pass
    live._retry = None if live._retry is None else (live._retry[0], 0.0)
    assert not live.refresh()
    assert not live.refresh()  # and then after a while each time
    assert len(names) == 4
    assert live.active is before


@pytest.mark.slow
def test_nothing_is_published_into_a_bundle(trained: Trained, other: Path, tmp_path: Path) -> None:
    target = shutil.copytree(other, tmp_path / "bundle")
    with pytest.raises(BundleError, match="is a bundle itself"), publishing(trained.bundle, target):
        pass
    load_private(target)
    with pytest.raises(RuntimeError), publishing(trained.bundle, tmp_path / "new"):
        raise RuntimeError("the service refuses")
    assert not (tmp_path / "new" / "live.json").exists()


@pytest.mark.slow
def test_a_bundle_that_is_attacked_again_while_it_is_loaded_is_of_one_version(
    attacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scorecard, attack networks and public part are those of one manifest, whenever the others come."""
    location = shutil.copytree(attacked, tmp_path / "bundle")
    old = {path: path.read_bytes() for path in location.rglob("*") if path.is_file()}
    card, network = location / "private" / "scorecard.json", location / "private" / "attacks" / "inverse.safetensors"

    def attack_again() -> None:
        scorecard = json.loads(old[card])
        scorecard["num_queries"] = 99
        card.write_text(json.dumps(scorecard))
        weights = {name: weight + 1 for name, weight in load(old[network]).items()}
        network.write_bytes(save(weights))
        for part in ("private", ""):
            write_manifest(location / part)

    def restore() -> None:
        for path, data in old.items():
            path.write_bytes(data)

    def is_one(served: LoadedModel) -> bool:
        assert served.attack_material is not None
        assert served.scorecard is not None
        new = served.scorecard["num_queries"] == 99
        assert (served.attack_material.networks["inverse"] == old[network]) is not new
        assert served.version == hashlib.sha256((location / "manifest.json").read_bytes()).hexdigest()[:16]
        return new

    for step in ("load_private", "verify", "load_public"):  # the moment at which the other attack run writes
        whole = getattr(loaded_model, step)
        calls: list[int] = []

        def meanwhile(*arguments: Any, whole: Any = whole, calls: list[int] = calls) -> Any:
            result = whole(*arguments)
            calls.append(1)
            if len(calls) == 1:
                attack_again()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(loaded_model, step, meanwhile)
            assert is_one(load_model(location, attacks=True))
        restore()
    assert not is_one(load_model(location, attacks=True))
    here = Here(location)
    served = here.active_model()
    before = load_attacks(served)["inverse"].run(served.private.sample[:2])
    attack_again()  # between what the replica loads and what it makes of that
    assert torch.equal(load_attacks(served)["inverse"].run(served.private.sample[:2]), before)
    with pytest.raises(ValueError, match="attacks=True"):
        load_attacks(load_model(location))


def test_loading_a_bundle_that_is_replaced_each_time_fails(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(loaded_model, "_manifest", lambda location: str(next(numbers)).encode())
    with pytest.raises(StorageError, match="was replaced by another one each of 3 times it was read"):
        load_model(trained.bundle)


@pytest.mark.slow
def test_a_link_to_a_bundle_is_followed_when_it_points_to_another_one(
    trained: Trained, other: Path, tmp_path: Path
) -> None:
    """As ``runs/latest`` does: what is served names the run itself."""
    for name, bundle in (("one", trained.bundle), ("two", other)):
        shutil.copytree(bundle, tmp_path / name / "bundle")
    point_latest(Storage(tmp_path / "one"))
    here = Here(tmp_path / "latest" / "bundle")
    client = TestClient(classifier_api(lambda: here))
    assert client.get("/v1/model").json()["bundle"] == "one/bundle"
    assert here.active_model().location == str(tmp_path / "one" / "bundle")
    point_latest(Storage(tmp_path / "two"))
    assert here.live.refresh()
    assert client.get("/v1/model").json()["bundle"] == "two/bundle"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_what_is_called_latest_and_is_no_link_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "run").mkdir()
    point_latest(Storage(tmp_path / "run"))
    assert not (tmp_path / "latest").is_symlink()
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--local", "--name", "latest", "--cluster.storage", str(tmp_path)])
    assert "run name 'latest' is not allowed: it is the link to the run that finished last" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_that_gets_another_bundle_is_taken_over(trained: Trained, other: Path, tmp_path: Path) -> None:
    """As after a resumed training; the version of a run is its bundle's."""
    bundle = shutil.copytree(trained.bundle, tmp_path / "run" / "bundle")
    shutil.copy(trained.run / "config.yaml", bundle.parent)
    here = Here(bundle.parent)
    before = here.active_model()
    assert (before.name, before.version) == ("run/bundle", resolve_model(bundle).version)
    shutil.rmtree(bundle)
    assert not here.live.refresh()
    assert "is a run that has no bundle yet" in (here.rejected() or {})["reason"]
    assert here.active_model() is before
    shutil.copytree(other, bundle)
    assert here.live.refresh()
    assert here.active_model().version != before.version
    assert here.rejected() is None


def test_requests_of_several_bundles_share_a_batch(trained: Trained, other: Path) -> None:
    one, two = ModelManager(trained.bundle).active, ModelManager(other).active
    jobs = [(s, s.private.sample[i : i + n]) for s, i, n in ((one, 0, 1), (two, 1, 3), (one, 2, 2))]
    for (served, images), (shares, protected_) in zip(jobs, classify(jobs), strict=True):
        assert torch.allclose(shares, served.probabilities(images), atol=1e-5)
        assert protected_.shape == (len(images),)


def test_openapi_describes_bodies_and_answers(here: Here) -> None:
    for api in (classifier_api(lambda: here), attack_api(lambda: here)):
        document = TestClient(api).get("/openapi.json").json()
        posts = [path["post"] for path in document["paths"].values() if "post" in path]
        for post in posts:
            assert set(post["requestBody"]["content"]) == {"image/png", "application/x-npy", "multipart/form-data"}
            schema = post["responses"]["200"]["content"]["application/json"]["schema"]
            model = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            assert model["title"] in {"Classification", "Reconstructions"}
            assert {"401", "413", "415", "422", "503"} <= set(post["responses"])


def test_async_services_do_not_mix_answers(here: Here, trained: Trained) -> None:
    """Many requests at once, each answered for its own image."""
    import httpx

    api = classifier_api(lambda: here)
    sample = load_private(trained.bundle)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as client:
            bodies = [npy(image[None].permute(0, 2, 3, 1).numpy()) for image in sample.sample]
            answers = await asyncio.gather(*(client.post("/v1/classify", content=b, headers=NPY) for b in bodies))
            return [answer.json()["images"][0]["index"] for answer in answers]

    assert asyncio.run(ask()) == sample.sample_classes.tolist()
