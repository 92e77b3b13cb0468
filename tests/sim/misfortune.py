"""Everything that goes wrong, by seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mesh.errors import AdmissionError
from mesh.wire.facts import NodeId

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World


class Misfortune:
    """Strikes until all is healed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        rng = self.rng
        self.over = False
        self.engine_failure = rng.choice([0.0, 0.0, 0.05, 0.3])
        self.engines_failed = False
        """By themselves, once or more."""
        self.slow_stops = rng.choice([0.0, 0.0, 0.2])
        self.slow_disk = rng.choice([0.0, 0.0, 0.1, 0.5])
        # Records of who belongs are dated by wall clocks: with clocks hours apart, revoking means little.
        self.clocks_jump = rng.random() < 0.3
        self.revocations = 0 if self.clocks_jump else rng.choice([0, 0, 1, 2])

    def begin(self, seconds: float) -> None:
        clock, rng = self.world.clock, self.rng
        end = clock.now + seconds
        pace = rng.choice([0.5, 1.5, 4.0])
        at = clock.now
        while (at := at + rng.expovariate(1 / pace)) < end:
            clock.at(at, self._strike)

    def _strike(self) -> None:
        if self.over:
            return
        rng, world = self.rng, self.world
        nodes = list(world.nodes)
        node = world.nodes[rng.choice(nodes)]
        for_s = rng.choice([0.3, 1.0, 3.0, 6.0]) * (0.5 + rng.random())
        match rng.randint(0, 15):
            case 0 | 1:
                self._crash(node, for_s)
            case 2:
                self.world.note(f"{node.id[0]} sleeps {for_s:.2f} s")
                world.expect_trouble([node.id], for_s)
                node.stall(for_s)
            case 3:
                self._cut([(node.id, rng.choice(nodes))], for_s)
            case 4:
                other = rng.choice(nodes)
                self._cut([(node.id, other), (other, node.id)], for_s)
            case 5:
                self._cut([p for o in nodes for p in ((node.id, o), (o, node.id))], for_s)
            case 6:
                side = {n for n in nodes if rng.random() < 0.5}
                self._cut([(a, b) for a in nodes for b in nodes if (a in side) != (b in side)], for_s)
            case 7 if node.is_member and node.engine.process is not None:
                world.note(f"the engine of {node.id[0]} dies")
                node.do(node.boots, node.engine.kill)
            case 8 if node.is_awake and node.is_member:
                world.note(f"{node.id[0]} leaves")
                node.do(node.boots, node.leave)
                self.later(0.5 + for_s, self._restart, node)
            case 9 if node.is_awake and node.is_member:
                world.note(f"{node.id[0]} drains")
                node.do(node.boots, node.drain)
                self.later(1.0, node.do, node.boots, node.leave)
                self.later(1.5 + for_s, self._restart, node)
            case 10 | 11:
                self._slow(node.id, rng.choice(nodes), for_s)
            case 12 | 13 if node.is_awake and node.is_member:
                node.fuse = rng.randint(0, 12)
                world.expect_trouble([node.id], for_s)
                self.later(for_s + 1.0, self._restart, node)
            case 14:
                self._wipe(node, for_s)
            case 15 if self.clocks_jump:
                node.wall_offset += rng.choice([-7200.0, -1.5, -0.01, 0.7, 3600.0])
                world.note(f"the wall clock of {node.id[0]} jumps to {node.wall_offset:+.2f} s")
            case 15 if self.revocations:
                self._revoke(node, for_s)

    # -- what strikes --------------------------------------------------------------------------------------------------

    def _crash(self, node: Node, for_s: float) -> None:
        if node.is_running:
            self.world.note(f"{node.id[0]} crashes")
            if node.is_awake:
                self.world.crashed_at[node.id] = self.world.clock.now
            node.crash()
            self.later(for_s, self._restart, node)

    def _restart(self, node: Node) -> None:
        if not node.is_running and not self._stays_out(node) and self.world.nodes.get(node.id) is node:
            node.start()

    def _stays_out(self, node: Node) -> bool:
        return node.id in self.world.revoked

    def _wipe(self, node: Node, for_s: float) -> None:
        """The disk is lost, and the key with it: the machine comes back as a node that nobody knows."""
        if node.is_running and self._could_invite(without=node):
            self._crash(node, for_s + 60)
            self.later(for_s, self.world.replace, node)

    def _could_invite(self, without: Node) -> bool:
        others = [n for n in self.world.nodes.values() if n is not without and not self._stays_out(n)]
        return sum(n.is_member and n.facts.role == "worker" for n in others) >= 2

    def _revoke(self, revoker: Node, for_s: float) -> None:
        others = [n for n in self.world.nodes.values() if n is not revoker and n.id not in self.world.revoked]
        if not revoker.is_awake or not revoker.is_member or len(others) < 2:
            return
        subject = self.rng.choice(others)
        if not self._could_invite(without=subject):
            return
        self.world.note(f"{revoker.id[0]} revokes {subject.id[0]}")
        revoker.do(revoker.boots, self._say_revoked, revoker, subject, for_s)

    def _say_revoked(self, revoker: Node, subject: Node, for_s: float) -> None:
        assert revoker.house is not None
        again = self.rng.random() < 0.5
        self.world.expect_trouble([subject.id], for_s)
        try:
            revoker.house.expulsion.revoke(subject.id)
        except AdmissionError as error:
            self.world.note(f"... which it may not: {error.message}")
            return
        self.revocations -= 1
        self.world.revoked.add(subject.id)
        if again:
            self.later(for_s + 1.0, self._invite_again, subject)

    def _invite_again(self, node: Node) -> None:
        """Somebody thinks better of it."""
        if self.world.nodes.get(node.id) is node:
            self.world.note(f"{node.id[0]} is to be invited again")
            self.world.revoked.discard(node.id)
            node.crash()
            if node.disk.record is not None:
                node.disk.record = node.disk.record.without_us()
            node.start()

    def _cut(self, paths: list[tuple[NodeId, NodeId]], for_s: float) -> None:
        world = self.world
        world.note("cut " + " ".join(f"{a[0]}>{b[0]}" for a, b in paths if a != b))
        world.expect_trouble([n for pair in paths for n in pair], for_s)
        for a, b in paths:
            if a != b:
                world.network.set_path(a, b, False)
                world.clock.after(for_s, world.network.set_path, a, b, True)

    def _slow(self, a: NodeId, b: NodeId, for_s: float) -> None:
        extra = self.rng.choice([0.3, 0.6, 1.0])
        self.world.note(f"{extra} s more from {a[0]} to {b[0]}")
        self.world.expect_trouble([a, b], for_s)
        self.world.network.slow[(a, b)] = extra
        self.world.clock.after(for_s, self.world.network.slow.pop, (a, b), None)

    def later(self, delay: float, do: Callable[..., Any], *args: Any) -> None:
        """More misfortune to come, unless all is healed before."""
        self.world.clock.after(delay, lambda: None if self.over else do(*args))

    # -- peace ---------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        world = self.world
        world.note("all is healed")
        self.over = True
        self.engine_failure = self.slow_disk = self.slow_stops = 0.0
        world.network.slow.clear()
        for a, b in sorted(world.network.closed):
            world.network.set_path(a, b, True)
        self._leave_one_down()
        for node in list(world.nodes.values()):
            node.fuse = None
            if node.is_running and not node.is_awake:
                node.stalled_until = world.clock.now
                node.resume(node.boots)
            going = node.is_running and (node.facts.draining or node.has_left or node.was_expelled)
            if (not node.is_running or going) and not self._stays_out(node) and node.id not in world.down:
                node.crash()
                node.start()

    def _leave_one_down(self) -> None:
        """A machine may be off for good."""
        nodes = [node for node in self.world.nodes.values() if not self._stays_out(node)]
        off = [node for node in nodes if not node.is_running]
        if off and self.rng.random() < 0.5 and any(n.is_member and n.facts.role == "worker" for n in nodes):
            one = self.rng.choice(off)
            self.world.note(f"{one.id[0]} stays off")
            self.world.down.add(one.id)
