"""Wait for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(condition: Callable[[], Any | Awaitable[Any]], within: float = 5.0, every: float = 0.02) -> Any:
    """Return the first truthy value of ``condition``; fail with its source when ``within`` seconds pass."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            try:
                what = inspect.getsource(condition).strip()  # type: ignore[arg-type]
            except (OSError, TypeError):
                what = repr(condition)
            raise AssertionError(f"not within {within} s: {what} (last value {value!r})")
        await asyncio.sleep(every)
