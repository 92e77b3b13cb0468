"""One client's request, from the moment its body is here: carries out what the core decides about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from mesh.clock import Clock
from mesh.proxy.budget import Budget, Share
from mesh.proxy.dialect import Dialect, error_message
from mesh.proxy.events import (
    Abandon,
    Advanced,
    Began,
    Comfort,
    Completed,
    Dispatch,
    Effect,
    Fail,
    Loss,
    Lost,
    Refused,
    RequestEvent,
    RequestId,
    Spoiled,
)
from mesh.proxy.http11 import Headers
from mesh.proxy.metrics import StreamTimes
from mesh.proxy.origin import Origin
from mesh.proxy.reply import ClientGone, Reply
from mesh.proxy.resume import RESUME_HEADER, may_be_wrapped, wrap
from mesh.proxy.told import ToldAnswer, headers_of, is_told
from mesh.proxy.transcript import TOKEN_BYTES, Portion, Transcript
from mesh.proxy.upstream import Answer, Upstream, UpstreamLost

MAX_BUFFERED_ANSWER = 32 << 20
"""Bytes of an answer that are held back so that it can be asked for again; a longer one is passed on as it comes."""
_MAX_LOADING_BODY = 4096


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client wants. ``headers`` are fit for the engine, and say no length; ``streams`` is what the body says."""

    method: str
    path: str
    target: bytes
    headers: Headers
    body: bytes
    dialect: Dialect
    origin: Origin
    model: str | None = None
    streams: bool = False
    holds: bool = True


class Hub(Protocol):
    """What an exchange needs of the proxy."""

    @property
    def budget(self) -> Budget: ...
    @property
    def clock(self) -> Clock: ...
    def tell(self, event: RequestEvent) -> None: ...
    def upstream_of(self, order: Dispatch) -> Upstream | None: ...


_Say = Callable[[], Awaitable[None]]


class _Sign(Enum):
    DELIVERED = "delivered"
    GONE = "gone"


