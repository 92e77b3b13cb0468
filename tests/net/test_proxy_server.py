"""The node's own answers, its guards, and the port it listens on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket

import httpx
import pytest

from mesh.clock import SystemClock
from mesh.errors import StateError
from mesh.proxy.http import create_app
from mesh.proxy.ingress import Proxy
from mesh.proxy.server import ApiServer
from tests.eventually import eventually
from tests.net.proxy_ingress import TOKEN, an_engine, an_ingress

BEARER = {"Authorization": f"Bearer {TOKEN}"}


async def test_the_front_page_and_health_say_what_this_is() -> None:
    async with an_engine() as (_, port), an_ingress() as ingress:
        page = await ingress.client.get("/")
        assert page.status_code == 200 and "/v1" in page.text and page.headers["content-type"].startswith("text/html")
        assert (await ingress.client.get("/health")).status_code == 503
        ingress.serve_tcp(port)
        assert (await ingress.client.get("/health")).json() == {"status": "ok"}


async def test_the_model_list_never_hangs() -> None:
    async with an_engine(hang=True) as (_, port), an_ingress() as ingress:
        assert (await ingress.client.get("/v1/models")).json() == {"object": "list", "data": []}
        ingress.proxy.unserve("starting", model_name="tiny")
        assert (await ingress.client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        ingress.serve_tcp(port)
        assert (await ingress.client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert (await ingress.client.get("/v1/models/tiny")).json()["object"] == "model"
        assert (await ingress.client.get("/v1/models/other")).status_code == 404


async def test_the_model_list_is_the_engines_when_it_answers() -> None:
    async with an_engine() as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        assert (await ingress.client.get("/v1/models")).json()["path"] == "/v1/models"


async def test_a_scraper_finds_the_engines_metrics_and_the_meshs() -> None:
    async with an_engine(hang=True) as (engine, port), an_ingress() as ingress:
        for serving in (False, True):
            for path in ("/metrics", "/mesh/metrics"):
                answer = await ingress.client.get(path)
                assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
                assert "mesh_requests_active 0.0" in answer.text and "llamacpp" not in answer.text
            if not serving:
                ingress.serve_tcp(port)  # an engine that hangs keeps no scraper waiting
        engine.hang = False
        text = (await ingress.client.get("/metrics")).text
        assert text.startswith("# HELP llamacpp:prompt_tokens_total") and "mesh_requests_active" in text
        assert "llamacpp" not in (await ingress.client.get("/mesh/metrics")).text


async def test_status_is_open_on_loopback() -> None:
    async with an_ingress(api_keys=["mine"]) as ingress:
        assert (await ingress.client.get("/mesh/status")).json() == {"mesh": {"epoch": 3}}


async def test_keys_are_asked_for_when_there_are_any() -> None:
    async with an_engine() as (engine, port), an_ingress(api_keys=["mine", "yours"]) as ingress:
        ingress.serve_tcp(port)
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = await ingress.client.post("/v1/chat/completions", json={}, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await ingress.client.get("/metrics", headers=headers)).status_code == 401
        assert not engine.seen
        for headers in ({"Authorization": "Bearer yours"}, {"X-Api-Key": "mine"}):
            assert (await ingress.client.post("/v1/chat/completions", json={}, headers=headers)).status_code == 200


async def test_a_name_that_is_not_this_node_is_refused() -> None:
    async with an_ingress() as ingress:
        for path in ("/", "/v1/models", "/mesh/status", "/mesh/control/invite"):
            refused = await ingress.client.get(path, headers={"Host": "evil.example:9337", **BEARER})
            assert refused.status_code == 403


async def test_pages_from_elsewhere_are_refused() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
        refused = await ingress.client.post("/v1/chat/completions", content=b"{}", headers=headers)
        assert refused.status_code == 403 and not engine.seen
        preflight = await ingress.client.options("/v1/chat/completions", headers={"Origin": "http://localhost:3000"})
        assert preflight.status_code == 405
        assert not [name for name in preflight.headers if name.startswith("access-control")]


async def test_control_calls_reach_the_node() -> None:
    async with an_ingress() as ingress:
        answer = await ingress.client.post("/mesh/control/invite", json={"uses": 2}, headers=BEARER)
        assert answer.json() == {"token": "mesh1xyz", "uses": 2}
        assert ingress.control.calls == [("invite", {"uses": 2})]


async def test_control_errors_carry_code_message_and_remedy() -> None:
    async with an_ingress() as ingress:
        answer = await ingress.client.post("/mesh/control/plan", headers=BEARER)
        assert answer.status_code == 422
        assert answer.json() == {"error": {"code": "plan", "message": "4 GB are missing", "remedy": "add a machine"}}
        for content in (b"[1]", b"{nonsense", b"\xff"):
            wrong = await ingress.client.post("/mesh/control/invite", content=content, headers=BEARER)
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "usage")
        assert (await ingress.client.get("/mesh/control/invite", headers=BEARER)).status_code == 400


async def test_control_is_closed_to_strangers_and_browsers() -> None:
    async with an_ingress() as ingress:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {**BEARER, "Origin": "http://localhost:3000"},
            {**BEARER, "Origin": "null"},
        ):
            refused = await ingress.client.post("/mesh/control/invite", json={}, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "refused")
        assert not ingress.control.calls


async def test_a_taken_port_is_named_with_the_flag_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ApiServer(create_app(Proxy(SystemClock()), dict), ("127.0.0.1",), port)
        with pytest.raises(StateError, match=str(port)) as caught:
            await server.start()
        assert "--api-port" in (caught.value.remedy or "")


async def test_the_server_leaves_signals_alone_and_frees_its_port() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    server = ApiServer(create_app(Proxy(SystemClock()), dict), ("127.0.0.1", "::1"), 0)
    addresses = await server.start()
    assert addresses[0] == f"127.0.0.1:{server.port}"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    await server.stop()
    await server.stop()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))


async def test_stopping_is_quick_and_tells_who_waits() -> None:
    async with an_ingress() as ingress:
        asking = asyncio.create_task(ingress.client.post("/v1/chat/completions", json={}))
        await eventually(lambda: ingress.proxy.counters.held == 1)
        async with asyncio.timeout(2):
            await ingress.proxy.close("this node leaves the mesh")
        answer = await asking
        assert answer.status_code == 503 and "leaves the mesh" in answer.json()["error"]["message"]


async def test_stopping_cuts_a_connection_that_will_not_end() -> None:
    server = ApiServer(create_app(Proxy(SystemClock()), dict), ("127.0.0.1",), 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    async with asyncio.timeout(3):
        await server.stop(within_s=0.3)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_garbage_on_the_port_harms_nobody() -> None:
    async with an_ingress() as ingress:
        for garbage in (
            b"\x16\x03\x01\x02\x00",
            b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"X" * 200_000,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", ingress.port)
            writer.write(garbage)
            writer.write_eof()
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(5):
                    said = await reader.read()
                assert said == b"" or said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))
            writer.close()
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{ingress.port}/")).status_code == 200
