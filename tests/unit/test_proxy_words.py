"""The pure parts around the core: events, error shapes, model names, and who may speak at all."""

from __future__ import annotations

import json

import pytest

from mesh.errors import AdmissionError
from mesh.proxy import guard
from mesh.proxy.control import check_control
from mesh.proxy.dialect import Dialect
from mesh.proxy.failure import not_serving, queue_full, stream_interrupted
from mesh.proxy.http import _wish
from mesh.proxy.naming import means


@pytest.mark.parametrize(
    ("path", "last", "whole"),
    [
        ("/v1/chat/completions", b"data: [DONE]", True),
        ("/v1/chat/completions", b'data: {"choices":[{"finish_reason":"stop"}]}', False),
        ("/v1/chat/completions", b'data: {"error":{"code":500}}', True),
        ("/v1/completions", b"", False),
        ("/completion", b'data: {"content":"","stop":true}', True),
        ("/completion", rb'data: {"content":"\"stop\":true","stop":false}', False),
        ("/v1/messages", b'event: message_stop\ndata: {"type":"message_stop"}', True),
        ("/v1/messages", b'event: content_block_delta\ndata: {"message_stop":1}', False),
        ("/v1/responses", b"event: response.completed\ndata: {}", True),
        ("/v1/responses", b"event: response.output_text.delta\ndata: {}", False),
        ("/v1/stream", b"data: whatever", True),
    ],
)
def test_a_stream_is_complete_only_with_its_end_mark(path: str, last: bytes, whole: bool) -> None:
    assert Dialect.of(path).is_end(last) is whole


def test_errors_have_the_shape_each_client_knows() -> None:
    failure = not_serving("no worker", 30.0, 5)
    openai = Dialect.of("/v1/chat/completions").error_body(failure)
    assert set(openai["error"]) == {"message", "type", "code", "param"}
    assert openai["error"]["code"] == "mesh_not_serving"
    anthropic = Dialect.of("/v1/messages").error_body(failure)
    assert anthropic["type"] == "error" and anthropic["error"]["type"] == "overloaded_error"
    assert Dialect.of("/v1/messages").error_body(queue_full(1, 5))["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/completion", "/v1/x"])
def test_an_error_in_a_stream_is_one_event_that_is_an_end(path: str) -> None:
    event = Dialect.of(path).error_event(stream_interrupted("reset\nby peer"))
    assert event.endswith(b"\n\n") and event.count(b"\n\n") == 1
    assert Dialect.of(path).is_end(event[:-2])
    data = json.loads(event.split(b"data: ", 1)[1])
    assert "error" in data


@pytest.mark.parametrize("asked", [None, "", "default", "Qwen-Q4", "qwen-q4", "Qwen-Q4.gguf", "/models/Qwen-Q4.gguf"])
def test_names_that_mean_the_served_model(asked: str | None) -> None:
    assert means(asked, "Qwen-Q4")
    assert means(asked, "Qwen-Q4.gguf")
    assert means(asked, "Qwen-Q4-00001-of-00003.gguf")


@pytest.mark.parametrize("asked", ["gpt-3.5-turbo", "Qwen", "Qwen-Q4-more", "Qwen-Q4.bin"])
def test_names_that_mean_another_model(asked: str) -> None:
    assert not means(asked, "Qwen-Q4")


def heads(**values: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in values.items()]


@pytest.mark.parametrize(
    "host", ["localhost:9337", "127.0.0.1:9337", "[::1]:9337", "192.168.1.4", "attic.lan", "a.localhost"]
)
def test_hosts_that_are_this_node(host: str) -> None:
    assert guard.check_host(heads(host=host), ["attic.lan"]) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9337", "localhost.evil.example", "127.0.0.1.nip.io", "[::1"]
)
def test_names_that_somebody_else_may_point_here_are_refused(host: str) -> None:
    refused = guard.check_host(heads(host=host), ["attic.lan"])
    assert refused is not None and refused.status == 403


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:9337", "vscode-webview://x", "app://obsidian.md"]
)
def test_pages_and_programs_of_this_machine_may_ask(origin: str) -> None:
    assert guard.check_origin(heads(host="localhost:9337", origin=origin), same_only=False) is None


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://192.168.1.9"]
)
def test_pages_from_elsewhere_may_not(origin: str) -> None:
    assert guard.check_origin(heads(host="localhost:9337", origin=origin), same_only=False) is not None


def test_an_image_tag_on_a_foreign_page_may_not_but_a_link_may() -> None:
    image = heads(host="localhost", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
    link = heads(host="localhost", sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert guard.check_origin(image, same_only=False) is not None
    assert guard.check_origin(link, same_only=False) is None


def test_a_key_comes_in_either_header() -> None:
    assert guard.check_key(heads(authorization="Bearer two"), ["one", "two"]) is None
    assert guard.check_key(heads(x_api_key="one"), ["one", "two"]) is None
    assert guard.check_key([], []) is None
    for wrong in (heads(), heads(authorization="Bearer three"), heads(authorization="one"), heads(x_api_key="é")):
        refused = guard.check_key(wrong, ["one", "two"])
        assert refused is not None and refused.status == 401


def test_control_wants_the_token_and_no_browser() -> None:
    check_control(heads(host="localhost:1", authorization="Bearer secret"), "secret")
    check_control(heads(host="localhost:1", origin="http://localhost:1", authorization="Bearer secret"), "secret")
    for wrong, token in [
        (heads(host="localhost:1"), "secret"),
        (heads(host="localhost:1", authorization="Bearer wrong"), "secret"),
        (heads(host="localhost:1", authorization="Bearer "), ""),
        (heads(host="localhost:1", origin="http://localhost:2", authorization="Bearer secret"), "secret"),
    ]:
        with pytest.raises(AdmissionError):
            check_control(wrong, token)


@pytest.mark.parametrize("body", [b'{"model":"\xb1\xff"}', b"\xff", b"[" * 5000, b'{"model":1,"stream":"\xe9"}', b""])
def test_a_body_that_is_no_text_is_left_to_the_engine_to_refuse(body: bytes) -> None:
    """A name in bytes that are no text was an error of ours, status 500."""
    assert (_wish(body).model, _wish(body).stream) in ((None, None), (None, False), (1, None), (1, False))
