"""A UDP socket in an event loop: many datagrams per wake-up, and errors that concern one datagram only."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from mesh.errors import TransportError

Addr = tuple[Any, ...]
"""As the socket module has it: ``(host, port)``, or ``(host, port, flow, scope)``."""
Datagram = tuple[bytes, Addr]
Receiver = Callable[["UdpSocket", list[Datagram]], None]

_DO_NOT_FRAGMENT = {
    ("linux", socket.AF_INET): (socket.IPPROTO_IP, 10, 3),  # IP_MTU_DISCOVER: IP_PMTUDISC_PROBE
    ("linux", socket.AF_INET6): (socket.IPPROTO_IPV6, 23, 3),
    ("darwin", socket.AF_INET): (socket.IPPROTO_IP, 28, 1),  # IP_DONTFRAG
    ("darwin", socket.AF_INET6): (socket.IPPROTO_IPV6, 62, 1),
    ("win32", socket.AF_INET): (socket.IPPROTO_IP, 14, 1),  # IP_DONTFRAGMENT
    ("win32", socket.AF_INET6): (socket.IPPROTO_IPV6, 14, 1),
}
"""Socket options that Python has no names for everywhere. A datagram too long for its path is lost, and so noticed."""
_SEGMENT = (17, 103)
"""Linux: SOL_UDP, UDP_SEGMENT. One call, and one way through the kernel, for datagrams of one length to one address."""
_MOST_SEGMENTS = 64
_MOST_SEGMENT_BYTES = 60_000
_BUFFER = 8 * 1024 * 1024
_BATCH = 64
_RUSH = 6
_RUSH_S = 0.002
_PAUSE_S = 0.002
"""When so many datagrams came in so short a time, more are coming: they are fetched together, every two milliseconds.
To be woken for each of them costs as much again as to take them in, of the processor that an engine computes with."""
_MAX_QUEUED = 4096


def bind(host: str, port: int) -> socket.socket:
    """A non-blocking UDP socket on a literal address.

    Raises:
        TransportError: the port is taken (code ``port-in-use``), or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        raise TransportError(f"this machine has no {family.name}: {error}", code="no-address") from error
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        with contextlib.suppress(OSError, KeyError):
            sock.setsockopt(*_DO_NOT_FRAGMENT[sys.platform, family])
        sock.setblocking(False)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise TransportError(
                f"UDP port {port} on {host} is taken by another program, or may not be used",
                remedy="stop that program, or choose another port:  --bind-port N",
                code="port-in-use",
            ) from error
        raise TransportError(
            f"cannot listen on {host}, UDP port {port}: {error.strerror or error}",
            remedy="--bind-host takes an address of this machine",
            code="no-address",
        ) from error
    return sock


class UdpSocket:
    """Reads in batches, writes at once and queues a little when the kernel's buffer is full."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self.family = sock.family
        self.address: Addr = sock.getsockname()
        self._sock = sock
        self._receiver = receiver
        self._queue: deque[Datagram] = deque()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.DatagramTransport | None = None
        self._closed = False
        self._segments = sys.platform == "linux"
        self._rush_began = 0.0
        self._in_rush = 0
        self._paused: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Begin to read."""
        try:
            self._loop.add_reader(self._sock.fileno(), self._readable)
        except NotImplementedError:  # the Windows proactor loop
            self._transport, _ = await self._loop.create_datagram_endpoint(
                lambda: _Protocol(self, self._receiver), sock=self._sock
            )

    def send(self, datagrams: Iterable[Datagram]) -> None:
        """Send each, in order. What cannot be sent is lost, as datagrams may be."""
        if self._closed:
            return
        if self._transport is not None:
            for data, addr in datagrams:
                self._transport.sendto(data, addr)
            return
        if self._queue:
            self._queue.extend(datagrams)
            while len(self._queue) > _MAX_QUEUED:
                self._queue.pop()
            return
        all_of_them = list(datagrams)
        sent = 0
        while sent < len(all_of_them):
            try:
                sent += self._send_some(all_of_them, sent)
            except (BlockingIOError, InterruptedError):
                self._queue.extend(all_of_them[sent:])
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return

    def _send_some(self, datagrams: list[Datagram], start: int) -> int:
        """Send what can go at once, from ``start``; returns how many that were.

        Raises BlockingIOError, InterruptedError: nothing was sent.
        """
        count = alike(datagrams, start) if self._segments else 1
        if count > 1:
            parts, addr = [data for data, _ in datagrams[start : start + count]], datagrams[start][1]
            try:
                self._sock.sendmsg(parts, [(*_SEGMENT, struct.pack("=H", len(parts[0])))], 0, addr)
                return count
            except (BlockingIOError, InterruptedError):
                raise
            except OSError as error:
                # One by one, then: some may be short enough. A kernel or a device that cannot is not asked again.
                self._segments = error.errno not in (errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
        for data, addr in datagrams[start : start + count]:
            try:
                self._sock.sendto(data, addr)
            except (BlockingIOError, InterruptedError):
                if count == 1:
                    raise
            except OSError:
                pass  # no route, refused by a firewall, too long for this path: QUIC takes it for loss, and so do we
        return count

    def close(self) -> None:
        """Free the port."""
        if self._closed:
            return
        self._closed = True
        if self._transport is not None:
            self._transport.close()
            return
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()

    def _readable(self) -> None:
        batch: list[Datagram] = []
        recvfrom = self._sock.recvfrom
        try:
            while len(batch) < _BATCH:
                batch.append(recvfrom(65535))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            pass  # an ICMP error of an earlier send; it says nothing about the next datagram
        if batch:
            self._receiver(self, batch)
            if len(batch) < _BATCH and self._is_rush(len(batch)) and not self._closed:
                self._loop.remove_reader(self._sock.fileno())
                self._paused = self._loop.call_later(_PAUSE_S, self._go_on)

    def _is_rush(self, came: int) -> bool:
        now = self._loop.time()
        if now - self._rush_began > _RUSH_S:
            self._rush_began, self._in_rush = now, 0
        self._in_rush += came
        return self._in_rush >= _RUSH

    def _go_on(self) -> None:
        self._paused = None
        self._loop.add_reader(self._sock.fileno(), self._readable)
        self._readable()

    def _writable(self) -> None:
        while self._queue:
            data, addr = self._queue[0]
            try:
                self._sock.sendto(data, addr)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                pass
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())


def alike(datagrams: list[Datagram], start: int) -> int:
    """How many from ``start`` can go in one call: to one address, of one length, the last of them perhaps shorter."""
    data, addr = datagrams[start]
    size = total = len(data)
    end = start + 1
    for data, to in datagrams[end : start + _MOST_SEGMENTS]:
        total += len(data)
        if to != addr or len(data) > size or total > _MOST_SEGMENT_BYTES:
            break
        end += 1
        if len(data) < size:
            break
    return end - start


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, owner: UdpSocket, receiver: Receiver) -> None:
        self._owner = owner
        self._receiver = receiver

    def datagram_received(self, data: bytes, addr: Addr) -> None:
        self._receiver(self._owner, [(data, addr)])
