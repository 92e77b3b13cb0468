"""A node that goes on purpose waits for what needs it, and for nothing else."""

from __future__ import annotations

import asyncio
import io

from mesh.cli.view import PlainView
from mesh.node import departure
from mesh.node.departure import Stop, hand_over
from tests.eventually import eventually


class Node:
    """Needed until ``free`` is set."""

    def __init__(self, drain_s: float) -> None:
        self.drain_s = drain_s
        self.free = asyncio.Event()
        self.announced = 0

    def announce_departure(self) -> None:
        self.announced += 1

    async def unneeded(self) -> None:
        await self.free.wait()


async def gone(node: Node, stop: Stop, within: float = 5.0) -> str:
    """What was shown until ``hand_over`` returned."""
    out = io.StringIO()
    await asyncio.wait_for(hand_over(node, stop, PlainView(out)), within)
    assert not stop.waits
    return out.getvalue()


async def test_who_carries_nothing_goes_without_a_word() -> None:
    node = Node(0.0)
    assert await gone(node, Stop()) == ""
    assert node.announced == 0


async def test_who_is_needed_says_that_it_goes_and_waits_until_it_is_not() -> None:
    node, stop = Node(60.0), Stop()
    going = asyncio.create_task(gone(node, stop))
    await eventually(lambda: stop.waits)
    assert not going.done()
    node.free.set()
    assert await going == "", "what takes no time needs no words"
    assert node.announced == 1


async def test_whoever_waits_for_long_says_what_for() -> None:
    node, stop = Node(60.0), Stop()
    going = asyncio.create_task(gone(node, stop))
    asyncio.get_running_loop().call_later(2 * departure.SHOW_AFTER_S, node.free.set)
    assert "requests under way may finish first, 60 s at most" in await going


async def test_a_second_word_ends_the_wait() -> None:
    node, stop = Node(60.0), Stop()
    stop.ask()
    going = asyncio.create_task(gone(node, stop))
    await eventually(lambda: stop.waits)
    stop.ask()
    await going


async def test_who_was_told_twice_before_it_could_wait_does_not() -> None:
    node, stop = Node(60.0), Stop()
    stop.ask()
    stop.ask()
    await gone(node, stop)
    assert node.announced == 0


async def test_nobody_waits_longer_than_the_drain_and_the_hand_over(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(departure, "SHOW_AFTER_S", 0.01)
    monkeypatch.setattr(departure, "HAND_OVER_S", 0.05)
    await gone(Node(0.05), Stop(), within=2.0)
