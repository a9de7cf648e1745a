"""The service's answers, its limits, and that nothing a client sends is its fault."""

import base64
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import deployed_folders as folders
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slimfuse_export.deployed import open_deployed
from slimfuse_export.serving import Limits, make_app
from slimfuse_export.serving.schemas import answers_model

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The model of texts."""
    return open_deployed(folders.sorts(tmp_path_factory.mktemp("texts") / "sorts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The model of images."""
    return open_deployed(folders.colours(tmp_path_factory.mktemp("images") / "colours"))


@pytest.fixture(scope="module")
def ask(texts):
    with TestClient(make_app(texts), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def show(images):
    limits = Limits(body_bytes=200_000, pixels=10_000, inputs=3)
    app = make_app(images, limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(client, *contents):
    return client.post(
        "/predict/images", files=[("files", ("x", c, "image/png")) for c in contents]
    )


def bomb(width, height):
    """A PNG that claims to be large, and is a few bytes."""

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))  # fmt: skip


def test_texts_are_answered_in_order(ask):
    found = ask.post("/predict", json={"inputs": ["the cat", "elm"], "top_k": 1}).json()
    assert [answer["label"] for answer in found["answers"]] == ["animal", "plant"]
    assert len(found["answers"][0]["scores"]) == 1
    assert found["milliseconds"] > 0
    assert len(ask.post("/predict", json={"inputs": "one text"}).json()["answers"]) == 1


def test_images_are_answered_as_files_and_as_base64(show):
    found = upload(show, folders.picture("red"), folders.picture("blue", kind="JPEG")).json()
    assert [answer["label"] for answer in found["answers"]] == ["red", "blue"]
    coded = base64.b64encode(folders.picture("green")).decode()
    found = show.post("/predict", json={"inputs": coded}).json()
    assert found["answers"][0]["label"] == "green"


@pytest.mark.parametrize(
    "make",
    [
        folders.colours,
        folders.sorts,
        folders.sentences,
        lambda folder: folders.sorts(folder, "multi_label_classification"),
        lambda folder: folders.sorts(folder, "regression"),
        lambda folder: folders.states(folder, "BertModel"),
        lambda folder: folders.states(folder, "BertForMaskedLM"),
        lambda folder: folders.states(folder, "GPT2LMHeadModel"),
    ],
    ids=["images", "texts", "sentences", "several", "numbers", "features", "masked", "causal"],
)
def test_every_tasks_answer_is_what_openapi_says(make, tmp_path):
    model = open_deployed(make(tmp_path / "model"))
    picture = base64.b64encode(folders.picture()).decode()
    with TestClient(make_app(model)) as client:
        given = picture if model.takes_images else "the [MASK] " + "old " * 20
        given = "the" if model.description.task == "causal-lm" else given
        found = client.post("/predict", json={"inputs": given})
        assert found.status_code == 200
        shape = answers_model(model)
        told = shape.model_validate(found.json()).model_dump(exclude_none=True)
        assert told == found.json()  # no key that the schema doesn't know
        schema = client.get("/openapi.json").json()
        answer = schema["paths"]["/predict"]["post"]["responses"]
        assert {"200", "400", "401", "408", "413", "422", "429", "503"} <= set(answer)
        about = client.get("/model").json()
        assert about["task"] == model.description.task


def test_requests_that_come_together_run_together_with_the_same_answers(texts):
    words = ["cat", "the old cat", "elm", "old elm new new", "dog oak", "[UNK]"] * 4
    alone = [next(texts.predict([text])) for text in words]
    app = make_app(texts, limits=Limits(wait_ms=200, batch=8))
    with TestClient(app) as client, ThreadPoolExecutor(len(words)) as pool:

        def one(text):
            return client.post("/predict", json={"inputs": text}).json()["answers"][0]

        together = list(pool.map(one, words))
        counted = client.get("/metrics").text
    assert together == alone
    calls = float(counted.split("slimfuse_batch_inputs_count ")[1].split()[0])
    assert calls < len(words) / 2
    assert f"slimfuse_batch_inputs_sum {len(words)}" in counted
    assert 'slimfuse_requests_total{path="/predict",status="200"} 24.0' in counted


def test_health_ready_and_the_page(ask, texts):
    assert ask.get("/health").json() == {"status": "ok"}
    assert ask.get("/ready").json() == {"status": "ready"}
    page = ask.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/page.css", "/page.js"):
        assert "://" not in ask.get(path).text  # nothing from elsewhere
    cold = TestClient(make_app(texts))  # its model has not run
    assert cold.get("/ready").status_code == 503


