"""Activations in half precision on the wire: half the bytes, rounded once per hop, never beyond what halves hold."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mesh.engine.cache import Engine
from tests.net.push_kit import PUSH_EXPECT, Memory, rpc_server, tensor
from tests.net.rpc_client import GET_TENSOR, SET_TENSOR
from tests.net.test_engine_wire import noise, ring, text, tiny

__all__ = ["noise", "tiny"]
NEW = 12
pytestmark = pytest.mark.engine

HALVES = 2
"""In place of a cache flag: what follows are halves."""
EDGES = [0.0, -0.0, 1.0, -2.5, 1 / 3, 65504.0, 65520.0, -1e30, 1e-8, 6.1e-5, float("inf"), float("nan")]


def held(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """What is left of single precision: rounded to the nearest half, and at most the largest."""
    halves: npt.NDArray[np.float16] = np.clip(values, -65504, 65504).astype("<f2")
    return halves


async def test_halves_arrive_as_the_floats_they_are_and_leave_as_the_nearest(engine: Engine, tiny: Path) -> None:
    values = np.array([*EDGES, *np.random.default_rng(1).normal(size=500)], "<f4")
    async with rpc_server(engine, tiny) as server:
        memory = await Memory.of(await server.client(NEW), 8192)
        place = tensor(memory.handle, memory.base, values.nbytes)
        memory.client.tell(SET_TENSOR, place + struct.pack("<BQ", 0, 0) + values.tobytes())
        body = place + struct.pack("<QQB", 0, values.nbytes, 1)
        halves = np.frombuffer(await memory.client.ask(GET_TENSOR, body), "<f2")
        np.testing.assert_array_equal(halves, held(values))
        memory.client.tell(SET_TENSOR, place + struct.pack("<BQ", HALVES, 0) + halves.tobytes())
        np.testing.assert_array_equal(np.frombuffer(await memory.read(values.nbytes), "<f4"), halves.astype("<f4"))


async def test_a_push_of_halves_waits_for_half_as_many_bytes(engine: Engine, tiny: Path) -> None:
    values = np.random.default_rng(2).normal(size=256).astype("<f2")
    async with rpc_server(engine, tiny) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        memory.client.tell(PUSH_EXPECT, memory.request(0, 1024, half=1))
        peer.push(0, values.tobytes())
        assert await memory.read(1024) == values.astype("<f4").tobytes()


# The demo model's activations are whole numbers, which halves hold: its text stays. The noise model's do not compress.
async def test_a_ring_in_halves_says_the_same_for_half_the_bytes(engine: Engine, tiny: Path, noise: Path) -> None:
    said, sent = [], []
    for wire_dtype in ("f32", "f16"):
        async with ring(engine, tiny, [2, 1, 1], wire_dtype=wire_dtype) as server:
            said.append(await server.say(text(300), 16))
        async with ring(engine, noise, [2, 2], wire_dtype=wire_dtype) as server:
            await server.say(text(9), 2)
            up, down, _ = (await server.cost(text(300, 4), 2))[0]
            sent.append((up, down))
    assert said[0] == said[1]
    assert sent[1][0] < 0.6 * sent[0][0]
    assert sent[1][1] < 0.6 * sent[0][1]
