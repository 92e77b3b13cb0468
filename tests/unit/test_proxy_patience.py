"""A bound on what mostly takes no time."""

from __future__ import annotations

import asyncio

import pytest

from mesh.proxy.patience import within


async def test_what_is_done_at_once_needs_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_timer(seconds: float) -> None:
        raise AssertionError("a timer was set")

    monkeypatch.setattr(asyncio, "timeout", no_timer)

    async def at_once() -> int:
        return 7

    assert await within(1.0, at_once()) == 7


async def test_what_has_to_wait_goes_on_from_there() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def two_waits() -> int:
        first = await future
        await asyncio.sleep(0)
        return first + 1

    asyncio.get_running_loop().call_soon(future.set_result, 1)
    assert await within(5.0, two_waits()) == 2


async def test_what_takes_too_long_is_cancelled() -> None:
    ended = False

    async def for_ever() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    with pytest.raises(TimeoutError):
        await within(0.01, for_ever())
    assert ended


async def test_an_error_is_passed_on_before_and_after_a_wait() -> None:
    async def fails(wait: bool) -> None:
        if wait:
            await asyncio.sleep(0)
        raise OSError("no")

    for wait in (False, True):
        with pytest.raises(OSError, match="no"):
            await within(5.0, fails(wait))


async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    waiting = asyncio.create_task(within(60.0, for_ever()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
