"""Whom a machine without a mesh asks, with which code, and when it stops looking."""

from __future__ import annotations

import itertools
from typing import Any

from mesh.discovery.lan import Door, Mesh
from mesh.membership.seeking import (
    AGAIN_S,
    MAX_GUESSES,
    ROUND_S,
    AskAt,
    Begin,
    Effect,
    Ended,
    Event,
    Guessed,
    Held,
    Nobody,
    Saw,
    Seeking,
    ShowCode,
    TellMistyped,
    Tick,
    Withdraw,
)

LOOK_S = 1.5
KITCHEN, ATTIC, OFFICE = (Door(name, (f"10.0.0.{n}:7842",)) for n, name in enumerate(("kitchen", "attic", "office"), 1))
HOME, WORK = Mesh("t1", "home", (KITCHEN, ATTIC)), Mesh("t2", "work", (OFFICE,))


class Newcomer:
    def __init__(self) -> None:
        numbers = itertools.count(1)
        self.core = Seeking(LOOK_S, lambda: f"code {next(numbers)}")
        self.now = 1000.0
        self.feed(Begin())

    def feed(self, *events: Event) -> list[Effect]:
        return [effect for event in events for effect in self.core.handle(event, self.now)]

    def wait(self, seconds: float) -> list[Effect]:
        """As a pump would: every timer in its time."""
        until, out = self.now + seconds, []
        while (due := self.core.next_timer()) is not None and due <= until:
            self.now = max(self.now, due)
            out += self.feed(Tick())
            assert (next_due := self.core.next_timer()) is None or next_due > self.now, "a due timer stays"
        self.now = until
        return out


def of(effects: list[Effect], kind: type[Any]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_when_nobody_is_announced_it_says_so_after_the_look_and_not_later() -> None:
    newcomer = Newcomer()
    assert newcomer.wait(LOOK_S) == [Nobody(())]
    assert newcomer.wait(10 * ROUND_S) == []


def test_every_member_that_is_seen_is_asked_with_one_code() -> None:
    newcomer = Newcomer()
    asked = of(newcomer.feed(Saw((HOME, WORK))), AskAt)
    assert asked == [AskAt(KITCHEN, "code 1"), AskAt(ATTIC, "code 1"), AskAt(OFFICE, "code 1")]


def test_the_code_is_shown_once_a_member_holds_the_request() -> None:
    newcomer = Newcomer()
    assert of(newcomer.feed(Saw((HOME, WORK))), ShowCode) == []
    assert newcomer.feed(Held(KITCHEN)) == [ShowCode("code 1", ("home",))]
    assert newcomer.feed(Held(ATTIC), Held(KITCHEN)) == [], "once is enough"
    assert newcomer.feed(Held(OFFICE)) == [ShowCode("code 1", ("home", "work"))]


def test_while_a_request_is_held_it_waits_for_ever() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((WORK,)), Held(OFFICE))
    assert of(newcomer.wait(20 * ROUND_S), Nobody) == []


def test_members_that_do_not_answer_are_named_and_no_reason_to_wait() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((HOME,)))
    assert newcomer.wait(2 * LOOK_S) == [], "they may yet answer"
    assert newcomer.feed(Ended(KITCHEN, "no-answer", "")) == []
    assert newcomer.feed(Ended(ATTIC, "no-answer", "")) == [Nobody(("home",))]


def test_a_member_that_dropped_the_request_is_asked_again_in_a_while() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((WORK,)), Held(OFFICE), Ended(OFFICE, "dropped", ""))
    assert of(newcomer.wait(AGAIN_S - 1), AskAt) == []
    assert of(newcomer.wait(2), AskAt) == [AskAt(OFFICE, "code 1")]


def test_every_round_has_its_own_code() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((WORK,)), Held(OFFICE))
    assert newcomer.wait(ROUND_S) == [Withdraw(OFFICE), AskAt(OFFICE, "code 2")]
    assert newcomer.feed(Held(OFFICE)) == [ShowCode("code 2", ("work",))]


def test_a_member_that_is_announced_twice_holds_one_request() -> None:
    again = Door("office", ("10.0.0.3:7842", "[fd00::3]:7842"))
    newcomer = Newcomer()
    newcomer.feed(Saw((WORK,)), Held(OFFICE))
    assert newcomer.feed(Saw((Mesh("t2", "work", (again,)),))) == [AskAt(again, "code 1")]
    newcomer.feed(Ended(OFFICE, "replaced", ""), Held(again))
    assert newcomer.wait(ROUND_S - 1) == [], "what is announced no more is not asked again"
    newcomer.feed(Saw((WORK, Mesh("t3", "work", (again,)))), Held(OFFICE), Ended(again, "replaced", ""))
    assert newcomer.wait(0.5) == [], "nor do two announcements take each other's request away"


def test_a_mistyped_code_is_told_and_many_guesses_end_the_code() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((WORK,)), Held(OFFICE))
    for _ in range(MAX_GUESSES - 1):
        assert newcomer.feed(Guessed(OFFICE)) == [TellMistyped("work")]
    assert AskAt(OFFICE, "code 2") in newcomer.feed(Guessed(OFFICE))


def test_a_member_that_comes_later_is_asked_too_and_one_that_went_is_not() -> None:
    newcomer = Newcomer()
    newcomer.feed(Saw((HOME,)), Held(KITCHEN))
    assert newcomer.feed(Saw((Mesh("t1", "home", (KITCHEN,)), WORK))) == [Withdraw(ATTIC), AskAt(OFFICE, "code 1")]
    assert newcomer.feed(Saw(())) == [Withdraw(OFFICE)], "the one that holds us says itself when that is over"
    assert newcomer.feed(Ended(ATTIC, "gone", ""), Held(ATTIC), Guessed(ATTIC)) == []
    newcomer.feed(Ended(KITCHEN, "no-answer", ""))
    assert newcomer.wait(2 * AGAIN_S) == []
