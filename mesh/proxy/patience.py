"""A bound on how long something may take, for what mostly takes no time at all."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, awaitable: Awaitable[T]) -> T:
    """What ``awaitable`` comes to. A timer is set only if it has to wait: a write of one token costs less than a timer.

    Raises:
        TimeoutError: it took longer; it was cancelled.
    """
    steps = awaitable.__await__()
    try:
        waited_for = next(steps)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    async with asyncio.timeout(seconds):
        return await _go_on(steps, waited_for)


@types.coroutine
def _go_on(steps: Generator[Any, Any, T], waited_for: Any) -> Generator[Any, Any, T]:
    """The rest of what waits for something already."""
    while True:
        step: Callable[[], Any]
        try:
            news = yield waited_for
        except BaseException as error:  # a cancellation, above all
            step = partial(steps.throw, error)
        else:
            step = partial(steps.send, news)
        try:
            waited_for = step()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
