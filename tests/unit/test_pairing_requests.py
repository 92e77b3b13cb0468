"""Requests to be let in: who is challenged with what was typed, how often, and for how long."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.identity.pairing import Attempt, Member, Newcomer
from mesh.membership.requests import (
    ANSWER_S,
    LIFE_S,
    MAX_OF_ONE_HOST,
    MAX_REQUESTS,
    MAX_TICKETS,
    MAX_TRIES,
    SILENCE_S,
    Admit,
    Answered,
    Came,
    Effect,
    Event,
    Failed,
    Gone,
    Heard,
    Requests,
    Say,
    SendAway,
    Show,
    Tick,
    Typed,
)
from mesh.wire.messages import Prove

US = Member(b"k" * 32, "m" * 26)
CODE, OTHER = "k7mpq2xd", "00000000"


class Asker:
    """A machine that shows ``code``."""

    def __init__(self, number: int, code: str = CODE, host: str = "") -> None:
        self.number, self.code, self.host = number, code, host or f"10.0.0.{number}"
        self.newcomer = Newcomer(number.to_bytes(32, "big"), "worker", f"machine {number}")
        self.attempt = Attempt(code, self.newcomer, secrets.token_bytes)

    def came(self) -> Came:
        return Came(self.number, self.newcomer, f"node{self.number}", self.host, self.attempt.element)

    def answer(self, prove: Prove) -> Answered:
        proof = self.attempt.answer(US, prove.element, prove.proof)
        if proof is not None:
            return Answered(self.number, proof=proof)
        self.attempt = Attempt(self.code, self.newcomer, secrets.token_bytes)
        return Answered(self.number, element=self.attempt.element)


class Table:
    """A core and the machines before it."""

    def __init__(self) -> None:
        self.core = Requests(US, secrets.token_bytes)
        self.now = 1000.0
        self.askers: dict[int, Asker] = {}
        self.tickets = 0

    def feed(self, event: Event) -> list[Effect]:
        return self.core.handle(event, self.now)

    def come(self, asker: Asker) -> list[Effect]:
        self.askers[asker.number] = asker
        return self.feed(asker.came())

    def type(self, code: str) -> list[Effect]:
        """Type a code; everybody answers honestly. Returns all effects but the challenges."""
        self.tickets += 1
        todo = self.feed(Typed(self.tickets, code))
        out: list[Effect] = []
        while todo:
            effect = todo.pop(0)
            if isinstance(effect, Say) and isinstance(effect.message, Prove):
                todo += self.feed(self.askers[effect.request].answer(effect.message))
            else:
                out.append(effect)
        return out

    def tick(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.feed(Tick())


def of(effects: list[Effect], kind: type[Any]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_a_machine_that_asks_is_shown_and_held() -> None:
    table = Table()
    effects = table.come(Asker(1))
    assert [show.request.name for show in of(effects, Show)] == ["machine 1"]
    assert of(effects, Say)[0].message.left_s == LIFE_S
    assert [request.node for request in table.core.open()] == ["node1"]


def test_the_machine_that_shows_the_typed_code_is_let_in_and_no_other() -> None:
    table = Table()
    for number, code in ((1, OTHER), (2, CODE), (3, OTHER)):
        table.come(Asker(number, code))
    (admit,) = of(table.type(CODE), Admit)
    assert admit.request.node == "node2"
    assert [request.node for request in table.core.open()] == ["node1", "node3"]


def test_a_wrong_code_is_called_so_with_the_tries_that_are_left() -> None:
    table = Table()
    table.come(Asker(1))
    (failed,) = table.type(OTHER)
    assert isinstance(failed, Failed)
    assert failed.code == "wrong-code"
    assert "2 more tries" in failed.message
    assert of(table.type(CODE), Admit)


def test_after_three_wrong_codes_a_request_is_dropped() -> None:
    table = Table()
    table.come(Asker(1))
    for _ in range(MAX_TRIES - 1):
        table.type(OTHER)
    effects = table.type(OTHER)
    assert [away.refused.code for away in of(effects, SendAway)] == ["dropped"]
    assert [failed.code for failed in of(effects, Failed)] == ["dropped"]
    assert table.core.open() == ()
    (late,) = table.type(CODE)
    assert isinstance(late, Failed)
    assert late.code == "dropped"


def test_without_a_request_a_code_is_for_nobody() -> None:
    (failed,) = Table().type(CODE)
    assert isinstance(failed, Failed)
    assert failed.code == "no-request"


def test_a_request_expires_and_a_late_code_is_told_so() -> None:
    table = Table()
    table.come(Asker(1))
    while table.now < 1000 + LIFE_S - SILENCE_S / 2:
        assert table.tick(SILENCE_S / 2) == []
        table.feed(Heard(1))
    (away,) = table.tick(SILENCE_S / 2 + 1)
    assert isinstance(away, SendAway)
    assert away.refused.code == "expired"
    (failed,) = table.type(CODE)
    assert isinstance(failed, Failed)
    assert failed.code == "expired"
    assert "machine 1" in failed.message


def test_a_machine_that_falls_silent_is_forgotten() -> None:
    table = Table()
    table.come(Asker(1))
    assert table.core.next_timer() == table.now + SILENCE_S
    assert [away.refused.code for away in of(table.tick(SILENCE_S), SendAway)] == ["no-answer"]


def test_a_machine_that_does_not_answer_its_challenge_is_shown_out_and_the_person_is_told() -> None:
    table = Table()
    table.come(Asker(1))
    table.feed(Typed(1, CODE))
    assert table.core.next_timer() == table.now + ANSWER_S
    effects = table.tick(ANSWER_S)
    assert of(effects, SendAway)
    assert [failed.ticket for failed in of(effects, Failed)] == [1]


def test_a_false_proof_ends_the_request() -> None:
    table = Table()
    table.come(Asker(1))
    table.feed(Typed(1, CODE))
    effects = table.feed(Answered(1, proof=bytes(32)))
    assert [away.refused.code for away in of(effects, SendAway)] == ["wrong-code"]
    assert [failed.code for failed in of(effects, Failed)] == ["wrong-code"]


def test_a_proof_that_nobody_asked_for_ends_the_request() -> None:
    table = Table()
    table.come(Asker(1))
    assert of(table.feed(Answered(1, proof=bytes(32))), SendAway)
    assert table.core.open() == ()


def test_a_guesser_beside_the_real_machine_gets_one_guess_for_each_code_that_is_typed() -> None:
    table = Table()
    table.come(Asker(1))
    table.come(Asker(2, OTHER))
    effects = table.feed(Typed(1, CODE))
    challenges = [effect.request for effect in of(effects, Say)]
    assert challenges == [1, 2]
    # It has been told one element and one proof; whatever it proves now is its one guess.
    table.feed(Answered(2, proof=secrets.token_bytes(32)))
    assert [request.node for request in table.core.open()] == ["node1"]


def test_few_requests_are_held_and_fewer_of_one_host() -> None:
    table = Table()
    for number in range(1, MAX_OF_ONE_HOST + 1):
        assert of(table.come(Asker(number, host="10.0.0.66")), Show)
    (away,) = table.come(Asker(50, host="10.0.0.66"))
    assert isinstance(away, SendAway)
    assert away.refused.code == "too-many"
    for number in range(MAX_OF_ONE_HOST + 1, MAX_REQUESTS + 1):
        assert of(table.come(Asker(number)), Show)
    assert of(table.come(Asker(51)), SendAway)
    assert len(table.core.open()) == MAX_REQUESTS


def test_a_machine_that_asks_again_has_one_request() -> None:
    table = Table()
    table.come(Asker(1))
    again = Asker(1)
    again.number = 9
    effects = table.feed(Came(9, again.newcomer, "node1", again.host, again.attempt.element))
    assert [away.request for away in of(effects, SendAway)] == [1]
    assert [request.id for request in table.core.open()] == [9]


def test_two_codes_typed_at_once_are_tried_one_after_the_other() -> None:
    table = Table()
    asker = Asker(1)
    table.come(asker)
    (first,) = of(table.feed(Typed(1, OTHER)), Say)
    assert table.feed(Typed(2, CODE)) == []
    effects = table.feed(asker.answer(first.message))
    assert [failed.ticket for failed in of(effects, Failed)] == [1]
    (second,) = of(effects, Say)
    (admit,) = of(table.feed(asker.answer(second.message)), Admit)
    assert admit.ticket == 2


def test_codes_do_not_pile_up() -> None:
    table = Table()
    table.come(Asker(1))
    for ticket in range(MAX_TICKETS):
        table.feed(Typed(ticket, OTHER))
    (failed,) = table.feed(Typed(99, OTHER))
    assert isinstance(failed, Failed)
    assert failed.code == "busy"


class AnyOrder(RuleBasedStateMachine):
    """Whatever machines, people and the clock do: every typed code gets exactly one answer, and only a machine that
    was challenged with its own code is let in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.challenged: dict[int, Prove] = {}
        self.typed: dict[int, str] = {}
        self.settled: set[int] = set()
        self.number = 0

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Say(request, Prove() as prove):
                    self.challenged[request] = prove
                case Admit(ticket, request):
                    assert ticket not in self.settled
                    self.settled.add(ticket)
                    assert self.table.askers[request.id].code == self.typed[ticket]
                case Failed(ticket, _, _):
                    assert ticket not in self.settled
                    self.settled.add(ticket)
                case _:
                    pass

    @rule(code=st.sampled_from([CODE, OTHER]), host=st.sampled_from(["10.0.0.1", "10.0.0.2"]))
    def come(self, code: str, host: str) -> None:
        self.number += 1
        self.take(self.table.come(Asker(self.number, code, host)))

    @rule(code=st.sampled_from([CODE, OTHER]))
    def type(self, code: str) -> None:
        self.number += 1
        self.typed[self.number] = code
        self.take(self.table.feed(Typed(self.number, code)))

    @rule(at=st.integers(0, 10), honest=st.booleans())
    def answer(self, at: int, honest: bool) -> None:
        if not self.challenged:
            return
        request = sorted(self.challenged)[at % len(self.challenged)]
        prove = self.challenged.pop(request)
        event = self.table.askers[request].answer(prove) if honest else Answered(request, proof=bytes(32))
        self.take(self.table.feed(event))

    @rule(request=st.integers(1, 30), event=st.sampled_from([Gone, Heard]))
    def noise(self, request: int, event: Callable[[int], Gone | Heard]) -> None:
        self.take(self.table.feed(event(request)))

    @rule(seconds=st.sampled_from([1.0, ANSWER_S, SILENCE_S, LIFE_S]))
    def wait(self, seconds: float) -> None:
        self.take(self.table.tick(seconds))

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        assert len(self.table.core.open()) <= MAX_REQUESTS

    @invariant()
    def a_due_timer_does_not_stay(self) -> None:
        self.take(self.table.feed(Tick()))
        due = self.table.core.next_timer()
        assert due is None or due > self.table.now

    def teardown(self) -> None:
        self.take(self.table.tick(LIFE_S))
        assert self.settled == set(self.typed)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
