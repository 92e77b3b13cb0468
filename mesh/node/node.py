"""One running node. Wires the rooms together: each core gets its events here, and its effects are carried out here.

    links --messages--> membership --view--> election --layout--> engine runner --api key--> election --route--> proxy

Nothing is decided in this module. If a line here needs an opinion, it belongs into a core.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import mesh.election.events as election
import mesh.membership.events as membership
import mesh.supervise.events as supervise
from mesh.clock import Clock
from mesh.config import Settings
from mesh.election.coordinate import Timing
from mesh.election.core import Election
from mesh.engine.cache import Engine
from mesh.engine.placement import Placement
from mesh.engine.speed import Measured
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.lapse import OUT
from mesh.membership.links import Callbacks, Links
from mesh.node.carriage import Carriage
from mesh.node.equipment import Equipment
from mesh.node.facts import OwnFacts
from mesh.node.narrator import Narrator
from mesh.node.pacing import Pacing
from mesh.node.planning import Trial, answer_plan, describe_plan, tried
from mesh.node.prepare import LocalModel
from mesh.node.record import Ledger, Record
from mesh.node.shelf import Shelf
from mesh.node.statedir import command_for
from mesh.node.status import Counts, build_status, gauges_in
from mesh.node.upkeep import Upkeep
from mesh.node.whereabouts import Whereabouts
from mesh.notice import View
from mesh.proxy.ingress import Proxy
from mesh.proxy.metrics import NodeGauges
from mesh.proxy.upstream import Route
from mesh.pump import Pump
from mesh.supervise.core import State
from mesh.supervise.runner import EngineRunner
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection, Stream
from mesh.transport.tcp import TcpLane
from mesh.tunnel.handover import make_doors
from mesh.wire.facts import NO_EPOCH, Epoch, NodeFacts, NodeId
from mesh.wire.messages import (
    Control,
    EngineDown,
    LoadProgress,
    Open,
    Refused,
    Serving,
    WorkerReady,
)

log = logging.getLogger(__name__)


class Node:
    """A member or a lite client, from ``start`` to ``stop``.

    Args:
        endpoint: already listening; its ``on_connection`` must call :meth:`accept`.
        tcp: for bulk streams; listening on the same port number, or dialing only.
        engine: None on a lite client.
        model: the one this node was started for, or None.
        bound: ``host:port`` of the endpoint's sockets.
    """

    def __init__(
        self,
        settings: Settings,
        key: NodeKey,
        record: Record,
        endpoint: Endpoint,
        tcp: TcpLane,
        bound: Sequence[str],
        engine: Engine | None,
        model: LocalModel | None,
        view: View,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.key = key
        self.record = record.started(clock.wall())
        self.view = view
        self.invites = InviteBook(settings.state_dir / "invites.json")
        self._clock = clock
        self._ledger = Ledger(settings.state_dir, view.show)
        self._shelf = Shelf(model, engine, view, self._tell_facts)
        self.whereabouts = Whereabouts(settings, endpoint, bound, clock, self._moved)
        self._own = OwnFacts(settings, key.id, engine, self.whereabouts.addresses, model, clock, tcp=tcp.listening)
        wanted = "" if model is None else model.cost.weights
        self._pacing = None if engine is None else Pacing(engine, wanted, self._paced, clock.wall)
        self._narrator = Narrator(view, key.id, record.name, lambda: self._membership.view(), clock.now)
        self._narrator.approve = command_for(settings.state_dir, "approve CODE")
        self._membership = Membership(self.facts, self.record.boot << BOOT_SHIFT)
        spread = random.random()  # noqa: S311 - of retries
        timing = Timing(drain=settings.drain_s)
        self._election = Election(key.id, seen=record.epoch, jitter=spread, timing=timing)
        self._members = Pump(self._membership, self._membership_effect, membership.Tick, clock, after=self._tell_view)
        self._view_is_old = False
        self._electing = Pump(self._election, self._election_effect, election.Tick, clock)
        self.links = self._make_links(endpoint, tcp)
        self.proxy = Proxy(clock)
        self._doors = None if engine is None else make_doors(settings.state_dir)
        self._carriage = Carriage(key.id, self.links.open_bulk, self._election, lambda: self._runner, self._doors)
        threads, gpu_layers = self.facts.threads, settings.gpu_layers
        equipment = Equipment(key.id, engine, self._shelf.file, threads, gpu_layers, settings.wire_dtype, self._doors)
        self._runner = EngineRunner(
            key.id,
            state_dir=settings.state_dir,
            rpc_command=equipment.rpc_server,
            server_command=equipment.llama_server,
            tunnels=self._carriage.to_workers,
            worker_side=self._carriage.from_host,
            pushes=self._carriage.pushes,
            clock=clock,
            tell_host=self._rpc_server_listens,
            announce=self._engine_says,
            on_placed=self._placed,
            unused=self._carriage.under_way.none,
        )
        self._placed_on = ""
        self._starts = 0
        self.proxy.metrics.node = self.gauges
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self.on_expelled: Callable[[str], None] = lambda reason: None

    def _make_links(self, endpoint: Endpoint, tcp: TcpLane) -> Links:
        return Links(
            endpoint,
            self.key,
            self.record.roster(),
            self._clock,
            Callbacks(
                on_up=self._link_up,
                on_down=self._link_down,
                on_message=self._received,
                on_bulk=self._bulk_opened,
                on_roster_changed=self.save,
                on_expelled=self._expelled,
                on_seen=self.whereabouts.member_sees,
                on_asked=self._narrator.asked,
            ),
            facts=lambda: self.facts,
            members=self.record.members,
            mesh_name=self.record.name,
            invites=self.invites if self.settings.role == "worker" else None,
            tcp=tcp,
            relay_rate=self.settings.relay_rate if self.settings.role == "worker" else 0,
            random=random.random,
        )

    # -- what others ask -----------------------------------------------------------------------------------------------

    @property
    def facts(self) -> NodeFacts:
        """What this node tells of itself."""
        return self._own.facts(self._shelf.costs)

    def accept(self, connection: Connection) -> None:
        """Somebody dialed us."""
        self.links.accept(connection)

    def status(self) -> dict[str, Any]:
        """The contract's status."""
        counted = self.proxy.counters
        counts = Counts(counted.active, counted.held, counted.completed, counted.resumed, counted.failed)
        seen = self._membership.view()
        return build_status(self.facts, self.record.mesh, seen, self._election.status(), self.links.peers(), counts)

    @property
    def members(self) -> tuple[NodeFacts, ...]:
        """What every member tells of itself, this node too."""
        return tuple(self._membership.view().facts)

    @property
    def placed(self) -> str:
        """Where this node's engine says its weights are; empty while none runs."""
        return "" if self._runner.state is State.IDLE else self._placed_on

    def gauges(self) -> NodeGauges:
        """What Prometheus is told of the mesh, besides requests."""
        return gauges_in(self.status(), self._starts)

    def plan_now(self, trial: Trial) -> dict[str, Any]:
        """What would be planned over the members of this moment, and why; nothing is carried out."""
        seen = self._membership.view()
        # A layout that runs is kept when another is hardly better; one that is tried out has no such rights.
        current = self._election.status().layout if trial == Trial() else None
        request = election.NeedPlan(0, tried(seen.facts, self.key.id, trial), current, {}, seen.cuts)
        return describe_plan(request, self.key.id, self.links.measured())

    def find_member(self, name_or_id: str) -> NodeFacts | None:
        """A member by its id, the beginning of it, or its name when only one bears it."""
        return self._membership.view().named(name_or_id)

    def narrate(self, api_url: str, make_invite: Callable[[], dict[str, Any]] | None) -> None:
        """Where people find this node's API, and how they let the next machine in."""
        self._narrator.api_url = api_url
        if make_invite is not None:
            self._narrator.invite = lambda: f"mesh up --join {make_invite()['token']}"

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Sweep what an earlier run left behind, then begin to take part."""
        self._ledger.write(self.record)
        swept = await self._runner.start()
        self._narrator.swept(len(swept))
        await asyncio.to_thread(self._own.list_devices)
        self._own.measure()
        if self._pacing is not None:
            self._pacing.recall()
            self._spawn(self._pacing.measure())
        self._members.feed(membership.FactsChanged(self.facts))
        self._electing.feed(election.ViewChanged(self._membership.view()))
        self.links.start()
        self.whereabouts.start()
        upkeep = Upkeep(
            self._own,
            self._shelf,
            self._ledger,
            self._clock,
            is_idle=lambda: self._runner.state is State.IDLE,
            links=self.links.measured,
            tell=self._tell_facts,
        )
        self._spawn(upkeep.watch_machine())
        self._spawn(upkeep.watch_links())

    @property
    def drain_s(self) -> float:
        """How long requests may take that need this node, if it is to go; 0: there can be none."""
        elected = self._election.status()
        carries = elected.layout is not None and any(member.id == self.key.id for member in elected.layout.ring)
        asked = self.proxy.counters.active + self.proxy.counters.held > 0
        busy = asked or self._runner.state is State.DRAINING or (carries and elected.state == "serving")
        return self.settings.drain_s if busy else 0.0

    def announce_departure(self) -> None:
        """This node is about to go: let the others plan without it."""
        self._narrator.stopping()
        self.proxy.turn_away("this node is about to stop")
        self._own.leaves()
        self._tell_facts()

    async def unneeded(self) -> None:
        """Return once nothing runs here for the mesh, and nobody here waits for an answer of its."""
        await self._runner.idle()
        await self.proxy.empty()

    async def stop(self, reason: str) -> None:
        """Say good-bye, end the engine, close every link. Nothing of this node runs when it returns."""
        if self._stopping:
            return
        self._stopping = True
        self._narrator.stopping()
        self._members.feed(membership.Leave(reason))
        self._electing.feed(election.Shutdown())
        self._electing.stop()
        self._members.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            self._shelf.close(), self.proxy.close(), self._runner.stop(), self.links.close(reason),
            self.whereabouts.close(), return_exceptions=True,
        )  # fmt: skip
        self._carriage.close()
        if self._doors is not None:
            self._doors.remove()

    def save(self) -> None:
        """Write down who belongs and where they are."""
        roster = self.links.roster
        self.record = self.record.grown(roster, self.links.members)
        self._ledger.write(self.record)

    # -- links -> membership -> election -------------------------------------------------------------------------------

    def _link_up(self, peer: NodeId, facts: NodeFacts, connection: Connection) -> None:
        self._members.feed(membership.LinkUp(peer, facts))
        self._electing.feed(election.LinkUp(peer))

    def _link_down(self, peer: NodeId, reason: str) -> None:
        log.info("link to %s is down: %s", peer, reason)
        self.whereabouts.member_gone(peer)
        if reason in OUT:
            self._members.feed(membership.Expelled(peer))
        self._members.feed(membership.LinkDown(peer, _cause(reason)))

    def _received(self, peer: NodeId, message: Control) -> None:
        self._members.feed(membership.Received(peer, message))
        self._electing.feed(election.Received(peer, message))
        if isinstance(message, LoadProgress):
            self._loading(message)

    def _expelled(self, peer: NodeId, refused: Refused) -> None:
        self.on_expelled(refused.message)

    def _membership_effect(self, effect: membership.Effect) -> None:
        match effect:
            case membership.Send(peer, message):
                self.links.send(peer, message)
            case membership.Broadcast(message):
                self.links.broadcast(message)
            case _:
                self._view_changed(effect)

    def _view_changed(self, effect: membership.Effect) -> None:
        seen = self._membership.view()
        self._narrator.member(effect, seen)
        if isinstance(effect, membership.MemberLost):
            self._carriage.drop(effect.node)
            if effect.reason != "restarted":  # then the link is the new process's already
                self.links.drop(effect.node, effect.reason)
        if isinstance(effect, membership.MemberAlive | membership.MemberFacts):
            self._shelf.look_for(effect.facts.models)
        self._view_is_old = True

    def _tell_view(self) -> None:
        # Only after all effects of a batch: a newcomer must hear who is in before it hears what runs, or it takes
        # members it does not know yet for lost.
        if self._view_is_old:
            self._view_is_old = False
            self._electing.feed(election.ViewChanged(self._membership.view()))

    # -- election -> engine and proxy ----------------------------------------------------------------------------------

    def _election_effect(self, effect: election.Effect) -> None:
        match effect:
            case membership.Send(peer, message):
                self.links.send(peer, message)
            case membership.Broadcast(message):
                self.links.broadcast(message)
            case election.NeedPlan():
                self._electing.feed(answer_plan(effect, self.key.id, self.links.measured()))
            case election.Remember(number):
                self.record = self.record.at(number)
                self._ledger.write(self.record)
            case election.Adopt():
                self._adopt(effect)
            case election.WorkersReady(epoch):
                for worker in self._layout_workers():
                    self._runner.post(supervise.MemberReady(worker, self._carriage.engine_epoch(epoch)))
            case election.Served():
                self._serve(effect)
            case election.Unserved(reason, drain_s):
                self._narrator.unserved(reason)
                self._unserve(reason, drain_s)

    def _adopt(self, adopt: election.Adopt) -> None:
        self._narrator.adopted(adopt)
        if adopt.lifts != NO_EPOCH:
            return  # the same layout under a new number: what runs goes on
        self._carriage.launched = adopt.epoch
        if adopt.layout is not None:
            self._starts += 1
        self._unserve(adopt.reason or "the engine is starting", adopt.drain_s)
        self._runner.post(supervise.Adopt(adopt.epoch, adopt.layout, adopt.drain_s))

    def _serve(self, served: election.Served) -> None:
        layout = self._election.status().layout
        assert layout is not None, "the election serves what it follows"

        open_server = partial(self._carriage.open_server, served.host, served.epoch)
        name, fingerprint = layout.model.name, layout.model.fingerprint
        # By the number it was started under: a layout that is only renumbered keeps its requests.
        epoch = self._carriage.launched
        self.proxy.serve(Route(epoch, served.host, served.api_key, name, open_server, fingerprint))
        self._narrator.served(layout)

    def _unserve(self, reason: str, drain_s: float) -> None:
        layout = self._election.status().layout
        self.proxy.unserve(reason, drain_s=drain_s, model_name=None if layout is None else layout.model.name)

    def _layout_workers(self) -> tuple[NodeId, ...]:
        layout = self._election.status().layout
        return () if layout is None else tuple(member.id for member in layout.workers)

    # -- engine -> election --------------------------------------------------------------------------------------------

    def _rpc_server_listens(self, host: NodeId, message: WorkerReady) -> None:
        self._electing.feed(election.EngineListening(message.epoch))

    def _engine_says(self, message: Serving | EngineDown | LoadProgress) -> None:
        match message:
            case Serving(epoch, api_key):
                self._electing.feed(election.EngineServing(epoch, api_key))
            case EngineDown(epoch, reason):
                self._electing.feed(election.EngineFailed(epoch, reason))
            case LoadProgress():
                self.links.broadcast(message)
                self._loading(message)

    def _placed(self, epoch: Epoch, placement: Placement) -> None:
        """The engine of this node says where its weights are: is that where the layout has them?"""
        layout = self._runner.layout
        share = None if layout is None else next((m for m in layout.ring if m.id == self.key.id), None)
        if share is None:
            return
        really = placement.instead_of(share.device)
        log.info("epoch %d: %s holds %s", epoch.number, share.name, placement)
        self._placed_on = str(placement)
        self._own.computes_on(really)
        self._tell_facts()
        if really:
            self._narrator.misplaced(share, really)

    def _loading(self, message: LoadProgress) -> None:
        self._narrator.loading(message)
        if message.node != self.key.id:
            self._runner.post(supervise.MemberLoading(message.node, self._carriage.engine_epoch(message.epoch)))

    # -- streams -------------------------------------------------------------------------------------------------------

    def _bulk_opened(self, peer: NodeId, request: Open, stream: Stream) -> None:
        carried = self._carriage.accept(peer, request, stream)
        if carried is None:
            stream.abort()
        else:
            self._spawn(carried)

    # -- itself --------------------------------------------------------------------------------------------------------

    def _moved(self, addresses: tuple[str, ...]) -> None:
        self._own.moved(addresses)
        self._tell_facts()
        self.links.own_addresses_changed()

    def _tell_facts(self) -> None:
        self._members.feed(membership.FactsChanged(self.facts))

    def _paced(self, device: str, found: Measured) -> None:
        if self._own.paced(device, found):
            self._tell_facts()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cause(reason: str) -> membership.Down:
    if reason in OUT:
        return membership.Down.LOCAL
    if "timeout" in reason.lower():
        return membership.Down.TIMEOUT
    return membership.Down.CLOSED
