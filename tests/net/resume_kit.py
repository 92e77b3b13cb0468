"""Streams of the engine with their traces, and the same streams cut and continued."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_TRACE = re.compile(r"^: mesh (\d+) (\d+)((?: \d+)*)( end)?$")
TIMES = frozenset({"created", "created_at", "completed_at", "timings"})
"""When it was, and how long it took."""
CACHES = frozenset({"cache_read_input_tokens", "input_tokens_details", "prompt_tokens_details", "id_slot"})
"""Where it was computed, and how much of it was known there already."""


def origin(name: str = "a1", client: str = "c1", seed: int = 7, age_ms: int = 0) -> dict[str, str]:
    """The header that an ingress adds."""
    return {"X-Mesh-Request": json.dumps({"id": name, "seed": seed, "age_ms": age_ms, "client": client})}


@dataclass(frozen=True)
class Group:
    """Blocks that one trace speaks for."""

    choice: int
    blocks: tuple[str, ...]
    tokens: tuple[int, ...]
    end: bool

    @property
    def plain(self) -> tuple[str, ...]:
        """Without what may differ between two runs: times and caches."""
        return tuple(map(_plain, self.blocks))


@dataclass(frozen=True)
class Stream:
    """An answer: its traced groups, then blocks without a trace; or an error."""

    status: int
    groups: tuple[Group, ...] = ()
    rest: tuple[str, ...] = ()
    error: dict[str, Any] = field(default_factory=dict)

    def plain(self, begin: int = 0) -> list[tuple[str, ...]]:
        return [group.plain for group in self.groups[begin:]]

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for group in self.groups if group.choice == choice for token in group.tokens]

    def data(self) -> list[Any]:
        return [
            json.loads(line[6:]) for g in self.groups for b in g.blocks for line in b.split("\n") if line[:1] == "d"
        ]


def told_whole(text: str) -> Any:
    """The answer, where it is no stream, that an ingress is told of before it comes."""
    *_, event = text.strip().split("\n\n")
    name, data = event.split("\n")
    assert name == "event: 200"
    return json.loads(data.removeprefix("data: "))


def tell(port: int, path: str, body: dict[str, Any], headers: dict[str, str], within: float = 60) -> Stream:
    """Ask for a stream and read it to its end."""
    answer = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, headers=headers, timeout=within)
    if answer.status_code != 200:
        return Stream(answer.status_code, error=answer.json()["error"])
    return parse(answer.text)


def parse(text: str) -> Stream:
    blocks = [block for block in text.split("\n\n") if block]
    groups: list[Group] = []
    rest: list[str] = []
    while blocks:
        first, _, more = blocks[0].partition("\n")
        if match := _TRACE.match(first):
            n = int(match[2])
            own = (more, *blocks[1:n])
            assert len(own) == n and not any(block.startswith(":") for block in own), blocks[:n]
            groups.append(Group(int(match[1]), own, tuple(map(int, match[3].split())), bool(match[4])))
            del blocks[:n]
        else:
            rest.append(blocks.pop(0))
    return Stream(200, tuple(groups), tuple(rest))


def resume(
    port: int,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    got: Sequence[Group],
    choices: int = 1,
) -> Stream:
    """Continue behind ``got``, as an ingress does that has given its client these groups."""
    said: list[Any] = [None] * choices
    for group in got:
        mine = said[group.choice] = said[group.choice] or {"tokens": [], "end": False}
        mine["tokens"] += group.tokens
        mine["end"] = mine["end"] or group.end
    return tell(port, path, {"body": body, "choices": said}, {**headers, "X-Mesh-Resume": "1"})


def _plain(block: str) -> str:
    lines = []
    for line in block.split("\n"):
        if line.startswith(("data: {", "data: [{")):
            line = "data: " + json.dumps(_without(json.loads(line[6:])), sort_keys=True)
        lines.append(line)
    return "\n".join(lines)


def _without(data: Any) -> Any:
    if isinstance(data, dict):
        # What the cache held is subtracted from an Anthropic message's input.
        anthropic = "cache_read_input_tokens" in data
        dropped = TIMES | CACHES | ({"input_tokens"} if anthropic else set())
        return {key: _without(value) for key, value in data.items() if key not in dropped}
    return [_without(value) for value in data] if isinstance(data, list) else data
