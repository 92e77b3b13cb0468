"""One client's request, from the moment its body is here: carries out what the core decides about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from mesh.proxy.budget import Budget, Share
from mesh.proxy.dialect import Dialect
from mesh.proxy.events import (
    Abandon,
    Began,
    Comfort,
    Completed,
    Dispatch,
    Effect,
    Fail,
    Loss,
    Lost,
    RequestEvent,
    RequestId,
)
from mesh.proxy.reply import ClientGone, Reply
from mesh.proxy.transcript import Transcript
from mesh.proxy.upstream import Answer, Headers, Upstream, UpstreamLost

MAX_BUFFERED_ANSWER = 32 << 20
"""Bytes of an answer that are held back so that it can be asked for again; a longer one is passed on as it comes."""
_MAX_LOADING_BODY = 4096


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants. ``headers`` are fit for the engine; ``streams`` is the body's own word for it."""

    method: str
    path: str
    target: bytes
    headers: Headers
    body: bytes
    dialect: Dialect
    model: str | None = None
    streams: bool = False
    holds: bool = True


class Hub(Protocol):
    """What an exchange needs of the proxy."""

    @property
    def budget(self) -> Budget: ...
    def tell(self, event: RequestEvent) -> None: ...
    def upstream_of(self, order: Dispatch) -> Upstream | None: ...


_Say = Callable[[], Awaitable[None]]


class _Sign(Enum):
    DELIVERED = "delivered"
    GONE = "gone"


class Exchange:
    """Two tasks at most: the one that called :meth:`run`, and the pump of the attempt under way."""

    def __init__(self, request: RequestId, ask: Ask, reply: Reply, hub: Hub) -> None:
        self.id = request
        self.ask = ask
        self._reply = reply
        self._hub = hub
        self._mail: asyncio.Queue[Effect | _Sign | BaseException] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None

    def put(self, effect: Effect) -> None:
        """Hand over what the core decided. An abandoned pump stops at once, whatever else waits."""
        if isinstance(effect, Abandon) and self._pump is not None:
            self._pump.cancel()
        self._mail.put_nowait(effect)

    async def run(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Until the client has its answer, its error, or is gone; ``gone`` returns when it is."""
        watch = asyncio.create_task(self._watch(gone))
        try:
            while True:
                news = await self._mail.get()
                if not await self._carry_out(news):
                    return
        except ClientGone:
            return
        finally:
            watch.cancel()
            await self._settle(cancel=True)

    async def _carry_out(self, news: Effect | _Sign | BaseException) -> bool:
        """False when nothing more is to be done."""
        match news:
            case Dispatch():
                await self._settle()
                self._pump = asyncio.create_task(self._attempt(news))
                self._pump.add_done_callback(self._noticed)
            case Abandon():
                await self._settle(cancel=True)
            case Comfort():
                await self._reply.comfort()
            case Fail():
                await self._settle()
                await self._reply.fail(news.failure)
                return False
            case _Sign():
                return False
            case BaseException():
                raise news
        return True

    def _noticed(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and (error := pump.exception()) is not None:
            self._mail.put_nowait(_Sign.GONE if isinstance(error, ClientGone) else error)

    async def _watch(self, gone: Callable[[], Awaitable[None]]) -> None:
        await gone()
        self._mail.put_nowait(_Sign.GONE)

    async def _settle(self, *, cancel: bool = False) -> None:
        """Wait for the pump's last word, so that one writer at a time speaks to the client."""
        pump, self._pump = self._pump, None
        if pump is None:
            return
        # Once is enough: a second one would interrupt the closing of the upstream.
        if cancel and not pump.cancelling():
            pump.cancel()
        await asyncio.wait([pump])

    # -- the pump ----------------------------------------------------------------------------------------------------

    async def _attempt(self, order: Dispatch) -> None:
        try:
            await self._ask(order)
        except UpstreamLost as lost:
            self._hub.tell(Lost(self.id, order.attempt, lost.loss, lost.message))

    async def _ask(self, order: Dispatch) -> None:
        upstream = self._hub.upstream_of(order)
        if upstream is None:
            raise UpstreamLost(Loss.UNREACHED, "the layout is gone")
        ask = self.ask
        # The connection is free again before the client hears the end, so that its next request finds it.
        async with await upstream.ask(ask.method, ask.target, ask.headers, ask.body) as answer:
            if _content_type(answer).startswith(b"text/event-stream"):
                say_last = await self._pass_events(order, answer)
            else:
                say_last = await self._pass_whole(order, answer)
        self._hub.tell(Completed(self.id, order.attempt))
        await say_last()
        self._mail.put_nowait(_Sign.DELIVERED)

    async def _pass_events(self, order: Dispatch, answer: Answer) -> _Say:
        transcript = Transcript()
        began = False
        async with aclosing(answer.parts()) as parts:
            async for part in parts:
                whole = transcript.feed(part)
                if not whole:
                    continue
                if not began and transcript.last:
                    began = True
                    self._hub.tell(Began(self.id, order.attempt))
                await self._reply.begin_events(answer.status, answer.headers)
                await self._reply.write(whole)
        if not self.ask.dialect.is_end(transcript.last):
            raise UpstreamLost(Loss.BROKEN, "the engine ended the stream before the answer was whole")
        return partial(self._reply.end, transcript.finish())

    async def _pass_whole(self, order: Dispatch, answer: Answer) -> _Say:
        """Nothing is sent until all is here, so the loss of the engine can be made good; unless it is too much."""
        held: list[bytes] = []
        with Share(self._hub.budget) as share:
            async with aclosing(answer.parts()) as parts:
                async for part in parts:
                    held.append(part)
                    if share.size + len(part) > MAX_BUFFERED_ANSWER or not share.take(len(part)):
                        return await self._pass_bytes(order, answer, b"".join(held), parts)
            body = b"".join(held)
            if answer.status == 503 and len(body) < _MAX_LOADING_BODY and b"oading model" in body:
                raise UpstreamLost(Loss.LOADING, "the engine is loading the model")
            return partial(self._reply.whole, answer.status, answer.headers, body)

    async def _pass_bytes(self, order: Dispatch, answer: Answer, first: bytes, parts: AsyncIterator[bytes]) -> _Say:
        self._hub.tell(Began(self.id, order.attempt))
        await self._reply.begin_bytes(answer.status, answer.headers)
        await self._reply.write(first)
        async for part in parts:
            await self._reply.write(part)
        return self._reply.end


def _content_type(answer: Answer) -> bytes:
    return next((value.lower() for name, value in answer.headers if name.lower() == b"content-type"), b"")
