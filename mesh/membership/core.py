"""Who is alive: a failure detector of the SWIM family for small, fully linked meshes. Pure.

Everyone probes everyone, but only after a silence, so traffic that flows anyway is probe enough. A silence that
outlasts a probe makes a suspect, and up to three others are asked for it (SWIM, section 4.1). The verdict falls when
the silence is longer than a stall of ``stall_allowance`` can explain: dead when nobody hears the suspect, cut off when
somebody does. A node that was late for its own timer slept itself, and holds that time against nobody.

Each node judges by its own evidence. Rumours add what it cannot see: they vouch only for what the speaker heard
directly and lately, so hearsay never feeds on itself and a dead node cannot be talked alive.
"""

from __future__ import annotations

from collections.abc import Iterator

from mesh.membership.events import (
    Broadcast,
    CutsChanged,
    Down,
    Effect,
    Event,
    Expelled,
    FactsChanged,
    Heard,
    Leave,
    LinkDown,
    LinkUp,
    MemberAlive,
    MemberFacts,
    MemberLost,
    MemberSuspect,
    Received,
    Send,
    Tick,
)
from mesh.membership.hearsay import Cuts, Errands
from mesh.membership.patience import Patience
from mesh.membership.standing import TRANSITIONS, Peer, Sign, Standing
from mesh.membership.view import Departed, Member, View
from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import Control, Facts, Leaving, Ping, PingAck, PingReq, Pong, Rumour

MAX_INCARNATION = 2**62
"""What the wire carries. Whoever claims more of us than could be refuted is not answered: the answer would be refused
by everyone."""
BOOT_SHIFT = 16
"""Bits of an incarnation that count refutations; what is above tells one run of the process from another."""
MAX_PEERS = 256
"""More are not kept: those that went longest ago are forgotten first."""


