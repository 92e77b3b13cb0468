"""The engine of a node as others meet it: with a fake process table for order, with real processes for the rest."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.clock import SystemClock
from mesh.errors import EngineError
from mesh.supervise.core import Deadlines, State
from mesh.supervise.events import Adopt, MemberReady
from mesh.supervise.reasons import ProcessKind
from mesh.supervise.registry import process_mark
from mesh.supervise.runner import EngineRunner
from mesh.tunnel import HostTunnels, WorkerTunnel
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch, Layout
from mesh.wire.messages import EngineDown, LoadProgress, Opened, Serving, WorkerReady
from tests.eventually import eventually
from tests.fakes.processes import (
    FakeChild,
    FakeLauncher,
    FakeTunnels,
    StandIn,
    layout_of,
    node_id,
    stand_in,
    stand_in_rpc,
    stand_in_server,
)
from tests.fakes.transport import stream_pair

A, B, C = (node_id(letter) for letter in "abc")
ONE, TWO, THREE = (Epoch(n, A) for n in (1, 2, 3))


class Node:
    """A runner with everything it says."""

    def __init__(self, tmp_path: Path, me: str = A, **overrides: Any) -> None:
        self.told: list[tuple[str, WorkerReady]] = []
        self.announced: list[Serving | EngineDown | LoadProgress] = []
        arguments: dict[str, Any] = {
            "state_dir": tmp_path,
            "rpc_command": stand_in_rpc,
            "server_command": stand_in_server,
            "tunnels": FakeTunnels(),
            "clock": SystemClock(),
            "tell_host": lambda host, message: self.told.append((host, message)),
            "announce": self.announced.append,
        }
        self.runner = EngineRunner(me, **{**arguments, **overrides})

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.announced if isinstance(message, kind)]


@pytest.fixture
async def nodes() -> AsyncIterator[list[Node]]:
    """Runners to stop at the end; no child of this process is left then."""
    made: list[Node] = []
    yield made
    for node in made:
        await asyncio.wait_for(node.runner.stop(), 20)
    assert not [p for p in psutil.Process().children() if "processes.py" in " ".join(p.cmdline())]


async def started(nodes: list[Node], tmp_path: Path, me: str = A, **overrides: Any) -> Node:
    state_dir = tmp_path / me[0]
    state_dir.mkdir()
    node = Node(state_dir, me, **overrides)
    nodes.append(node)
    await node.runner.start()
    return node


# -- order, with a fake process table --------------------------------------------------------------------------------


async def serving_fake(nodes: list[Node], tmp_path: Path, **overrides: Any) -> tuple[Node, FakeLauncher]:
    async def probe(port: int, api_key: str) -> None:
        return

    launcher = FakeLauncher()
    node = await started(nodes, tmp_path, launcher=launcher, probe=probe, **overrides)
    node.runner.post(Adopt(ONE, layout_of("a")))
    await eventually(lambda: node.runner.state is State.SERVING)
    return node, launcher


async def test_the_old_process_is_gone_before_the_new_one_starts(nodes: list[Node], tmp_path: Path) -> None:
    alive_at_launch: list[int] = []
    node, launcher = await serving_fake(nodes, tmp_path)
    launcher.on_launch = lambda child: alive_at_launch.append(len(launcher.alive))
    old = launcher.children[0]
    old.dies_when_killed = False
    node.runner.post(Adopt(TWO, layout_of("a")))
    await eventually(lambda: node.runner.state is State.STOPPING)
    assert launcher.alive == [old]
    old.exit(-9)
    await eventually(lambda: node.runner.state is State.SERVING)
    assert alive_at_launch == [1]
    assert node.runner.epoch == TWO


async def test_a_layout_adopted_during_a_start_ends_the_half_started(nodes: list[Node], tmp_path: Path) -> None:
    node, launcher = await serving_fake(nodes, tmp_path)
    launcher.gate.clear()
    node.runner.post(Adopt(TWO, layout_of("a")))
    await eventually(lambda: launcher.waiting == 1)
    node.runner.post(Adopt(THREE, layout_of("a")))
    assert node.runner.state is State.STOPPING
    launcher.gate.set()
    await eventually(lambda: node.runner.state is State.SERVING)
    assert node.runner.epoch == THREE
    assert [child.returncode for child in launcher.children] == [-9, -9, None]


async def test_stopping_during_a_start_leaves_nothing(nodes: list[Node], tmp_path: Path) -> None:
    node, launcher = await serving_fake(nodes, tmp_path)
    launcher.gate.clear()
    node.runner.post(Adopt(TWO, layout_of("a")))
    await eventually(lambda: launcher.waiting == 1)
    stop = asyncio.ensure_future(node.runner.stop())
    await eventually(lambda: node.runner.state is State.CLOSING)
    launcher.gate.set()
    await stop
    assert launcher.alive == []


async def test_a_cancelled_stop_still_stops(nodes: list[Node], tmp_path: Path) -> None:
    node, launcher = await serving_fake(nodes, tmp_path)
    launcher.children[0].dies_when_killed = False
    stop = asyncio.ensure_future(node.runner.stop())
    await eventually(lambda: node.runner.state is State.CLOSING)
    stop.cancel()
    await asyncio.sleep(0)
    assert not stop.done()
    launcher.children[0].exit(-9)
    with pytest.raises(asyncio.CancelledError):
        await stop
    assert node.runner.state is State.CLOSED


async def test_every_epoch_has_secrets_of_its_own(nodes: list[Node], tmp_path: Path) -> None:
    node, launcher = await serving_fake(nodes, tmp_path)
    node.runner.post(Adopt(TWO, layout_of("a", "b")))
    node.runner.post(MemberReady(B, TWO))
    await eventually(lambda: node.runner.state is State.SERVING)
    first, second = (child.env for child in launcher.children)
    keys = {child[name] for child in (first, second) for name in ("LLAMA_API_KEY", "MESH_RPC_SECRET")}
    assert len(keys) == 4
    assert {len(bytes.fromhex(key)) for key in keys} == {32}
    assert [message.api_key for message in node.said(Serving)] == [
        child.env["LLAMA_API_KEY"] for child in launcher.children
    ]
    assert node.runner.serving == node.said(Serving)[-1]


async def test_a_probe_that_fails_is_reported(nodes: list[Node], tmp_path: Path) -> None:
    async def probe(port: int, api_key: str) -> None:
        raise EngineError("llama-server answered 500 to its first prompt")

    node = await started(nodes, tmp_path, launcher=FakeLauncher(), probe=probe)
    node.runner.post(Adopt(ONE, layout_of("a")))
    await eventually(lambda: node.runner.state is State.IDLE)
    assert node.announced == [EngineDown(ONE, "llama-server answered 500 to its first prompt")]


async def test_a_step_that_takes_too_long_is_given_up(nodes: list[Node], tmp_path: Path) -> None:
    def deaf(child: FakeChild) -> None:
        child.listens = False

    launcher = FakeLauncher(deaf)
    node = await started(nodes, tmp_path, launcher=launcher, deadlines=Deadlines(launch_s=0.1))
    node.runner.post(Adopt(ONE, layout_of("a")))
    await eventually(lambda: node.runner.state is State.IDLE and node.announced)
    assert "did not listen" in node.said(EngineDown)[0].reason
    assert launcher.alive == []


async def test_a_listener_that_reacts_at_once_is_heard_after_the_event_it_reacts_to(
    nodes: list[Node], tmp_path: Path
) -> None:
    # The coordinator may answer a failure with a new layout from inside the callback.
    heard: list[Any] = []

    def announce(message: Any) -> None:
        heard.append(message)
        if isinstance(message, EngineDown):
            node.runner.post(Adopt(TWO, layout_of("a")))

    node, launcher = await serving_fake(nodes, tmp_path, announce=announce)
    launcher.children[0].exit(1)
    await eventually(lambda: node.runner.state is State.SERVING and node.runner.epoch == TWO)
    assert [type(message) for message in heard] == [Serving, EngineDown, Serving]


# -- real processes --------------------------------------------------------------------------------------------------


async def ring(nodes: list[Node], tmp_path: Path) -> tuple[Node, Node, Node]:
    """Host a and workers b, c with real processes and tunnels; messages and streams cross in memory."""
    workers: dict[str, tuple[Node, WorkerTunnel]] = {}

    async def open_bulk(worker: str, request: Any, **_: Any) -> Any:
        ours, theirs = stream_pair()
        task = asyncio.ensure_future(workers[worker][1].serve(A, request, theirs))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        reply = await read_frame(ours, open_reply_decoder)
        if not isinstance(reply, Opened):
            raise EngineError(reply.message)
        return ours

    tasks: set[asyncio.Task[None]] = set()
    host = await started(nodes, tmp_path, A, tunnels=HostTunnels(open_bulk))
    for me in (B, C):
        tunnel = WorkerTunnel(
            lambda epoch, me=me: workers[me][0].runner.rpc_endpoint(epoch),  # type: ignore[misc]
            lambda peer, epoch: peer == A,
        )

        def tell_host(to: str, message: WorkerReady, me: str = me) -> None:
            assert to == A
            host.runner.post(MemberReady(me, message.epoch))

        workers[me] = (await started(nodes, tmp_path, me, worker_side=tunnel, tell_host=tell_host), tunnel)
    return host, workers[B][0], workers[C][0]


def adopt(nodes: list[Node], epoch: Epoch) -> None:
    for node in nodes:
        node.runner.post(Adopt(epoch, layout_of("a", "b", "c")))


async def all_serve(host: Node, epoch: Epoch) -> None:
    await eventually(lambda: host.runner.state is State.SERVING and host.runner.epoch == epoch, within=20)


async def test_a_ring_serves_after_a_word_went_through_every_member(nodes: list[Node], tmp_path: Path) -> None:
    host, b, c = await ring(nodes, tmp_path)
    adopt(nodes, ONE)
    await all_serve(host, ONE)
    assert [type(message) for message in host.announced] == [Serving]
    assert {message.done_bytes for message in b.said(LoadProgress)} >= {100}
    traffic = host.runner._tunnels.traffic  # type: ignore[attr-defined]
    assert {(t.up_bytes, t.down_bytes) for t in traffic.values()} == {(10, 10)}
    assert c.runner.state is State.WORKING


async def test_a_killed_worker_process_is_reported_and_the_next_epoch_serves(nodes: list[Node], tmp_path: Path) -> None:
    host, b, _ = await ring(nodes, tmp_path)
    adopt(nodes, ONE)
    await all_serve(host, ONE)
    os.kill(b.runner._children[0].pid, signal.SIGKILL)
    await eventually(lambda: b.said(EngineDown))
    assert "rpc-server was killed by SIGKILL" in b.said(EngineDown)[0].reason
    adopt(nodes, TWO)
    await all_serve(host, TWO)


async def test_a_layout_adopted_while_the_last_one_starts_is_the_one_that_serves(
    nodes: list[Node], tmp_path: Path
) -> None:
    host, b, c = await ring(nodes, tmp_path)
    for epoch in (ONE, TWO, THREE):
        adopt(nodes, epoch)
        await eventually(lambda: any(node.runner._launches or node.runner._children for node in nodes))
    await all_serve(host, THREE)
    for node in nodes:
        assert len(node.runner._children) == 1
    assert (b.runner.epoch, c.runner.epoch) == (THREE, THREE)


async def test_the_death_of_the_server_is_reported_with_its_signal(nodes: list[Node], tmp_path: Path) -> None:
    host = await started(nodes, tmp_path)
    host.runner.post(Adopt(ONE, layout_of("a")))
    await all_serve(host, ONE)
    os.kill(host.runner._children[0].pid, signal.SIGSEGV)
    await eventually(lambda: host.said(EngineDown))
    assert "llama-server was killed by SIGSEGV" in host.said(EngineDown)[0].reason
    assert host.runner.serving is None
    assert host.runner.http_port(ONE) is None


async def test_a_server_that_cannot_load_says_why(nodes: list[Node], tmp_path: Path) -> None:
    host = await started(
        nodes,
        tmp_path,
        server_command=lambda *_: stand_in("exit", "--say", "error loading model: bad magic", "--code", "1"),
    )
    host.runner.post(Adopt(ONE, layout_of("a")))
    await eventually(lambda: host.said(EngineDown))
    assert host.said(EngineDown)[0].reason == "llama-server exited with code 1: error loading model: bad magic"
    assert "bad magic" in (tmp_path / "a" / "logs" / "llama-server.log").read_text()


async def test_a_program_that_is_not_there_is_reported_with_the_remedy(nodes: list[Node], tmp_path: Path) -> None:
    missing = type("Missing", (), {"argv": (str(tmp_path / "llama-server"),), "env": {}})()
    host = await started(nodes, tmp_path, server_command=lambda *_: missing)
    host.runner.post(Adopt(ONE, layout_of("a")))
    await eventually(lambda: host.said(EngineDown))
    assert "mesh engine build" in host.said(EngineDown)[0].reason


async def test_a_port_taken_in_between_costs_another_try_not_the_layout(nodes: list[Node], tmp_path: Path) -> None:
    with socket.socket() as thief:
        tries: list[int] = []

        def command(layout: Layout, port: int, *rest: Any) -> StandIn:
            tries.append(port)
            if len(tries) == 1:
                thief.bind(("127.0.0.1", port))
                thief.listen()
            return stand_in_server(layout, port, *rest)

        host = await started(nodes, tmp_path, server_command=command)
        host.runner.post(Adopt(ONE, layout_of("a")))
        await all_serve(host, ONE)
    assert len(tries) == 2
    assert host.announced == [host.runner.serving]


async def test_the_books_list_what_runs_and_nothing_after(nodes: list[Node], tmp_path: Path) -> None:
    host = await started(nodes, tmp_path)
    host.runner.post(Adopt(ONE, layout_of("a")))
    await all_serve(host, ONE)
    (entry,) = host.runner._registry.left_over()
    assert (entry.pid, entry.kind) == (host.runner._children[0].pid, ProcessKind.SERVER)
    assert entry.mark == process_mark(entry.pid)
    await host.runner.stop()
    assert host.runner._registry.left_over() == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
async def test_a_start_ends_what_the_last_run_left_behind(nodes: list[Node], tmp_path: Path) -> None:
    state_dir = tmp_path / "a"
    state_dir.mkdir()
    left = await asyncio.create_subprocess_exec(*stand_in("idle").argv, start_new_session=True)
    crashed = Node(state_dir)
    crashed.runner._registry.record(left.pid, ProcessKind.SERVER)
    node = Node(state_dir)
    nodes.append(node)
    assert [entry.pid for entry in await node.runner.start()] == [left.pid]
    assert await asyncio.wait_for(left.wait(), 5) == -signal.SIGKILL
