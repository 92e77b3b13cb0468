"""Tokens of a ring leave while the host has nothing to compute, not when the step is over."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mesh.engine.cache import Engine
from tests.net.engine_kit import serving, write_model
from tests.net.push_kit import push_ring

pytestmark = pytest.mark.engine
ONE_WAY_S = 0.15


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_model(tmp_path_factory.mktemp("models") / "m.gguf", engine, layers=4)
    return path


async def arrivals(port: int, prompt: str, words: int) -> list[float]:
    """When each part of a stream came, in seconds since it was asked for."""
    body = json.dumps({"prompt": prompt, "n_predict": words, "temperature": 0, "stream": True, "ignore_eos": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    began = time.monotonic()
    writer.write(f"{head}{body}".encode())
    came: list[float] = []
    async for line in reader:
        if line.startswith(b"data: "):
            came.append(time.monotonic() - began)
            if json.loads(line[6:])["stop"]:
                break
    writer.close()
    return came


@pytest.mark.parametrize("counts", [(2, 2), (0, 4), (2, 1, 1)])
async def test_a_token_leaves_while_the_next_one_is_waited_for(
    engine: Engine, model: Path, counts: tuple[int, ...]
) -> None:
    async with push_ring(engine, model, counts) as ring:
        await serving(ring.host, ring.port)
        await arrivals(ring.port, "once", 4)
        ring.links[-1].delay_s = ONE_WAY_S
        came = await arrivals(ring.port, "once upon", 6)
    gaps = [after - before for before, after in pairwise(came[:6])]
    # The first is sent at once. Were the second held back until its successor is there, two trips would lie between.
    assert all(2 * ONE_WAY_S <= gap < 3 * ONE_WAY_S for gap in gaps), gaps
