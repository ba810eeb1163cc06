"""The services against bodies that nobody wrote by hand: from their own OpenAPI, and damaged at random."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from conftest import Trained
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from services import Here, attack_copy, npy, protected

from raypp.serve.api import attack_api, classifier_api
from raypp.utils.images import encode_png

pytestmark = pytest.mark.slow

NUM = 67 * settings().max_examples  # 10,050 in CI, 1,340 elsewhere
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MOST_GROWTH = 64 * 2**20  # bytes: of 10,000 answers, what the allocator keeps


@pytest.fixture(scope="module")
def here(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Here:
    """A bundle with one attack."""
    root = tmp_path_factory.mktemp("fuzz")
    bundle = attack_copy(trained.bundle, root, {"feature_reconstruction": {}})
    return Here(bundle)


@pytest.mark.parametrize("which", ["classifier", "attack"])
def test_whatever_openapi_allows_is_answered_as_it_says(which: str, here: Here) -> None:
    api = classifier_api(lambda: here) if which == "classifier" else attack_api(lambda: here)
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    seen: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def test(case: schemathesis.Case) -> None:
            if "attack" in case.path_parameters and sum(seen.values()) % 2:
                case.path_parameters["attack"] = "feature_reconstruction"
            answer = case.call()
            seen[answer.status_code] += 1
            case.validate_response(answer, checks=CHECKS)

        test()
    assert sum(seen.values()) > 60
    assert seen[200] > 0
    assert seen[422] > 0


def damaged(body: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, cut, doubled, put elsewhere or made up; half of the PNG-like ones with right check sums."""
    data = bytearray(body)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, max(1, len(data))))
        length = int(random.integers(1, 40))
        match random.integers(0, 6):
            case 0 if data:
                data[at] ^= 1 << int(random.integers(0, 8))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = random.bytes(length)
            case 3:
                data[at : at + length] = random.bytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case _ if data:
                data[at] = int(random.choice([0, 1, 127, 128, 255]))
    if random.random() < 0.5:
        _mend(data)
    return bytes(data)


def _mend(data: bytearray) -> None:
    """Give the chunks of a PNG file the check sums that they need to pass the first check."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


@pytest.mark.parametrize("which", ["classifier", "attack"])
def test_thousands_of_damaged_bodies(which: str, here: Here) -> None:
    """No answer is a defect of ours, none takes long, and memory stays what it is."""
    bundle = Path(here.live.location)
    images = protected(bundle)
    files = [("image", encode_png(images[0])), ("image", npy(images[1:3]))]
    if which == "classifier":
        api, path = classifier_api(lambda: here), "/v1/classify"
    else:
        api, path = attack_api(lambda: here), "/v1/feature_reconstruction"
        files.append(("plain", npy(images[:3])))
    form = httpx.Request("POST", "http://x", files=files)
    whole = [
        (encode_png(images[0]), "image/png"),
        (npy(images[0]), "application/x-npy"),
        (npy(images), "application/x-npy"),
        (form.read(), form.headers["content-type"]),
    ]
    random = np.random.default_rng(0)
    statuses: Counter[int] = Counter()
    memory = psutil.Process().memory_info

    async def run() -> int:
        transport = httpx.ASGITransport(api, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            before = 0
            for number in range(NUM):
                if number == NUM // 10:  # by now, everything has been imported and every cache filled
                    before = memory().rss
                body, kind = whole[number % len(whole)]
                headers = {
                    "Content-Type": kind if random.random() < 0.95 else str(random.choice([k for _, k in whole]))
                }
                answer = await asyncio.wait_for(client.post(path, content=damaged(body, random), headers=headers), 20)
                statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    assert answer.headers["content-type"] == "application/problem+json", answer.text
                    assert answer.json()["status"] == answer.status_code
            return memory().rss - before

    growth = asyncio.run(run())
    assert sum(statuses.values()) == NUM
    assert all(status < 500 for status in statuses), statuses
    assert len(statuses) >= 3, statuses
    assert statuses[200] > 0
    assert growth < MOST_GROWTH


@given(st.binary(max_size=400), st.sampled_from(["image/png", "application/x-npy", "multipart/form-data; boundary=x"]))
def test_bytes_that_are_nothing(body: bytes, kind: str) -> None:
    """No body that is made up is an image."""
    from raypp.serve.admission import Limits, RequestError
    from raypp.serve.request_parsing import read_images

    with pytest.raises(RequestError) as refused:
        asyncio.run(read_images(body, kind, (16, 16, 3), Limits()))
    assert 400 <= refused.value.status < 500
