"""What members of large meshes say to each other:  bin/sim --scale 5 32 100 1000.

One real core among others that answer as real ones do; every member's lot is the same. Sizes are those of the codec.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from msgspec.structs import replace

from mesh.identity.grants import found_mesh, sign_grant
from mesh.identity.key import NodeKey
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.events import Broadcast, Effect, Event, LinkUp, MemberLost, Received, Send, Tick
from mesh.wire.codec import encode
from mesh.wire.facts import Device, ModelCost, NodeFacts, NodeId
from mesh.wire.messages import Control, Members, Ping, Pong, Rumour
from tests.sim.fakes import facts_of

DELAY_S = 0.010
WATCHED_S = 60.0
BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
MODEL = ModelCost(
    fingerprint="0" * 64,
    name="some-model-of-7b.Q8_0",
    architecture="llama",
    size_bytes=7_000_000_000,
    n_layers=32,
    n_embd=4096,
    n_vocab=32_000,
    n_ctx_train=32_768,
    layer_bytes=(215_000_000,) * 32,
    input_bytes=140_000_000,
    output_bytes=140_000_000,
    kv_bytes_per_token=(16_384,) * 32,
)


def _facts(index: int) -> NodeFacts:
    """As large as a usual machine's: two models on its disk, three addresses."""
    name = "".join(BASE32[index // 32**place % 32] for place in (2, 1, 0)) + "a" * 23
    device = Device("CPU", "cpu", "some processor", 16_000_000_000, 12_000_000_000)
    models = (MODEL, replace(MODEL, fingerprint="1" * 64))
    addresses = ("192.168.178.20:7842", "[2001:db8::1:2:3:4]:7842", "203.0.113.7:7842")
    return replace(facts_of(0, id=name), name=f"machine-{index}", devices=(device,), models=models, addresses=addresses)


@dataclass(frozen=True)
class Load:
    """What one member of a mesh of ``n`` sends and bears, at rest unless said otherwise."""

    n: int
    messages_per_s: float
    bytes_per_s: float
    cpu: float
    """Share of one processor that the core takes."""
    detection_s: list[float]
    join_bytes: int
    """That one member sends when a machine joins, to it and to the others."""
    newcomer_gets: int
    grants_bytes: int
    """The roster, once for each link."""


class Member:
    """One real core among ``n``; the others answer pings, ask when their turn comes, and may fall silent."""

    def __init__(self, n: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        facts = [_facts(i) for i in range(n)]
        self.me = facts[n // 2]
        self.peers = {each.id: each for each in facts if each is not self.me}
        self.core = Membership(self.me, 1 << BOOT_SHIFT)
        self.now = 0.0
        self.silent: set[NodeId] = set()
        self.sent = self.bytes = 0
        self.cpu = 0.0
        self.lost: list[tuple[NodeId, float]] = []
        self._heap: list[tuple[float, int, NodeId, Event | None]] = []
        self._n = 0
        self._last: dict[NodeId, float] = {}
        self._counts = False
        self._interval = 0.25 * max(1.0, n / 32)
        for peer, known in self.peers.items():
            self.feed(LinkUp(peer, known))
            self.feed(Received(peer, Rumour(peer, 1 << BOOT_SHIFT, "alive")))
            if peer < self.me.id:
                self._push(self.rng.random() * self._interval, peer, None)
        self._counts = True
        self.cpu = 0.0

    def feed(self, event: Event) -> list[Effect]:
        began = time.perf_counter()
        effects = self.core.handle(event, self.now)
        self.core.next_timer()
        self.cpu += time.perf_counter() - began
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect.peer, effect.message)
            elif isinstance(effect, Broadcast):
                for peer in self.peers:
                    self._send(peer, effect.message)
            elif isinstance(effect, MemberLost):
                self.lost.append((effect.node, self.now))
        return effects

    def run(self, until: float) -> None:
        while True:
            due = self.core.next_timer()
            event_at = self._heap[0][0] if self._heap else until
            if due is not None and due <= min(event_at, until):
                self.now = max(self.now, due)
                self.feed(Tick())
            elif event_at < until:
                self.now, _, peer, event = heappop(self._heap)
                self._happens(peer, event)
            else:
                self.now = until
                return

    def _happens(self, peer: NodeId, event: Event | None) -> None:
        if peer in self.silent:
            return
        if event is not None:
            self.feed(event)
            return
        # The peer's own probe: an interval after it heard us last.
        quiet = self.now - self._last.get(peer, -1.0)
        if quiet >= self._interval:
            self._last[peer] = self.now
            self._push(self.now + DELAY_S, peer, Received(peer, Ping(1)))
        self._push(self.now + max(0.01, self._interval - max(0.0, min(quiet, self._interval))), peer, None)

    def _send(self, peer: NodeId, message: Control) -> None:
        if not self._counts:
            return
        self.sent += 1
        self.bytes += len(encode(message))
        self._last[peer] = self.now + DELAY_S
        if isinstance(message, Ping):
            self._push(self.now + 2 * DELAY_S, peer, Received(peer, Pong(message.seq)))

    def _push(self, at: float, peer: NodeId, event: Event | None) -> None:
        self._n += 1
        heappush(self._heap, (at, self._n, peer, event))


def measure(n: int, victims: int = 20) -> Load:
    member = Member(n)
    member.run(WATCHED_S)
    per_s, bytes_per_s, cpu = member.sent / WATCHED_S, member.bytes / WATCHED_S, member.cpu / WATCHED_S
    fell: dict[NodeId, float] = {}
    for victim in member.rng.sample(sorted(member.peers), min(victims, n - 1)):
        member.run(member.now + member.rng.random() * 2)
        member.silent.add(victim)
        fell[victim] = member.now
    member.run(member.now + 60)
    took = sorted(when - fell[node] for node, when in member.lost)
    assert {node for node, _ in member.lost} == set(fell), "the silent ones, and nobody else"

    newcomer = _facts(n)
    before = Member(n, seed=2)
    before.peers[newcomer.id] = newcomer
    effects = before.feed(LinkUp(newcomer.id, newcomer))
    to_newcomer = sum(len(encode(e.message)) for e in effects if isinstance(e, Send))
    return Load(n, per_s, bytes_per_s, cpu, took, before.bytes, n * to_newcomer, _grants_bytes(n))


def _grants_bytes(n: int) -> int:
    key = NodeKey.from_seed(b"f" * 32)
    mine = found_mesh(key, 0)
    other = sign_grant(key, mesh=key.id, subject=b"s" * 32, role="worker", wall=1.8e9)
    return len(encode(Members((), (mine,)))) + (n - 1) * (
        len(encode(Members((), (mine, other)))) - len(encode(Members((), (mine,))))
    )


def table(sizes: Iterable[int]) -> str:
    lines = [
        "| members | messages/s sent | KB/s sent | processor | crash noticed, p50 / max | a join: each member sends | "
        "the newcomer gets | grants |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in sizes:
        load = measure(n)
        took = load.detection_s
        lines.append(
            f"| {n} | {load.messages_per_s:.0f} | {load.bytes_per_s / 1000:.1f} | {load.cpu:.1%} | "
            f"{took[len(took) // 2]:.2f} / {took[-1]:.2f} s | {load.join_bytes / 1e3:,.0f} KB | "
            f"{load.newcomer_gets / 1e6:,.1f} MB | {load.grants_bytes / 1e3:,.0f} KB |"
        )
    return "\n".join(lines)


def main(sizes: list[int]) -> int:
    print(table(sizes))
    return 0
