"""Keeps dialing the members that are not connected, and dials at once where an introduction says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from mesh.errors import AdmissionError, MeshError
from mesh.membership.known import AddressBook
from mesh.membership.link import Link
from mesh.transport.lane import Connection, Detour, Lane
from mesh.wire.facts import NodeId

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 5.0
PUNCH_TIMEOUT_S = 3.0
"""For a dial that both sides begin at the same moment; five or so packets."""
STAGGER_S = 0.25
"""Between trying one address of a member and the next, while the first still may answer."""
MAX_TRIED = 24
"""Addresses in one attempt: however many are announced, it ends, and the next begins with those that once were good."""
FIRST_RETRY_S = 0.25
LAST_RETRY_S = 3.0


Reach = Callable[[], Awaitable[Connection]]
"""One way to dial one member."""


@dataclass(slots=True)
class _Attempt:
    """Ways to one member: its usual addresses, one after the other, and what to try at once, as soon as it is named."""

    peer: NodeId
    usual: bool
    at_once: list[Reach] = field(default_factory=list)
    more: asyncio.Event = field(default_factory=asyncio.Event)


class Dialer:
    """One task per known member, which sleeps while there is a link.

    Args:
        introduce: says Hello on a fresh connection, and returns the link that came of it.
        is_linked: is there a link to that member, whoever dialed it?
        on_refused: a member does not let us in.
        random: uniform in [0, 1); spreads the attempts of many nodes.
    """

    def __init__(
        self,
        lane: Lane,
        book: AddressBook,
        *,
        introduce: Callable[[Connection], Awaitable[Link | None]],
        is_linked: Callable[[NodeId], bool],
        on_refused: Callable[[NodeId, AdmissionError], None],
        random: Callable[[], float],
    ) -> None:
        self._lane = lane
        self._book = book
        self._introduce = introduce
        self._is_linked = is_linked
        self._on_refused = on_refused
        self._random = random
        self._keepers: dict[NodeId, asyncio.Task[None]] = {}
        self._kicks: dict[NodeId, asyncio.Event] = {}
        self._dialing: dict[NodeId, asyncio.Task[Link | None]] = {}
        self._attempts: dict[NodeId, _Attempt] = {}
        self._punches: set[asyncio.Task[bool]] = set()
        self._hints: dict[NodeId, tuple[str, ...]] = {}
        self._closed = False

    def hint(self, peer: NodeId, addresses: tuple[str, ...]) -> None:
        """``peer`` may be at these addresses: try them after those of the book, from now on. Empty: no more."""
        if addresses == self._hints.get(peer, ()) or self._closed:
            return
        self._hints[peer] = addresses
        if addresses:
            self.keep(peer)
            self.kick(peer)
        else:
            del self._hints[peer]

    def keep(self, peer: NodeId) -> None:
        """See to it that there is a link to ``peer`` from now on."""
        if peer in self._keepers or self._closed:
            return
        self._kicks[peer] = asyncio.Event()
        self._keepers[peer] = asyncio.get_running_loop().create_task(self._keep_linked(peer))

    def kick(self, peer: NodeId) -> None:
        """Something changed for ``peer``: its link was lost, or a new address is known."""
        kick = self._kicks.get(peer)
        if kick is not None:
            kick.set()

    def forget(self, peer: NodeId) -> None:
        """Dial ``peer`` no more."""
        self._kicks.pop(peer, None)
        self._hints.pop(peer, None)
        keeper = self._keepers.pop(peer, None)
        if keeper is not None:
            keeper.cancel()

    def punch(self, peer: NodeId, addresses: Iterable[str]) -> None:
        """Dial all of ``addresses`` now: ``peer`` was told to do the same. A relayed link moves to what answers."""
        self._at_once(peer, [self._to(address, peer, PUNCH_TIMEOUT_S) for address in addresses])

    def dial_over(self, peer: NodeId, detour: Detour) -> None:
        """Dial ``peer`` through a member, now."""
        self._at_once(peer, [lambda: self._lane.dial_over(detour, expect=peer, timeout=PUNCH_TIMEOUT_S)])

    def _at_once(self, peer: NodeId, ways: list[Reach]) -> None:
        if self._closed:
            return
        attempt = self._attempts.get(peer)
        if attempt is not None:
            attempt.at_once += ways
            attempt.more.set()
            return
        punch = asyncio.get_running_loop().create_task(self._try(_Attempt(peer, False, ways)))
        self._punches.add(punch)
        punch.add_done_callback(self._punches.discard)

    def is_dialing(self, peer: NodeId) -> bool:
        return peer in self._dialing

    async def outcome(self, peer: NodeId, timeout: float) -> None:
        """Wait until the attempt under way, if there is one, has come to something or nothing."""
        task = self._dialing.get(peer)
        if task is not None:
            await asyncio.wait({task}, timeout=timeout)

    def give_up(self, peer: NodeId) -> None:
        """The peer's own dial was faster: drop the attempt under way."""
        task = self._dialing.get(peer)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop everything."""
        self._closed = True
        tasks = [*self._keepers.values(), *self._punches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_linked(self, peer: NodeId) -> None:
        """Dial whenever there is no link, ever more slowly while nobody answers."""
        kick = self._kicks[peer]
        delay = 0.0
        while True:
            kick.clear()
            if self._is_linked(peer):
                await kick.wait()
                delay = FIRST_RETRY_S
                continue
            if delay:
                await _wait_for(kick, delay * (0.5 + self._random()))
                if self._is_linked(peer):
                    continue
            under_way = self._dialing.get(peer)
            if under_way is not None:
                await asyncio.wait({under_way})
            elif not await self._try(_Attempt(peer, True)):
                delay = min(max(delay * 2, FIRST_RETRY_S), LAST_RETRY_S)

    def _to(self, address: str, peer: NodeId, timeout: float) -> Reach:
        return lambda: self._lane.dial(address, expect=peer, timeout=timeout)

    async def _try(self, attempt: _Attempt) -> bool:
        peer = attempt.peer
        self._attempts[peer] = attempt
        task = self._dialing[peer] = asyncio.get_running_loop().create_task(self._dial(attempt))
        try:
            await asyncio.wait({task})
        finally:
            if self._dialing.get(peer) is task:
                del self._dialing[peer], self._attempts[peer]
            task.cancel()
        if task.cancelled():
            return False
        error = task.exception()
        if isinstance(error, AdmissionError):
            self._on_refused(peer, error)
        if isinstance(error, MeshError):
            log.debug("dialing %s: %s", peer, error.message)
            return False
        return task.result() is not None

    async def _dial(self, attempt: _Attempt) -> Link | None:
        """Try the usual addresses one after the other, each with a head start, until one answers."""
        tried: set[str] = set()
        dials: set[asyncio.Task[Connection]] = set()
        failures: list[MeshError] = []
        winner: Connection | None = None
        try:
            while winner is None:
                now, attempt.at_once = attempt.at_once, []
                # Looked up each time: what somebody announces meanwhile need not wait until all old ones have failed.
                address = self._next(attempt, tried)
                if address is not None:
                    tried.add(address)
                    now = [*now, self._to(address, attempt.peer, DIAL_TIMEOUT_S)]
                dials |= {asyncio.get_running_loop().create_task(_await(reach)) for reach in now}
                if not dials:
                    break
                done = await _first(dials, attempt, STAGGER_S)
                dials -= done
                for ended in done:
                    error = ended.exception()
                    if isinstance(error, MeshError):
                        failures.append(error)
                    elif error is not None:
                        raise error
                    elif winner is None:
                        winner = ended.result()
                    else:
                        _close_late(ended)
        finally:
            for left in dials:
                left.cancel()
                left.add_done_callback(_close_late)
        if winner is not None:
            return await self._introduce(winner)
        if failures:
            raise failures[0]
        return None

    def _next(self, attempt: _Attempt, tried: set[str]) -> str | None:
        if not attempt.usual or len(tried) >= MAX_TRIED:
            return None
        known = (*self._book.addresses(attempt.peer), *self._hints.get(attempt.peer, ()))
        return next((address for address in known if address not in tried), None)


async def _await(reach: Reach) -> Connection:
    return await reach()


async def _first(
    dials: set[asyncio.Task[Connection]], attempt: _Attempt, timeout: float | None
) -> set[asyncio.Task[Connection]]:
    """Those of ``dials`` that ended, as soon as one has, or there is more to dial, or the time is up."""
    more = asyncio.get_running_loop().create_task(attempt.more.wait())
    try:
        await asyncio.wait({*dials, more}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        more.cancel()
    attempt.more.clear()
    return {dial for dial in dials if dial.done()}


def _close_late(dial: asyncio.Task[Connection]) -> None:
    if not dial.cancelled() and dial.exception() is None:
        dial.result().close(0, "another address was faster")


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
