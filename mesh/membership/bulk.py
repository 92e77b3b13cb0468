"""Bulk streams to members, over whichever lane is better: the TCP lane beside the links, or the links' own QUIC.

What is decided is decided in :mod:`mesh.transport.choice` and :mod:`mesh.membership.knocks`; here it is carried out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from mesh.clock import Clock
from mesh.errors import MeshError, TransportError
from mesh.membership.knocks import Knocks
from mesh.membership.link import Link
from mesh.transport.address import split_address
from mesh.transport.choice import Event, LaneChoice, Measured, TcpFailed, is_near
from mesh.transport.lane import Path, Stream
from mesh.transport.tcp import TcpLane, digest_of, new_ticket
from mesh.transport.tcpstream import TcpStream
from mesh.wire.codec import encode
from mesh.wire.facts import LinkFact, NodeId
from mesh.wire.messages import Knock, Open, Opened, OpenProbe

log = logging.getLogger(__name__)

TCP_WITHIN_S = 1.0
"""For a stream over TCP to be let in; then QUIC takes it."""
SETTLE_WITHIN_S = 0.5
"""How long a stream waits for the first trial of a fresh link: it may live for days on the lane it begins on."""
KNOCK_WITHIN_S = 1.0
"""A ticket may be shown before its knock has come: the two travel apart."""
TRIAL_WITHIN_S = 3.0
EXAMINED_WITHIN_S = 6.0
MAX_DIALS = 8
"""To one peer at once: under what it takes of strangers from one address."""
MAX_ECHOES = 32
_PINGS = 9
"""Their median is a usual round trip: on a link that jitters five of them were off by a tenth."""
_PING_BYTES = 32
_BURST_BYTES = 32 * 1024
_WARM_BURSTS = 3
"""What follows the first burst, and tells the rate: the first one waits for the window to open."""
_ECHO_BYTES = 256 * 1024
_ECHO_WITHIN_S = 10.0
_LEAST_MS = 0.05
_DRIFT_MS = 2.0
"""The shortest acknowledgements of a minute wander by less."""
_RECENT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Echoes:
    rtt_ms: float
    """The shortest."""
    jitter_ms: float
    """What a usual one took more."""
    burst_ms: float
    rate: float
    """Bytes per second."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found, and the shortest round trip that QUIC's acknowledgements had shown by then."""

    found: Measured
    acknowledged_ms: float

    def over(self, path: str, recent_ms: float) -> tuple[float, float]:
        """Round trip (ms) and rate (bytes per second) of a lane.

        Acknowledgements come with whatever a busy interpreter adds, but they come all the time. So the trial holds,
        and what the shortest of them have grown by since is added. A trial that took longer than they do met a busy
        machine.

        Args:
            recent_ms: the shortest acknowledgement of the last minute.
        """
        if path == "tcp":
            rtt_ms, rate = self.found.rtt_ms, self.found.bytes_per_second
        else:
            rtt_ms, rate = self.found.quic_rtt_ms or recent_ms, self.found.quic_bytes_per_second
        grown = max(recent_ms - self.acknowledged_ms, 0.0)
        shortest = min(rtt_ms, max(recent_ms, _LEAST_MS)) if grown < _DRIFT_MS else rtt_ms + grown
        return shortest + self.found.jitter_ms, rate


@dataclass(frozen=True, slots=True)
class Examined:
    """What a test of one link found.

    Attributes:
        rtt_ms: shortest echo of a small packet.
        burst_ms: echo of ``burst_bytes``, there and back.
        clock_ahead_s: how far the peer's clock is ahead of ours, give or take ``clock_within_s``; None: not told.
    """

    path: Path
    rtt_ms: float
    burst_ms: float
    burst_bytes: int
    clock_ahead_s: float | None
    clock_within_s: float


