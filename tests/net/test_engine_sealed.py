"""A worker's real server at its door: what it is given, what it does with bytes that are not its peer's, and a ring."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.engine.cache import Engine
from mesh.engine.commands import rpc_server_command
from mesh.tunnel.handover import KEY_BYTES, Doors, make_doors
from tests.eventually import eventually
from tests.net.engine_kit import Process, running, write_model
from tests.net.rpc_client import DEVICE_COUNT, HELLO, HELLO_ANSWER
from tests.net.sealed_kit import MOST, Sealed, give, record, tcp_pair
from tests.ports import free_port

pytestmark = pytest.mark.engine

SECRET = os.urandom(32)
QUESTION = struct.pack("<BQ", DEVICE_COUNT, 0)
ONE_DEVICE = struct.pack("<I", 1)


@dataclass
class Worker:
    doors: Doors
    process: Process

    def connect(self, secret: bytes = SECRET) -> Sealed:
        """Our end of a connection that the server has been given the other end of."""
        ours, theirs = tcp_pair()
        keys = os.urandom(2 * KEY_BYTES)
        line = give(self.doors.of_server, secret, keys[KEY_BYTES:] + keys[:KEY_BYTES], theirs)
        theirs.close()
        return Sealed(ours, keys, line)

    async def admitted(self) -> Sealed:
        client = self.connect()
        assert len(await client.ask(HELLO, bytes(24))) == HELLO_ANSWER
        return client


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", engine, layers=3)[0]


@pytest.fixture
async def worker(engine: Engine, model: Path, tmp_path: Path) -> AsyncIterator[Worker]:
    doors = make_doors(tmp_path)
    assert doors is not None
    launch = rpc_server_command(
        engine,
        free_port(),
        threads=1,
        model_files=[model],
        fingerprint="f" * 64,
        rpc_secret=SECRET,
        handover=doors.env_of_rpc_server,
    )
    try:
        async with running(launch) as process:
            await process.says("mesh-listening")
            yield Worker(doors, process)
    finally:
        doors.remove()


async def test_it_is_a_client_like_any_other(worker: Worker) -> None:
    client = await worker.admitted()
    assert await client.ask(DEVICE_COUNT, b"") == ONE_DEVICE
    for piece in (QUESTION[:1], QUESTION[1:5], QUESTION[5:]):  # records are no messages
        await client.write(piece)
    assert await client.read_exactly(12) == struct.pack("<Q", 4) + ONE_DEVICE


async def test_a_new_client_displaces_it_and_its_line_ends(worker: Worker) -> None:
    first = await worker.admitted()
    second = await worker.admitted()
    assert await first.ended()
    assert first.line is not None
    await eventually(lambda: is_closed(first.line))  # type: ignore[arg-type]
    assert await second.ask(DEVICE_COUNT, b"") == ONE_DEVICE


def is_closed(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False


def flipped(key: bytes, n: int) -> bytes:
    data = bytearray(record(key, n, QUESTION))
    data[6] ^= 1
    return bytes(data)


HOSTILE: dict[str, Callable[[bytes, int], bytes]] = {
    "a flipped bit": flipped,
    "a tag that is not": lambda key, n: record(key, n, QUESTION)[:-1] + b"\0",
    "another key": lambda key, n: record(os.urandom(32), n, QUESTION),
    "the record before, again": lambda key, n: record(key, n - 1, QUESTION),
    "a record left out": lambda key, n: record(key, n + 1, QUESTION),
    "no bytes at all": lambda key, n: record(key, n, b""),
    "a length that is a lie": lambda key, n: record(key, n, QUESTION, len(QUESTION) - 1) + bytes(40),
    "more than a record holds": lambda key, n: record(key, n, bytes(MOST + 1)),
    "a length without end": lambda key, n: struct.pack("<I", 2**32 - 1) + bytes(1 << 16),
    "no encryption": lambda key, n: QUESTION + bytes(64),
}


@pytest.mark.parametrize("bytes_of", HOSTILE.values(), ids=HOSTILE.keys())
async def test_what_is_not_the_peers_ends_the_connection_and_nothing_else(
    worker: Worker, bytes_of: Callable[[bytes, int], bytes]
) -> None:
    client = await worker.admitted()
    sent = client._sent
    with contextlib.suppress(ConnectionError):
        await client.write_raw(bytes_of(client.send_key, sent))
    assert await client.ended()
    assert await (await worker.admitted()).ask(DEVICE_COUNT, b"") == ONE_DEVICE


async def test_the_other_direction_has_another_key(worker: Worker) -> None:
    client = await worker.admitted()
    await client.write_raw(record(client._receive_key, client._sent, QUESTION))
    assert await client.ended()


async def test_without_the_secret_nothing_is_taken(worker: Worker) -> None:
    stranger = worker.connect(bytes(32))
    await stranger.write(struct.pack("<BQ", HELLO, 24) + bytes(24))
    assert await stranger.ended()
    await worker.admitted()


async def test_who_knocks_and_gives_nothing_is_let_go(worker: Worker) -> None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(str(worker.doors.of_server))
    line.send(SECRET + bytes(2 * KEY_BYTES))  # but no descriptor
    line.setblocking(False)
    await eventually(lambda: is_closed(line))
    await worker.admitted()


async def test_a_peer_that_ends_inside_a_record_is_gone(worker: Worker) -> None:
    client = await worker.admitted()
    await client.write_raw(record(client.send_key, client._sent, QUESTION)[:9])
    client.close()
    await worker.admitted()
