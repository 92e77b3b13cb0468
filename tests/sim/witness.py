"""What must never be false, checked at every step that could make it so. The names are those of docs/invariants.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.election import events as el
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from tests.sim.fakes import LAYERS

if TYPE_CHECKING:
    from tests.sim.admission import Token
    from tests.sim.engine import Process
    from tests.sim.ingress import Attempt, Client, Question
    from tests.sim.network import Clock
    from tests.sim.node import Node


class InvariantError(AssertionError):
    """An invariant does not hold. The message names it, the seed and the moment."""


class Witness:
    """Told by the nodes what they do, and judges it by what it was told before."""

    seed: int
    clock: Clock
    nodes: dict[NodeId, Node]

    def __init__(self, story: list[str] | None) -> None:
        self.story = story
        self.layouts: dict[Epoch, tuple[Any, ...]] = {}
        self.epoch_of: dict[NodeId, Epoch] = {}
        """What each node last adopted, crashes included."""
        self.boot_of: dict[NodeId, int] = {}
        self.lineage: dict[NodeId, set[Epoch]] = {}
        self.routes: dict[NodeId, el.Served | None] = {}
        self.crashed_at: dict[NodeId, float] = {}
        self.trouble_until: dict[NodeId, float] = {}
        self.detected: list[float] = []
        self.evicted_alive = 0
        self.revoked: set[NodeId] = set()
        """Thrown out, and not invited again."""
        self.down: set[NodeId] = set()
        """Crashed, and not started again."""
        self.listening: set[tuple[NodeId, Epoch]] = set()
        """Whose rpc-server was ever ready, and for which epoch."""
        self.served_shapes: set[Any] = set()
        self.outcomes: dict[str, int] = {}
        """By what became of requests."""
        self.deaths_midway = 0

    def fail(self, what: str) -> None:
        raise InvariantError(f"seed {self.seed}, t={self.clock.now:.3f} s: {what}")

    def note(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.clock.now:9.3f}  {text}")

    # -- life ----------------------------------------------------------------------------------------------------------

    def started(self, node: Node) -> None:
        self.routes[node.id] = None
        self.lineage[node.id] = set()
        self.crashed_at.pop(node.id, None)
        me = node.membership.view().find(node.id)
        number = 0 if me is None else me.boot
        if number <= self.boot_of.get(node.id, 0):
            self.fail(f"M1: two runs of {node.id[0]} go by the number {number}, or the later by a smaller one")
        self.boot_of[node.id] = number
        self.expect_trouble([node.id], 0.0)  # verdicts on its last run may still come

    def gone(self, node: Node) -> None:
        """Its process ended, and with it the connections of its clients."""
        self._count("gone with its node", len(node.ingress.clients))
        node.ingress.clients.clear()

    def died_midway(self, node: Node) -> None:
        self.note(f"{node.id[0]} dies in the middle of a step")
        self.deaths_midway += 1
        if node.is_awake:
            self.crashed_at[node.id] = self.clock.now

    def expect_trouble(self, nodes: list[NodeId], for_s: float) -> None:
        """Until then (and some time of recovery) verdicts are not held against the detector."""
        for node in nodes:
            self.trouble_until[node] = max(self.trouble_until.get(node, 0.0), self.clock.now + for_s + 5.0)

    def lost(self, judge: Node, node: NodeId, reason: str) -> None:
        self.note(f"{judge.id[0]} loses {node[0]}: {reason}")
        if reason not in ("crashed", "unreachable"):
            return
        crashed = self.crashed_at.get(node)
        now = self.clock.now
        if crashed is not None:
            if now > self.trouble_until.get(judge.id, 0.0) and crashed > self.trouble_until.get(node, 0.0):
                self.detected.append(now - crashed)
            return
        subject = self.nodes.get(node)
        calm = max(self.trouble_until.get(n, 0.0) for n in (judge.id, node)) < now
        if calm and subject is not None and subject.is_awake and subject.is_member and not subject.has_left:
            self.evicted_alive += 1

    # -- S1, S2: epochs ------------------------------------------------------------------------------------------------

    def adopted(self, node: Node, effect: el.Adopt) -> None:
        shape = None if effect.layout is None else effect.layout.shape()
        ring = "" if effect.layout is None else "".join(m.id[0] for m in effect.layout.ring)
        number = f"({effect.epoch.number},{effect.epoch.coordinator[0]})"
        lifts = "" if effect.lifts == NO_EPOCH else f" lifts {effect.lifts.number}"
        self.note(f"{node.id[0]} adopts {number} {ring or '-'}{lifts}: {effect.reason}")
        known = self.layouts.setdefault(effect.epoch, (shape,))
        if known != (shape,):
            self.fail(f"S1: epoch {effect.epoch} has two layouts: {known[0]} and {shape}")
        before = self.epoch_of.get(node.id, NO_EPOCH)
        fresh = not self.lineage[node.id]
        if effect.epoch.number < before.number or (effect.epoch <= before and not fresh):
            self.fail(f"S2: {node.id[0]} went from epoch {before} back to {effect.epoch}")
        remembered = 0 if node.disk.record is None else node.disk.record.epoch
        if effect.epoch.number > remembered:
            self.fail(f"S2: {node.id[0]} follows epoch {effect.epoch.number} but would forget it")
        if effect.lifts == NO_EPOCH:
            self.lineage[node.id] = set()
        self.lineage[node.id].add(effect.epoch)
        self.epoch_of[node.id] = effect.epoch

    # -- S3, S4, S5, S10: engines --------------------------------------------------------------------------------------

    def carried(self, worker: Node, host: Process) -> None:
        """A worker let a host's tunnel in."""
        if host.epoch not in self.lineage[worker.id]:
            follows, guest = self.epoch_of[worker.id], host.node.id[0]
            self.fail(f"S3: {worker.id[0]} follows {follows} but carries for {guest} in {host.epoch}")
        if host.node.id in self.revoked and worker.house is not None:
            key = worker.house.keys.get(host.node.id)
            if key is not None and worker.house.roster.is_revoked(key):
                self.fail(f"A2: {worker.id[0]} carries for {host.node.id[0]}, which it knows to be revoked")
        process = worker.engine.process
        if process is not None and process.carries not in (None, host) and process.carries.is_alive:
            self.fail(f"S4: {worker.id[0]} serves two hosts' tunnels at once")

    def listens(self, worker: Node, epoch: Epoch) -> None:
        """A worker's rpc-server is ready, and its host is told."""
        self.listening.add((worker.id, epoch))

    def turned_away(self, worker: Node, host: Process) -> None:
        """A host's tunnel is not let in."""
        same = self.lineage[worker.id]  # what listened under an earlier number of the same layout has listened
        if host.epoch in same and not any((worker.id, epoch) in self.listening for epoch in same):
            self.fail(f"S10: {host.node.id[0]} opens its tunnels before {worker.id[0]} ever listened")

    def serves(self, node: Node, server: Process) -> None:
        """A token has come through ``server``'s ring."""
        ranges = sorted(m.layers for m in server.layout.ring if m.layers is not None)
        covered = [layer for first, last in ranges for layer in range(first, last + 1)]
        if covered != list(range(LAYERS)):
            self.fail(f"S5: epoch {server.epoch} serves layers {covered}")
        for share in server.layout.ring:
            member = self.nodes.get(share.id)
            if member is None or not member.is_running:
                self.fail(f"S5: epoch {server.epoch} serves with {share.id[0]}, which is dead")
        for share in server.layout.workers:
            worker = self.nodes[share.id].engine.process
            if worker is None or not worker.is_alive or worker.layout.shape() != server.layout.shape():
                self.fail(f"S5: epoch {server.epoch} serves, but {share.id[0]} runs something else")
        self.served_shapes.add(server.layout.shape())

    # -- S6, Q: requests -----------------------------------------------------------------------------------------------

    def routed(self, node: Node, effect: el.Served | el.Unserved) -> None:
        is_end = isinstance(effect, el.Unserved)
        self.note(f"{node.id[0]} {effect}" if is_end else f"{node.id[0]} routes to {effect.host[0]}")
        before = self.routes[node.id]
        if isinstance(effect, el.Unserved):
            if before is None:
                self.fail(f"S6: {node.id[0]} was told twice that nothing serves")
            self.routes[node.id] = None
            return
        if effect.epoch != node.election.epoch:
            self.fail(f"S6: {node.id[0]} follows {node.election.epoch} and routes to {effect.epoch}")
        if self.layouts[effect.epoch][0] not in self.served_shapes:
            self.fail(f"S6: {node.id[0]} routes to {effect.host[0]}, which never served epoch {effect.epoch}")
        self.routes[node.id] = effect

    def dispatched(self, node: Node, epoch: Epoch, host: NodeId) -> None:
        """A request leaves for ``host``."""
        layout = node.election.status().layout
        if layout is None or layout.host != host or not node.election.covers(epoch):
            self.fail(f"S6: {node.id[0]} follows {node.election.epoch} and sends a request to {host[0]} in {epoch}")

    def taken_up(self, question: Question, server: Process) -> None:
        """An engine begins to answer."""
        asker = self.nodes.get(question.ingress)
        if not server.answers:
            self.fail(f"S6: {server.node.id[0]} takes a request before a token came through its ring")
        if asker is not None and asker.is_member and asker.boots == question.boot:
            attempt = asker.ingress.attempts.get(question.request)
            if attempt is not None and attempt.question == question:
                attempt.server = server

    def abandoned(self, node: Node, attempt: Attempt) -> None:
        server = attempt.server
        goes_on = server is not None and server.is_alive and node.election.covers(server.epoch)
        if goes_on and not node.has_left and node.election.status().state == "serving":
            self.fail(f"Q2: {node.id[0]} drops a request although the engine that answers it goes on")

    def settled(self, node: Node, request: int, client: Client | None, how: str) -> None:
        if client is None:
            self.fail(f"Q1: request {request} at {node.id[0]} is settled twice, now: {how}")
        self._count(how)

    def _count(self, how: str, n: int = 1) -> None:
        if n:
            self.outcomes[how] = self.outcomes.get(how, 0) + n

    # -- A: admission --------------------------------------------------------------------------------------------------

    def let_in(self, token: Token, joiner: NodeId) -> None:
        token.admitted.add(joiner)
        if len(token.admitted) > token.uses:
            who = ", ".join(node[0] for node in sorted(token.admitted))
            self.fail(f"A1: an invite for {token.uses} admitted {who}")

    def admitted_link(self, node: Node, other: Node) -> None:
        assert node.house is not None
        if node.house.roster.role_of(other.disk.key.public, node.wall()) is None:
            self.fail(f"A2: {node.id[0]} links with {other.id[0]}, which is no member")

    def shut_out(self, node: Node, other: Node, code: str) -> None:
        self.note(f"{node.id[0]} shuts {other.id[0]} out: {code}")
