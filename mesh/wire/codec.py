"""Structs to bytes and back, with a bound on everything.

Frame: 4-byte big-endian length, then msgpack. The length is checked before a byte of the body is awaited.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import msgspec

from mesh.errors import WireError
from mesh.wire.messages import Control, Open, OpenReply

MAX_FRAME = 1 << 20
"""Bytes. A Hello of a 64-node mesh with 16 models each stays under a quarter of it."""
MAX_OPEN_FRAME = 4096
"""Bytes. The first frame of a stream comes from a peer nothing is known about yet."""

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
control_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
open_decoder: msgspec.msgpack.Decoder[Open] = msgspec.msgpack.Decoder(Open)
open_reply_decoder: msgspec.msgpack.Decoder[OpenReply] = msgspec.msgpack.Decoder(OpenReply)


class Reader(Protocol):
    async def read_exactly(self, n: int) -> bytes: ...


def encode(message: Any) -> bytes:
    """Frame one struct.

    Raises:
        WireError: the message is larger than :data:`MAX_FRAME`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise WireError(f"a {type(message).__name__} message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return len(body).to_bytes(4, "big") + body


def decode(decoder: msgspec.msgpack.Decoder[T], body: bytes | memoryview) -> T:
    """Read one struct from a frame's body.

    Raises:
        WireError: the bytes are not a message that ``decoder`` knows.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, ValueError) as error:
        raise WireError(f"a peer sent a malformed message: {error}") from error


async def read_frame(reader: Reader, decoder: msgspec.msgpack.Decoder[T], limit: int = MAX_FRAME) -> T:
    """Await one frame.

    Raises:
        WireError: longer than ``limit``, or malformed.
        EOFError: the stream ended between two frames or inside one.
    """
    length = int.from_bytes(await reader.read_exactly(4), "big")
    if length > limit:
        raise WireError(f"a peer announced a frame of {length} bytes; the limit is {limit}")
    return decode(decoder, await reader.read_exactly(length))
