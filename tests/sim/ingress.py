"""The proxy of one simulated node: the real hold queue, its clients, and the way of a request to the host and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh.proxy import events as px
from mesh.proxy.core import Core, Limits
from mesh.wire.facts import Epoch, NodeId
from tests.sim.pump import SimPump

if TYPE_CHECKING:
    from tests.sim.engine import Process
    from tests.sim.node import Node


@dataclass(frozen=True)
class Question:
    """An HTTP request on its way to the host of ``epoch``."""

    ingress: NodeId
    boot: int
    request: int
    attempt: int
    epoch: Epoch
    """As the node that asks has it now."""
    streams: bool


@dataclass(frozen=True)
class Answer:
    """Part of what the host says: ``began``, ``whole``, or how the attempt was lost."""

    question: Question
    part: str
    lost: px.Loss | None = None


@dataclass(eq=False)
class Client:
    """One request of somebody at this node, as the world sees it."""

    request: int
    streams: bool
    since: float
    answers: int = 0


@dataclass(eq=False)
class Attempt:
    question: Question
    host: NodeId
    link: Any = None
    """What it travels on; None: the host is this node."""
    begun: bool = False
    server: Process | None = None
    """Where it was taken up, as the world knows."""


class Ingress:
    def __init__(self, node: Node, limits: Limits) -> None:
        self.node = node
        self.world = node.world
        self.core: Core = self.world.parts.proxy(limits)
        self.pump = SimPump(self.core, node.carrier(self._carry_out), px.Tick, node)
        self.limits = limits
        self.clients: dict[int, Client] = {}
        self.attempts: dict[int, Attempt] = {}
        self.host: NodeId = ""
        self.epoch: Epoch | None = None
        self._heard: set[tuple[NodeId, int, int, int]] = set()
        self._served: dict[Process, set[Question]] = {}

    # -- the node tells ------------------------------------------------------------------------------------------------

    def serve(self, epoch: Epoch, host: NodeId) -> None:
        self.host, self.epoch = host, epoch
        self.pump.feed(px.Served(epoch, "sim"))

    def unserve(self, reason: str, drain_s: float) -> None:
        self.epoch = None
        self.pump.feed(px.Unserved(reason, drain_s))

    def stop(self) -> None:
        self.epoch = None
        self.pump.feed(px.Stopped("this machine is going"))

    def lost(self, peer: NodeId) -> None:
        """A link broke: what was asked over it is not answered any more."""
        for attempt in [each for each in self.attempts.values() if each.link is not None and each.host == peer]:
            self._tell_lost(attempt, px.Loss.BROKEN, "the connection is lost")

    # -- clients -------------------------------------------------------------------------------------------------------

    def ask(self, streams: bool) -> None:
        request = self.world.next_request()
        self.clients[request] = Client(request, streams, self.world.clock.now)
        self.pump.feed(px.Arrived(request, streams=streams))

    def _settled(self, request: int, how: str) -> None:
        client = self.clients.pop(request, None)
        self.attempts.pop(request, None)
        self.world.settled(self.node, request, client, how)

    # -- the core decides ----------------------------------------------------------------------------------------------

    def _carry_out(self, effect: px.Effect) -> None:
        match effect:
            case px.Dispatch():
                self._dispatch(effect)
            case px.Abandon(request, attempt):
                known = self.attempts.get(request)
                if known is not None and known.question.attempt == attempt:
                    self.world.abandoned(self.node, known)
                    del self.attempts[request]
            case px.Fail(request, why):
                self._settled(request, why.code)
            case px.Comfort():
                pass

    def _dispatch(self, order: px.Dispatch) -> None:
        client = self.clients[order.request]
        newest = self.node.election.epoch if self.node.election.covers(order.epoch) else order.epoch
        question = Question(self.node.id, self.node.boots, order.request, order.attempt, newest, client.streams)
        self.world.dispatched(self.node, order.epoch, self.host)
        attempt = self.attempts[order.request] = Attempt(question, self.host)
        if order.epoch != self.epoch:
            self._later(attempt, px.Loss.UNREACHED, "the layout is gone")
        elif self.host == self.node.id:
            self.node.later(0.001, 0.001, self.take, question)
        else:
            attempt.link = self.world.network.link.get((self.node.id, self.host))
            if attempt.link is None:
                self._later(attempt, px.Loss.UNREACHED, "not connected")
            else:
                self.world.network.send(self.node.id, self.host, question)

    def _later(self, attempt: Attempt, loss: px.Loss, reason: str) -> None:
        self.node.later(0.001, 0.001, self._tell_lost, attempt, loss, reason)

    def _tell_lost(self, attempt: Attempt, loss: px.Loss, reason: str) -> None:
        question = attempt.question
        if self.attempts.get(question.request) is attempt:
            del self.attempts[question.request]
            self.pump.feed(px.Lost(question.request, question.attempt, loss, reason))

    def hear(self, answer: Answer) -> None:
        """The host says something."""
        question = answer.question
        attempt = self.attempts.get(question.request)
        if question.boot != self.node.boots or attempt is None or attempt.question != question:
            return
        if answer.lost is not None:
            self._tell_lost(attempt, answer.lost, "the engine ended")
        elif answer.part == "began":
            if attempt.begun:
                return
            attempt.begun = True
            can_resume = question.request % 2 == 0  # of some streams no transcript can be kept
            self.pump.feed(px.Began(question.request, question.attempt, resumable=can_resume))
        else:
            self.pump.feed(px.Completed(question.request, question.attempt))
            self._settled(question.request, "answered")

    # -- on the host ---------------------------------------------------------------------------------------------------

    def take(self, question: Question) -> None:
        """A question arrives at our llama-server, if that is here."""
        mark = (question.ingress, question.boot, question.request, question.attempt)
        if mark in self._heard:
            return  # rough weather repeats what a stream would not
        self._heard.add(mark)
        server = self.node.engine.server_of(self.node.engine_epoch(question.epoch))
        if server is None:
            self._say(question, Answer(question, "", px.Loss.UNREACHED))
            return
        self._served.setdefault(server, set()).add(question)
        self.world.taken_up(question, server)
        self.node.later(0.02, 0.1, self._token, server, question, True)

    def _token(self, server: Process, question: Question, first: bool) -> None:
        if question not in self._served.get(server, ()):
            return
        if server.is_held_up() or server.why_broken():
            self.node.later(0.2, 0.2, self._token, server, question, first)
            return
        if first:
            if question.streams:
                self._say(question, Answer(question, "began"))
            self.node.later(0.03, 0.4, self._token, server, question, False)
            return
        self._served[server].discard(question)
        self._say(question, Answer(question, "whole"))

    def ended(self, server: Process) -> None:
        """Our llama-server is no more: all that it had begun is lost."""
        for question in sorted(self._served.pop(server, ()), key=lambda q: (q.request, q.attempt)):
            self._say(question, Answer(question, "", px.Loss.BROKEN))

    def busy(self, server: Process | None) -> bool:
        return server is not None and bool(self._served.get(server))

    def _say(self, question: Question, answer: Answer) -> None:
        if question.ingress == self.node.id:
            self.node.later(0.001, 0.001, self.hear, answer)
        else:
            self.world.network.send(self.node.id, question.ingress, answer)
