"""A STUN client (RFC 8489): what address do servers out there see us come from? Pure.

The codec is ours because the one at hand (aioice's) takes answers without the magic cookie, lets ``struct.error`` out
when an attribute has the wrong length, and brings a DNS library along; a Binding request is 20 bytes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

COOKIE = b"\x21\x12\xa4\x42"
MAX_ANSWER = 1280
"""Bytes; what is longer came in fragments, and no Binding answer does."""
SENDS = 3
"""Of each request, before the server counts as silent."""
FIRST_WAIT_S = 0.5
"""For an answer; then twice as long each time (RFC 8489, section 6.2.1)."""
MAX_SERVERS = 8
_REQUEST = b"\x00\x01"
_SUCCESS = b"\x01\x01"
_XOR_MAPPED = 0x0020
_FAMILY_BYTES = {1: 4, 2: 16}

Target = tuple[str, int]
"""A literal IP address and a port."""


def encode_request(transaction: bytes) -> bytes:
    """A Binding request without attributes; ``transaction`` is 12 bytes."""
    return _REQUEST + b"\0\0" + COOKIE + transaction


def decode_answer(data: bytes) -> tuple[bytes, Target] | None:
    """Transaction and mapped address of a Binding success; None for everything else, however it is broken."""
    if not 20 <= len(data) <= MAX_ANSWER or data[:2] != _SUCCESS or data[4:8] != COOKIE:
        return None
    end = 20 + int.from_bytes(data[2:4], "big")
    if end != len(data):
        return None
    at = 20
    while at + 4 <= end:
        kind = int.from_bytes(data[at : at + 2], "big")
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        value = data[at + 4 : at + 4 + length]
        if len(value) != length:
            return None
        if kind == _XOR_MAPPED:
            mapped = _mapped(value, COOKIE + data[8:20])
            return None if mapped is None else (data[8:20], mapped)
        at += 4 + length + -length % 4
    return None


def _mapped(value: bytes, mask: bytes) -> Target | None:
    if len(value) < 4 or len(value) != 4 + _FAMILY_BYTES.get(value[1], -1):
        return None
    port = int.from_bytes(value[2:4], "big") ^ int.from_bytes(mask[:2], "big")
    host = bytes(a ^ b for a, b in zip(value[4:], mask, strict=False))
    return (str(ipaddress.ip_address(host)), port) if port else None


# -- events and effects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """Ask these servers, each by one of its addresses. A round under way ends without a result."""

    servers: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """A datagram that may be STUN came from ``source``; anybody may have sent it."""

    data: bytes
    source: Target


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_timer`` named has come."""


Event = Look | Received | Tick


@dataclass(frozen=True, slots=True)
class Query:
    """Send ``data`` to ``target`` from the socket whose address is asked for."""

    data: bytes
    target: Target


@dataclass(frozen=True, slots=True)
class Answered:
    """``server`` says that we come from ``address``. Its word alone: it may lie."""

    server: Target
    address: Target


@dataclass(frozen=True, slots=True)
class Silent:
    """These servers did not answer: the round is over."""

    servers: tuple[Target, ...]


Effect = Query | Answered | Silent


@dataclass(slots=True)
class _Request:
    server: Target
    transaction: bytes
    sent: int
    due: float


class StunClient:
    """Asks several servers at a time.

    Args:
        randomness: unguessable bytes; an answer counts only with the transaction of a request to the same server.
    """

    def __init__(self, randomness: Callable[[int], bytes]) -> None:
        self._randomness = randomness
        self._open: dict[bytes, _Request] = {}
        self._silent: list[Target] = []

    def next_timer(self) -> float | None:
        """When to send :class:`Tick` at the latest; None while nothing is asked."""
        return min((request.due for request in self._open.values()), default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event in; effects are to be carried out in order."""
        match event:
            case Look(servers):
                return self._look(dict.fromkeys(servers), now)
            case Received(data, source):
                return self._received(data, source)
            case Tick():
                return self._tick(now)

    def _look(self, servers: Iterable[Target], now: float) -> list[Effect]:
        self._open.clear()
        self._silent.clear()
        for server in list(servers)[:MAX_SERVERS]:
            transaction = self._randomness(12)
            self._open[transaction] = _Request(server, transaction, 0, now)
        return self._tick(now)

    def _received(self, data: bytes, source: Target) -> list[Effect]:
        answer = decode_answer(data)
        if answer is None:
            return []
        transaction, address = answer
        request = self._open.get(transaction)
        if request is None or request.server != source:
            return []
        del self._open[transaction]
        return [Answered(source, address), *self._over()]

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request in list(self._open.values()):
            if request.due > now:
                continue
            if request.sent >= SENDS:
                del self._open[request.transaction]
                self._silent.append(request.server)
                continue
            effects.append(Query(encode_request(request.transaction), request.server))
            request.due = now + FIRST_WAIT_S * 2**request.sent
            request.sent += 1
        return [*effects, *self._over()]

    def _over(self) -> Sequence[Effect]:
        if self._open or not self._silent:
            return ()
        silent, self._silent = tuple(self._silent), []
        return (Silent(silent),)
