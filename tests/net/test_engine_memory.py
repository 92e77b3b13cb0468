"""What the planner counts for a member is what the engine allocates there: weights, caches, states and buffers.

The engine says in its log what it reserves on which device; no prompt is needed for that, since it reserves for the
largest batch at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from mesh.engine.cache import Engine
from mesh.models.gguf import inspect
from mesh.models.write import split_gguf
from mesh.plan.costs import Costs
from tests.fakes.architectures import ARCHITECTURES, FURTHER, KINDS, LAYERS, write_architecture
from tests.net.engine_kit import serving
from tests.net.push_kit import push_ring

pytestmark = pytest.mark.engine

MIB = 1 << 20
WITHIN = 0.05
SMALL = 0.55 * MIB
"""A row of these models for a batch, 256 values, is half a MiB: more than a twentieth of the smallest members."""
SPLITS = [(6,), (2, 3, 1), (0, 1, 5), (1, 4, 1), (0, 6)]
SIZES = [(2048, 2), (4096, 1), (512, 4)]
"""Context of one slot, and slots."""
_BUFFER = re.compile(
    r"([A-Za-z0-9_]+)(?:\[127\.0\.0\.1:(\d+)\])? +(model|output|KV|RS|compute) buffer size = +([0-9.]+) MiB"
)


def allocated(lines: list[str]) -> dict[str, float]:
    """Bytes of each member: the port of its server, or "" for the host."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        if match := _BUFFER.search(line):
            found[match[2] or ""] += float(match[4]) * MIB
    return found


def counted(costs: Costs, split: tuple[int, ...]) -> list[int]:
    """What the plan counts for each member, less what a process takes besides its buffers."""
    model, at, found = costs.model, 0, []
    for n, layers in enumerate(split):
        bytes_ = costs.layers(at, at + layers) + costs.buffer(at, at + layers, host=n == 0)
        if n == 0:
            bytes_ += model.input_bytes + model.output_bytes - costs.tied_bytes() + 4 * costs.parallel * model.n_vocab
        found.append(bytes_)
        at += layers
    return found


def cases() -> list[tuple[str, str, tuple[int, ...], tuple[int, int]]]:
    """Each architecture alone and in two divisions, each time of another type and size."""
    kinds = list(KINDS)
    found = []
    for row, name in enumerate([*ARCHITECTURES, *FURTHER]):
        for column, split in enumerate((SPLITS[0], SPLITS[1 + row % 4], SPLITS[1 + (row + 1) % 4])):
            kind = kinds[(row + column) % 3]
            # Its latents are narrower than a block of that type.
            kind = "F16" if (name, kind) == ("deepseek2", "Q4_K") else kind
            found.append((name, kind, split, SIZES[(row + column) % 3]))
    return found


@pytest.mark.parametrize(("name", "kind", "split", "size"), cases())
async def test_the_engine_takes_what_the_plan_counts(
    engine: Engine, tmp_path: Path, name: str, kind: str, split: tuple[int, ...], size: tuple[int, int]
) -> None:
    path = tmp_path / f"{name}.gguf"
    write_architecture(path, name, KINDS[kind])
    context, parallel = size
    costs = Costs(inspect(path).cost("0" * 64), context, parallel)
    options = ("-lv", "4", "--no-repack")
    async with push_ring(engine, path, split, parallel=parallel, context=context, options=options) as r:
        await serving(r.host, r.port)
        found = allocated(r.host.lines)
        ports = ["", *(str(link.port) for link in r.links)]
    real = [found[port] for port in ports]
    plan = counted(costs, split)
    print(name, kind, split, size, *(f"{p / MIB:.2f}/{x / MIB:.2f}" for p, x in zip(plan, real, strict=True)))
    assert sum(split) == LAYERS
    if not any(costs.model.kv_bytes_per_token[: split[0]]):
        # A host that does not look at the masks lets them go, and whether the logits find room where they were is a
        # matter of luck: counted as if not.
        masks = 512 * 2 * 2 * context
        assert real[0] - SMALL <= plan[0] <= real[0] + masks + SMALL
        plan, real = plan[1:], real[1:]
    for planned, taken in zip(plan, real, strict=True):
        assert abs(planned - taken) <= max(WITHIN * taken, SMALL), (
            f"{planned / MIB:.2f} MiB planned, {taken / MIB:.2f} taken"
        )


async def test_shards_weigh_what_the_whole_file_weighs(engine: Engine, tmp_path: Path) -> None:
    whole = tmp_path / "m.gguf"
    write_architecture(whole, "qwen2moe", KINDS["Q8_0"])
    shards = split_gguf(whole, 3)
    one, many = inspect(whole).cost("0" * 64), inspect(shards[0]).cost("0" * 64)
    assert many.layer_bytes == one.layer_bytes
    assert many.read_bytes == one.read_bytes
    assert (many.input_bytes, many.output_bytes) == (one.input_bytes, one.output_bytes)
    async with push_ring(engine, shards[0], (6,), parallel=1, options=("-lv", "4")) as r:
        await serving(r.host, r.port)
        taken = allocated(r.host.lines)[""]
    assert abs(counted(Costs(many, 2048, 1), (6,))[0] - taken) <= WITHIN * taken
