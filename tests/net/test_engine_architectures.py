"""Whatever the architecture, the weights' type and the division: a ring says what one process says.

Not nearly: every token, and the probabilities of the best ones to the last bit. That can be asked for because both
use the same kernels on the same batches; four things that would differ, in one process as in a ring, are kept alike:

- ``--no-repack``. A process keeps some types (Q4_K; which ones depends on the processor) of its own CPU's weights in
  another order, with kernels that take a batch by fours and round differently, so that a process disagrees with itself
  as soon as a prompt shares its batch with another. Workers keep weights as they are in the file. Without the option a
  ring's numbers are as good as one process's, but not the same.
- ``-ctxcp 0``, as in every ring: checkpoints cut the prompts of models with a sliding window in other places.
- As many threads, and the same micro-batches: attention over one token and over many is computed in different ways.
- Several prompts come in one request. Requests that arrive by themselves meet in batches by chance; that rings answer
  those alike is shown with the demo model, whose words do not hang on rounding (``test_engine_push.py``).

Each architecture meets each type once, and three of the divisions. ``MESH_MATRIX=full`` tries all of it, with small and
large micro-batches, in seven minutes; besides it tries two threads, which on a busy machine takes much longer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.engine.cache import Engine
from tests.fakes.architectures import ARCHITECTURES, FIRST_WORD, KINDS, LAYERS, VOCAB, WIDTH, write_architecture
from tests.net.engine_kit import ask, serving
from tests.net.push_kit import PushRing, push_ring

pytestmark = pytest.mark.engine

FULL = os.environ.get("MESH_MATRIX") == "full"
SPLITS = [(0, 6), (5, 1), (2, 3, 1), (0, 1, 5), (1, 1, 1, 3), (0, 2, 3, 1)]
"""Layers of the host and of each worker."""
SAME = ("--no-repack", "-ctxcp", "0")
PATIENCE_S = 110
"""Threads that wait for each other by spinning take their time on a busy machine."""
LONG = 640
"""Tokens: several of the smaller micro-batches, and more than one of the larger."""
ACTIVATION = 4 * WIDTH
WHOLE = {"gemma4"}
"""Their last layer computes every token of a prompt, where others keep to the ones that are asked for."""


def prompt(n: int, seed: int) -> list[int]:
    """A beginning mark and ``n - 1`` words."""
    return [1, *np.random.default_rng(seed).integers(FIRST_WORD, VOCAB, n - 1).tolist()]


@dataclass(frozen=True)
class Said:
    """Tokens, and after each the logarithms of the probabilities of the best three."""

    tokens: list[int]
    best: list[list[tuple[int, float]]]


async def said(port: int, prompts: list[list[int]], words: int) -> list[Said]:
    body = {"prompt": prompts, "n_predict": words, "temperature": 0, "n_probs": 3, "cache_prompt": False}
    body |= {"ignore_eos": True, "return_tokens": True}
    answer = await asyncio.to_thread(ask, port, "/completion", body, within=PATIENCE_S)
    found = answer if isinstance(answer, list) else [answer]
    found.sort(key=lambda one: one["index"])
    return [
        Said(one["tokens"], [[(top["id"], top["logprob"]) for top in word["top_logprobs"]] for word in _words_of(one)])
        for one in found
    ]


def _words_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    words: list[dict[str, Any]] = answer["completion_probabilities"]
    return words


async def embedded(port: int, texts: list[list[int]]) -> list[list[float]]:
    answer = await asyncio.to_thread(ask, port, "/v1/embeddings", {"input": texts, "model": "m"})
    return [one["embedding"] for one in answer["data"]]


@dataclass(frozen=True)
class Answers:
    one: list[Said]
    several: list[Said]
    long: list[Said]
    vectors: list[list[float]]


async def answers(port: int, micro_batch: int) -> Answers:
    return Answers(
        await said(port, [prompt(20, 1)], 32),
        await said(port, [prompt(9, 2), prompt(17, 3), prompt(70, 4)], 12),
        await said(port, [prompt(5 * micro_batch // 2 + 9, 5)], 8),
        await embedded(port, [prompt(70, 6)]),
    )


class Library:
    """One model at a time, and what one process says with it."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.directory = directory
        self._said: dict[tuple[object, ...], Answers] = {}

    def model(self, name: str, kind: str) -> Path:
        path = self.directory / f"{name}-{kind}.gguf"
        if not path.exists():
            for old in self.directory.iterdir():
                old.unlink()
            write_architecture(path, name, KINDS[kind])
        return path

    async def alone(self, name: str, kind: str, micro_batch: int, threads: int) -> Answers:
        key = (name, kind, micro_batch, threads)
        if key not in self._said:
            options = (*SAME, "-ub", str(micro_batch))
            path = self.model(name, kind)
            async with push_ring(self.engine, path, [LAYERS], parallel=3, threads=threads, options=options) as r:
                await serving(r.host, r.port)
                self._said[key] = await answers(r.port, micro_batch)
        return self._said[key]


