"""What clients get from the routes: errors in OpenAI's form with the right status, and limits."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import HTTPException
from starlette.testclient import TestClient

from rotmole.serving.app import build_app
from rotmole.serving.engine import Batched
from rotmole.serving.limits import Limits, Places
from rotmole.serving.memory import BLOCK
from rotmole.serving.models import load_models, named_targets

KEY = "a-key-of-more-than-16"
CHAT = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT = {"model": "red", "prompt": "the film", "max_tokens": 4}


@pytest.fixture(scope="module")
def engine(targets):
    served = load_models(named_targets([str(targets[0])]))[0]
    engine = Batched(served, 6 * BLOCK)
    yield engine
    engine.stop()


@pytest.fixture
def client(engine):
    """A client whose server is not shut down, so that its engine serves the next test, too."""
    return TestClient(build_app([engine], limits=Limits(body=5000)), raise_server_exceptions=False)


def post(client, body, path="/v1/completions", **options):
    sent = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return client.post(path, content=sent, headers=headers, **options)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "not JSON"),
        ("[" * 4000, 400, ""),
        ({}, 400, "model: Field required"),
        (TEXT | {"model": "green"}, 404, "no model 'green'; the models are red"),
        (TEXT | {"max_tokens": 0}, 400, "max_tokens"),
        (TEXT | {"max_tokens": 600}, 400, "more than the 512"),
        (TEXT | {"prompt": "film " * 600}, 400, "shorten the prompt"),
        (TEXT | {"prompt": ["a"]}, 400, "prompt"),
        (TEXT | {"temperature": "1"}, 400, "temperature"),
        (TEXT | {"temperature": 2.5}, 400, "temperature"),
        (TEXT | {"n": 2}, 400, "n: "),
        (TEXT | {"logprobs": 3}, 400, "logprobs"),
        (TEXT | {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        (TEXT | {"stop": ""}, 400, "stop"),
        (TEXT | {"top_k": 3}, 400, "top_k: this server has no such field"),
        (TEXT | {"generation_config": "{"}, 400, "generation_config must be the JSON"),
        (TEXT | {"generation_config": '{"num_beams": 3}'}, 400, "generation_config.num_beams"),
        ('{"model": "red", "prompt": "\\ud800"}', 400, "surrogate"),
        ("x" * 6000, 413, "longer than 5000 bytes"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(client, body, status, words):
    answer = post(client, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["code"] == status
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "robot", "content": "hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": 3}],
    ],
)
def test_wrong_chats(client, messages):
    answer = post(client, CHAT | {"messages": messages}, "/v1/chat/completions")
    assert answer.status_code == 400
    assert "messages" in answer.json()["error"]["message"]


def test_a_body_of_another_type(client):
    answer = client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_a_length_that_is_hidden_is_counted(client):
    def parts():
        yield b'{"model": "red", "prompt": "'
        for _ in range(10):
            yield b"x" * 1000
        yield b'"}'

    assert client.post("/v1/completions", content=parts()).status_code == 413


def test_without_the_key_nothing_but_health_answers(engine):
    client = TestClient(build_app([engine], key=KEY))
    paths = ["/v1/models", "/v1/models/red", "/openapi.json", "/nothing"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert [client.get(path, headers=headers).status_code for path in paths] == [401] * 4
        for path in ("/v1/completions", "/v1/chat/completions", "/load_model", "/reset"):
            assert post(client, TEXT, path, headers=headers).status_code == 401
    assert client.get("/health").status_code == 200
    right = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/v1/models", headers=right).json()["data"][0]["id"] == "red"
    assert post(client, TEXT, headers=right).status_code == 200
    schema = client.get("/openapi.json", headers=right).json()
    assert schema["components"]["securitySchemes"]


def test_routes_of_transformers_that_change_the_server_are_closed(client):
    for path in ("/reset", "/v1/responses", "/v1/audio/transcriptions"):
        assert post(client, {}, path).status_code == 404
    loaded = post(client, {"model": "red"}, "/load_model")
    assert json.loads(loaded.text.removeprefix("data: "))["status"] == "ready"
    assert post(client, {"model": "other/model"}, "/load_model").status_code == 404


def test_a_foreign_name_of_this_computer_is_refused(engine):
    app = build_app([engine], hosts=["127.0.0.1"])
    assert TestClient(app, base_url="http://evil.example").get("/v1/models").status_code == 400
    assert TestClient(app, base_url="http://127.0.0.1:8000").get("/v1/models").status_code == 200


def test_the_schema_names_the_statuses_that_there_are(client):
    schema = client.get("/openapi.json").json()
    statuses = set(schema["paths"]["/v1/completions"]["post"]["responses"])
    assert statuses == {"200", "400", "401", "404", "413", "429", "503"}


def test_a_full_queue_refuses_and_a_place_that_is_free_is_taken():
    async def fill():
        places = Places(Limits(parallel=2, waiting=1))
        await places.take()
        await places.take()
        third = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as refused:
            await places.take()
        assert (refused.value.status_code, refused.value.headers) == (429, {"Retry-After": "1"})
        places.give_back()
        await asyncio.wait_for(third, 1)
        assert (places.taken, places.waiting) == (2, 0)
        fourth = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        fourth.cancel()
        await asyncio.gather(fourth, return_exceptions=True)
        assert (places.taken, places.waiting) == (2, 0)

    asyncio.run(fill())


def test_an_engine_that_fails_says_nothing_of_its_reason(client, engine, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret /path")

    monkeypatch.setattr(engine, "_begin", broken)
    for stream in (False, True):
        answer = post(client, TEXT | {"stream": stream})
        assert answer.status_code == 500
        assert "secret" not in answer.text
    monkeypatch.undo()
    monkeypatch.setattr(engine, "is_alive", lambda: False)
    assert client.get("/health").status_code == 503


def test_an_answer_that_fails_in_the_midst_ends_its_stream_with_an_error(
    client, engine, monkeypatch
):
    def failing(key, prompt, sampling, answer):
        answer.take([5])
        answer.finish("secret /path")

    monkeypatch.setattr(engine, "_begin", failing)
    answer = post(client, CHAT | {"stream": True}, "/v1/chat/completions")
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line[6:7] == "{"]
    assert "server's log" in events[-1]["error"]
    assert "secret" not in answer.text
    assert post(client, CHAT, "/v1/chat/completions").status_code == 500
