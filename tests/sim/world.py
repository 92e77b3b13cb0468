"""A mesh in one thread: the real cores on a virtual clock, a seeded network, seeded misfortune, and invariants.

``run_seed(n)`` is a pure function of ``n``: a failing seed replays exactly. The invariants are those of
docs/invariants.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mesh.identity.invite import create_invite
from mesh.identity.key import NodeKey
from mesh.wire.facts import NO_EPOCH, NodeId
from mesh.wire.messages import Join, Joined
from tests.sim.admission import Disk, Token, founded, key_of, signatures_checked_once
from tests.sim.fakes import facts_of, plan
from tests.sim.misfortune import Misfortune
from tests.sim.network import Clock, Network, Weather
from tests.sim.node import Node
from tests.sim.parts import REAL, Parts
from tests.sim.witness import InvariantError as InvariantError
from tests.sim.witness import Witness

ONE_HOST_WITHIN = 5.0
"""Simulated seconds after healing until everyone must follow one epoch; what it really takes is reported."""
SERVED_WITHIN = 12.0
"""... and until it must serve, engines loaded and all."""
ANSWERED_WITHIN = 6.0
"""... and then until every request is answered; where nothing can serve they have as long as they may be held."""
THIEF = 25


@dataclass
class Outcome:
    seed: int
    nodes: int
    steps: int
    simulated_s: float
    one_host_after_s: float
    served_after_s: float
    epochs: int
    detected_s: list[float]
    """Seconds from each crash to each other node's verdict."""
    evicted_alive: int
    """Verdicts on nodes that ran, were awake lately, and could be reached by the judge."""
    requests: dict[str, int]
    deaths_midway: int