@pytest.fixture(scope="module")
def library(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    directory = tmp_path_factory.mktemp("models")
    yield Library(engine, directory)
    for old in directory.iterdir():
        old.unlink()


def matrix() -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    for row, name in enumerate(ARCHITECTURES):
        for column, kind in enumerate(KINDS):
            if FULL:
                yield from ((name, kind, split, size, 1) for size in (128, 512) for split in SPLITS)
                if column == row % len(KINDS):
                    yield (name, kind, SPLITS[row % len(SPLITS)], 128, 2)
            else:
                yield (name, kind, SPLITS[(row + 2 * column) % len(SPLITS)], 128, 1)


def check_lively(found: Answers) -> None:
    """A model that repeats itself, or says the same to everything, would prove little."""
    assert all(len(set(text.tokens)) > len(text.tokens) // 4 for text in found.one)
    assert len({tuple(text.tokens) for text in found.several}) == 3


async def check_traffic(r: PushRing, whole: bool) -> None:
    """One activation per token and hop; nobody but the last worker answers, and that one nothing else."""
    counts: list[list[tuple[int, int]]] = []
    for words, tokens in ((20, 20), (4, 20), (20, 20), (1, LONG)):
        counts.append([(link.up, link.down) for link in (*r.links, *r.peers)])
        await said(r.port, [prompt(tokens, 7)], words)
    counts.append([(link.up, link.down) for link in (*r.links, *r.peers)])
    costs = [[(b[0] - a[0], b[1] - a[1]) for a, b in zip(*pair, strict=True)] for pair in pairwise(counts)]
    _, few, many, long = costs
    up = [(m[0] - f[0]) / 16 for f, m in zip(few, many, strict=True)]
    down = [(m[1] - f[1]) / 16 for f, m in zip(few, many, strict=True)]
    workers = len(r.links)
    print("bytes per token and hop:", round(up[0]), *map(round, up[workers:]), round(down[workers - 1]))
    assert up[0] <= ACTIVATION + 1024
    assert all(ACTIVATION <= pushed <= ACTIVATION + 64 for pushed in up[workers:]), up
    assert all(other <= 1024 for other in up[1:workers]), up
    assert down == [0] * (workers - 1) + [ACTIVATION + 8] + [0] * len(r.peers)
    activations = LONG * ACTIVATION
    assert all(cost[0] <= 1.1 * activations + 20_000 for cost in long), long
    assert sum(cost[1] for cost in long) <= 2 * ACTIVATION + (1.1 * activations if whole else 0), long


@pytest.mark.parametrize(("name", "kind", "split", "micro_batch", "threads"), list(matrix()))
async def test_a_ring_says_what_one_process_says(
    engine: Engine, library: Library, name: str, kind: str, split: tuple[int, ...], micro_batch: int, threads: int
) -> None:
    expected = await library.alone(name, kind, micro_batch, threads)
    check_lively(expected)
    options = (*SAME, "-ub", str(micro_batch))
    path = library.model(name, kind)
    async with push_ring(engine, path, split, parallel=3, threads=threads, options=options) as r:
        await serving(r.host, r.port)
        assert await answers(r.port, micro_batch) == expected
        assert not r.said("mesh-push-fallback")
        await check_traffic(r, name in WHOLE)


# What is shifted lies in the workers' caches, and stays there.
@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [(n, k, s) for n in ARCHITECTURES for k in KINDS for s in ((2, 3, 1), (0, 6))]
    if FULL
    else [
        ("llama", "Q8_0", (2, 3, 1)),
        ("gemma3", "F16", (0, 1, 5)),
        ("phi3", "Q4_K", (0, 6)),
        ("qwen3moe", "Q8_0", (5, 1)),
    ],
)
async def test_a_text_longer_than_the_context_goes_on_alike(
    engine: Engine, library: Library, name: str, kind: str, split: tuple[int, ...]
) -> None:
    # The cache of a sliding window can be shifted only if it is as long as the others.
    options = (*SAME, "--context-shift", "--swa-full")
    texts, path = [], library.model(name, kind)
    for counts in ([LAYERS], split):
        async with push_ring(engine, path, counts, parallel=1, context=256, options=options) as r:
            await serving(r.host, r.port)
            before = [(link.up, link.down) for link in (*r.links, *r.peers)]
            texts.append(await said(r.port, [prompt(100, 8)], 400))
            assert sum("context shift" in line for line in r.host.lines) >= 2, r.host.text
            assert len(texts[-1][0].tokens) == 400
            after = [(link.up, link.down) for link in (*r.links, *r.peers)]
            carried = [b - a for pair in zip(before, after, strict=True) for a, b in zip(*pair, strict=True)]
            assert all(n < 500 * (ACTIVATION + 512) + 20_000 for n in carried), carried
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("name", "split"), [("llama", (2, 4)), ("gemma3", (0, 3, 3)), ("qwen2moe", (1, 5))])
async def test_a_prompt_of_several_large_batches_is_read_alike(
    engine: Engine, library: Library, name: str, split: tuple[int, ...]
) -> None:
    texts, path = [], library.model(name, "Q8_0")
    for counts in ([LAYERS], split):
        async with push_ring(engine, path, counts, parallel=1, options=(*SAME, "-ub", "512")) as r:
            await serving(r.host, r.port)
            texts.append(await said(r.port, [prompt(1300, 9)], 8))
    assert texts[0] == texts[1]


# Texts of unequal lengths share micro-batches, and a vector is the mean over a whole text all the same. With flash
# attention one and many tokens are computed differently (up to 3e-3 here, in one process too), so it is off.
@pytest.mark.parametrize("counts", [(6,), (2, 3, 1)])
async def test_texts_embedded_together_are_embedded_as_each_alone(
    engine: Engine, library: Library, counts: tuple[int, ...]
) -> None:
    texts = [prompt(30, 6), prompt(400, 7), prompt(5, 8)]
    options = (*SAME, "-fa", "off")
    async with push_ring(engine, library.model("gemma3", "F16"), counts, parallel=5, options=options) as r:
        await serving(r.host, r.port)
        alone = [(await embedded(r.port, [text]))[0] for text in texts]
        np.testing.assert_allclose(await embedded(r.port, texts), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parallel", [2, 3, 5, 7])
async def test_any_number_of_slots_starts(engine: Engine, library: Library, parallel: int) -> None:
    async with push_ring(engine, library.model("qwen2", "Q4_K"), (2, 4), parallel=parallel, options=SAME) as r:
        await serving(r.host, r.port)
        assert len(await said(r.port, [prompt(9, n) for n in range(parallel)], 4)) == parallel
