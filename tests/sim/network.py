"""Links between simulated nodes: in-order streams that stall in a cut, break when idle, and are dialed again."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Clock:
    """Virtual time: a heap of things to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._n = 0

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        self._n += 1
        heapq.heappush(self._heap, (max(when, self.now), self._n, do, args))

    def after(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay, do, *args)

    def step(self) -> None:
        self.now, _, do, args = heapq.heappop(self._heap)
        self.steps += 1
        do(*args)

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.step()
        self.now = until


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


class Network:
    """Carries messages between ``nodes``, which offer ``is_up``, ``deliver``, ``link_up`` and ``link_down``."""

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
        if receiver not in link.ends or not self.nodes[receiver].is_running:
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
        """What a node's transport does now and then: give up silent links, dial missing ones."""
        for peer in self.nodes:
            if peer == node:
                continue
            link = self.link.get((node, peer))
            if link is None:
                self._dial(node, peer)
            elif self.clock.now - link.last[node] > self.weather.idle:
                self.close(node, peer, "timeout")

    def close(self, node: str, peer: str, reason: str) -> None:
        """``node`` ends its link to ``peer`` and says so, which ``peer`` learns if the path is open."""
        link = self.link.pop((node, peer), None)
        if link is None:
            return
        link.ends.discard(node)
        self.nodes[node].link_down(peer, reason)
        if (node, peer) not in self.closed:
            self.clock.after(self.latency() + 0.05, self._closed, link, peer, node)

    def _closed(self, link: Link, node: str, peer: str) -> None:
        if node in link.ends and self.link.get((node, peer)) is link and self.nodes[node].is_running:
            del self.link[(node, peer)]
            link.ends.discard(node)
            self.nodes[node].link_down(peer, "closed")

    def vanish(self, node: str) -> None:
        """The process is gone without a word; nobody is told."""
        for key in [key for key in self.link if key[0] == node]:
            self.link.pop(key).ends.discard(node)

    def _dial(self, node: str, peer: str) -> None:
        if self.is_open(node, peer) and self.nodes[peer].is_awake:
            self.clock.after(2 * self.latency(), self._connected, node, peer)

    def _connected(self, dialer: str, peer: str) -> None:
        mine, theirs = self.link.get((dialer, peer)), self.link.get((peer, dialer))
        ready = self.nodes[dialer].is_awake and self.nodes[peer].is_awake and self.is_open(dialer, peer)
        if mine is not None or not ready:
            return
        if theirs is not None:
            theirs.ends.clear()  # replaced: the peer had not noticed that the old one is dead
        now = self.clock.now
        link = Link(dialer, peer, {dialer, peer}, {dialer: now, peer: now})
        self.link[(dialer, peer)] = self.link[(peer, dialer)] = link
        self.nodes[peer].link_up(dialer)
        self.nodes[dialer].link_up(peer)
