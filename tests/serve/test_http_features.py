"""Every HTTP feature that the services do not read is refused by its own name; HEAD answers as GET; the index."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from httpx import Response
from services import Here, attack_copy, npy
from starlette.testclient import TestClient

from raypp.serve.api import attack_api, classifier_api
from raypp.serve.index import SWITCH_ON, Server
from raypp.serve.schemas import COMMON_PROBLEMS
from raypp.utils.images import encode_png

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
NPY_BODY, PNG_BODY = npy(IMAGES), encode_png(IMAGES[0])
NPY, PNG = {"Content-Type": "application/x-npy"}, {"Content-Type": "image/png"}
FORM = {"Content-Type": "multipart/form-data; boundary=XX"}
CLASSIFY = "/v1/classify"
IMAGE_PART = (
    b'Content-Disposition: form-data; name="image"; filename="a.npy"\r\nContent-Type: application/x-npy',
    NPY_BODY,
)


def form(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"--XX\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--XX--\r\n"


def text_field(name: str, value: bytes = b"3") -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="%s"' % name.encode(), value


def file_field(name: str, more: bytes = b"") -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="%s"; filename="a.npy"%s' % (name.encode(), more), NPY_BODY


@pytest.fixture(scope="module")
def here(trained: Trained) -> Here:
    return Here(trained.live)


@pytest.fixture(scope="module")
def client(here: Here) -> TestClient:
    return TestClient(classifier_api(lambda: here, here.observe), follow_redirects=False)


@pytest.fixture(scope="module")
def attack(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """The attack service of a bundle with one attack, ``feature_reconstruction``."""
    root = tmp_path_factory.mktemp("attacked")
    bundle = attack_copy(trained.bundle, root, {"feature_reconstruction": {}})
    attacked = Here(bundle)
    return TestClient(attack_api(lambda: attacked), follow_redirects=False)


def problem(answer: Response, status: int, code: str, *words: str) -> None:
    """An answer is this problem document, and its one sentence has these words."""
    document = answer.json()
    assert (answer.status_code, document["type"]) == (status, f"urn:raypp:problem:{code}"), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert document["status"] == status
    detail = document["detail"]
    assert "\n" not in detail
    for word in words:
        assert word in detail, detail


@pytest.mark.parametrize(
    "path", ["/v1/model", "/v1/protection", "/docs", "/openapi.json", "/v1/nothing", CLASSIFY, "/", "/v1/model?x=1"]
)
def test_head_answers_as_get_without_a_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    own = {"x-request-id", "date"}
    assert head.status_code == whole.status_code
    assert head.content == b""
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in whole.headers.items() if k not in own
    }
    assert int(head.headers["Content-Length"]) == len(whole.content)


@pytest.mark.slow
def test_head_of_the_attack_service(attack: TestClient) -> None:
    head = attack.head("/v1")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) == len(attack.get("/v1").content)


def test_head_is_conditional_too(client: TestClient) -> None:
    tag = client.head("/v1/protection").headers["ETag"]
    assert client.head("/v1/protection", headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(NPY_BODY, mtime=0)),
        ("GZIP", gzip.compress(NPY_BODY, mtime=0)),
        ("x-gzip", gzip.compress(NPY_BODY, mtime=0)),
        ("deflate", zlib.compress(NPY_BODY)),
        ("br", NPY_BODY),
        ("zstd", NPY_BODY),
        ("compress", NPY_BODY),
        ("gzip, br", NPY_BODY),
        ("identity, gzip", NPY_BODY),
        ("aes128gcm", NPY_BODY),
    ],
    ids=lambda value: value if isinstance(value, str) else "body",
)
def test_encodings_are_refused_by_their_names(client: TestClient, encoding: str, body: bytes) -> None:
    answer = client.post(CLASSIFY, content=body, headers=NPY | {"Content-Encoding": encoding})
    named = ", ".join(word for word in encoding.lower().split(", ") if word != "identity")
    problem(answer, 415, "unsupported-encoding", f"Content-Encoding '{named}'", "allowed is identity")
    assert answer.headers["Accept-Encoding"] == "identity"


def test_two_headers_of_encodings_are_one_list(client: TestClient) -> None:
    headers = [("Content-Type", "application/x-npy"), ("Content-Encoding", "br"), ("Content-Encoding", "gzip")]
    problem(client.post(CLASSIFY, content=b"x", headers=headers), 415, "unsupported-encoding", "'br, gzip'")


@pytest.mark.parametrize(
    ("headers", "status", "code", "words"),
    [
        ({"Transfer-Encoding": "gzip, chunked"}, 501, "unsupported-transfer-encoding", ["'gzip, chunked'", "chunked"]),
        ({"Transfer-Encoding": "gzip"}, 501, "unsupported-transfer-encoding", ["'gzip'"]),
        ({"Content-Range": "bytes 0-9/100"}, 400, "partial-body", ["Content-Range"]),
        ({"Expect": "200-ok"}, 417, "unsupported-expectation", ["Expect '200-ok'", "100-continue"]),
        ({"If-Match": '"abc"'}, 412, "no-version", ["If-Match"]),
        ({"If-None-Match": "*"}, 412, "no-version", ["If-None-Match"]),
        ({"Content-Digest": "sha-256=:AAAA:"}, 400, "digest-not-read", ["Content-Digest", "leave the header out"]),
        ({"Repr-Digest": "sha-256=:AAAA:"}, 400, "digest-not-read", ["Repr-Digest"]),
        ({"Digest": "sha-256=AAAA"}, 400, "digest-not-read", ["Digest"]),
        ({"Content-MD5": "AAAA"}, 400, "digest-not-read", ["Content-MD5"]),
        ({"Accept": "text/html"}, 406, "not-acceptable", ["Accept 'text/html'", "application/json"]),
        ({"Accept": "application/xml, image/*"}, 406, "not-acceptable", ["application/json"]),
        ({"Accept": "application/json;q=0"}, 406, "not-acceptable", ["application/json"]),
        ({"Accept": "*/*, application/json;q=0"}, 406, "not-acceptable", ["application/json"]),
        ({"Accept": "nonsense"}, 406, "not-acceptable", ["'nonsense'"]),
    ],
)
def test_headers_that_are_not_read(
    client: TestClient, headers: dict[str, str], status: int, code: str, words: list[str]
) -> None:
    problem(client.post(CLASSIFY, content=NPY_BODY, headers=NPY | headers), status, code, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Encoding": "identity"},
        {"Content-Encoding": ""},
        {"Transfer-Encoding": "chunked"},
        {"Expect": "100-Continue"},
        {"Accept": "*/*"},
        {"Accept": ""},
        {"Accept": "application/*;q=0.5"},
        {"Accept": "text/html, */*;q=0.1"},
        {"Accept": "Application/JSON; charset=utf-8"},
        {"If-Match": "*"},
        {"If-None-Match": '"abc"'},
        {"Range": "bytes=0-9"},
        {"Content-Type": "APPLICATION/X-NPY"},
        {"Content-Type": "application/x-npy; charset=utf-8"},
        {"Accept-Encoding": "gzip, br"},
        {"Cookie": "a=b"},
    ],
)
def test_headers_that_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post(CLASSIFY, content=NPY_BODY, headers=NPY | headers)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["images"]) == 3


@pytest.mark.parametrize("kind", ["IMAGE/PNG", "Image/Png; charset=binary", "image/png;"])
def test_types_are_read_in_any_case_and_with_parameters(client: TestClient, kind: str) -> None:
    assert client.post(CLASSIFY, content=PNG_BODY, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/x-www-form-urlencoded", "image/jpg", "image/jpeg", "multipart/mixed; boundary=XX",
     "application/octet-stream", "text/plain; charset=utf-8", "x"],
)  # fmt: skip
def test_types_are_refused_by_their_names(client: TestClient, kind: str) -> None:
    answer = client.post(CLASSIFY, content=b"{}", headers={"Content-Type": kind})
    problem(answer, 415, "unsupported-type", repr(kind.partition(";")[0]), "image/png, application/x-npy")
    assert answer.headers["Accept"] == "image/png, application/x-npy, multipart/form-data"


@pytest.mark.parametrize("name", ["Content-Type", "Raypp-Protection", "Authorization"])
def test_headers_sent_twice_are_refused(client: TestClient, name: str) -> None:
    headers = [*NPY.items(), (name, "a"), (name, "b")]
    problem(client.post(CLASSIFY, content=NPY_BODY, headers=headers), 400, "header-twice", name)


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ("tops=3", "unknown-parameter", ["'tops'", "did you mean 'top'", "allowed: top"]),
        ("Top=3", "unknown-parameter", ["'Top'", "allowed: top"]),
        ("top=3&x", "unknown-parameter", ["'x'"]),
        ("top=2&top=3", "parameter-twice", ["'top'", "twice"]),
        ("top=", "bad-parameter", ["query parameter top is ''"]),
        ("top=many", "bad-parameter", ["query parameter top is 'many'", "integer"]),
        ("top=0", "bad-parameter", ["query parameter top is '0'", "greater than or equal to 1"]),
        ("top=1001", "bad-parameter", ["less than or equal to 1000"]),
        ("=3", "unknown-parameter", ["''"]),
    ],
)
def test_query_parameters_are_refused_by_their_names(
    client: TestClient, query: str, code: str, words: list[str]
) -> None:
    problem(client.post(f"{CLASSIFY}?{query}", content=NPY_BODY, headers=NPY), 422, code, *words)


def test_requests_without_parameters_take_none(client: TestClient, attack: TestClient) -> None:
    problem(client.get("/v1/model?verbose=1"), 422, "unknown-parameter", "'verbose'", "takes none")
    problem(attack.get("/v1?a=1"), 422, "unknown-parameter", "'a'")
    problem(
        attack.post("/v1/feature_reconstruction?top=1", content=NPY_BODY, headers=NPY),
        422,
        "unknown-parameter",
        "'top'",
    )


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "words"),
    [
        (form(IMAGE_PART, text_field("top")), FORM, 422, "unknown-field", ["text field 'top'", "in 'image'"]),
        (form(text_field("top"), IMAGE_PART), FORM, 422, "unknown-field", ["text field 'top'"]),
        (form(text_field("image")), FORM, 422, "unknown-field", ["text field 'image'", "filename"]),
        (form(*[text_field(f"f{i}") for i in range(40)]), FORM, 422, "unknown-field", ["text fields", "'image'"]),
        (form(IMAGE_PART, file_field("images")), FORM, 422, "unknown-field", ["'images'", "did you mean 'image'"]),
        (form(file_field("plain")), FORM, 422, "unknown-field", ["'plain'", "'image'"]),
        (form(file_field("")), FORM, 422, "unknown-field", ["''"]),
        (form(file_field("image", b"\r\nContent-Type: multipart/mixed; boundary=YY")), FORM, 415, "unsupported-type",
         ["file 1 of field 'image' is 'multipart/mixed'"]),
        (form(file_field("image", b"\r\nContent-Type: image/jpeg")), FORM, 415, "unsupported-type",
         ["file 1 of field 'image' is 'image/jpeg'", "allowed are image/png and application/x-npy"]),
        (form(IMAGE_PART, file_field("image", b"\r\nContent-Type: Text/Plain; charset=x")), FORM, 415,
         "unsupported-type", ["file 2 of field 'image' is 'text/plain'"]),
        (form(file_field("image", b"\r\nContent-Type: image/png")), FORM, 422, "not-png", ["is no PNG image"]),
        (form((IMAGE_PART[0], PNG_BODY)), FORM, 422, "not-npy", ["is no NumPy file"]),
        (form(file_field("image", b"\r\nContent-Transfer-Encoding: base64")), FORM, 422, "metadata",
         ["'content-transfer-encoding'"]),
        (form(file_field("image", b"\r\nContent-Encoding: gzip")), FORM, 422, "metadata", ["'content-encoding'"]),
        (form(*[file_field("image")] * 40), FORM, 413, "too-many-images", ["16 images"]),
        (form(*[file_field("image")] * 7), FORM, 413, "too-many-images", ["more than the 16 images"]),
        (form(), FORM, 422, "no-image", ["'image'"]),
        (form(IMAGE_PART), {"Content-Type": "multipart/form-data"}, 400, "bad-form", ["no boundary"]),
        (form(IMAGE_PART), {"Content-Type": "multipart/form-data; boundary="}, 400, "bad-form", ["no boundary"]),
        (form(IMAGE_PART), {"Content-Type": "multipart/form-data; boundary=YY"}, 400, "bad-form", ["the form"]),
        (form((b"X: y", b"z")), FORM, 400, "bad-form", ["Content-Disposition"]),
    ],
)  # fmt: skip
def test_forms_are_refused_by_the_names_of_their_fields(
    client: TestClient, body: bytes, headers: dict[str, str], status: int, code: str, words: list[str]
) -> None:
    problem(client.post(CLASSIFY, content=body, headers=headers), status, code, *words)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CLASSIFY, "POST"), ("PUT", CLASSIFY, "POST"), ("OPTIONS", CLASSIFY, "POST"),
        ("POST", "/v1/model", "GET, HEAD"), ("DELETE", "/v1/model", "GET, HEAD"), ("OPTIONS", "/v1/model", "GET, HEAD"),
        ("PATCH", "/v1/protection", "GET, HEAD"), ("PROPFIND", "/v1/model", "GET, HEAD"),
    ],
)  # fmt: skip
def test_methods_are_refused_by_their_names(client: TestClient, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    problem(answer, 405, "method-not-allowed", f"'{method}' is not supported at '{path}'", f"allowed: {allow}")
    assert answer.headers["Allow"] == allow


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/classify/", ["did you mean '/v1/classify'"]),
        ("/v1/model/", ["did you mean '/v1/model'"]),
        ("/v1/clasify", ["did you mean '/v1/classify'"]),
        ("/V1/model", ["'/V1/model'"]),
        ("/nothing", ["there is nothing at '/nothing'", "/docs lists what there is"]),
        ("/" + "x" * 300, ["x..."]),
    ],
)
def test_paths_that_are_none_name_the_nearest(client: TestClient, path: str, words: list[str]) -> None:
    problem(client.get(path), 404, "not-found", *words)


def test_a_body_that_nobody_reads_is_refused(client: TestClient) -> None:
    problem(client.request("GET", "/v1/model", content=b"x"), 400, "body-not-read", "body")
    chunks = client.request("GET", "/v1/model", content=(part for part in (b"a", b"b")))
    problem(chunks, 400, "body-not-read", "body")
    assert client.get("/v1/model", headers={"Content-Length": "0"}).status_code == 200


def test_conditions_on_the_protection_are_read(client: TestClient) -> None:
    tag = client.get("/v1/protection").headers["ETag"]
    for condition in (tag, f"W/{tag}", f'"a", {tag}', "*"):
        answer = client.get("/v1/protection", headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
    for condition in ('"a"', tag.strip('"')):
        assert client.get("/v1/protection", headers={"If-None-Match": condition}).status_code == 200
    for condition in (tag, "*", f'"a", {tag}'):
        assert client.get("/v1/protection", headers={"If-Match": condition}).status_code == 200
    for condition in ('"a"', f"W/{tag}"):
        answer = client.get("/v1/protection", headers={"If-Match": condition})
        problem(answer, 412, "other-version", "If-Match")
    part = client.get("/v1/protection", headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.headers["Accept-Ranges"]) == (200, "none")
    assert len(part.content) > 10


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "image/png"), ("image/*", "image/png"), ("IMAGE/PNG", "image/png"),
        ("*/*", "application/json"), ("application/json, image/png", "application/json"),
        ("image/png, application/json", "image/png"), ("image/png;q=0.1, application/json", "application/json"),
        ("*/*;q=0.1, image/png", "image/png"),
    ],
)  # fmt: skip
def test_an_attack_answers_in_the_type_that_is_preferred(attack: TestClient, accept: str, kind: str) -> None:
    headers = PNG | {"Accept": accept}
    answer = attack.post("/v1/feature_reconstruction", content=PNG_BODY, headers=headers)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, kind), answer.text


def test_an_attack_names_what_it_cannot_answer_in(attack: TestClient) -> None:
    answer = attack.post("/v1/feature_reconstruction", content=PNG_BODY, headers=PNG | {"Accept": "image/webp"})
    problem(answer, 406, "not-acceptable", "'image/webp'", "application/json, image/png")


@pytest.mark.parametrize("kind", [b"application/octet-stream", b"Application/X-NPY; a=b", b""])
def test_a_part_of_a_form_states_its_type_or_none(client: TestClient, kind: bytes) -> None:
    body = form(file_field("image", b"\r\nContent-Type: " + kind if kind else b""))
    assert client.post(CLASSIFY, content=body, headers=FORM).status_code == 200


def test_a_form_of_an_attack_names_both_fields(attack: TestClient) -> None:
    body = form(IMAGE_PART, file_field("plane"))
    answer = attack.post("/v1/feature_reconstruction", content=body, headers=FORM)
    problem(answer, 422, "unknown-field", "'plane'", "did you mean 'plain'", "'image' and 'plain'")


def test_a_client_without_a_token_learns_nothing_else(trained: Trained) -> None:
    from raypp.serve.auth import Tokens

    here = Here(trained.live, Tokens((("a", b"", frozenset()),)))
    client = TestClient(classifier_api(lambda: here))
    headers = NPY | {"Content-Encoding": "gzip"}
    problem(client.post(f"{CLASSIFY}?x=1", content=b"x", headers=headers), 401, "no-token")


# The server's own address


def server(here: Here, *names: str) -> TestClient:
    async def running() -> tuple[str, ...]:
        return names

    observe: Any = here.observe
    return TestClient(Server(classifier_api(lambda: here, observe), running, observe), follow_redirects=False)


def test_the_index_links_what_runs(here: Here) -> None:
    both, one = server(here, "classifier", "attack"), server(here, "classifier")
    answer = both.get("/")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert [service["docs"] for service in answer.json()["services"]] == ["/classifier/docs", "/attack/docs"]
    assert "hint" not in answer.json()
    assert [service["name"] for service in one.get("/").json()["services"]] == ["classifier"]
    assert "--with-attacks" in one.get("/").json()["hint"]
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
    page = one.get("/", headers=browser)
    assert page.headers["Content-Type"].startswith("text/html")
    assert '<a href="/classifier/docs">classifier</a>' in page.text
    assert "/attack/docs" not in page.text
    assert "raypp serve BUNDLE --with-attacks" in page.text
    assert '<a href="/attack/docs">attack</a>' in both.get("/", headers=browser).text
    head = one.head("/", headers=browser)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) == len(page.content)


def test_the_classifier_is_below_its_own_address(here: Here) -> None:
    client = server(here, "classifier")
    answer = client.post("/classifier/v1/classify", content=NPY_BODY, headers=NPY)
    assert answer.status_code == 200, answer.text
    for path in ("/classifier", "/classifier/"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["Location"]) == (307, "/classifier/docs")
        assert client.head(path).status_code == 307
    assert "/classifier/openapi.json" in client.get("/classifier/docs").text
    assert client.get("/classifier/openapi.json").json()["servers"] == [{"url": "/classifier"}]
    problem(client.get("/classifier/v1/modl"), 404, "not-found", "'/classifier/v1/modl'", "mean '/classifier/v1/model'")
    problem(client.get("/nothing"), 404, "not-found", "'/nothing'")
    problem(client.post("/"), 405, "method-not-allowed", "'POST'", "GET, HEAD")
    problem(client.get("/", headers={"Accept": "image/png"}), 406, "not-acceptable", "text/html")


@pytest.mark.parametrize("path", ["/", "/classifier", "/classifier/", "/classifier/docs", "/classifier/openapi.json"])
def test_pages_take_neither_parameters_nor_conditions(here: Here, path: str) -> None:
    client = server(here, "classifier")
    problem(client.get(f"{path}?verbose=1"), 422, "unknown-parameter", "'verbose'", "takes none")
    problem(client.request("GET", path, content=b"x"), 400, "body-not-read", "body")
    for headers, status, code in (
        ({"Content-Encoding": "gzip"}, 415, "unsupported-encoding"),
        ({"If-Match": '"a"'}, 412, "no-version"),
        ({"Content-Digest": "sha-256=:AAAA:"}, 400, "digest-not-read"),
        ({"Expect": "200-ok"}, 417, "unsupported-expectation"),
    ):
        problem(client.get(path, headers=headers), status, code)
        assert client.head(path, headers=headers).status_code == status
    assert client.get(path, headers={"Accept": "*/*", "Range": "bytes=0-9"}).status_code in (200, 307)
    assert client.get(f"{path.rstrip('/')}/oauth2-redirect?code=1").status_code == 404


def test_pages_name_the_type_that_they_have(here: Here) -> None:
    client = server(here, "classifier")
    for path, kind in (("docs", "text/html"), ("openapi.json", "application/json")):
        answer = client.get(f"/classifier/{path}", headers={"Accept": "image/png"})
        problem(answer, 406, "not-acceptable", f"allowed: {kind}")


def test_an_attack_service_that_is_off_says_how_it_is_switched_on(here: Here) -> None:
    client = server(here, "classifier")
    for path in ("/attack", "/attack/", "/attack/v1", "/attack/docs"):
        problem(client.get(path), 404, "attack-service-off", SWITCH_ON)
    problem(client.post("/attack/v1/inverse", content=NPY_BODY, headers=NPY), 404, "attack-service-off")
    assert client.get("/attackers").json()["type"] == "urn:raypp:problem:not-found"


def test_the_classifier_answers_alone_where_serve_has_it_below_its_address(here: Here) -> None:
    """As with a configuration whose route_prefix is /classifier."""

    async def running() -> tuple[str, ...]:
        return ()

    app = Server(classifier_api(lambda: here), running, here.observe)
    client = TestClient(app, root_path="/classifier", follow_redirects=False)
    assert client.get("/classifier/v1/model").status_code == 200
    assert client.get("/classifier").headers["Location"] == "/classifier/docs"


def test_the_attack_service_redirects_its_own_address(attack: TestClient) -> None:
    assert attack.get("/").headers["Location"] == "/docs"


def test_openapi_lists_the_statuses_of_each_route(client: TestClient, attack: TestClient) -> None:
    common = {"200", *map(str, COMMON_PROBLEMS)}
    routes = {}
    for service in (client, attack):
        document = service.get("/openapi.json").json()
        assert "404 `not-found`" in document["info"]["description"]
        assert "405 `method-not-allowed`" in document["info"]["description"]
        routes |= {
            path: set(*(o["responses"] for o in methods.values())) for path, methods in document["paths"].items()
        }
    assert routes == {
        CLASSIFY: common | {"409", "413"},
        "/v1/protection": common | {"304"},
        "/v1/model": common,
        "/v1": common,
        "/v1/{attack}": common | {"404", "409", "413"},
    }