class BulkLanes:
    """Opens and takes bulk streams.

    Args:
        tcp: None: all goes over QUIC. Its handlers are set here.
        link_of: the link to a member, if there is one.
    """

    def __init__(self, tcp: TcpLane | None, clock: Clock, link_of: Callable[[NodeId], Link | None]) -> None:
        self._tcp = tcp
        self._clock = clock
        self._link_of = link_of
        self._knocks = Knocks()
        self._awaited: dict[bytes, asyncio.Future[None]] = {}
        self._ways: dict[NodeId, _Way] = {}
        self._hosts: dict[NodeId, str] = {}
        """Where each linked peer is; "" behind a relay."""
        self._echoes: set[asyncio.Task[None]] = set()
        if tcp is not None:
            tcp.recognise = self._recognise
            tcp.on_stream = self._arrived

    # -- what the links tell -----------------------------------------------------------------------------------------

    def up(self, link: Link) -> None:
        """A member is connected: see whether it can be reached over TCP, too."""
        self._hosts[link.peer] = _host_of(link)
        if self._tcp is not None and link.facts.tcp and link.connection.path != "relay":
            way = self._ways[link.peer] = _Way(LaneChoice(self._clock.now()))
            way.keeper = asyncio.get_running_loop().create_task(self._keep_choosing(self._tcp, link, way))

    def moved(self, link: Link) -> None:
        """The link goes another way than before: what was found out about lanes is history. Streams over QUIC go on.

        Those over TCP do when only the port is another. A TCP connection cannot follow its peer to another address, and
        would say so after a quarter of an hour; nor is one likely to live on a path that just died under QUIC.
        """
        if self._tcp is not None and self._hosts.get(link.peer) != _host_of(link):
            self._tcp.cut(link.peer, f"{link.peer} is reached at {link.address} now")
        way = self._ways.pop(link.peer, None)
        if way is not None:
            way.end()
        link.path = link.connection.path
        self.up(link)

    def own_addresses_changed(self) -> None:
        """This machine moved: TCP streams cannot follow it either."""
        if self._tcp is not None:
            self._tcp.cut_homeless()

    def down(self, link: Link, reason: str) -> None:
        """The link is lost: nothing of that peer goes on."""
        way = self._ways.pop(link.peer, None)
        if way is not None:
            way.end()
        self._hosts.pop(link.peer, None)
        self._knocks.forget(link.peer)
        if self._tcp is not None:
            self._tcp.cut(link.peer, f"the link to {link.peer} is down: {reason}")

    def knocked(self, link: Link, knock: Knock) -> None:
        """A member is about to show a ticket."""
        if self._knocks.expect(link.peer, knock.digest, self._clock.now()):
            awaited = self._awaited.get(knock.digest)
            if awaited is not None and not awaited.done():
                awaited.set_result(None)

    def echo(self, stream: Stream) -> None:
        """A member tries out a lane: send back what comes, within bounds."""
        if len(self._echoes) >= MAX_ECHOES:
            stream.abort()
            return
        task = asyncio.get_running_loop().create_task(_echo(stream, self._clock.wall()))
        self._echoes.add(task)
        task.add_done_callback(self._echoes.discard)

    def measured(self, link: Link) -> LinkFact | None:
        """What is known of the way that bulk takes to a member now; None before anything was measured.

        To be asked every second or so: it is what remembers the round trips of the last minute.
        """
        if link.rtt_ms is None:
            return None
        way = self._ways.get(link.peer)
        if way is None:
            return LinkFact(link.peer, round(link.rtt_ms, 3))
        recent_ms = way.heard(link.rtt_ms, self._clock.now())
        if way.tried is None:
            return LinkFact(link.peer, round(recent_ms, 3))
        rtt_ms, rate = way.tried.over(way.choice.path, recent_ms)
        return LinkFact(link.peer, round(rtt_ms, 3), round(rate, -3))

    async def examine(self, link: Link) -> Examined:
        """Time a small packet and a burst over the lane that is in use, and compare clocks.

        Raises:
            TransportError: the link broke, or it took too long.
        """
        told: list[float] = []
        asked = self._clock.wall()
        try:
            async with asyncio.timeout(EXAMINED_WITHIN_S):
                stream = await self.open(
                    link, OpenProbe(), EXAMINED_WITHIN_S, heard=lambda opened: told.append(opened.wall)
                )
                heard = self._clock.wall()
                echoes = await self._measure(stream)
        except (TimeoutError, EOFError) as error:
            raise TransportError(f"node {link.peer} did not send back what it got", code="no-answer") from error
        ahead = told[0] - (asked + heard) / 2 if told and told[0] > 0 else None
        return Examined(link.path, echoes.rtt_ms, echoes.burst_ms, _BURST_BYTES, ahead, (heard - asked) / 2)

    async def open(
        self, link: Link, request: Open, timeout: float, *, heard: Callable[[Opened], None] = lambda opened: None
    ) -> Stream:
        """Open a stream for ``request`` over the lane that is better now; raises what :meth:`Link.open_bulk` does."""
        began = self._clock.now()
        way = self._ways.get(link.peer)
        if way is not None and self._tcp is not None:
            if not way.choice.tried:
                await _wait_for(way.settled, min(timeout, SETTLE_WITHIN_S))
            if way.choice.path == "tcp":
                stream = await self._open_over_tcp(self._tcp, link, way, request)
                if stream is not None:
                    left = timeout - (self._clock.now() - began)
                    return await link.open_bulk(request, left, begun=stream, heard=heard)
        return await link.open_bulk(request, timeout - (self._clock.now() - began), heard=heard)

    async def close(self) -> None:
        """Stop every task. The lane is its owner's to close."""
        tasks = [way.keeper for way in self._ways.values() if way.keeper is not None] + [*self._echoes]
        self._ways.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- taking streams ----------------------------------------------------------------------------------------------

    async def _recognise(self, ticket: bytes) -> NodeId | None:
        digest = digest_of(ticket)
        peer = self._knocks.claim(digest, self._clock.now())
        if peer is None:
            knock = self._awaited.setdefault(digest, asyncio.get_running_loop().create_future())
            try:
                await asyncio.wait({knock}, timeout=KNOCK_WITHIN_S)
            finally:
                self._awaited.pop(digest, None)
            peer = self._knocks.claim(digest, self._clock.now())
        return peer

    def _arrived(self, peer: NodeId, stream: TcpStream) -> None:
        link = self._link_of(peer)
        if link is None:
            stream.abort()
        else:
            link.take_stream(stream)

    # -- opening and trying out --------------------------------------------------------------------------------------

    async def _open_over_tcp(self, tcp: TcpLane, link: Link, way: _Way, request: Open) -> TcpStream | None:
        try:
            return await self._dial(tcp, link, way, request)
        except MeshError as error:
            log.info("bulk to %s goes over QUIC: %s", link.peer, error.message)
            self._learn(link, way, TcpFailed())
            way.kick.set()
            return None

    async def _dial(self, tcp: TcpLane, link: Link, way: _Way, request: Open) -> TcpStream:
        async with way.gate:
            ticket, digest = new_ticket()
            link.send(Knock(digest))
            return await tcp.dial(
                link.address, expect=link.peer, ticket=ticket, opening=encode(request), timeout=TCP_WITHIN_S
            )

    async def _keep_choosing(self, tcp: TcpLane, link: Link, way: _Way) -> None:
        while True:
            pause = way.choice.next_timer() - self._clock.now()
            if pause > 0:
                way.kick.clear()
                await _wait_for(way.kick, pause)
                continue
            self._learn(link, way, await self._try_out(tcp, link, way))

    async def _try_out(self, tcp: TcpLane, link: Link, way: _Way) -> Event:
        try:
            async with asyncio.timeout(TRIAL_WITHIN_S):
                stream = await self._dial(tcp, link, way, OpenProbe())
                over_tcp = await self._measure(await link.open_bulk(OpenProbe(), TRIAL_WITHIN_S, begun=stream))
        except (TimeoutError, EOFError, MeshError) as error:
            log.info("%s cannot be reached over TCP at %s: %s", link.peer, link.address, error)
            return TcpFailed()
        jitter_ms = over_tcp.jitter_ms
        found = Measured(over_tcp.rtt_ms, over_tcp.burst_ms, bytes_per_second=over_tcp.rate, jitter_ms=jitter_ms)
        if is_near(over_tcp.rtt_ms):
            return found
        try:
            async with asyncio.timeout(TRIAL_WITHIN_S):
                over_quic = await self._measure(await link.open_bulk(OpenProbe(), TRIAL_WITHIN_S))
        except (TimeoutError, EOFError, MeshError):
            return found
        return replace(
            found,
            quic_burst_ms=over_quic.burst_ms,
            quic_rtt_ms=over_quic.rtt_ms,
            quic_bytes_per_second=over_quic.rate,
            jitter_ms=max(jitter_ms, over_quic.jitter_ms),
        )

    async def _measure(self, stream: Stream) -> _Echoes:
        try:
            pings = sorted([await self._time_echo(stream, _PING_BYTES) for _ in range(_PINGS)])
            ping = pings[0]
            # On a short link that is this machine's doing, or the peer's, and may be over when the plan is carried out.
            jitter = pings[_PINGS // 2] - ping if ping > _DRIFT_MS else 0.0
            return _Echoes(ping, jitter, await self._time_echo(stream, _BURST_BYTES), await self._rate(stream, ping))
        finally:
            stream.abort()

    async def _rate(self, stream: Stream, ping_ms: float) -> float:
        """Bytes per second; 0 where the peer gives up before that, as an older version does."""
        try:
            async with asyncio.timeout(TRIAL_WITHIN_S / 2):
                burst = min([await self._time_echo(stream, _BURST_BYTES) for _ in range(_WARM_BURSTS)])
        except (TimeoutError, EOFError, MeshError):
            return 0.0
        return 2 * _BURST_BYTES / max(burst - ping_ms, _LEAST_MS) * 1000

    async def _time_echo(self, stream: Stream, size: int) -> float:
        began = self._clock.now()
        await stream.write(bytes(size))
        await stream.read_exactly(size)
        return 1000 * (self._clock.now() - began)

    def _learn(self, link: Link, way: _Way, event: Event) -> None:
        if self._ways.get(link.peer) is not way:
            return  # a dial that ended late, to where the peer was before it moved
        way.choice.handle(event, self._clock.now())
        path: Path = "tcp" if way.choice.path == "tcp" else link.connection.path
        if isinstance(event, Measured):
            way.tried = Trial(event, way.heard(link.rtt_ms or event.rtt_ms, self._clock.now()))
        log.info("bulk to %s goes over %s: %s", link.peer, path, event)
        link.path = path
        way.settled.set()


class _Way:
    """To one linked peer."""

    def __init__(self, choice: LaneChoice) -> None:
        self.choice = choice
        self.settled = asyncio.Event()
        self.kick = asyncio.Event()
        self.gate = asyncio.Semaphore(MAX_DIALS)
        self.tried: Trial | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=256)
        self.keeper: asyncio.Task[None] | None = None

    def heard(self, rtt_ms: float, now: float) -> float:
        """Take in a round trip; the shortest of the last minute, ms."""
        self._recent.append((now, rtt_ms))
        while self._recent[0][0] < now - _RECENT_S:
            self._recent.popleft()
        return min(ms for _, ms in self._recent)

    def end(self) -> None:
        self.settled.set()
        if self.keeper is not None:
            self.keeper.cancel()


def _host_of(link: Link) -> str:
    return "" if link.connection.path == "relay" else split_address(link.address)[0]


async def _echo(stream: Stream, wall: float) -> None:
    left = _ECHO_BYTES
    try:
        async with asyncio.timeout(_ECHO_WITHIN_S):
            await stream.write(encode(Opened(wall)))
            while left and (data := await stream.read(left)):
                await stream.write(data)
                left -= len(data)
    except (TimeoutError, MeshError):
        pass
    finally:
        stream.abort()


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
