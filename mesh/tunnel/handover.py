"""Connections that the engine carries on by itself: the mesh makes them, and gives socket and keys away.

Through a pump each hop of a token takes two more processes, four more system calls and a TLS record, in Python that
the engine's weights have driven from the core's caches (docs/adr/0011-the-engines-carry-their-own-bytes.md). So a
stream over TCP whose other end agrees becomes, after its ``Opened``, the engines' own (patches/0026). What is left here
is a line to our engine for each, open as long as the connection is in use, and the right to cut it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import ssl
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from mesh.errors import TransportError
from mesh.transport.tcpstream import TcpStream

log = logging.getLogger(__name__)

KEY_BYTES = 32
KEYS_BYTES = 2 * KEY_BYTES
"""For the bytes of who opened the stream, and for those of who answered."""
YES = b"Y"
"""Before the keys, to who asked."""
_NO = b"N"
_MAX_PATH = 100
"""A Unix socket's path has 104 to 108 bytes, its end included."""


class Doors:
    """Where our engine asks for connections, and is given those of others: Unix sockets in a private directory.

    Args:
        directory: nobody else may enter it.
        libcrypto: what the engine is to encrypt with.
    """

    def __init__(self, directory: Path, libcrypto: Path) -> None:
        self._directory = directory
        self._libcrypto = libcrypto

    @property
    def of_server(self) -> Path:
        """Our rpc-server is given connections there."""
        return self._directory / "given"

    @property
    def of_host(self) -> Path:
        """Our llama-server asks for the connections to its workers there."""
        return self._directory / "host"

    @property
    def of_pushes(self) -> Path:
        """Our rpc-server asks for the connection to the next worker there."""
        return self._directory / "push"

    @property
    def env_of_llama_server(self) -> Mapping[str, str]:
        return {"MESH_LIBCRYPTO": str(self._libcrypto), "MESH_RPC_HANDOVER": str(self.of_host)}

    @property
    def env_of_rpc_server(self) -> Mapping[str, str]:
        return {
            "MESH_LIBCRYPTO": str(self._libcrypto),
            "MESH_RPC_HANDOVER": str(self.of_pushes),
            "MESH_RPC_DOOR": str(self.of_server),
        }

    def remove(self) -> None:
        """Leave nothing behind."""
        for path in (self.of_server, self.of_host, self.of_pushes):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()


def make_doors(state_dir: Path) -> Doors | None:
    """The doors of the node with this ``state_dir``; None where its engine must do with loopback ports."""
    libcrypto = _libcrypto()
    if sys.platform == "win32" or libcrypto is None:
        return None
    # By a name that comes again: a node that was killed leaves no second directory behind.
    name = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:16]
    directory = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"mesh-{os.getuid()}-{name}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        log.info("the engine's connections go through this process: %s", error)
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700
    if not private or len(os.fsencode(directory)) + len("/given") > _MAX_PATH:
        log.warning("the engine's connections go through this process: %s is not its own, or too long", directory)
        return None
    return Doors(directory, libcrypto)


def _libcrypto() -> Path | None:
    """The library that Python's ``ssl`` is linked with, and whoever looks after this machine keeps up to date.

    None where it is a part of Python, and on systems that do not say what is loaded.
    """
    if sys.platform != "linux" or not ssl.OPENSSL_VERSION.startswith("OpenSSL"):
        return None
    with contextlib.suppress(OSError), Path("/proc/self/maps").open(errors="replace") as maps:
        for line in maps:
            path = Path(line.rstrip("\n").partition("/")[2])
            if path.name.startswith("libcrypto.so"):
                return Path("/") / path
    return None


class Line:
    """To our own engine, about one connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    def to(cls, door: Path) -> Line:
        """Raises OSError: the engine has no such door, or too many wait at it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(str(door))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    async def read_exactly(self, n: int) -> bytes:
        """Raises EOFError, OSError."""
        data = b""
        while len(data) < n:
            piece = await asyncio.get_running_loop().sock_recv(self._sock, n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def give(self, said: bytes, sock: socket.socket) -> None:
        """Raises OSError: the engine is gone. So few bytes never wait."""
        socket.send_fds(self._sock, [said], [sock.fileno()])

    def refuse(self) -> None:
        """It is to use the port."""
        with contextlib.suppress(OSError):
            self._sock.send(_NO)

    async def closed(self) -> None:
        """Return once the engine uses the connection no more."""
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._sock, 64):
                pass

    def close(self) -> None:
        self._sock.close()


async def hand_over(
    line: Line,
    stream: TcpStream,
    said: bytes,
    *,
    before: Callable[[], Awaitable[None]] | None = None,
    given: Callable[[], None] = lambda: None,
) -> None:
    """Give ``stream`` to our engine, and wait until it has done with it; then everything is closed.

    Args:
        said: what the engine hears with it.
        before: says the last of our own words on the stream, of which nothing is read any more.
        given: told once the engine has it.

    Raises:
        TransportError: the stream is lost, or the other side ended it.
    """
    with contextlib.ExitStack() as ends:
        ends.callback(line.close)
        ends.callback(stream.abort)
        sock = stream.hand_over()
        ends.callback(sock.close)
        if before is not None:
            await before()
        try:
            line.give(said, sock)
        except OSError:
            return  # our engine has gone meanwhile, and whoever watches it knows
        given()
        await _done_with(line, stream, sock)


async def _done_with(line: Line, stream: TcpStream, sock: socket.socket) -> None:
    waits = [asyncio.ensure_future(line.closed()), asyncio.ensure_future(stream.lost())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[1].done():
            raise TransportError(str(waits[1].result()), code="stream-reset")
        if _has_ended(sock):
            raise TransportError("the server behind it closed the connection")
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _has_ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Giving:
    """Hears our engine ask for connections.

    Args:
        door: where it asks.
        asked: what is done about each line; the line is its to close.
    """

    def __init__(self, door: Path, asked: Callable[[Line], None]) -> None:
        self._door = door
        self._asked = asked
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Raises OSError: the door cannot be made."""
        self._door.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(str(self._door))
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._accepting = asyncio.ensure_future(self._accept(listener))

    def close(self) -> None:
        """Hear nothing more. Idempotent."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._listener.close()
            self._door.unlink(missing_ok=True)
        self._accepting = self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                self._asked(Line(sock))
