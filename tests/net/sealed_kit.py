"""The engine's end of a connection that was handed over (patches/0026), by another library than the engine's."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.tunnel.handover import KEY_BYTES, KEYS_BYTES
from tests.net.rpc_client import CODED, decode

MOST = 64 * 1024


def record(key: bytes, number: int, plain: bytes, length: int | None = None) -> bytes:
    """``plain`` as the ``number``th record under ``key``, or one that says another ``length``."""
    head = struct.pack("<I", len(plain) if length is None else length)
    return head + AESGCM(key).encrypt(struct.pack("<IQ", 0, number), plain, head)


class Sealed:
    """One end. ``line``: to the mesh that gave it."""

    def __init__(self, sock: socket.socket, keys: bytes, line: socket.socket | None = None) -> None:
        sock.setblocking(False)
        self.sock, self.line = sock, line
        self.send_key, self._receive_key = keys[:KEY_BYTES], keys[KEY_BYTES:KEYS_BYTES]
        self._sent = self._received = 0
        self._raw = self._plain = b""

    async def write_raw(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), MOST):
            piece = record(self.send_key, self._sent, data[start : start + MOST])
            self._sent += 1
            await self.write_raw(piece)

    async def _more(self) -> bool:
        piece = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 18)
        self._raw += piece
        return bool(piece)

    async def read_exactly(self, n: int) -> bytes:
        """Raises EOFError, and InvalidTag."""
        while len(self._plain) < n:
            while len(self._raw) < 4 or len(self._raw) < 20 + struct.unpack_from("<I", self._raw)[0]:
                if not await self._more():
                    raise EOFError
            size = struct.unpack_from("<I", self._raw)[0]
            sealed, self._raw = self._raw[4 : 20 + size], self._raw[20 + size :]
            nonce = struct.pack("<IQ", 0, self._received)
            self._plain += AESGCM(self._receive_key).decrypt(nonce, sealed, struct.pack("<I", size))
            self._received += 1
        data, self._plain = self._plain[:n], self._plain[n:]
        return data

    async def ended(self, within: float = 5) -> bool:
        """The other side has ended it, and said nothing more."""
        try:
            async with asyncio.timeout(within):
                return not await self._more()
        except ConnectionError:
            return True

    async def ask(self, command: int, body: bytes) -> bytes:
        """One command of the engine's RPC."""
        await self.write(struct.pack("<BQ", command, len(body)) + body)
        (size,) = struct.unpack("<Q", await self.read_exactly(8))
        if not size & CODED:
            return await self.read_exactly(size)
        (plain,) = struct.unpack("<Q", await self.read_exactly(8))
        return decode(await self.read_exactly(size & ~CODED), plain)

    def close(self) -> None:
        """As a process that ends."""
        self.sock.close()
        if self.line is not None:
            self.line.close()


async def received(line: socket.socket, said: int) -> tuple[bytes, socket.socket]:
    """``said`` bytes and the socket that came with them."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(line, said, 1)
        except BlockingIOError:
            await asyncio.sleep(0.001)
            continue
        while len(data) < said and (piece := await loop.sock_recv(line, said - len(data))):
            data += piece
        if not descriptors:
            raise EOFError(data)
        return data, socket.socket(fileno=descriptors[0])


async def ask_for(door: Path, secret: bytes, port: int) -> Sealed | None:
    """What a client's engine does; None: it is to use the port.

    Raises:
        EOFError: whoever has this secret gets nothing.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, str(door))
    line.send(secret + struct.pack("<H", port))
    try:
        data, sock = await received(line, 1 + KEYS_BYTES)
    except EOFError as error:
        line.close()
        if error.args[0] == b"N":
            return None
        raise
    return Sealed(sock, data[1:], line)


class Server:
    """What a worker's engine does at its door."""

    def __init__(self, door: Path) -> None:
        door.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(door))
        self._listener.listen()

    async def given(self, secret: bytes) -> Sealed:
        """The next connection."""
        line, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        line.setblocking(False)
        data, sock = await received(line, len(secret) + KEYS_BYTES)
        assert data[: len(secret)] == secret
        return Sealed(sock, data[len(secret) :], line)

    def close(self) -> None:
        self._listener.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def give(door: Path, secret: bytes, keys: bytes, sock: socket.socket) -> socket.socket:
    """What the mesh does at an engine's door; the line."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(str(door))
    socket.send_fds(line, [secret + keys], [sock.fileno()])
    line.setblocking(False)
    return line
