"""Whatever a client or a peer says, a worker's server refuses it or obeys, and serves the next one.

Run against the server as it is shipped, and against one built with sanitizers (workshop/checked.py). More cases than
the suite has time for:  MESH_FUZZ_CASES=20000 bin/test tests/net/test_engine_fuzz.py
A failure names its case: MESH_FUZZ_SEED and MESH_FUZZ_FIRST begin there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.engine.cache import find_engine
from mesh.engine.commands import Launch
from tests.eventually import eventually
from tests.net.engine_kit import Process, running
from tests.net.rpc_client import ALLOC_BUFFER, DEVICE_COUNT, GRAPH_COMPUTE, SET_TENSOR, Client
from tests.net.rpc_frames import F16, F32, I32, OP, Q8_0, Graph, Tensor
from tests.net.rpc_fuzz import ARENA, COPY_TENSOR, Fuzz, Session, deep_graph
from tests.net.rpc_graphs import GRAPHS
from tests.ports import free_port
from workshop.checked import find_checked

pytestmark = pytest.mark.engine

SECRET = bytes(range(1, 33))
SEED = os.environ.get("MESH_FUZZ_SEED", "1")
FIRST = int(os.environ.get("MESH_FUZZ_FIRST", "0"))
CASES = int(os.environ.get("MESH_FUZZ_CASES", "0"))
# A report of AddressSanitizer ends the process; so does one of UndefinedBehaviorSanitizer, which is built that way.
SANITIZERS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=4096:exitcode=99:quarantine_size_mb=64",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
REPORTS = ("ERROR: AddressSanitizer", "runtime error:", "ERROR: LeakSanitizer")


@dataclass
class Server:
    port: int
    process: Process

    def is_unharmed(self) -> None:
        said = self.process.text
        assert not any(report in said for report in REPORTS), said[-8000:]
        assert self.process.handle.returncode is None, said[-8000:]


@pytest.fixture(params=["shipped", "checked"])
def program(request: pytest.FixtureRequest) -> Path:
    """The server as it is shipped, and the one with sanitizers."""
    if request.param == "shipped":
        engine = find_engine()
        if engine is None:
            pytest.skip("the engine is not built: mesh engine build")
        return engine.rpc_server
    checked = find_checked()
    if checked is None:
        pytest.skip("LEFT OUT: the server with sanitizers is not built: bin/env --dev -m workshop.checked")
    return checked.rpc_server


@contextlib.asynccontextmanager
async def serving(program: Path) -> AsyncIterator[Server]:
    port = free_port()
    argv = (str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "2", "-d", "CPU")
    environment = {"MESH_RPC_SECRET": SECRET.hex(), "MESH_RPC_PUSH_WITHIN_S": "1", **SANITIZERS}
    async with running(Launch(argv, environment)) as process:
        await process.says("mesh-listening", within=20)
        yield Server(port, process)


async def test_what_the_fuzz_changes_is_right_as_it_is(program: Path) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        for name in GRAPHS:
            session.client.tell(GRAPH_COMPUTE, session.graph(name).message())
            try:
                await session.client.ask(DEVICE_COUNT, b"")
            except (asyncio.IncompleteReadError, ConnectionError):
                pytest.fail(f"refused: {name}\n{server.process.text[-3000:]}")
        server.is_unharmed()


# However malformed the frame, the server touches only what is its own, and computes for the next client.
@pytest.mark.timeout(120 + CASES // 10)
async def test_malformed_frames_do_no_harm(program: Path) -> None:
    async with serving(program) as server:
        fuzz = Fuzz(server.port, SECRET)
        here = psutil.Process(server.process.handle.pid)
        cases = CASES or (1200 if "checked" in str(program) else 2400)
        for n in range(FIRST, FIRST + cases):
            try:
                await fuzz.case(random.Random(f"{SEED}-{n}"))
                server.is_unharmed()
            except (AssertionError, OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                with contextlib.suppress(TimeoutError):
                    await server.process.ended(within=5)
                pytest.fail(f"MESH_FUZZ_SEED={SEED} MESH_FUZZ_FIRST={n}: {error!r}\n{server.process.text[-6000:]}")
        assert min(fuzz.refused, fuzz.obeyed) > cases // 10, (fuzz.refused, fuzz.obeyed)
        await fuzz.end()
        last = await Session.begin(server.port, SECRET)
        await last.end()
        await eventually(lambda: here.num_threads() <= 8 and here.num_fds() <= 16, within=15)
        server.process.handle.send_signal(signal.SIGTERM)
        assert await server.process.ended(within=10) == -signal.SIGTERM
        assert not any(report in server.process.text for report in REPORTS)


async def test_a_chain_of_a_hundred_thousand_views_does_not_exhaust_the_stack(program: Path) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        session.client.tell(GRAPH_COMPUTE, deep_graph(session, 100_000).body)
        await session.client.ask(DEVICE_COUNT, b"")
        server.is_unharmed()


def _one(session: Session, *sources: Tensor, **node: Any) -> Graph:
    """A node on its sources, each with memory of its own, however much they claim to need."""
    kinds = [*sources, Tensor(**{"ne": (8, 4, 1, 1), "src": tuple(range(1, len(sources) + 1)), **node})]
    placed = (replace(t, buffer=session.arena, data=session.arena_base + 4096 * n) for n, t in enumerate(kinds))
    return Graph(tuple(placed), (len(kinds),))


def _tensor(*ne: int, kind: int = F32, nb: tuple[int, ...] = ()) -> Tensor:
    return Tensor(kind, (*ne, *[1] * (4 - len(ne))), nb=nb)


def _without_memory(session: Session) -> Graph:
    graph = _one(session, _tensor(8, 4), op=OP["SQR"])
    return replace(graph, tensors=(replace(graph.tensors[0], buffer=0, data=0), graph.tensors[1]))


def _askew(session: Session) -> Graph:
    graph = _one(session, _tensor(8, 4), op=OP["SQR"])
    return replace(graph, tensors=(replace(graph.tensors[0], data=session.arena_base + 2), graph.tensors[1]))


def _many_elements(session: Session) -> Graph:
    wide = _tensor(32, 2**31, 2**20, nb=(4, 0, 0, 0))
    return _one(session, _tensor(32, 6, kind=F16), wide, op=OP["MUL_MAT"], ne=(6, 1, 1, 1))


def _long_rows(session: Session) -> Graph:
    return _one(session, _tensor(2**13, 8, nb=(0, 4, 4, 4)), op=OP["SQR"], ne=(2**13, 8, 1, 1), nb=(0, 4, 4, 4))


def _rotation(session: Session) -> Graph:
    sources = _tensor(16, 2, 3), _tensor(12, kind=I32)
    return _one(session, *sources, op=OP["ROPE"], ne=(16, 2, 3, 1), params=(0, 16, 8))


def _blocks_apart(session: Session) -> Graph:
    target = {"kind": Q8_0, "ne": (32, 4, 1, 1), "nb": (34000, 34, 136, 136)}
    return _one(session, _tensor(32, 4), _tensor(32, 4, kind=Q8_0), op=OP["CPY"], **target)


REFUSED: dict[str, Callable[[Session], Graph]] = {
    "an address of a function": lambda s: _one(s, _tensor(8, 4), op=OP["MAP_CUSTOM1"], params=(2**20, 0, 1)),
    "an address of a function and no source": lambda s: _one(s, op=OP["CUSTOM"], params=(2**20, 0, 1)),
    "training": lambda s: _one(s, *[_tensor(8, 4)] * 3, op=OP["OPT_STEP_SGD"]),
    "a source that is missing": lambda s: _one(s, _tensor(8, 4), op=OP["ADD"]),
    "a source without memory": _without_memory,
    "a node twice": lambda s: replace(_one(s, _tensor(8, 4), op=OP["SQR"]), nodes=(2, 2)),
    "rows longer than their memory": _long_rows,
    "more elements than can be counted": _many_elements,
    "another shape than its source": lambda s: _one(s, _tensor(8, 4), op=OP["SQR"], ne=(8, 100, 1, 1)),
    "a product of another shape": lambda s: _one(
        s, _tensor(32, 6, kind=F16), _tensor(32, 3), op=OP["MUL_MAT"], ne=(60, 30, 1, 1)
    ),
    "numbers where floats belong": lambda s: _one(s, _tensor(8, 4, kind=I32), op=OP["RMS_NORM"]),
    "a function that does not exist": lambda s: _one(s, _tensor(8, 4), op=OP["UNARY"], params=(22,)),
    "a rotation of no sections": _rotation,
    "an address between two floats": _askew,
    "rows of what has none": lambda s: _one(s, _tensor(8, 0), _tensor(3, kind=I32), op=OP["GET_ROWS"], ne=(8, 3, 1, 1)),
    "single blocks that claim to be far apart": _blocks_apart,
}


# Each of these made the server crash, or write where it should not.
@pytest.mark.parametrize("what", REFUSED)
async def test_a_graph_is_not_computed_that_has(program: Path, what: str) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        session.clear()
        session.client.tell(GRAPH_COMPUTE, REFUSED[what](session).message())
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await session.client.ask(DEVICE_COUNT, b"")
        await Session.begin(server.port, SECRET)
        server.is_unharmed()


async def _hung_up(client: Client) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(client.reader.read(1), 5) == b""
    return True


async def test_memory_for_a_message_is_not_given_on_its_senders_word(program: Path) -> None:
    async with serving(program) as server:
        for command, length in (
            (SET_TENSOR, ARENA + 10_000),
            (SET_TENSOR, 2**40),
            (SET_TENSOR, 2**62),
            (GRAPH_COMPUTE, 2**36),
        ):
            session = await Session.begin(server.port, SECRET)
            session.client.tell(command, b"", length)
            assert await _hung_up(session.client)
        server.is_unharmed()


async def test_no_buffers_are_promised_beyond_what_the_device_has(program: Path) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        total = psutil.virtual_memory().total
        assert await session.client.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, total)) == bytes(24)
        assert await session.client.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, 1 << 20)) != bytes(24)
        server.is_unharmed()


async def test_a_coding_of_no_bytes_is_no_message(program: Path) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        session.client.tell_coded(ALLOC_BUFFER, b"", 12)
        assert await _hung_up(session.client)
        server.is_unharmed()


async def test_a_copy_onto_a_part_of_itself_is_refused(program: Path) -> None:
    async with serving(program) as server:
        session = await Session.begin(server.port, SECRET)
        source = Tensor(F32, (64, 1, 1, 1), session.arena, session.arena_base)
        session.client.tell(COPY_TENSOR, source.packed() + replace(source, data=source.data + 4).packed())
        assert await _hung_up(session.client)
        await Session.begin(server.port, SECRET)
        server.is_unharmed()
