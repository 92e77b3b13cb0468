"""The real engine under supervision: a ring of three on one machine, tunnels between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from mesh.clock import SystemClock
from mesh.engine.cache import Engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from mesh.errors import EngineError
from mesh.models.demo import write_demo
from mesh.models.fingerprint import fingerprint
from mesh.supervise.core import State
from mesh.supervise.events import Adopt, MemberReady
from mesh.supervise.runner import EngineRunner
from mesh.tunnel import HostTunnels, PushTunnels, WorkerTunnel
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch, Layout, ModelCost, RingMember
from mesh.wire.messages import EngineDown, LoadProgress, Opened, OpenPush, OpenRpc, Serving, WorkerReady
from tests.eventually import eventually
from tests.fakes.processes import node_id
from tests.fakes.transport import stream_pair

pytestmark = pytest.mark.engine

A, B, C = (node_id(letter) for letter in "abc")
ONE, TWO = Epoch(1, A), Epoch(2, A)


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ModelCost]]:
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    file = write_demo(path, engine.vocab("llama-spm"))
    yield path, file.cost(fingerprint([path]))
    path.unlink()


class Ring:
    """Nodes a, b, c, whose messages and streams cross in memory."""

    def __init__(self, engine: Engine, model: tuple[Path, ModelCost], tmp_path: Path) -> None:
        self.engine, (self.model, self.cost) = engine, model
        self.announced: list[tuple[str, Serving | EngineDown | LoadProgress]] = []
        self.tunnels = HostTunnels(self.open_bulk)
        self.worker_ends: dict[str, WorkerTunnel] = {}
        self.pushes: dict[str, PushTunnels] = {}
        self.runners: dict[str, EngineRunner] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.may_push = True
        for me in (A, B, C):
            (tmp_path / me[0]).mkdir()
            self.worker_ends[me] = WorkerTunnel(
                lambda epoch, me=me: self.runners[me].rpc_endpoint(epoch),  # type: ignore[misc]
                lambda peer, epoch: peer == A,
            )
            self.pushes[me] = PushTunnels(
                lambda to, request, me=me, **_: self.open_push(me, to, request),  # type: ignore[misc]
                lambda epoch, me=me: self.runners[me].rpc_endpoint(epoch),  # type: ignore[misc]
                lambda peer, epoch, me=me: self.may_push and self.runners[peer].layout.successor(peer) == me,  # type: ignore
            )
            self.runners[me] = EngineRunner(
                me,
                state_dir=tmp_path / me[0],
                rpc_command=self.rpc_command,
                server_command=self.server_command,
                tunnels=self.tunnels if me == A else HostTunnels(self.open_bulk),
                worker_side=self.worker_ends[me],
                pushes=self.pushes[me],
                clock=SystemClock(),
                tell_host=lambda host, message, me=me: self.tell(host, me, message),  # type: ignore[misc]
                announce=lambda message, me=me: self.announced.append((me, message)),  # type: ignore[misc]
            )

    def rpc_command(self, layout: Layout, port: int, secret: bytes, peers: Mapping[str, str]) -> Launch:
        return rpc_server_command(
            self.engine,
            port,
            threads=1,
            model_files=[self.model],
            fingerprint=self.cost.fingerprint,
            rpc_secret=secret,
            peers=peers,
        )

    def server_command(
        self, layout: Layout, port: int, endpoints: Sequence[str], secret: bytes, api_key: str
    ) -> Launch:
        return llama_server_command(
            self.engine, layout, self.model, port, endpoints, threads=1, rpc_secret=secret, api_key=api_key
        )

    def tell(self, host: str, worker: str, message: WorkerReady) -> None:
        self.runners[host].post(MemberReady(worker, message.epoch))

    async def open_bulk(self, worker: str, request: Any, /, **_: Any) -> Any:
        return await self.opened(lambda stream: self.worker_ends[worker].serve(A, request, stream))

    async def open_push(self, source: str, worker: str, request: OpenRpc | OpenPush) -> Any:
        assert isinstance(request, OpenPush)
        return await self.opened(lambda stream: self.pushes[worker].serve(source, request, stream))

    async def opened(self, serve: Callable[[Any], Coroutine[Any, Any, None]]) -> Any:
        ours, theirs = stream_pair()
        task = asyncio.ensure_future(serve(theirs))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        reply = await read_frame(ours, open_reply_decoder)
        if not isinstance(reply, Opened):
            raise EngineError(reply.message)
        return ours

    def layout(self, *workers: str) -> Layout:
        n = self.cost.n_layers
        ids = (A, *workers)
        bounds = [n * i // len(ids) for i in range(len(ids) + 1)]
        members = tuple(
            RingMember(me, f"node {me[0]}", (bounds[i], bounds[i + 1] - 1), 1 << 20, "CPU") for i, me in enumerate(ids)
        )
        return Layout("split" if workers else "solo", A, self.cost, members, 512, 1)

    def adopt(self, epoch: Epoch, *workers: str) -> None:
        for runner in self.runners.values():
            runner.post(Adopt(epoch, self.layout(*workers)))

    async def serves(self, epoch: Epoch) -> None:
        def serving_or_down() -> bool:
            downs = [message for _, message in self.announced if isinstance(message, EngineDown)]
            assert not [message for message in downs if message.epoch == epoch], downs
            return self.runners[A].state is State.SERVING and self.runners[A].epoch == epoch

        await eventually(serving_or_down, within=60)

    def pid(self, me: str) -> int:
        return self.runners[me]._children[0].pid

    async def text(self) -> str:
        serving = self.runners[A].serving
        assert serving is not None
        port = self.runners[A].http_port(serving.epoch)
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(
                f"http://127.0.0.1:{port}/completion",
                headers={"Authorization": f"Bearer {serving.api_key}"},
                json={"prompt": "Once", "n_predict": 16, "temperature": 0},
            )
        answer.raise_for_status()
        content: str = answer.json()["content"]
        return content


@pytest.fixture
async def ring(engine: Engine, model: tuple[Path, ModelCost], tmp_path: Path) -> AsyncIterator[Ring]:
    ring = Ring(engine, model, tmp_path)
    for runner in ring.runners.values():
        await runner.start()
    yield ring
    await asyncio.gather(*(runner.stop() for runner in ring.runners.values()))


async def test_three_nodes_say_what_one_says_and_a_killed_worker_costs_an_epoch(ring: Ring) -> None:
    ring.adopt(ONE)
    await ring.serves(ONE)
    alone = await ring.text()
    ring.adopt(TWO, B, C)
    await ring.serves(TWO)
    assert await ring.text() == alone
    progress = {message.node: message for _, message in ring.announced if isinstance(message, LoadProgress)}
    assert {node for node, message in progress.items() if message.done_bytes == message.total_bytes} == {B, C}
    weights = sum(ring.cost.layer_bytes) // 3
    assert all(traffic.up_bytes < weights for traffic in ring.tunnels.traffic.values())
    # What B computes goes straight to C: at least 16 tokens of the prompt and the answer.
    assert ring.pushes[B].traffic[C].up_bytes > 16 * 4 * ring.cost.n_embd

    os.kill(ring.pid(B), signal.SIGKILL)
    await eventually(lambda: {me for me, m in ring.announced if isinstance(m, EngineDown)} == {A, B}, within=5)
    reasons = {me: m.reason for me, m in ring.announced if isinstance(m, EngineDown)}
    assert "rpc-server was killed by SIGKILL" in reasons[B]
    assert "node b" in reasons[A]
    three = Epoch(3, A)
    ring.adopt(three, C)
    await ring.serves(three)
    assert await ring.text() == alone


async def test_a_worker_that_lets_nobody_push_costs_time_and_is_named(
    ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    ring.adopt(ONE)
    await ring.serves(ONE)
    alone = await ring.text()
    ring.may_push = False
    ring.adopt(TWO, B, C)
    await ring.serves(TWO)
    assert await ring.text() == alone
    assert "node b reaches node c only through this machine: it did not answer" in caplog.text


async def test_a_file_that_is_no_model_is_reported_in_the_engines_words(ring: Ring, tmp_path: Path) -> None:
    ring.model = tmp_path / "broken.gguf"
    ring.model.write_bytes(b"GGUF" + b"\0" * 100)
    ring.adopt(ONE)
    await eventually(lambda: ring.announced, within=20)
    ((_, down),) = ring.announced
    assert isinstance(down, EngineDown)
    assert down.reason.startswith("llama-server exited with code 1: ")
    assert "load" in down.reason


async def test_the_engine_without_the_key_answers_nobody(ring: Ring) -> None:
    ring.adopt(ONE)
    await ring.serves(ONE)
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(
            f"http://127.0.0.1:{ring.runners[A].http_port(ONE)}/completion", json={"prompt": "Once", "n_predict": 1}
        )
    assert answer.status_code == 401
