"""A code typed on one member, tried on all: a machine may have asked another than the one the person sits at."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Mapping
from typing import Any

from mesh.clock import Clock
from mesh.membership.desk import ANSWER_WITHIN_S, Desk
from mesh.membership.link import Link
from mesh.wire.facts import NodeId
from mesh.wire.messages import Approve, Approved

MAX_PASSED_ON = 6
"""Codes that one member may pass on within :data:`WITHIN_S`: a person types no faster."""
WITHIN_S = 10.0
_TELLING = ("wrong-code", "dropped", "expired", "busy", "too-many")
"""Reasons of failure, those that say most first; all others say less."""


class Approvals:
    """Tries codes here and elsewhere.

    Args:
        desk: None: this node lets nobody in.
        links: members connected now.
    """

    def __init__(self, desk: Desk | None, links: Mapping[NodeId, Link], clock: Clock) -> None:
        self._desk = desk
        self._links = links
        self._clock = clock
        self._numbers = itertools.count(1)
        self._asked: dict[tuple[NodeId, int], asyncio.Future[Approved]] = {}
        self._passed_on: dict[NodeId, list[float]] = {}

    async def approve(self, code: str) -> Approved:
        """Let in the machine that shows ``code``, whichever member it asked."""
        if self._desk is None:
            return Approved(0, "refused", "this node lets nobody in")
        loop = asyncio.get_running_loop()
        pending = {loop.create_task(self._desk.approve(code))}
        for link in list(self._links.values()):
            if link.role == "worker" and link.facts.pairs:
                pending.add(loop.create_task(self._elsewhere(link, code)))
        failures: list[Approved] = []
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for result in (task.result() for task in done):
                    if not result.code:
                        return result
                    failures.append(result)
        finally:
            for task in pending:
                task.cancel()
        order = [*_TELLING, failures[0].code]
        return min(failures, key=lambda failure: order.index(failure.code) if failure.code in order else len(order))

    def received(self, link: Link, message: Approve | Approved) -> Coroutine[Any, Any, None] | None:
        """A member passed a code on, or answers one. Returns the work of answering, if there is any."""
        if isinstance(message, Approved):
            future = self._asked.get((link.peer, message.seq))
            if future is not None and not future.done():
                future.set_result(message)
            return None
        now = self._clock.now()
        if self._desk is None or link.role != "worker":
            link.send(Approved(message.seq, "refused", "you may not let anybody in here"))
        elif not self._may_pass_on(link.peer, now):
            link.send(Approved(message.seq, "too-many", "too many codes at once: wait ten seconds"))
        else:
            return self._answer(self._desk, link, message)
        return None

    def _may_pass_on(self, peer: NodeId, now: float) -> bool:
        recent = self._passed_on[peer] = [at for at in self._passed_on.get(peer, ()) if now - at < WITHIN_S]
        if len(recent) >= MAX_PASSED_ON:
            return False
        recent.append(now)
        return True

    async def _answer(self, desk: Desk, link: Link, approve: Approve) -> None:
        result = await desk.approve(approve.code)
        link.send(Approved(approve.seq, result.code, result.message, result.node, result.name, result.role))

    async def _elsewhere(self, link: Link, code: str) -> Approved:
        key = (link.peer, next(self._numbers))
        future: asyncio.Future[Approved] = asyncio.get_running_loop().create_future()
        self._asked[key] = future
        link.send(Approve(key[1], code))
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await future
        except TimeoutError:
            return Approved(key[1], "no-answer", f"{link.facts.name} did not answer")
        finally:
            del self._asked[key]
