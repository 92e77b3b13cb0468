"""The proxy of one node: feeds the core events and the time, and hands its decisions to the requests they are about."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from mesh.clock import Clock
from mesh.proxy.budget import DEFAULT_BYTES, Budget
from mesh.proxy.core import Core, Counters, Limits
from mesh.proxy.events import (
    Arrived,
    Closing,
    Departed,
    Dispatch,
    Effect,
    Fail,
    RequestEvent,
    RequestId,
    Served,
    Stopped,
    Tick,
    Unserved,
)
from mesh.proxy.exchange import Ask, Exchange
from mesh.proxy.http11 import Headers
from mesh.proxy.metrics import Metrics
from mesh.proxy.reply import Reply
from mesh.proxy.upstream import IDLE_S, OPEN_S, Route, Upstream, UpstreamLost
from mesh.pump import Pump

MAX_PEEK_BYTES = 1 << 20


class Proxy:
    """Holds, carries and replays requests. All methods belong to one event loop.

    Args:
        budget_bytes: bodies of requests and answers held at one time, all together.
        idle_s: how long an unused connection to the engine is kept.
        open_s: how long opening one may take.
    """

    def __init__(
        self,
        clock: Clock,
        limits: Limits | None = None,
        *,
        budget_bytes: int = DEFAULT_BYTES,
        idle_s: float = IDLE_S,
        open_s: float = OPEN_S,
    ) -> None:
        self.budget = Budget(budget_bytes)
        self.clock = clock
        self._core = Core(limits or Limits())
        self.metrics = Metrics(lambda: self._core.counters)
        self._pump = Pump(self._core, self._carry_out, Tick, clock, after=self._note_drained)
        self._idle_s = idle_s
        self._open_s = open_s
        self._ids = itertools.count(1)
        self._exchanges: dict[RequestId, Exchange] = {}
        self._upstream: Upstream | None = None
        self._model_name: str | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._empty = asyncio.Event()
        self._empty.set()

    # -- for the node ------------------------------------------------------------------------------------------------

    def serve(self, route: Route) -> None:
        """Send requests there from now on, the waiting ones first. What another epoch's engine still owes is lost."""
        self._replace(Upstream(route, idle_s=self._idle_s, open_s=self._open_s))
        self._model_name = route.model_name
        self._pump.feed(Served(route.epoch, route.model_name, route.fingerprint))

    def unserve(self, reason: str, *, drain_s: float = 0.0, model_name: str | None = None) -> None:
        """Let requests wait.

        Args:
            reason: for those who wait in vain.
            drain_s: how long answers under way may take to finish; 0 for an engine that is gone.
            model_name: what will be served next, if known.
        """
        self._replace(None)
        self._model_name = model_name
        self._pump.feed(Unserved(reason, drain_s))

    @property
    def route(self) -> Route | None:
        return None if self._upstream is None else self._upstream.route

    @property
    def model_name(self) -> str | None:
        """What is served, or will be as far as is known."""
        return self._model_name

    @property
    def counters(self) -> Counters:
        return self._core.counters

    async def drained(self, within_s: float) -> bool:
        """Whether all answers under way were finished in that time; waiting requests do not count."""
        try:
            async with asyncio.timeout(within_s):
                await self._drained.wait()
        except TimeoutError:
            return False
        return True

    def turn_away(self, reason: str) -> None:
        """Let nobody in any more; whoever is here is still answered."""
        self._pump.feed(Closing(reason))

    async def empty(self) -> None:
        """Return once no client is left."""
        await self._empty.wait()

    async def close(self, reason: str = "this node is stopping", within_s: float = 1.0) -> None:
        """Tell every client, and wait until the last one knows."""
        self._replace(None)
        self._pump.feed(Stopped(reason))
        try:
            async with asyncio.timeout(within_s):
                await self._empty.wait()
        except TimeoutError:
            pass
        finally:
            self._pump.stop()

    # -- for the HTTP side -------------------------------------------------------------------------------------------

    async def carry(self, ask: Ask, reply: Reply, gone: Callable[[], Awaitable[None]]) -> None:
        """See one request through: its answer, its error, or the end of its client's patience."""
        request = next(self._ids)
        exchange = Exchange(request, ask, reply, self, self.metrics.watch(self.clock))
        self._exchanges[request] = exchange
        self._empty.clear()
        try:
            self._pump.feed(Arrived(request, streams=ask.streams, model=ask.model, holds=ask.holds))
            await exchange.run(gone)
        finally:
            self._pump.feed(Departed(request))
            del self._exchanges[request]
            if not self._exchanges:
                self._empty.set()

    async def peek(self, target: bytes, within_s: float = 1.0) -> tuple[int, Headers, bytes] | None:
        """What the engine says to a GET, apart from all queues; None when there is none, it does not say it soon, or it
        says more than :data:`MAX_PEEK_BYTES`."""
        upstream = self._upstream
        if upstream is None:
            return None
        try:
            async with asyncio.timeout(within_s), await upstream.ask("GET", target, ()) as answer:
                body = bytearray()
                async for part in answer.parts():
                    body += part
                    if len(body) > MAX_PEEK_BYTES:
                        return None
                return (200, answer.headers, bytes(body)) if answer.status == 200 else None
        except (UpstreamLost, TimeoutError):
            return None

    def tell(self, event: RequestEvent) -> None:
        """What an exchange has seen of its upstream."""
        self._pump.feed(event)

    def upstream_of(self, order: Dispatch) -> Upstream | None:
        """The engine an order names, unless it is gone again."""
        upstream = self._upstream
        return upstream if upstream is not None and upstream.route.epoch == order.epoch else None

    # -- the pump ----------------------------------------------------------------------------------------------------

    def _replace(self, upstream: Upstream | None) -> None:
        before, self._upstream = self._upstream, upstream
        if before is not None:
            before.retire()

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Fail):
            self.metrics.failed(effect.failure.code)
        exchange = self._exchanges.get(effect.request)
        if exchange is not None:
            exchange.put(effect)

    def _note_drained(self) -> None:
        if self._core.counters.active:
            self._drained.clear()
        else:
            self._drained.set()
