"""The engine's RPC as a client speaks it: a command byte, a length, a body; answers are a length and a body.

A length whose highest bit is set means that the body comes coded, after the length it has when it is decoded.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

CODED = 1 << 63
ALLOC_BUFFER, SET_TENSOR, GET_TENSOR, GRAPH_COMPUTE, HELLO, DEVICE_COUNT, GRAPH_RECOMPUTE = 0, 6, 8, 10, 14, 15, 16
HELLO_ANSWER = 28 + 4 + 16 * 33


def number(value: int) -> bytes:
    """Little-endian, seven bits a byte."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def sequence(literals: bytes, match: int = 0, distance: int = 0) -> bytes:
    """One step of a coding: literals, then ``match`` bytes from ``distance`` back; no match ends the message."""
    rest = match - 4 if match else 0
    out = bytes([min(len(literals), 15) << 4 | min(rest, 15)])
    out += number(len(literals) - 15) if len(literals) >= 15 else b""
    out += literals
    if match:
        out += (number(rest - 15) if rest >= 15 else b"") + number(distance)
    return out


def decode(coded: bytes, size: int) -> bytes:
    """The message that was coded."""
    out = bytearray()
    at = 0

    def more(n: int) -> int:
        nonlocal at
        shift = 0
        while n >= 15:
            byte = coded[at]
            at += 1
            n += (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return n

    def read_number() -> int:
        return more(15) - 15

    while True:
        lengths = coded[at]
        at += 1
        n = more(lengths >> 4)
        out += coded[at : at + n]
        at += n
        if len(out) == size:
            assert at == len(coded)
            return bytes(out)
        match = more(lengths & 15) + 4
        distance = read_number()
        for _ in range(match):
            out.append(out[-distance])


@dataclass
class Client:
    """One connection to a worker's server, past the secret."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def tell(self, command: int, body: bytes, length: int | None = None) -> None:
        self.writer.write(struct.pack("<BQ", command, len(body) if length is None else length) + body)

    def tell_coded(self, command: int, coded: bytes, size: int) -> None:
        self.writer.write(struct.pack("<BQQ", command, len(coded) | CODED, size) + coded)

    async def ask(self, command: int, body: bytes) -> bytes:
        self.tell(command, body)
        return await asyncio.wait_for(self.answer(), 10)

    async def answer(self) -> bytes:
        (length,) = struct.unpack("<Q", await self.reader.readexactly(8))
        if not length & CODED:
            return await self.reader.readexactly(length)
        (size,) = struct.unpack("<Q", await self.reader.readexactly(8))
        return decode(await self.reader.readexactly(length ^ CODED), size)

    async def buffer(self, size: int) -> tuple[int, int]:
        """A remote buffer: its handle and where it begins."""
        handle, _, base = struct.unpack("<QQQ", await self.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, size)))
        return handle, base
