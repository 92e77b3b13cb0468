"""A bound on how long something may take, for what mostly takes no time at all."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """What ``coroutine`` returns. A timer is set only if it has to wait: a write of one token costs less than a timer.

    Raises:
        TimeoutError: it took longer; it was cancelled.
    """
    try:
        waited_for = coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    async with asyncio.timeout(seconds):
        return await _go_on(coroutine, waited_for)


@types.coroutine
def _go_on(coroutine: Coroutine[Any, Any, T], waited_for: Any) -> Generator[Any, Any, T]:
    """The rest of a coroutine that waits for something already."""
    while True:
        step: Callable[[], Any]
        try:
            news = yield waited_for
        except BaseException as error:  # a cancellation, above all
            step = partial(coroutine.throw, error)
        else:
            step = partial(coroutine.send, news)
        try:
            waited_for = step()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
