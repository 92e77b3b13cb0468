"""Real engine processes, small models and counting relays for the tests of the engine room."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mesh.engine.cache import Engine
from mesh.engine.commands import Launch
from mesh.supervise.launch import child_environment
from tests.eventually import eventually
from tests.ports import free_port

CONTEXT = 512


def write_model(
    path: Path,
    engine: Engine,
    *,
    seed: int = 1,
    layers: int = 6,
    width: int = 128,
    tensors_per_shard: int = 0,
    dtype: type = np.float16,
    change: str = "",
    context: int = CONTEXT,
    q8: bool = False,
    template: str = "",
) -> list[Path]:
    """A llama with random weights and a real vocabulary; the files it was written to, shards in order.

    Args:
        change: names one tensor that is drawn from another seed than the rest.
        q8: matrices as Q8_0. Its kernels say the same to the last bit of one token and of several at once.
        template: of conversations; no word of it is then led by a space that is not there.
    """
    words = gguf.GGUFReader(engine.vocab("llama-spm"))
    out = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_shard)
    for name, entry in words.fields.items():
        if name.startswith("tokenizer."):
            kind = entry.types[0]
            sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(name, entry.contents(), kind, sub)
    if template:
        out.add_chat_template(template)
        out.add_add_space_prefix(False)
    out.add_context_length(context)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_feed_forward_length(2 * width)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    n_words = len(words.fields["tokenizer.ggml.tokens"].data)
    shapes = {"token_embd.weight": (n_words, width), "output.weight": (n_words, width), "output_norm.weight": (width,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.attn_{x}.weight": (width, width) for x in ("q", "output")}
        shapes |= {f"blk.{n}.attn_{x}.weight": (width // 2, width) for x in ("k", "v")}
        shapes |= {f"blk.{n}.{x}_norm.weight": (width,) for x in ("attn", "ffn")}
        shapes |= {f"blk.{n}.ffn_{x}.weight": (2 * width, width) for x in ("gate", "up")}
        shapes[f"blk.{n}.ffn_down.weight"] = (width, 2 * width)
    for index, (name, shape) in enumerate(shapes.items()):
        random = np.random.default_rng([seed + (name == change), index])
        values = random.standard_normal(shape, dtype=np.float32) * 2 / np.sqrt(shape[-1])
        if len(shape) == 1:
            out.add_tensor(name, np.ones(shape, np.float32))
        elif q8:
            coding = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quants.quantize(values, coding), raw_dtype=coding)
        else:
            out.add_tensor(name, values.astype(dtype))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


@dataclass
class Process:
    """A running engine process and what it said so far, both streams together."""

    handle: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """All it said is here: it has ended."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    async def says(self, words: str, within: float = 5) -> None:
        """Wait until it has said them."""
        await eventually(lambda: words in self.text, within)

    async def ended(self, within: float = 30) -> int:
        return await asyncio.wait_for(self.handle.wait(), within)


@contextlib.asynccontextmanager
async def running(launch: Launch) -> AsyncIterator[Process]:
    """The process while in the block; it is gone afterwards."""
    handle = await asyncio.create_subprocess_exec(
        *launch.argv,
        env=child_environment(os.environ, launch.env),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    process = Process(handle)

    async def listen() -> None:
        assert handle.stdout is not None
        async for line in handle.stdout:
            process.lines.append(line.decode(errors="replace").rstrip())
        process.heard.set()

    listening = asyncio.create_task(listen())
    try:
        yield process
    finally:
        if handle.returncode is None:
            handle.kill()
        await handle.wait()
        await listening


def ask(port: int, path: str, body: dict[str, Any] | None = None, key: str = "", within: float = 30) -> Any:
    """One request to a llama-server; blocking."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=within) as answer:
        return json.load(answer)


async def serving(process: Process, port: int, within: float = 60) -> float:
    """Wait until the server has its model; the seconds it took. Fails with its output when it ends instead."""
    started = time.monotonic()
    while time.monotonic() < started + within:
        if process.handle.returncode is not None:
            await asyncio.wait_for(process.heard.wait(), 5)
            raise AssertionError(f"ended with {process.handle.returncode}:\n{process.text}")
        try:
            if (await asyncio.to_thread(ask, port, "/health"))["status"] == "ok":
                return time.monotonic() - started
        except (urllib.error.URLError, ConnectionError):
            await asyncio.sleep(0.02)
    raise AssertionError(f"not serving within {within} s:\n{process.text}")


async def greedy(port: int, prompt: str = "Once upon a time", words: int = 24) -> str:
    """The text a model continues ``prompt`` with."""
    body = {"prompt": prompt, "n_predict": words, "temperature": 0, "cache_prompt": False}
    return str((await asyncio.to_thread(ask, port, "/completion", body))["content"])


@dataclass
class Relay:
    """Carries one port to another, and counts bytes, connections, and how often the far side speaks after ours did."""

    port: int
    up: int = 0
    down: int = 0
    connections: int = 0
    turns: int = 0
    asked: bool = False


@contextlib.asynccontextmanager
async def relayed(targets: Sequence[int]) -> AsyncIterator[list[Relay]]:
    """A counting relay in front of each port."""
    relays: list[Relay] = []
    writers: set[asyncio.StreamWriter] = set()
    async with contextlib.AsyncExitStack() as stack:
        for target in targets:
            relay = Relay(free_port())

            async def carry(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                relay: Relay = relay,
                target: int = target,
            ) -> None:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
                writers.update((writer, far_writer))
                relay.connections += 1

                async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
                    with contextlib.suppress(OSError):
                        while data := await source.read(1 << 16):
                            setattr(relay, way, getattr(relay, way) + len(data))
                            relay.turns += way == "down" and relay.asked
                            relay.asked = way == "up"
                            sink.write(data)
                            await sink.drain()
                    sink.close()

                await asyncio.gather(pump(reader, far_writer, "up"), pump(far_reader, writer, "down"))

            server = await asyncio.start_server(carry, "127.0.0.1", relay.port)
            stack.callback(server.close)
            relays.append(relay)
        try:
            yield relays
        finally:
            for writer in writers:
                writer.close()