class Exchange:
    """Two tasks at most: the one that called :meth:`run`, and the pump of the attempt under way."""

    def __init__(self, request: RequestId, ask: Ask, reply: Reply, hub: Hub, times: StreamTimes) -> None:
        self.id = request
        self.ask = ask
        self._times = times
        self._arrived = hub.clock.now()
        self._transcript = Transcript()
        self._tokens = Share(hub.budget)
        self._spoilt = False
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
            with self._tokens:
                while await self._carry_out(await self._mail.get()):
                    pass
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
                self._times.lost()
            case Comfort():
                await self._reply.comfort()
            case Fail():
                await self._settle()
                await self._reply.fail(news.failure, inside=self._transcript.cut_inside)
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
            if self._is_over():  # the one before was abandoned at its last byte
                await self._finish(order, self._reply.end)
            else:
                await self._ask(order)
        except UpstreamLost as lost:
            self._times.lost()
            if self._is_over():
                await self._finish(order, self._reply.end)
            else:
                self._hub.tell(Lost(self.id, order.attempt, lost.loss, lost.message))

    async def _ask(self, order: Dispatch) -> None:
        upstream = self._hub.upstream_of(order)
        if upstream is None:
            raise UpstreamLost(Loss.UNREACHED, "the layout is gone")
        ask = self.ask
        if order.resume:
            self._transcript.restart()
        else:  # the client has nothing yet, whatever was promised
            self._transcript = Transcript()
            self._tokens.free()
        choices = self._transcript.choices
        headers = [*ask.headers, ask.origin.header(self._hub.clock.now() - self._arrived)]
        pieces: tuple[bytes, ...] = (ask.body,) if ask.body or ask.method in ("POST", "PUT", "PATCH") else ()
        if choices:
            headers.append(RESUME_HEADER)
            pieces = wrap(ask.body, choices)
        # The connection is free again before the client hears the end, so that its next request finds it.
        async with await upstream.ask(ask.method, ask.target, headers, pieces) as answer:
            if is_told(answer.headers):
                say_last = await self._pass_told(order, answer, resumes=bool(choices))
            elif _content_type(answer).startswith(b"text/event-stream"):
                say_last = await self._pass_events(order, answer)
            else:
                say_last = await self._pass_plain(order, answer, resumes=bool(choices))
        if say_last is not None:
            await self._finish(order, say_last)

    async def _finish(self, order: Dispatch, say_last: _Say) -> None:
        self._hub.tell(Completed(self.id, order.attempt))
        await say_last()
        self._times.done()
        self._mail.put_nowait(_Sign.DELIVERED)

    def _is_over(self) -> bool:
        """The client has the end mark: what the engine owed after it was the end of its HTTP."""
        dialect, last = self.ask.dialect, self._transcript.last
        return dialect.has_end_mark and last != b"" and dialect.is_end(last)

    async def _pass_events(self, order: Dispatch, answer: Answer) -> _Say | None:
        transcript = self._transcript
        began = False
        async with aclosing(answer.parts()) as parts:
            async for part in parts:
                portion = transcript.feed(part)
                if not portion.data and not portion.traced:
                    continue
                if not began and portion.last:
                    began = True
                    wrappable = may_be_wrapped(self.ask.body)
                    self._hub.tell(Began(self.id, order.attempt, resumable=transcript.resumable and wrappable))
                    answer.pass_to(partial(self._straight, order))
                await self._reply.begin_events(answer.status, answer.headers)
                await self._deliver(order, portion)
        if not self.ask.dialect.is_end(transcript.last):
            raise UpstreamLost(Loss.BROKEN, "the engine ended the stream before the answer was whole")
        return partial(self._reply.end, transcript.finish())

    def _straight(self, order: Dispatch, part: bytes) -> bool:
        """What most tokens take, once the stream has begun: from one socket to the other without a task in between."""
        if not self._reply.is_free:
            return False
        block = self._transcript.pass_on(part)
        if block is not None:
            self._reply.write_now(block)
            self._times.delivered(1)
            self._charge(order, 1)
            return True
        portion = self._transcript.feed(part)
        if portion.data:
            self._reply.write_now(portion.data)
        if portion.data or portion.traced:
            self._note(order, portion)
        return True

    async def _deliver(self, order: Dispatch, portion: Portion) -> None:
        """Nothing lies between the write and the note of it: a pump that is cancelled has done both or neither."""
        if portion.data:
            await self._reply.write(portion.data)
        self._note(order, portion)

    def _note(self, order: Dispatch, portion: Portion) -> None:
        fresh = self._transcript.deliver(portion)
        if portion.last:
            self._times.delivered(fresh)
        self._charge(order, fresh)

    def _charge(self, order: Dispatch, fresh: int) -> None:
        transcript = self._transcript
        if not self._tokens.take(fresh * TOKEN_BYTES):
            transcript.spoiled = True
        if transcript.spoiled and transcript.last and not self._spoilt:
            self._spoilt = True
            self._hub.tell(Spoiled(self.id, order.attempt))

    async def _pass_plain(self, order: Dispatch, answer: Answer, *, resumes: bool) -> _Say | None:
        async with aclosing(answer.parts()) as parts:
            return await self._pass_whole(order, lambda: (answer.status, answer.headers), parts, resumes=resumes)

    async def _pass_told(self, order: Dispatch, answer: Answer, *, resumes: bool) -> _Say | None:
        told = ToldAnswer(self._transcript)
        async with aclosing(answer.parts()) as parts, aclosing(self._listen(order, told, parts)) as body:
            return await self._pass_whole(
                order, lambda: (told.status or 500, headers_of(answer.headers)), body, resumes=resumes
            )

    async def _listen(self, order: Dispatch, told: ToldAnswer, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """The body of an answer that comes whole; what it is made of goes on record before."""
        transcript = self._transcript
        wrappable = may_be_wrapped(self.ask.body)
        try:
            async for part in parts:
                body, fresh = told.feed(part)
                if not self._tokens.take(fresh * TOKEN_BYTES):
                    transcript.spoiled = True
                if fresh and wrappable:
                    news = Advanced if transcript.resumable else Spoiled
                    self._hub.tell(news(self.id, order.attempt))
                if body:
                    yield body
            yield told.finish()
        except ValueError as error:
            raise UpstreamLost(Loss.BROKEN, f"the engine's answer is not understood: {error}") from error

    async def _pass_whole(
        self, order: Dispatch, head: Callable[[], tuple[int, Headers]], parts: AsyncIterator[bytes], *, resumes: bool
    ) -> _Say | None:
        """Nothing is sent until all is here, so the loss of the engine can be made good; unless it is too much.

        Args:
            head: status and headers, to be asked for once the first part is here.
            resumes: the engine was asked to go on with an answer.
        """
        held: list[bytes] = []
        with Share(self._hub.budget) as share:
            async for part in parts:
                held.append(part)
                if share.size + len(part) > MAX_BUFFERED_ANSWER or not share.take(len(part)):
                    return await self._pass_bytes(order, head(), b"".join(held), parts)
            body = b"".join(held)
            status, headers = head()
            if status == 503 and len(body) < _MAX_LOADING_BODY and b"oading model" in body:
                raise UpstreamLost(Loss.LOADING, "the engine is loading the model")
            if resumes and status >= 500:
                raise UpstreamLost(Loss.BROKEN, f"the engine answered {status}: {error_message(body)}")
            if resumes and status != 200:
                self._hub.tell(Refused(self.id, order.attempt, error_message(body)))
                return None
            if not any(name.lower() == b"content-length" for name, _ in headers):
                headers = [*headers, (b"content-length", str(len(body)).encode())]
            return partial(self._reply.whole, status, headers, body)

    async def _pass_bytes(
        self, order: Dispatch, head: tuple[int, Headers], first: bytes, parts: AsyncIterator[bytes]
    ) -> _Say:
        self._hub.tell(Began(self.id, order.attempt))
        await self._reply.begin_bytes(*head)
        await self._reply.write(first)
        async for part in parts:
            await self._reply.write(part)
        return self._reply.end


def _content_type(answer: Answer) -> bytes:
    return next((value.lower() for name, value in answer.headers if name.lower() == b"content-type"), b"")
