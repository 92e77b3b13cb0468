"""One admitted connection to every known member, and what travels over them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from mesh.clock import Clock
from mesh.errors import AdmissionError, TransportError
from mesh.identity.grants import Roster, known_as
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey, node_id
from mesh.membership.approvals import Approvals
from mesh.membership.bulk import BulkLanes, Examined
from mesh.membership.callbacks import Callbacks as Callbacks
from mesh.membership.desk import Desk
from mesh.membership.dialer import Dialer
from mesh.membership.door import Admitted, Choice, choose
from mesh.membership.expulsion import Expulsion
from mesh.membership.greeting import Greeter
from mesh.membership.known import AddressBook
from mesh.membership.link import Link, flush
from mesh.membership.requests import Request
from mesh.membership.rights import may_open, may_say
from mesh.membership.ways import Ways
from mesh.transport.lane import Connection, Lane, Stream
from mesh.transport.tcp import TcpLane
from mesh.wire.facts import LinkFact, NodeFacts, NodeId
from mesh.wire.messages import (
    Approve,
    Approved,
    Control,
    Crossing,
    Door,
    Facts,
    Joined,
    Knock,
    MemberAddress,
    Members,
    Open,
    Opened,
    OpenProbe,
    Refused,
    Revocation,
    Revoke,
)

log = logging.getLogger(__name__)


class Links:
    """Keeps the links of one node.

    Args:
        lane: how to dial. Its ``on_connection`` must be :meth:`accept`.
        roster: who belongs; changed in place.
        members: where members were last seen.
        mesh_name: told to joiners.
        facts: of this node, as they are now.
        invites: None when this node lets nobody in.
        tcp: the lane for bulk streams, if there is one beside ``lane``; its handlers are set here.
        relay_rate: bytes per second that this node carries between two others; 0: none.
        random: uniform in [0, 1); spreads redials.
    """

    def __init__(
        self,
        lane: Lane,
        key: NodeKey,
        roster: Roster,
        clock: Clock,
        callbacks: Callbacks,
        *,
        facts: Callable[[], NodeFacts],
        members: tuple[MemberAddress, ...] = (),
        mesh_name: str = "mesh",
        invites: InviteBook | None = None,
        tcp: TcpLane | None = None,
        relay_rate: int = 0,
        random: Callable[[], float],
    ) -> None:
        self.roster = roster
        self._key = key
        self._clock = clock
        self._tell = callbacks
        self._facts = facts
        self._book = AddressBook(member for member in members if member.id != key.id)
        self._links: dict[NodeId, Link] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._expulsion = Expulsion(self, key, roster, clock, callbacks)
        lane.is_known = self._book.is_home
        if tcp is not None:
            tcp.is_known = self._book.is_home
        self._bulk = BulkLanes(tcp, clock, self.link)
        self._desk = None
        if invites is not None:
            self._desk = Desk(self, key, roster, clock, mesh_name=mesh_name, on_asked=callbacks.on_asked)
        self._approvals = Approvals(self._desk, self._links, clock)
        self._greeter = Greeter(
            self, key, roster, clock, facts=facts, mesh_name=mesh_name, invites=invites, desk=self._desk
        )
        self._dialer = Dialer(
            lane,
            self._book,
            introduce=self._greeter.introduce,
            is_linked=self.is_linked,
            on_refused=self._refused,
            random=random,
        )
        self.ways = Ways(
            lane,
            key.id,
            clock,
            self._links,
            self._dialer,
            is_member=self._is_granted,
            on_moved=self._bulk.moved,
            on_seen=callbacks.on_seen,
            relay_rate=relay_rate,
        )

    # -- what the owner asks -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to dial the known members."""
        self.spawn(self._expulsion.watch())
        for member in self._book.members:
            self._keep(member.id)

    def peers(self) -> Mapping[NodeId, Link]:
        """Members connected now."""
        return self._links

    def own_addresses_changed(self) -> None:
        """This machine moved: look for better paths, and end what cannot follow."""
        self._bulk.own_addresses_changed()
        self.ways.own_addresses_changed()

    def measured(self) -> tuple[LinkFact, ...]:
        """What is known of the ways to those peers, by id."""
        found = (self._bulk.measured(link) for _, link in sorted(self.peers().items()))
        return tuple(fact for fact in found if fact is not None)

    def link(self, peer: NodeId) -> Link | None:
        return self._links.get(peer)

    @property
    def members(self) -> tuple[MemberAddress, ...]:
        """Every other member this node knows of, connected or not, with the addresses to try; worth saving."""
        return self._book.members

    def last_heard(self, peer: NodeId) -> float | None:
        """``clock.now()`` of the last packet of ``peer``; None when it is not connected."""
        link = self._links.get(peer)
        return None if link is None else link.last_heard

    def send(self, peer: NodeId, message: Control) -> bool:
        """Queue ``message`` for ``peer``; never blocks. False when ``peer`` is not connected."""
        link = self._links.get(peer)
        if link is None:
            return False
        link.send(message)
        return True

    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None:
        """Queue ``message`` for everyone connected, ``but`` one."""
        for peer, link in list(self._links.items()):
            if peer != but:
                link.send(message)

    async def open_bulk(
        self,
        peer: NodeId,
        request: Open,
        *,
        timeout: float = 10.0,
        heard: Callable[[Opened], None] = lambda opened: None,
    ) -> Stream:
        """Open a stream to ``peer`` and wait until it answered ``Opened``, which ``heard`` is told.

        Raises:
            TransportError: not connected, the connection broke, or no answer within ``timeout`` seconds.
            AdmissionError: the peer refused; ``code`` and message are its own.
        """
        link = self._links.get(peer)
        if link is None:
            raise TransportError(f"node {peer} is not connected", code="not-connected")
        return await self._bulk.open(link, request, timeout, heard=heard)

    async def examine(self, peer: NodeId) -> Examined:
        """Test the link to ``peer``: its times, and the peer's clock.

        Raises:
            TransportError: not connected, or the link does not carry.
        """
        link = self._links.get(peer)
        if link is None:
            raise TransportError(f"node {peer} is not connected", code="not-connected")
        return await self._bulk.examine(link)

    def learn(self, member: MemberAddress) -> None:
        """``member`` may be reached at these addresses: try soon."""
        if member.id == self._key.id or self._closed:
            return
        if self._book.hear(member):
            self._tell.on_roster_changed()
            self._dialer.kick(member.id)
        self._keep(member.id)

    def hint(self, prefix: str, addresses: tuple[str, ...]) -> None:
        """The member whose id begins with ``prefix`` may be at ``addresses``, somebody says: tried after those we know
        of, and written nowhere before its key has answered there."""
        for key in self.roster.subjects():
            peer = node_id(key)
            is_worker = self.roster.role_of(key, self._clock.wall()) == "worker"  # a lite client dials for itself
            if peer.startswith(prefix) and peer != self._key.id and is_worker and not self._closed:
                self._dialer.hint(peer, addresses)

    async def approve(self, code: str) -> Approved:
        """Let in the machine that shows ``code``, whichever member it has asked; the answer says why not."""
        return await self._approvals.approve(code)

    def requests(self) -> tuple[Request, ...]:
        """Machines that ask this node to be let in."""
        return () if self._desk is None else self._desk.open()

    def drop(self, peer: NodeId, reason: str) -> None:
        """Close the link to ``peer``; it is dialed again while it stays a member."""
        link = self._links.get(peer)
        if link is not None:
            self.lose(link, reason)

    def revoke(self, subject: NodeId) -> Revocation:
        """Throw ``subject`` out: close its links and tell the others.

        Raises:
            AdmissionError: unknown node, or this node may not.
        """
        return self._expulsion.revoke(subject)

    async def close(self, reason: str) -> None:
        """Close all links, once what was queued for them is out: a good-bye, most likely."""
        self._closed = True
        links = list(self._links.values())
        self._links.clear()
        self.ways.close()
        if self._desk is not None:
            self._desk.close()
        await self._dialer.close()
        await flush(*links)
        await self._bulk.close()
        for link in links:
            link.stop()
            self._bulk.down(link, reason)
            link.connection.close(0, reason)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def accept(self, connection: Connection) -> None:
        """Somebody connected; the lane has proven its key and nothing more."""
        if self._closed:
            connection.close(0, "shutting down")
            return
        guest = self._greeter.receive(connection)
        if guest is not None:
            self.spawn(self._greeter.greet(connection, guest))

    # -- the house behind the door (see greeting.House) --------------------------------------------------------------

    def choice(self, peer: NodeId) -> Choice:
        link = self._links.get(peer)
        return choose(
            self._key.id,
            peer,
            dialing=self._dialer.is_dialing(peer),
            linked_s=None if link is None else self._clock.now() - link.since,
            linked_by_us=link is not None and link.connection.dialed,
        )

    async def outcome_of_our_dial(self, peer: NodeId, timeout: float) -> None:
        await self._dialer.outcome(peer, timeout)

    def is_linked(self, peer: NodeId) -> bool:
        return peer in self._links

    def may_move(self, onto: Connection) -> bool:
        link = self._links.get(onto.peer)
        return link is not None and self.ways.is_better(onto, link)

    def move(self, onto: Connection) -> None:
        self._links[onto.peer].connection.move(onto)

    def unlink(self, peer: NodeId, reason: str) -> None:
        self.drop(peer, reason)

    def joined(self, answer: Joined) -> None:
        self._tell.on_roster_changed()
        self.broadcast(Members((), answer.grants))

    def address_list(self) -> tuple[MemberAddress, ...]:
        me = self._facts()
        return (MemberAddress(me.id, me.name, me.addresses), *self._book.members)

    def admit(self, connection: Connection, control: Stream, facts: NodeFacts, verdict: Admitted) -> Link:
        peer = connection.peer
        older = self._links.get(peer)
        if older is not None:
            self.lose(older, "it connected anew: it was restarted, or its old path broke")
        if not connection.dialed:
            self._dialer.give_up(peer)
        connection.widen()
        link = Link(
            connection,
            control,
            facts,
            verdict.role,
            since=self._clock.now(),
            on_message=self._received,
            on_bulk=self._bulk_opened,
            on_broken=self.lose,
        )
        self._links[peer] = link
        connection.on_close = link.connection_closed
        # A lite client comes and goes as it likes, and dials for itself.
        lasting = facts.role == "worker"
        changed = (lasting and self._meet(connection, facts)) or verdict.changed
        link.start()
        self._bulk.up(link)
        self.ways.up(link)
        link.send(Members(self._book.members, self.roster.grants))
        if changed:
            self._tell.on_roster_changed()
            self.broadcast(self._news_of(peer), but=peer)
        if lasting:
            self._keep(peer)
            self._dialer.kick(peer)
        self._tell.on_up(peer, facts, connection)
        if verdict.changed:
            self._expulsion.review(peer)
        return link

    def forget(self, node: NodeId) -> None:
        """``node`` is no member any more: do not look for it."""
        self._book.forget(node)
        self._dialer.forget(node)
        self.ways.unwanted(node)

    def lose(self, link: Link, reason: str) -> None:
        """The link is over."""
        link.stop()
        link.connection.close(0, reason)
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._bulk.down(link, reason)
            self.ways.down(link)
            self._dialer.kick(link.peer)
            if link.peer in self._book:
                self.ways.wanted(link.peer)
            else:
                self.ways.unwanted(link.peer)
            self._tell.on_down(link.peer, reason)

    def show_out(self, link: Link, reason: str) -> None:
        """Let it read why, for a moment, then close."""
        self.spawn(self._show_out(link, reason))

    async def _show_out(self, link: Link, reason: str) -> None:
        await flush(link)
        self.lose(link, reason)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside; it ends with the links."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- within ------------------------------------------------------------------------------------------------------

    def _meet(self, connection: Connection, facts: NodeFacts) -> bool:
        # An address that we dialed works; one we were dialed from may be a NAT's, and goes last.
        # An IPv6 scope means something on this machine only.
        seen = () if "%" in connection.address or connection.path == "relay" else (connection.address,)
        addresses = (*seen, *facts.addresses) if connection.dialed else (*facts.addresses, *seen)
        return self._book.meet(MemberAddress(connection.peer, facts.name, addresses))

    def _keep(self, peer: NodeId) -> None:
        self._dialer.keep(peer)
        if peer not in self._links:
            self.ways.wanted(peer)

    def _news_of(self, peer: NodeId) -> Members:
        members = tuple(member for member in self._book.members if member.id == peer)
        public = known_as(self.roster, peer)
        return Members(members, self.roster.chain(public or b"", self._clock.wall()))

    def _received(self, link: Link, message: Control) -> None:
        if not may_say(link.role, link.peer, message):
            log.debug("%s is a lite client: its %s is not heard", link.peer, type(message).__name__)
        elif isinstance(message, Members):
            self._take_members(link, message)
        elif isinstance(message, Revoke):
            self._expulsion.take(message.revocation, link.peer)
        elif isinstance(message, Knock):
            self._bulk.knocked(link, message)
        elif isinstance(message, Crossing):
            self.ways.heard(link, message)
        elif isinstance(message, Approve | Approved):
            answer = self._approvals.received(link, message)
            if answer is not None:
                self.spawn(answer)
        elif isinstance(message, Door):
            self.lose(link, "the peer introduced itself twice")
        else:
            if isinstance(message, Facts):
                self._take_facts(link, message.facts)
            self._tell.on_message(link.peer, message)

    def _take_facts(self, link: Link, facts: NodeFacts) -> None:
        """Members move: where one says it is now is where to dial it when its link is lost."""
        where = MemberAddress(facts.id, facts.name, facts.addresses)
        if facts.id == link.peer:
            link.facts = facts
        if facts.role == "worker" and facts.id in self._book and self._book.hear(where):
            self._tell.on_roster_changed()
            self._dialer.kick(facts.id)

    def _bulk_opened(self, peer: NodeId, request: Open, stream: Stream) -> None:
        if isinstance(request, OpenProbe):
            self._bulk.echo(stream)
        elif not may_open(self._links[peer].role if peer in self._links else "client", request):
            stream.abort()
        else:
            self._tell.on_bulk(peer, request, stream)

    def _take_members(self, link: Link, message: Members) -> None:
        wall = self._clock.wall()
        changed = self.roster.add(message.grants, wall, vouched=link.role == "worker")
        for member in message.members:
            if member.id != self._key.id and self._is_granted(member.id) and self._book.hear(member):
                changed = True
                self._keep(member.id)
        if changed:
            self._tell.on_roster_changed()
            self.broadcast(message, but=link.peer)

    def _refused(self, peer: NodeId, error: AdmissionError) -> None:
        if error.code in ("revoked", "not-a-member"):
            self._tell.on_expelled(peer, Refused(error.code, error.message[:1024]))

    def _is_member(self, key: bytes) -> bool:
        return self.roster.role_of(key, self._clock.wall()) is not None

    def _is_granted(self, node: NodeId) -> bool:
        return any(node_id(key) == node and self._is_member(key) for key in self.roster.subjects())
