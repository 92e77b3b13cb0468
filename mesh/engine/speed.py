"""What a device really does: seconds of the engine's own kernels on small made-up models, once per machine and engine.

Two models answer two questions. A wide one is read from memory, not from a cache of the processor, and tells the bytes
per second of its type of weights. A thin one of many layers hardly reads anything, and tells what a layer costs
besides. Each is asked a few times and the best counts: whatever else the machine does only makes it look slower.

The engine's benchmark runs with as many threads as a ring would, and twice: a ring leaves weights as they are in the
file, one machine alone rearranges them on a CPU, which is better for prompts and may be worse for a token. What was
found is kept in the user's cache under everything that decides it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mesh.engine.cache import Engine, cache_root, cpu_features
from mesh.errors import EngineError
from mesh.models import write
from mesh.wire.facts import Device, Speed, alone

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is measured and how."""
FAMILIES = ("Q8_0", "Q4_K", "F16")
"""Of :func:`~mesh.wire.facts.weight_family`."""
CPU_BYTES, GPU_BYTES = 160 << 20, 512 << 20
"""Of the wide model: more than the last cache of a processor holds, and enough for a GPU to take notice."""
WIDTH, FEED = 1024, 2816
THIN_WIDTH, THIN_FEED, THIN_LAYERS = 64, 64, 48
WORDS = 256
SHORT = 2, 8
"""Tokens of one sample, and samples: short ones fall between what else the machine does."""
LONG = 24, 2
"""Where a container allows less time than the threads want, only a long sample knows."""
WITHIN_S = 5.0
"""Threads that spin for each other on a machine that is busy take for ever; then it is for another day."""
AGAIN_S = 3600.0
_TYPES = {"F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}
"""The format's number, values and bytes of a block."""
_CHUNK = 1 << 20
_STEERING = ("LLAMA_", "GGML_", "MESH_")


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one device, or as much of it as was found yet.

    Args:
        speeds: bytes per second by family.
        layer_us: what a layer costs besides its weights; None when not measured.
    """

    speeds: Mapping[str, float] = field(default_factory=dict)
    layer_us: float | None = None

    def on(self, device: Device) -> Device:
        """``device`` with these figures."""
        kinds = [kind for family in FAMILIES for kind in (family, alone(family)) if kind in self.speeds]
        speeds = tuple(Speed(kind, round(self.speeds[kind], -6)) for kind in kinds)
        first = speeds[0].bytes_per_second if speeds else 0.0
        return replace(device, bytes_per_second=first, speeds=speeds, layer_us=round(self.layer_us or 0.0, 1))


def speed_key(engine: Engine, device: Device, threads: int, cpus: float | None) -> str:
    """Of everything that decides how fast ``device`` is; sixteen hex digits.

    Args:
        cpus: how many processors' worth of time a container allows; None: all.
    """
    parts = [VERSION, engine.pin, engine.backend, cpu_features(), device.name, device.kind, device.description]
    # A container's memory limit says nothing about speed.
    parts += [] if device.kind == "cpu" else [device.total_bytes]
    return hashlib.sha256(json.dumps([*parts, threads, cpus]).encode()).hexdigest()[:16]


def _place(key: str) -> Path:
    return cache_root().parent / "speed" / f"{key}.json"


def recall(key: str) -> Measured:
    """What was found under ``key`` before; nothing where nothing was, or it cannot be read."""
    try:
        record = json.loads(_place(key).read_text("utf-8"))
        speeds = {str(family): float(speed) for family, speed in record["speeds"].items() if float(speed) > 0}
        layer = record["layer_us"]
        return Measured(speeds, None if layer is None else float(layer))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Measured()


def remember(key: str, found: Measured) -> None:
    """Keep ``found``; that a disk is full is no reason to stop."""
    with contextlib.suppress(OSError):
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"speeds": dict(found.speeds), "layer_us": found.layer_us}), "utf-8")
        part.replace(place)


def gave_up(key: str, wall: float) -> bool:
    """Whether a try failed within the last hour: on a machine that is busy the next one would, too."""
    try:
        return abs(wall - _place(key).with_suffix(".failed").stat().st_mtime) < AGAIN_S
    except OSError:
        return False


def give_up(key: str) -> None:
    """Note that a try failed."""
    with contextlib.suppress(OSError):
        place = _place(key).with_suffix(".failed")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


async def measure(
    engine: Engine,
    device: Device,
    threads: int,
    family: str,
    known: Measured,
    *,
    cpus: float | None = None,
    patience: float = 1.0,
) -> Measured:
    """``known`` with the speed for ``family``, and the cost of a layer if that is missing. Half a second on a CPU.

    Args:
        cpus: how many processors' worth of time a container allows; None: all.
        patience: times :data:`WITHIN_S`, for who has nothing else to do.

    Raises:
        EngineError: the benchmark cannot be run, fails, or takes over :data:`WITHIN_S`.
    """
    with tempfile.TemporaryDirectory(prefix="mesh-speed-") as directory:
        size = CPU_BYTES if device.kind == "cpu" else GPU_BYTES
        per_layer = _layer_bytes(WIDTH, FEED, family)
        layers = -(-size // per_layer)
        wide, thin = Path(directory, "wide.gguf"), Path(directory, "thin.gguf")
        await asyncio.to_thread(_write_model, wide, family, WIDTH, FEED, layers)
        asked = [wide]
        if known.layer_us is None:
            await asyncio.to_thread(_write_model, thin, "F16", THIN_WIDTH, THIN_FEED, THIN_LAYERS)
            asked.append(thin)
        sampled, within_s = SHORT, WITHIN_S
        if device.kind == "cpu" and cpus is not None and cpus < threads:
            sampled, within_s = LONG, WITHIN_S * threads / max(cpus, 0.05)
        answers = await _ask(engine, device, threads, asked, sampled, within_s * patience)
        seconds = [answers[str(path), False] for path in asked]
        rearranged = answers.get((str(wide), True))
    layer_us = known.layer_us
    if layer_us is None:
        layer_us = seconds[1] / THIN_LAYERS * 1e6  # its weights, 57 KB a layer, lie in a cache
    rest = max(seconds[0] - layers * layer_us / 1e6, seconds[0] / 4)
    speeds = {**known.speeds, family: layers * per_layer / rest}
    if rearranged is not None:
        speeds[alone(family)] = layers * per_layer / max(rearranged - layers * layer_us / 1e6, rearranged / 4)
    return Measured(speeds, layer_us)


async def _ask(
    engine: Engine, device: Device, threads: int, models: Iterable[Path], sampled: tuple[int, int], within_s: float
) -> dict[tuple[str, bool], float]:
    """The best seconds of a token for each model, with its weights rearranged or not."""
    tokens, samples = sampled
    argv = [str(engine.llama_bench), "-o", "json", "-p", "0", "-n", str(tokens), "-r", str(samples)]
    argv += ["-t", str(threads), "--repack", "0,1" if device.kind == "cpu" else "0", "-lm", "none", "--offline"]
    argv += ["-ngl", "0"] if device.kind == "cpu" else ["-ngl", "99", "-dev", device.name]
    for model in models:
        argv += ["-m", str(model)]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(_STEERING)}
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise EngineError(
            f"cannot run the engine's {engine.llama_bench.name}: {error}", remedy="mesh engine build"
        ) from error
    try:
        async with asyncio.timeout(within_s):
            answer, said = await process.communicate()
    except TimeoutError as error:
        raise EngineError(f"{device.name} took over {within_s:.0f} s for some tokens of a small model") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        runs: list[Mapping[str, Any]] = json.loads(answer)
        return {
            (str(run["model_filename"]), bool(run["repack"])): min(run["samples_ns"]) / tokens / 1e9 for run in runs
        }
    except (ValueError, KeyError, TypeError) as error:
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise EngineError(f"{engine.llama_bench.name} failed ({process.returncode}): {last[0]}") from error


def _layer_bytes(width: int, feed: int, family: str) -> int:
    _, values, size = _TYPES[family]
    return (4 * width * width + 3 * width * feed) * size // values


def _write_model(path: Path, family: str, width: int, feed: int, layers: int) -> None:
    """A llama that knows no words. What its weights are does not matter for time, as long as they are numbers."""
    entries = [
        write.text("general.architecture", "llama"),
        write.u32("llama.block_count", layers),
        write.u32("llama.context_length", 512),
        write.u32("llama.embedding_length", width),
        write.u32("llama.feed_forward_length", feed),
        write.u32("llama.attention.head_count", width // 64),
        write.u32("llama.attention.head_count_kv", width // 64),
        write.f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        write.u32("llama.rope.dimension_count", 64),
        write.u32("llama.vocab_size", WORDS),
        write.text("tokenizer.ggml.model", "none"),
    ]
    tensors = [_matrix("token_embd.weight", (width, WORDS), family), _ones("output_norm.weight", width)]
    shapes = {f"attn_{x}": (width, width) for x in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (width, feed), "ffn_up": (width, feed), "ffn_down": (feed, width)}
    for layer in range(layers):
        tensors += [_ones(f"blk.{layer}.{name}_norm.weight", width) for name in ("attn", "ffn")]
        tensors += [_matrix(f"blk.{layer}.{name}.weight", shape, family) for name, shape in shapes.items()]
    write.write_gguf(path, entries, tensors, lambda done, total: None, durable=False)


def _matrix(name: str, shape: tuple[int, int], family: str) -> write.NewTensor:
    kind, values, size = _TYPES[family]
    n_bytes = shape[0] * shape[1] // values * size
    return write.NewTensor(name, kind, shape, n_bytes, partial(_blocks, family, n_bytes))


def _blocks(family: str, n_bytes: int) -> Iterator[bytes]:
    """Blocks of small numbers, none of them so small that a processor would stumble over it."""
    scale = struct.pack("<e", 0.01)
    block = {"F16": scale, "Q8_0": scale + bytes(range(1, 33)), "Q4_K": scale + scale + bytes([0x21] * 140)}[family]
    chunk = block * (_CHUNK // len(block))
    left = n_bytes
    while left > 0:
        yield chunk[:left]
        left -= len(chunk)


def _ones(name: str, n: int) -> write.NewTensor:
    return write.NewTensor(name, 0, (n,), 4 * n, partial(lambda count: [struct.pack("<f", 1.0) * count], n))
