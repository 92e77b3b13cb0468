"""Links between simulated nodes: in-order streams that stall in a cut, break when idle, and are dialed again."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mesh.membership.dialer import DIAL_TIMEOUT_S, FIRST_RETRY_S, LAST_RETRY_S

STANDSTILL = 50_000
"""Things done at one and the same moment."""


class Clock:
    """Virtual time: a heap of things to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._began = 0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._n = 0

    def at(self, when: float, do: Callable[..., object], *args: Any) -> None:
        self._n += 1
        heapq.heappush(self._heap, (max(when, self.now), self._n, do, args))

    def after(self, delay: float, do: Callable[..., object], *args: Any) -> None:
        self.at(self.now + delay, do, *args)

    def run(self, until: float) -> None:
        """Do all that is due until then. May be called by what is being done: for somebody who waits, time passes."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, do, args = heapq.heappop(heap)
            if when > self.now:
                self.now, self._began = when, self.steps
            self.steps += 1
            if self.steps - self._began > STANDSTILL:
                raise RuntimeError(f"time stands still at {self.now:.3f} s: a timer that is due stays due")
            try:
                do(*args)
            except DiedError as died:
                died.end()
        self.now = max(self.now, until)


class DiedError(Exception):
    """The process of a node ended in the middle of what it was doing."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self.end = end


@dataclass(eq=False)
class Link:
    """One connection. ``ends`` holds those that still think it is up."""

    a: str
    b: str
    ends: set[str]
    last: dict[str, float]
    """By receiver: when it last got a packet."""
    due: dict[str, float] = field(default_factory=dict)
    stuck: dict[str, list[Any]] = field(default_factory=dict)
    """By receiver: what waits for the path to open."""

    def other(self, end: str) -> str:
        return self.b if end == self.a else self.a


@dataclass(frozen=True)
class Weather:
    """What the paths are like. ``rough``: messages may come twice and out of order, which real streams never do."""

    delay: float = 0.01
    jitter: float = 0.02
    loss: float = 0.01
    rough: float = 0.0
    idle: float = 4.0


RESENT_AFTER_S = (0.0, 0.3, 0.9, 2.1, 4.5)
"""The first packet of a dial that gets no answer is sent again: a probe timeout, doubled each time."""


