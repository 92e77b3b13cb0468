"""The programs people have (OpenAI's and Anthropic's SDKs, a JavaScript one, curl) find the mesh to be llama-server."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from bench.lab import Lab
from bench.meshnode import MeshNode
from tests.lab.client_cases import ANTHROPIC, FUNCTION, GREEDY, MESSAGES, OPENAI, SOBER
from tests.lab.client_mesh import (
    APART,
    CLIENT,
    KEY,
    KEYED,
    LOCAL_URL,
    MEMBERS,
    PLACES,
    SLOTS,
    ClientMesh,
    anthropic_at,
    node_program,
    openai_at,
    write_model,
)
from tests.lab.mesh_kit import IN_LAB, plain_server

pytestmark = IN_LAB
LONG: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 3500, **GREEDY}
"""Computes for many seconds."""
FREE_WITHIN_S = 1.0
JAVASCRIPT = Path(__file__).parent / "javascript" / "client.mjs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo-with-tools.gguf"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[str]:
    """llama-server itself, on this machine."""
    with plain_server(model, slots=SLOTS) as url:
        yield url


def hello(client: openai.OpenAI) -> str:
    return str(client.completions.create(prompt="Hello", max_tokens=8, **GREEDY).choices[0].text)


class Held(threading.Thread):
    """Somebody at a lite client that has lost its mesh: asks once, and leaves it to the SDK what to do when refused."""

    def __init__(self, mesh: ClientMesh) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[float, int, str | None]] = []
        """When each answer came, with its status and Retry-After."""
        self.text: str | None = None
        self.refused = threading.Event()
        node = mesh.nodes[APART]
        mesh.lab.part([APART], [name for name in mesh.nodes if name != APART])
        node.wait(lambda status: status["mesh"]["state"] != "serving", 30, "noticing that everybody is gone")
        self._mesh, self._node = mesh, node

    def _note(self, response: httpx.Response) -> None:
        self.answers.append((time.monotonic(), response.status_code, response.headers.get("retry-after")))
        if response.status_code == 503:
            self.refused.set()

    def run(self) -> None:
        http = httpx.Client(event_hooks={"response": [self._note]}, trust_env=False, timeout=60)
        with contextlib.suppress(openai.OpenAIError):
            self.text = self._mesh.with_openai(self._node, hello, http_client=http, max_retries=2)


@pytest.fixture(scope="module")
def mesh(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientMesh]:
    with Lab([*MEMBERS, CLIENT, APART], link="lan", cores=1) as lab:
        made = ClientMesh(lab, tmp_path_factory.mktemp("clients"), model)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def held(mesh: ClientMesh) -> Held:
    """It takes half a minute until the mesh refuses, in which other tests run."""
    asking = Held(mesh)
    asking.start()
    return asking


@pytest.fixture(scope="module")
def expected(plain: str) -> dict[str, Any]:
    """What the same SDKs get from llama-server."""
    with openai_at(plain) as ours, anthropic_at(plain) as theirs:
        return {name: case(ours) for name, case in OPENAI.items()} | {
            name: case(theirs) for name, case in ANTHROPIC.items()
        }


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPENAI)
def test_openais_sdk_gets_what_llama_server_says(
    mesh: ClientMesh, expected: dict[str, Any], name: str, place: str
) -> None:
    assert mesh.with_openai(mesh.at(place), OPENAI[name]) == expected[name]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ANTHROPIC)
def test_anthropics_sdk_gets_what_llama_server_says(
    mesh: ClientMesh, expected: dict[str, Any], name: str, place: str
) -> None:
    assert mesh.with_anthropic(mesh.at(place), ANTHROPIC[name]) == expected[name]


@pytest.mark.parametrize("place", PLACES)
def test_models_are_listed_and_found_by_name(mesh: ClientMesh, place: str) -> None:
    def models(client: openai.OpenAI) -> str:
        [only] = client.models.list().data
        assert client.models.retrieve(only.id).id == only.id
        assert client.completions.create(model=only.id, prompt="Hello", max_tokens=1).model == only.id
        return only.id

    node = mesh.at(place)
    assert mesh.with_openai(node, models) == node.status()["layout"]["model"]["name"]  # type: ignore[index]


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_model_is_the_sdks_not_found_error(mesh: ClientMesh, place: str) -> None:
    def asked(client: openai.OpenAI) -> None:
        for streams in (False, True):
            with pytest.raises(openai.NotFoundError) as refused:
                client.chat.completions.create(model="gpt-nowhere", messages=MESSAGES, stream=streams)
            assert refused.value.code == "model_not_found" and "gpt-nowhere" in refused.value.message
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-nowhere")

    def asked_of_anthropic(client: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="claude-nowhere"):
            client.messages.create(model="claude-nowhere", max_tokens=1, messages=MESSAGES)

    mesh.with_openai(mesh.at(place), asked)
    mesh.with_anthropic(mesh.at(place), asked_of_anthropic)


@pytest.mark.parametrize("key", ["sk-guessed", "x"])
def test_a_wrong_key_is_the_sdks_authentication_error(mesh: ClientMesh, key: str) -> None:
    def asked(client: openai.OpenAI) -> None:
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(messages=MESSAGES, **GREEDY)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

    def asked_of_anthropic(client: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.create(max_tokens=1, messages=MESSAGES, **SOBER)

    node = mesh.nodes[KEYED]
    mesh.with_openai(node, asked, api_key=key)
    mesh.with_anthropic(node, asked_of_anthropic, api_key=key)
    assert mesh.with_openai(node, lambda client: client.models.list().data)


# -- going away ------------------------------------------------------------------------------------------------------


def leave_openai_stream(mesh: ClientMesh, node: MeshNode, computing: Callable[[], None]) -> None:
    def leave(client: openai.OpenAI) -> None:
        with client.chat.completions.create(stream=True, **LONG) as stream:
            for _, _chunk in zip(range(5), stream, strict=False):
                pass
            computing()

    mesh.with_openai(node, leave)


def leave_anthropic_stream(mesh: ClientMesh, node: MeshNode, computing: Callable[[], None]) -> None:
    def leave(client: anthropic.Anthropic) -> None:
        with client.messages.stream(messages=MESSAGES, max_tokens=3500, **SOBER) as stream:
            for _, _text in zip(range(5), stream.text_stream, strict=False):
                pass
            computing()

    mesh.with_anthropic(node, leave)


def time_out(mesh: ClientMesh, node: MeshNode, computing: Callable[[], None]) -> None:
    def leave(client: openai.OpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**LONG)

    watch = threading.Timer(0.7, computing)
    watch.start()
    mesh.with_openai(node, leave, timeout=1.5)
    watch.join()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("leave", [leave_openai_stream, leave_anthropic_stream, time_out])
def test_a_client_that_goes_away_frees_its_slot_within_a_second(
    mesh: ClientMesh, place: str, leave: Callable[[ClientMesh, MeshNode, Callable[[], None]], None]
) -> None:
    seen: list[int] = []
    mesh.wait_busy(0, 5)
    leave(mesh, mesh.at(place), lambda: seen.append(mesh.busy_slots()))
    assert seen == [1], "the engine was at work"
    mesh.wait_busy(0, FREE_WITHIN_S)


# -- other programs --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm (apt install nodejs npm)")
@pytest.mark.parametrize("place", ["worker", "client"])
def test_the_javascript_sdk_gets_what_llama_server_says(mesh: ClientMesh, expected: dict[str, Any], place: str) -> None:
    node = mesh.nodes[KEYED] if place == "worker" else mesh.at(place)
    with node_program(JAVASCRIPT) as script:
        done = mesh.lab.run(node.machine, ["node", script, LOCAL_URL, KEY, json.dumps(FUNCTION)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said, _prompt_tokens = expected["chat"]
    assert found["chat"] == found["streamed"] == said
    assert (found["usage"], found["finish"], found["ids"], found["roles"]) == (24, "length", 1, 1)
    assert found["completion"] == expected["completions"] and found["response"] == expected["responses"]
    assert found["tool"] == found["streamedTool"] and found["tool"].keys() == {"city", "days"}
    assert found["structured"].keys() == {"city", "days"}
    assert (found["models"], found["dimensions"]) == (1, 256)
    assert found["unknownModel"] == {"kind": "NotFoundError", "status": 404, "code": "model_not_found"}
    if node.machine == KEYED:
        assert found["wrongKey"] == {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key"}
    assert found["left"] == 5
    mesh.wait_busy(0, FREE_WITHIN_S)


@pytest.mark.parametrize("place", PLACES)
def test_curl_gets_whole_answers_streams_and_errors(mesh: ClientMesh, expected: dict[str, Any], place: str) -> None:
    node = mesh.at(place)

    def curl(path: str, body: dict[str, Any], *more: str, key: str = KEY) -> str:
        url = LOCAL_URL + path
        headers = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}")
        done = mesh.lab.run(node.machine, ["curl", "-sS", *more, url, *headers, "-d", json.dumps(body)])
        assert done.returncode == 0, done.stderr
        return done.stdout

    said, _prompt_tokens = expected["chat"]
    body = {"messages": MESSAGES, "max_tokens": 24, **GREEDY}
    assert json.loads(curl("/v1/chat/completions", body))["choices"][0]["message"]["content"] == said
    lines = curl("/v1/chat/completions", {**body, "stream": True}, "-N").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == said
    native = json.loads(curl("/completion", {"prompt": "Hello", "n_predict": 4, "temperature": 0}))
    assert native["content"] and native["stop_type"] == "limit"
    tokens = json.loads(curl("/tokenize", {"content": "Hello there"}))["tokens"]
    assert json.loads(curl("/detokenize", {"tokens": tokens}))["content"].strip() == "Hello there"
    prompt = json.loads(curl("/apply-template", {"messages": MESSAGES}))["prompt"]
    assert MESSAGES[0]["content"] in prompt
    assert curl("/v1/chat/completions", {**body, "model": "no"}, "-o", "/dev/null", "-w", "%{http_code}") == "404"
    if node.machine == KEYED:
        assert curl("/v1/chat/completions", body, "-o", "/dev/null", "-w", "%{http_code}", key="no") == "401"


# -- last, because its answer takes half a minute ---------------------------------------------------------------------


def test_a_mesh_that_serves_nobody_says_when_to_ask_again_and_the_sdk_does(
    mesh: ClientMesh, held: Held, plain: str
) -> None:
    assert held.refused.wait(45), f"no refusal: {held.answers}"
    mesh.lab.heal_all()
    held.join(40)
    (refused_at, status, retry_after), *later = held.answers
    assert (status, retry_after) == (503, "5")
    assert [code for _, code, _ in later] == [200] and later[0][0] - refused_at >= 5
    with openai_at(plain) as client:
        assert held.text == hello(client)
