"""What each lane costs between two processes of this machine: time to open a stream, echo of 8 KB, throughput.

    bin/bench lanes
    bin/bench lanes --loop asyncio uvloop      (after: .venv/bin/pip install uvloop)

The TLS, QUIC and Python of both ends and nothing else: no engine, no tunnel, no network. Lanes take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mesh.clock import SystemClock
from mesh.errors import MeshError
from mesh.identity.key import NodeKey
from mesh.transport.address import split_address
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Stream
from mesh.transport.tcp import TICKET_BYTES, TcpLane
from mesh.wire.facts import NodeId

ECHO_BYTES = 8192
CHUNK = 1 << 18
ECHO, SINK = b"e", b"s"
KEY = NodeKey.from_seed(hashlib.sha256(b"the listener of a measurement").digest())
LOOPS = ("asyncio", "uvloop")
T = TypeVar("T")
Opener = Callable[[bytes], Awaitable[Stream]]


@dataclass(frozen=True, slots=True)
class Lane:
    """Medians of one lane: milliseconds, and 10^6 bytes per second."""

    name: str
    open_ms: float
    echo_ms: float
    echo_p95_ms: float
    cpu_ms: float
    """Of the asking process alone, for one echo; what it costs whatever else the machine does."""
    throughput: float


async def measure(name: str, opener: Opener, trips: int, megabytes: int) -> Lane:
    """Open, echo, and send ``megabytes`` one way."""
    opens, echoes = [], []
    for _ in range(10):
        began = time.perf_counter()
        stream = await opener(ECHO)
        await stream.write(b"!")
        await stream.read_exactly(1)
        opens.append(time.perf_counter() - began)
        stream.abort()
    stream = await opener(ECHO)
    busy = time.process_time()
    for _ in range(trips):
        began = time.perf_counter()
        await stream.write(bytes(ECHO_BYTES))
        await stream.read_exactly(ECHO_BYTES)
        echoes.append(time.perf_counter() - began)
    busy = time.process_time() - busy
    stream.abort()
    stream = await opener(SINK)
    began = time.perf_counter()
    for _ in range(megabytes * 4):
        await stream.write(bytes(250_000))
    await stream.write_eof()
    await stream.read_exactly(1)
    took = time.perf_counter() - began
    echoes.sort()
    return Lane(
        name,
        1e3 * statistics.median(opens),
        1e3 * statistics.median(echoes),
        1e3 * echoes[int(0.95 * trips)],
        1e3 * busy / trips,
        megabytes / took,
    )


async def serve(stream: Stream) -> None:
    """Echo, or swallow and say so at the end."""
    try:
        kind = await stream.read_exactly(1)
        while data := await stream.read(CHUNK):
            if kind == ECHO:
                await stream.write(data)
        await stream.write(b".")
        await stream.write_eof()
    except (MeshError, EOFError):
        stream.abort()


async def listen() -> None:
    """The other process: both lanes, until its standard input ends."""
    tasks: set[asyncio.Task[None]] = set()

    def opened(stream: Stream) -> None:
        tasks.add(asyncio.ensure_future(serve(stream)))

    def connected(connection: PeerConnection) -> None:
        connection.widen()
        connection.on_stream = opened

    async def anybody(ticket: bytes) -> NodeId | None:
        return KEY.id

    endpoint, tcp = Endpoint(KEY, SystemClock(), on_connection=connected), TcpLane(KEY)
    [address] = await endpoint.start([("127.0.0.1", 0)])
    tcp.recognise, tcp.on_stream = anybody, lambda peer, stream: opened(stream)
    await tcp.start([split_address(address)])
    print(address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await tcp.close()
    await endpoint.close()


async def dial(address: str, options: argparse.Namespace) -> list[Lane]:
    key = NodeKey.generate()
    endpoint, tcp = Endpoint(key, SystemClock(), on_connection=lambda connection: None), TcpLane(key)
    await endpoint.start([("127.0.0.1", 0)])
    connection = await endpoint.dial(address, expect=KEY.id)
    connection.widen()

    async def over_quic(opening: bytes) -> Stream:
        stream = await connection.open_stream()
        await stream.write(opening)
        return stream

    async def over_tcp(opening: bytes) -> Stream:
        return await tcp.dial(address, expect=KEY.id, ticket=bytes(TICKET_BYTES), opening=opening, timeout=5)

    try:
        return [
            await measure("quic", over_quic, options.trips, 20),
            await measure("tcp", over_tcp, options.trips, 200),
        ]
    finally:
        await tcp.close()
        await endpoint.close()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bin/bench lanes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--trips", type=int, default=500, metavar="N", help="echoes per round")
    parser.add_argument(
        "--loop", nargs="+", default=["asyncio"], choices=LOOPS, help="event loops, in turns; uvloop must be installed"
    )
    parser.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.listen:
        run(listen(), options.loop[0])
        return 0
    found = {loop: list[Lane]() for loop in options.loop}
    for _ in range(options.rounds):
        for loop, lanes in found.items():
            argv = [sys.executable, "-m", "bench.lanes", "--listen", "--loop", loop]
            with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
                assert other.stdout is not None
                lanes += run(dial(other.stdout.readline().strip(), options), loop)
    print("| loop | lane | open and one trip ms | 8 KB echo ms | p95 | CPU ms | MB/s |\n|---|---|---|---|---|---|---|")
    for loop, name in itertools.product(found, ("quic", "tcp")):
        lanes = [lane for lane in found[loop] if lane.name == name]
        row = [
            statistics.median(getattr(lane, what) for lane in lanes)
            for what in ("open_ms", "echo_ms", "echo_p95_ms", "cpu_ms", "throughput")
        ]
        print(f"| {loop} | {name} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:.2f} | {row[4]:.0f} |")
    return 0


def run(work: Coroutine[Any, Any, T], loop: str) -> T:
    """``asyncio.run`` on the event loop of that name."""
    factory = importlib.import_module(loop).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