def test_a_token_is_asked_for(texts):
    with TestClient(make_app(texts, token="secret")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"},
                        {"authorization": "Basic secret"}):  # fmt: skip
            found = client.post("/predict", json={"inputs": "cat"}, headers=headers)
            assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        bearing = {"authorization": "bearer secret"}
        assert client.post("/predict", json={"inputs": "cat"}, headers=bearing).status_code == 200
        assert client.get("/metrics").status_code == client.get("/model").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_sizes_are_bounded(show, ask):
    assert show.post("/predict", content=b"x" * 200_001, headers=JSON).status_code == 413

    def drip():
        yield from [b"x" * 50_000] * 5

    assert show.post("/predict", content=drip(), headers=JSON).status_code == 413  # no length said
    found = upload(show, folders.picture(size=(101, 100)))
    assert (found.status_code, "10,000 pixels" in found.json()["detail"]) == (422, True)
    assert upload(show, *[folders.picture()] * 4).status_code == 422
    long = ask.post("/predict", json={"inputs": "x" * 100_001})
    assert long.status_code == 422
    assert len(long.content) < 1000  # what was sent is not sent back
    cut = ask.post("/predict", json={"inputs": "cat " * 50, "truncate": False})
    assert (cut.status_code, "too long" in cut.json()["detail"]) == (422, True)
    assert ask.post("/predict", json={"inputs": "cat " * 50}).json()["answers"][0]["truncated"]


def test_a_full_queue_is_told(texts):
    limits = Limits(queue=2, inputs=2, wait_ms=500, batch=2)
    with TestClient(make_app(texts, limits=limits)) as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(
            lambda i: client.post("/predict", json={"inputs": "cat"}), range(8)
        ))  # fmt: skip
        codes = {response.status_code for response in found}
        assert codes == {200, 429}
        refused = next(response for response in found if response.status_code == 429)
        assert refused.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_given_up(texts):
    limits = Limits(seconds=0.05, wait_ms=60_000)
    with TestClient(make_app(texts, limits=limits)) as client:
        found = client.post("/predict", json={"inputs": "cat"})
        assert (found.status_code, "0.05 seconds" in found.json()["detail"]) == (503, True)
        assert "slimfuse_queue_inputs 0.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"inputs": NaN}', b'{"inputs": "\\ud800"}',
     b'{"\\ud800": 1, "inputs": ""}', b'{"inputs": ' + b"9" * 5000 + b"}", b"null", b'"cat"',
     b'{"inputs": []}', b'{"inputs": [1]}', b'{"inputs": "a", "top_k": 0}',
     b'{"inputs": "a", "top_k": 1e999}', b'{"inputs": "a", "top_k": "5"}',
     b'{"inputs": "a", "more": 1}', b'{"inputs": {"a": ' + b'{"a": ' * 500 + b"1" + b"}" * 502],
    ids=lambda body: body[:24].decode(errors="replace"),
)  # fmt: skip
def test_bad_json_is_the_clients_fault(ask, body):
    found = ask.post("/predict", content=body, headers=JSON)
    assert found.status_code in (400, 422)
    assert set(found.json()) == {"detail"}


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"inputs": "cat"'])
def test_what_is_no_json_is_told_from_what_is_not_legal(ask, body):
    assert ask.post("/predict", content=body, headers=JSON).status_code == 400
    assert ask.post("/predict", content=b'{"inputs": 3}', headers=JSON).status_code == 422


def bad_images():
    whole = folders.picture(kind="JPEG", size=(90, 90))
    animated = io.BytesIO()
    Image.new("P", (9, 9)).save(animated, "GIF", save_all=True)
    return {
        "empty": b"",
        "text": b"no image",
        "truncated": whole[: len(whole) // 2],
        "bomb": bomb(60_000, 60_000),
        "within the limit of pixels": bomb(90, 90),
        "no pixels": bomb(0, 0),
        "broken gif": animated.getvalue()[:-20],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_the_clients_fault(show, name):
    content = bad_images()[name]
    found = upload(show, content)
    assert found.status_code == 422
    assert found.json()["detail"].startswith("input 0: ") or "files" in found.json()["detail"]
    coded = base64.b64encode(content).decode()
    assert show.post("/predict", json={"inputs": coded}).status_code == 422


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", b'{"inputs": "cat"}'),
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1"),
        ("multipart/form-data; boundary=" + "x" * 500, b"--y"),
        ("application/x-www-form-urlencoded", b"files=1"),
        ("application/json", b"%PNG"),
        ("\xff", b"x"),
        ("", b"x"),
    ],
)
def test_wrong_content_types_are_the_clients_fault(show, kind, body):
    for path in ("/predict", "/predict/images"):
        found = show.post(path, content=body, headers={"content-type": kind.encode("latin-1")})
        assert 400 <= found.status_code < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["inputs", "top_k", "truncate", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=VALUES)
def test_no_json_is_our_fault(ask, show, value):
    body = json.dumps(value).encode()
    for client in (ask, show):
        assert client.post("/predict", content=body, headers=JSON).status_code in (200, 400, 422)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damaged_image_is_our_fault(show, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]))
    content = bytearray(folders.picture(kind=kind, size=(20, 15)))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    assert upload(show, bytes(content)).status_code in (200, 422)