class Network:
    """Carries messages between ``nodes`` (:class:`tests.sim.node.Node`), and links them where their doors agree."""

    def __init__(self, clock: Clock, rng: random.Random, weather: Weather, nodes: dict[str, Any]) -> None:
        self.clock = clock
        self.rng = rng
        self.weather = weather
        self.nodes = nodes
        self.closed: set[tuple[str, str]] = set()
        """Directed paths nothing passes."""
        self.slow: dict[tuple[str, str], float] = {}
        """Seconds more that a directed path takes: a full queue somewhere."""
        self.link: dict[tuple[str, str], Link] = {}
        """(whose view, peer) -> the link it thinks is up."""
        self._seeking: set[tuple[str, int, str]] = set()
        """(who, in which of its runs, whom): one that dies as it begins to look must not keep the next from looking."""

    # -- packets -------------------------------------------------------------------------------------------------------

    def is_open(self, a: str, b: str) -> bool:
        return (a, b) not in self.closed and (b, a) not in self.closed

    def latency(self) -> float:
        delay = self.weather.delay + self.weather.jitter * self.rng.random()
        wait = 0.1
        while self.rng.random() < self.weather.loss:
            delay += wait  # sent again after a probe timeout, doubled each time
            wait *= 2
        return delay

    def send(self, sender: str, receiver: str, message: Any) -> None:
        link = self.link.get((sender, receiver))
        if link is None:
            return
        when = self.clock.now + self.latency() + self.slow.get((sender, receiver), 0.0)
        if self.rng.random() < self.weather.rough:
            self.clock.at(when + self.rng.random() * 0.3, self._arrive, link, sender, receiver, message)
            if self.rng.random() < 0.5:
                return
        else:
            when = link.due[receiver] = max(when, link.due.get(receiver, 0.0))
        self.clock.at(when, self._arrive, link, sender, receiver, message)

    def _arrive(self, link: Link, sender: str, receiver: str, message: Any) -> None:
        if (sender, receiver) in self.closed or link.stuck.get(receiver):
            link.stuck.setdefault(receiver, []).append(message)
            return
        if receiver not in link.ends:
            return
        link.last[receiver] = self.clock.now
        self.nodes[receiver].deliver(sender, message, link)

    def set_path(self, sender: str, receiver: str, is_open: bool) -> None:
        if not is_open:
            self.closed.add((sender, receiver))
            return
        self.closed.discard((sender, receiver))
        mine, theirs = self.link.get((sender, receiver)), self.link.get((receiver, sender))
        for link in [mine] if mine is theirs else [mine, theirs]:
            if link is not None and link.stuck.get(receiver):
                # The probe timeout has backed off meanwhile.
                self.clock.after(self.rng.random(), self._flush, link, sender, receiver)

    def _flush(self, link: Link, sender: str, receiver: str) -> None:
        if (sender, receiver) in self.closed:
            return
        waiting, link.stuck[receiver] = link.stuck.get(receiver, []), []
        for message in waiting:
            self._arrive(link, sender, receiver, message)

    # -- links ---------------------------------------------------------------------------------------------------------

    def housekeeping(self, node: str) -> None:
        """What a node's transport does now and then: give up silent links, look for missing ones."""
        for peer in self.nodes[node].wanted:
            link = self.link.get((node, peer))
            if link is None:
                self.seek(node, peer)
            elif self.clock.now - link.last[node] > self.weather.idle:
                self.close(node, peer, "timeout")

    def seek(self, node: str, peer: str, delay: float = 0.0) -> None:
        """``node`` keeps dialing ``peer``, unless it does so already (see :mod:`mesh.membership.dialer`)."""
        boot = self.nodes[node].boots
        if (node, boot, peer) not in self._seeking and node != peer:
            self._seeking.add((node, boot, peer))
            self.clock.after(delay * (0.5 + self.rng.random()), self._dial, node, boot, peer, 0.0)

    def _dial(self, node: str, boot: int, peer: str, delay: float) -> None:
        mine, theirs = self.nodes.get(node), self.nodes.get(peer)
        if mine is None or mine.boots != boot or not mine.is_running:
            return
        if theirs is None or peer not in mine.wanted or (node, peer) in self.link:
            self._seeking.discard((node, boot, peer))
            return
        for resent in RESENT_AFTER_S:
            self.clock.after(resent, self._knock, node, boot, peer)
        pause = min(max(delay * 2, FIRST_RETRY_S), LAST_RETRY_S)
        self.clock.after(DIAL_TIMEOUT_S + pause * (0.5 + self.rng.random()), self._dial, node, boot, peer, pause)

    def _knock(self, node: str, boot: int, peer: str) -> None:
        mine, theirs = self.nodes.get(node), self.nodes.get(peer)
        if mine is None or mine.boots != boot or not mine.is_awake or (node, peer) in self.link:
            return
        if theirs is not None and self.is_open(node, peer) and theirs.is_awake:
            self.clock.after(2 * self.latency(), self._connected, mine, theirs)

    def close(self, node: str, peer: str, reason: str) -> None:
        """``node`` ends its link to ``peer`` and says so, which ``peer`` learns if the path is open."""
        link = self.link.pop((node, peer), None)
        if link is None:
            return
        link.ends.discard(node)
        self.nodes[node].link_down(peer, reason)
        self.seek(node, peer, FIRST_RETRY_S)
        if (node, peer) not in self.closed:
            self.clock.after(self.latency() + 0.05, self._closed, link, peer, node)

    def _closed(self, link: Link, node: str, peer: str) -> None:
        if node in link.ends and self.link.get((node, peer)) is link:
            del self.link[(node, peer)]
            link.ends.discard(node)
            self.nodes[node].link_down(peer, "closed")
            self.seek(node, peer, FIRST_RETRY_S)

    def vanish(self, node: str) -> None:
        """The process is gone without a word; nobody is told."""
        for key in [key for key in self.link if key[0] == node]:
            self.link.pop(key).ends.discard(node)
        self._seeking = {pair for pair in self._seeking if pair[0] != node}

    def _connected(self, dialer: Any, peer: Any) -> None:
        a, b = dialer.id, peer.id
        mine, theirs = self.link.get((a, b)), self.link.get((b, a))
        here = self.nodes.get(a) is dialer and self.nodes.get(b) is peer
        if mine is not None or not here or not dialer.is_awake or not peer.is_awake or not self.is_open(a, b):
            return
        theirs_says = peer.greets(dialer)
        mine_says = dialer.greets(peer) if theirs_says is not None else None
        if theirs_says is None or mine_says is None:
            return
        if theirs is not None:
            theirs.ends.clear()  # replaced: the peer had not noticed that the old one is dead
            del self.link[(b, a)]
            boot = peer.boots
            peer.link_down(a, "closed")
            if not peer.is_running or peer.boots != boot:
                return  # it died of that: nobody is there to be linked with
        now = self.clock.now
        link = Link(a, b, {a, b}, {a: now, b: now})
        self.link[(a, b)] = self.link[(b, a)] = link
        peer.do(peer.boots, peer.link_up, dialer, theirs_says)
        dialer.do(dialer.boots, dialer.link_up, peer, mine_says)