class World(Witness):
    """Everything there is."""

    def __init__(self, seed: int, parts: Parts = REAL, story: list[str] | None = None) -> None:
        super().__init__(story)
        self.seed = seed
        self.rng = random.Random(seed)
        self.parts = parts
        self.clock = Clock()
        self.nodes: dict[NodeId, Node] = {}
        self.network = Network(self.clock, self.rng, self._weather(), self.nodes)
        self.hold_s = self.rng.choice([4.0, 10.0])
        self.misfortune = Misfortune(self)
        self._requests = 0
        self._machines = 0
        self._tokens: dict[NodeId, Token] = {}

    def _weather(self) -> Weather:
        return Weather(
            delay=self.rng.choice([0.0005, 0.005, 0.02, 0.15]),
            jitter=self.rng.choice([0.001, 0.02, 0.2]),
            loss=self.rng.choice([0.0, 0.01, 0.05]),
            rough=self.rng.choice([0.0, 0.0, 0.0, 0.1]),
            idle=self.rng.choice([2.0, 8.0, 30.0]),
        )

    # -- machines ------------------------------------------------------------------------------------------------------

    def populate(self) -> None:
        rng = self.rng
        n = rng.randint(2, 9)
        clients = rng.randint(0, min(2, n - 2)) if n > 2 else 0
        roles = ["client"] * clients + ["worker"] * (n - clients)
        rng.shuffle(roles)
        made = [self._machine(role, rng.choice([2, 4, 6, 6, 8, 12])) for role in roles]
        founder = rng.choice([node for node in made if node.facts.role == "worker"])
        late = rng.choice([0, 0, 1, 2])
        others = [node for node in made if node is not founder]
        founded(founder.disk, [(node.disk, node.facts.role) for node in others[late:]])
        for node in made:
            self.clock.at(rng.choice([0.0, 0.0, 1.0, 3.0]) * rng.random(), node.start)

    def _machine(self, role: str, layers: int) -> Node:
        index, self._machines = self._machines, self._machines + 1
        disk = Disk(key_of(index))
        facts = facts_of(index, role=role, layers=layers, id=disk.key.id)
        rate, offset = 1 + self.rng.uniform(-0.02, 0.02), self.rng.uniform(0, 1e6)
        node = self.nodes[disk.key.id] = Node(self, facts, disk, rate=rate, offset=offset)
        node.wall_offset = self.rng.uniform(-2, 2)
        return node

    def replace(self, node: Node) -> None:
        """The machine comes back with an empty disk."""
        node.crash()
        if self.nodes.get(node.id) is node and self._machines < THIEF:
            del self.nodes[node.id]
            fresh = self._machine(node.facts.role, node.facts.devices[0].total_bytes if node.facts.devices else 0)
            self.note(f"{node.id[0]} has lost its disk, and is {fresh.id[0]} now")
            fresh.start()
            self._forget_the_unheard_of()

    def _forget_the_unheard_of(self) -> None:
        """What only the lost disk knew, nobody can act on: such a revocation was never made."""
        for subject in [self.nodes[node] for node in self.revoked if node in self.nodes]:
            if not any(node.has_heard_of_revoking(subject.disk.key.public) for node in self.nodes.values()):
                self.note(f"nobody knows any more that {subject.id[0]} was revoked")
                self.revoked.discard(subject.id)
                if not subject.is_running:
                    subject.start()

    def asks_again(self, node: Node) -> None:
        """Thrown out by what somebody had not heard yet: its owner asks for another invite."""
        if node.id not in self.revoked | self.down and node.was_expelled and self.nodes.get(node.id) is node:
            node.crash()
            node.start()

    def engine_fails(self, node: Node) -> bool:
        fails = self.rng.random() < self.misfortune.engine_failure
        self.misfortune.engines_failed |= fails
        return fails

    @property
    def slow_stops(self) -> float:
        return self.misfortune.slow_stops

    def slow_write(self, node: Node) -> float:
        """Seconds a write to ``node``'s disk takes."""
        if self.rng.random() >= self.misfortune.slow_disk:
            return 0.0
        wait = self.rng.choice([0.1, 0.4, 1.0])
        self.expect_trouble([node.id], wait)
        return wait

    # -- invites -------------------------------------------------------------------------------------------------------

    def token_for(self, node: Node) -> Token | None:
        """The token that somebody gave to the owner of ``node``; a new one when the last came to nothing."""
        token = self._tokens.get(node.id)
        if token is None:
            inviters = [n for n in self.nodes.values() if n.is_awake and n.is_member and n.facts.role == "worker"]
            if inviters:
                inviter = self.rng.choice(inviters)
                inviter.do(inviter.boots, self._invite, inviter, node)
        return self._tokens.get(node.id)

    def _invite(self, inviter: Node, node: Node) -> None:
        house = inviter.house
        if house is None or house.book is None:
            return
        uses = self.rng.choice([1, 1, 2])
        invite = create_invite(
            house.book,
            mesh=house.roster.mesh,
            inviter=inviter.disk.key.public,
            addresses=(),
            randomness=self.rng.randbytes,
            wall=inviter.wall(),
            lifetime_s=3000,
            uses=uses,
            role=node.facts.role,
        )
        self._tokens[node.id] = Token(invite.secret, inviter.id, invite.mesh, uses, node.facts.role)

    def forget_token(self, node: Node) -> None:
        self._tokens.pop(node.id, None)

    def knock(self, token: Token, join: Join, key: NodeKey, answered: Callable[[object], None]) -> None:
        """Somebody with ``key`` shows ``token`` to whoever made it."""
        inviter = self.nodes.get(token.inviter)
        if inviter is not None and inviter.is_member and inviter.is_awake and not inviter.has_left:
            inviter.do(inviter.boots, self._answer, inviter, token, join, key, answered)

    def _answer(
        self, inviter: Node, token: Token, join: Join, key: NodeKey, answered: Callable[[object], None]
    ) -> None:
        assert inviter.house is not None
        was_in = inviter.house.roster.role_of(key.public, inviter.wall()) is not None
        answer = inviter.house.answer_join(join, key.public)
        if isinstance(answer, Joined) and not was_in:
            self.note(f"{inviter.id[0]} lets {key.id[0]} in")
            self.let_in(token, key.id)
            self.revoked.discard(key.id)  # by an invite from before, maybe: those are for whoever shows them
            if token.is_spent:
                for _ in range(3):
                    self.clock.after(0.1 + 4 * self.rng.random(), self._steal, token)
        self.clock.after(self.network.latency(), answered, answer)

    def _steal(self, token: Token) -> None:
        """Somebody found the spent token in a chat, and tries it."""
        self.knock(token, Join(1, token.secret, "thief"), key_of(THIEF), lambda answer: None)

    # -- requests ------------------------------------------------------------------------------------------------------

    def next_request(self) -> int:
        self._requests += 1
        return self._requests

    def _ask(self, pace: float) -> None:
        if self.misfortune.over:
            return
        node = self.nodes[self.rng.choice(list(self.nodes))]
        if node.is_awake and node.is_member and not node.has_left:
            node.do(node.boots, node.ingress.ask, self.rng.random() < 0.3)
        self.clock.after(self.rng.expovariate(1 / pace), self._ask, pace)

    def unsettled(self) -> str:
        """Which requests nobody has answered or refused yet; empty when none."""
        waiting = {n.id[0]: len(n.ingress.clients) for n in self.nodes.values() if n.is_member and n.ingress.clients}
        return f"requests wait: {waiting}" if waiting else ""

    # -- peace ---------------------------------------------------------------------------------------------------------

    def _expected(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.id not in self.revoked and node.id not in self.down]

    def two_hosts(self) -> str:
        """Why there is not one host for all yet; empty when everyone follows one epoch."""
        nodes = self._expected()
        missing = [n.id[0] for n in nodes if not n.is_awake or not n.is_member]
        if missing:
            return f"{', '.join(missing)} is not in"
        epochs = {n.election.epoch for n in nodes}
        if len(epochs) != 1 or NO_EPOCH in epochs:
            told = ((n.id[0], n.election.epoch) for n in nodes)
            return "epochs " + ", ".join(f"{k}:{epoch.number}{epoch.coordinator[:1]}" for k, epoch in told)
        return self._outsiders(nodes)

    def _outsiders(self, nodes: list[Node]) -> str:
        """A2, L1: who was revoked is out, everywhere; so is who crashed."""
        for node in nodes:
            for gone in self.down:
                if gone in node.membership.view():
                    return f"{node.id[0]} still counts {gone[0]} in, which is off"
            for outsider in self.revoked:
                if outsider in node.membership.view():
                    return f"{node.id[0]} still counts {outsider[0]} in, which was revoked"
                if (node.id, outsider) in self.network.link:
                    return f"{node.id[0]} is still linked to {outsider[0]}, which was revoked"
        inside = [o[0] for o in self.revoked if o in self.nodes and self.nodes[o].is_member]
        return f"{', '.join(inside)} was revoked and still runs" if inside else ""

    def disagreement(self) -> str:
        """Why the mesh is not one yet; empty when everyone follows one epoch and it serves, or nothing can."""
        why = self.two_hosts()
        if why:
            return why
        nodes = self._expected()
        statuses = {n.id[0]: n.election.status() for n in nodes}
        states = {s.state for s in statuses.values()}
        if states == {"waiting"}:
            possible, _ = plan(tuple(n.facts for n in nodes), None, {}, frozenset())
            why = next(iter(statuses.values())).reason
            gave_up = why.startswith("FAILED") and self.misfortune.engines_failed
            return "" if possible is None or gave_up else f"all wait ({why}), but could serve"
        if states != {"serving"}:
            return "states " + ", ".join(f"{k}:{s.state} ({s.reason})" for k, s in statuses.items())
        routes = [self.routes[n.id] for n in nodes]
        hosts = {route.host if route else None for route in routes}
        return "" if len(hosts) == 1 else f"routes to {hosts}"

    def settle(self) -> tuple[float, float]:
        """Run until everyone agrees and every request is settled; seconds to one host, and to its first token."""
        start = self.clock.now
        while why := self.two_hosts():
            if self.clock.now >= start + ONE_HOST_WITHIN:
                self.fail(f"L3: not one host {ONE_HOST_WITHIN:.0f} s after healing: {why}")
            self.clock.run(self.clock.now + 0.1)
        apart = self.clock.now - start
        while why := self.disagreement():
            if self.clock.now >= start + SERVED_WITHIN:
                self.fail(f"L3: nothing serves {SERVED_WITHIN:.0f} s after healing: {why}")
            self.clock.run(self.clock.now + 0.1)
        served = self.clock.now - start
        serves = any(self.routes[node.id] is not None for node in self._expected())
        limit = self.clock.now + ANSWERED_WITHIN + (0.0 if serves else self.hold_s)
        while waiting := self.unsettled():
            if self.clock.now >= limit:
                self.fail(f"Q1: {waiting}, long after healing")
            self.clock.run(self.clock.now + 0.1)
        return apart, served


def run_seed(seed: int, parts: Parts = REAL, story: list[str] | None = None) -> Outcome:
    """One life of one mesh.

    Args:
        story: what happened is appended to it, line by line.

    Raises:
        InvariantError: an invariant did not hold.
    """
    with signatures_checked_once():
        world = World(seed, parts, story)
        world.populate()
        world.clock.at(1.0, world._ask, world.rng.choice([0.2, 1.0]))
        world.clock.run(4.0)
        seconds = world.rng.choice([6.0, 12.0, 20.0])
        world.misfortune.begin(seconds)
        world.clock.run(world.clock.now + seconds)
        world.misfortune.heal()
        one_host, served = world.settle()
    return Outcome(
        seed=seed,
        nodes=len(world.nodes),
        steps=world.clock.steps,
        simulated_s=world.clock.now,
        one_host_after_s=one_host,
        served_after_s=served,
        epochs=len(world.layouts),
        detected_s=world.detected,
        evicted_alive=world.evicted_alive,
        requests=world.outcomes,
        deaths_midway=world.deaths_midway,
    )