class Membership:
    """Decides who is in: ``handle`` takes events, ``view`` says what came of them, ``next_timer`` when to tick.

    Args:
        facts: this node's own.
        incarnation: larger than in any earlier run of this node; the number of the run ``<< BOOT_SHIFT``.
        probe_interval: seconds of silence after which a peer is probed. Doubles and so on past 32 members.
        ping_timeout: seconds until an unanswered probe makes a suspect; the measured round trip is added.
        stall_allowance: seconds a peer may sleep without being called dead; see :class:`Patience` for when it is.
        vouch_life: seconds another member's word for a peer counts.
        helpers: how many members are asked at a time.
    """

    def __init__(
        self,
        facts: NodeFacts,
        incarnation: int,
        *,
        probe_interval: float = 0.25,
        ping_timeout: float = 0.3,
        stall_allowance: float = 1.0,
        vouch_life: float = 2.0,
        helpers: int = 3,
    ) -> None:
        self._facts = facts
        self._incarnation = incarnation
        self._patience = Patience(facts.id, probe_interval, ping_timeout, stall_allowance, vouch_life)
        self._patience.among(0)
        self._helpers = helpers
        self._peers: dict[NodeId, Peer] = {}
        self._cuts = Cuts()
        self._errands = Errands()
        self._seq = 0
        self._turn = 0
        self._due: float | None = None
        self._stale = True
        """Whether ``_due`` must be computed anew. Being heard only pushes it back, so a packet costs no search."""
        self._out: list[Effect] = []
        self._left = False

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> NodeId:
        return self._facts.id

    def view(self) -> View:
        """Members sorted by id, this node among them."""
        members = [Member(self._facts, boot=self._incarnation >> BOOT_SHIFT)]
        departed = []
        for peer in self._peers.values():
            if peer.is_member:
                members.append(
                    Member(
                        peer.facts,
                        state="alive" if peer.standing is Standing.ALIVE else "suspect",
                        reachable=peer.standing is not Standing.CUT,
                        boot=peer.boot,
                        rtt_ms=None if peer.rtt is None else round(peer.rtt * 1000, 2),
                    )
                )
            elif peer.standing is not Standing.STRANGER:
                departed.append(Departed(peer.facts, peer.reason))
        return View(
            me=self.id,
            members=tuple(sorted(members, key=lambda m: m.id)),
            departed=tuple(sorted(departed, key=lambda d: d.facts.id)),
            cuts=self._known_cuts(),
        )

    def next_timer(self) -> float | None:
        """When to send :class:`Tick` at the latest; None while there is nobody to watch."""
        if self._left:
            return None
        if not self._stale and self._due is not None:
            return self._due
        self._stale = False
        due = self._patience.due
        self._due = min([at for peer in self._peers.values() if (at := due(peer)) is not None], default=None)
        return self._due

    # -- events --------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event in; effects are to be carried out in order."""
        if self._left:
            return []
        self._out = []
        self._doubt_ourselves(now)
        if isinstance(event, Received):  # most of all that comes, so asked first
            self._heard(event.peer, now)
            self._received(event.peer, event.message, now)
        elif isinstance(event, Heard):
            self._heard(event.peer, now)
        else:
            self._stale = True
            self._take(event, now)
        if not self._stale:
            self._stale = not all(isinstance(effect, Send) for effect in self._out)
        return self._out

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Tick():
                self._due, self._stale = self._watch_all(now), False
            case LinkUp(peer, facts):
                self._link_up(peer, facts, now)
            case LinkDown(peer, reason):
                self._link_down(peer, reason, now)
            case FactsChanged(facts):
                self._facts = facts
                self._out += [Broadcast(Facts(facts)), MemberFacts(self.id, facts)]
            case Expelled(peer):
                self._part(peer, "revoked", now)
            case Leave(reason):
                self._left = True
                self._out.append(Broadcast(Leaving(reason)))
            case _:
                pass

    def _doubt_ourselves(self, now: float) -> None:
        """Being late for our own timer means that we slept, not that everyone else died."""
        if self._due is None:
            return
        late = now - self._due
        if late > self._patience.probe_interval:
            for peer in self._peers.values():
                peer.forgive(late, now)
            self._errands.drop()
        if late > 0:
            self._due, self._stale = None, True  # told once; the caller asks for the next timer after this

    def _heard(self, node: NodeId, now: float) -> None:
        peer = self._peers.get(node)
        if peer is None:
            return
        peer.heard_at = now
        peer.hurry_at = None
        if peer.standing is not Standing.ALIVE:
            self._move(peer, Sign.HEARD, now)
        for asker, seq in self._errands.done(node, now):
            self._out.append(Send(asker, PingAck(node, seq)))

    def _link_up(self, node: NodeId, facts: NodeFacts, now: float) -> None:
        peer = self._peers.get(node)
        if peer is None:
            self._make_room()
            peer = self._peers[node] = Peer(facts)
        elif peer.facts != facts:
            # The Hello is the peer's own word, newer than any hearsay, even if a lost disk made it count anew.
            peer.facts = facts
            if peer.is_member:
                self._out.append(MemberFacts(node, facts))
        peer.linked, peer.heard_at, peer.hurry_at, peer.ping = True, now, None, None
        self._cuts.start_over(node)
        self._out += [Send(node, Rumour(self.id, self._incarnation, "alive")), Send(node, Facts(self._facts))]
        if not peer.is_member:
            # Others may be unable to link to it, and must know it all the same.
            self._out += [Broadcast(Facts(facts)), Broadcast(Rumour(node, peer.incarnation, "alive"))]
        self._move(peer, Sign.LINKED, now)
        for other in self._peers.values():
            if other.id == node or not other.is_member:
                continue
            self._out.append(Send(node, Facts(other.facts)))
            if self._patience.hears(other, now):
                self._out.append(Send(node, Rumour(other.id, other.incarnation, "alive")))
            elif other.standing is Standing.CUT:
                self._out.append(Send(node, Rumour(other.id, other.incarnation, "suspect")))

    def _link_down(self, node: NodeId, reason: Down, now: float) -> None:
        peer = self._peers.get(node)
        if peer is None or not peer.linked:
            return
        peer.linked, peer.ping = False, None
        if reason is Down.CLOSED:
            peer.hurry_at = self._patience.hurry_at(peer, now)
        if peer.standing is Standing.ALIVE:
            self._move(peer, Sign.SILENT, now)
        self._watch(peer, now)

    def _received(self, sender: NodeId, message: Control, now: float) -> None:
        match message:
            case Ping(seq):
                self._out.append(Send(sender, Pong(seq)))
            case Pong(seq):
                peer = self._peers.get(sender)
                if peer is not None and peer.ping is not None and peer.ping[0] == seq:
                    peer.answered(now)
            case PingReq(target, seq):
                self._run_errand(sender, target, seq, now)
            case PingAck(target, _):
                peer = self._peers.get(target)
                # Never from the dead: an answer on its way when the verdict fell would bring a corpse back.
                if peer is not None and peer.is_member:
                    peer.vouched_at = now
                    self._move(peer, Sign.VOUCHED, now)
            case Rumour(node, incarnation, state):
                self._rumour(sender, node, incarnation, state, now)
            case Facts(facts):
                self._learn(facts)
            case Leaving():
                self._part(sender, "left", now)
            case _:
                pass

    # -- probing -------------------------------------------------------------------------------------------------------

    def _watch_all(self, now: float) -> float | None:
        """Do what is due, and say when something will be next."""
        soonest: float | None = None
        for peer in list(self._peers.values()):
            due = self._patience.due(peer)
            if due is not None and due <= now:
                self._watch(peer, now)
                due = self._patience.due(peer)
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        return soonest

    def _watch(self, peer: Peer, now: float) -> None:
        if not peer.is_member:
            return
        if peer.standing is Standing.ALIVE and now >= self._patience.suspect_at(peer):
            self._move(peer, Sign.SILENT, now)
        if peer.standing is not Standing.ALIVE:
            self._judge(peer, now)
        if not peer.is_member:
            return
        if peer.linked and now >= self._patience.probe_at(peer):
            self._ping(peer, now)
        if peer.standing is not Standing.ALIVE and now >= self._patience.ask_at(peer):
            self._ask_others(peer, now)

    def _judge(self, peer: Peer, now: float) -> None:
        vouched = now < self._patience.vouched_until(peer)
        if peer.standing is Standing.CUT:
            if not vouched:
                self._move(peer, Sign.EXPIRED, now)
            return
        overdue = now >= self._patience.verdict_at(peer)
        if vouched:
            if overdue:
                self._move(peer, Sign.CUT_OFF, now)
        elif overdue or (peer.hurry_at is not None and now >= peer.hurry_at):
            self._move(peer, Sign.EXPIRED, now)

    def _ping(self, peer: Peer, now: float) -> None:
        self._seq += 1
        peer.pinged_at = now
        if peer.ping is None:  # an unanswered one stays the awaited one: a late answer is a true round trip
            peer.ping = (self._seq, now)
            self._out.append(Send(peer.id, Ping(self._seq)))
        else:
            self._out.append(Send(peer.id, Ping(peer.ping[0])))

    def _ask_others(self, peer: Peer, now: float) -> None:
        peer.asked_at = now
        self._seq += 1
        able = [p.id for p in self._members() if p.linked and p.standing is Standing.ALIVE and p.id != peer.id]
        able.sort()
        self._turn += 1
        for i in range(min(self._helpers, len(able))):
            self._out.append(Send(able[(self._turn + i) % len(able)], PingReq(peer.id, self._seq)))

    def _run_errand(self, asker: NodeId, target: NodeId, seq: int, now: float) -> None:
        if target == self.id:
            self._out.append(Send(asker, PingAck(target, seq)))
            return
        peer = self._peers.get(target)
        if peer is None or not peer.linked or asker == target:
            return
        if self._errands.take(target, asker, seq, now + self._patience.vouch_life, now):
            self._ping(peer, now)

    # -- hearsay -------------------------------------------------------------------------------------------------------

    def _rumour(self, sender: NodeId, node: NodeId, incarnation: int, state: str, now: float) -> None:
        if node == self.id:
            if state != "alive" and self._incarnation <= incarnation < MAX_INCARNATION:
                self._incarnation = incarnation + 1
                self._out.append(Broadcast(Rumour(self.id, self._incarnation, "alive")))
            self._note_cut(sender, node, state == "suspect")
            return
        if sender == node:
            self._introduced(node, incarnation, now)
            return
        peer = self._peers.get(node)
        if peer is None:
            return
        self._note_cut(sender, node, state == "suspect")
        if incarnation < peer.incarnation:
            return
        if state == "alive":
            peer.vouched_at = now
            if peer.standing in (Standing.STRANGER, Standing.GONE):
                # Hearsay gets the time of a silence to be confirmed before it counts as a cut.
                peer.heard_at, peer.asked_at, peer.hurry_at = now, now, None
            self._move(peer, Sign.VOUCHED, now)
        elif state in ("dead", "left") and peer.is_member:
            if self._patience.hears(peer, now):
                self._out.append(Send(sender, Rumour(node, peer.incarnation, "alive")))
            elif peer.standing is Standing.ALIVE:
                self._move(peer, Sign.SILENT, now)
            if state == "left" and not peer.linked:
                self._part(node, "left", now)

    def _introduced(self, node: NodeId, incarnation: int, now: float) -> None:
        """``node`` itself tells its incarnation: another boot means that its earlier run is dead, seen or not."""
        peer = self._peers.get(node)
        if peer is None:
            return
        boot = incarnation >> BOOT_SHIFT
        restarted = peer.boot not in (0, boot)
        peer.incarnation, peer.boot = incarnation, boot
        self._note_cut(node, self.id, False)
        if restarted and peer.is_member:
            self._cuts.start_over(node)
            self._out += [MemberLost(node, "restarted"), MemberAlive(node, peer.facts)]

    def _learn(self, facts: NodeFacts) -> None:
        if facts.id == self.id:
            return
        peer = self._peers.get(facts.id)
        if peer is None:
            self._make_room()
            self._peers[facts.id] = Peer(facts)
        elif facts.version > peer.facts.version:
            peer.facts = facts
            if peer.is_member:
                self._out.append(MemberFacts(facts.id, facts))

    def _note_cut(self, reporter: NodeId, node: NodeId, cut: bool) -> None:
        if not self._cuts.would_change(reporter, node, cut):
            return
        before = self._known_cuts()
        self._cuts.note(reporter, node, cut)
        if self._known_cuts() != before:
            self._out.append(CutsChanged())

    def _known_cuts(self) -> frozenset[tuple[NodeId, NodeId]]:
        pairs = self._cuts.pairs([self.id, *(p.id for p in self._members())])
        pairs |= {(self.id, p.id) for p in self._members() if p.standing is Standing.CUT}
        return frozenset((min(pair), max(pair)) for pair in pairs)

    # -- moving --------------------------------------------------------------------------------------------------------

    def _members(self) -> Iterator[Peer]:
        return (peer for peer in self._peers.values() if peer.is_member)

    def _move(self, peer: Peer, sign: Sign, now: float) -> None:
        """Apply one transition of the table, and say what changed."""
        before, was_in = peer.standing, peer.is_member
        peer.standing = after = TRANSITIONS[before, sign]
        if after is before:
            return
        if after is Standing.ALIVE or (peer.is_member and not was_in):
            self._out.append(MemberAlive(peer.id, peer.facts))
            if before is Standing.CUT:
                self._out += [Broadcast(Rumour(peer.id, peer.incarnation, "alive")), CutsChanged()]
        elif after is Standing.SUSPECT:
            self._out.append(MemberSuspect(peer.id))
            self._ask_others(peer, now)
        elif after is Standing.CUT:
            self._cuts.start_over(peer.id)  # what it finds out from now on does not reach us
            self._out += [Broadcast(Rumour(peer.id, peer.incarnation, "suspect")), CutsChanged()]
        else:
            self._bury(peer, was_in, before)

    def _bury(self, peer: Peer, was_in: bool, before: Standing) -> None:
        if peer.standing is Standing.GONE:
            peer.reason = "unreachable" if before is Standing.CUT else "crashed"
        self._cuts.forget(peer.id)
        peer.boot = 0
        if was_in:
            state = "left" if peer.reason == "left" else "dead"
            self._out += [
                MemberLost(peer.id, peer.reason),
                Broadcast(Rumour(peer.id, peer.incarnation, state)),  # type: ignore[arg-type]
            ]

    def _part(self, node: NodeId, reason: str, now: float) -> None:
        peer = self._peers.get(node)
        if peer is not None:
            peer.reason = reason
            self._move(peer, Sign.PARTED, now)

    def _make_room(self) -> None:
        if len(self._peers) >= MAX_PEERS:
            useless = [p for p in self._peers.values() if not p.is_member and not p.linked]
            if useless:
                del self._peers[min(useless, key=lambda p: (p.heard_at, p.id)).id]
        self._patience.among(len(self._peers) + 1)
