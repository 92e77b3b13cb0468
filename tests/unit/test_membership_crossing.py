"""What is tried, in which order, to reach a member that cannot just be dialed; and what is done for others in that."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.membership import crossing
from mesh.membership.crossing import (
    DIALS_AT_ONCE,
    FIRST_DIRECT_S,
    FIRST_PAUSE_S,
    HEAD_START_S,
    HELPERS,
    LAST_DIRECT_S,
    REDIAL_S,
    Crossing,
    Dial,
    DialOver,
    Effect,
    Heard,
    Helper,
    HelperGone,
    Linked,
    Moved,
    Silent,
    Tell,
    Tick,
    Unwanted,
    Wanted,
)
from mesh.membership.introducer import (
    IDLE_S,
    MAX_MEETING,
    MAX_PAIRS,
    MAX_PAIRS_OF_ONE,
    Bucket,
    Introducer,
    Reached,
    RelayTable,
    meeting_addresses,
    sane_addresses,
)
from mesh.wire.facts import NodeFacts
from mesh.wire.messages import Apart, Carried, Carry, Introduce, Meet


def node(letter: str) -> str:
    return letter * 26


US, B, R, S, T, U = (node(letter) for letter in "abrstu")
THERE = ("203.0.113.5:7842",)


class Played:
    """A core and its clock; remembers what it asked for."""

    def __init__(self, *helpers: Helper) -> None:
        self.members = {B, R, S, T, U}
        self.core = Crossing(US, self.members.__contains__)
        self.now = 128.0
        for helper in helpers:
            self.say(helper)

    def say(self, event: crossing.Event) -> list[Effect]:
        return self.core.handle(event, self.now)

    def tick(self) -> list[Effect]:
        """Let time pass until the next timer."""
        due = self.core.next_timer()
        assert due is not None
        self.now = max(self.now, due)
        return self.say(Tick())

    def hear(self, via: str, message: Meet | Carried | Apart) -> list[Effect]:
        return self.say(Heard(via, message))


def near(letter: str, rtt_ms: float = 10.0, *, relay_only: bool = False) -> Helper:
    return Helper(node(letter), rtt_ms, relay_only)


def test_the_ordinary_dial_has_its_chance_first() -> None:
    played = Played(near("r"))
    assert played.say(Wanted(B)) == []
    assert played.core.next_timer() == played.now + HEAD_START_S
    played.say(Linked(B, relayed=False))
    assert played.core.next_timer() is None


def test_introductions_are_asked_of_those_who_only_relay_and_then_of_the_nearest() -> None:
    played = Played(near("r", 30), near("s", 90, relay_only=True), near("t", 5), near("u", 200))
    played.say(Wanted(B))
    assert played.tick() == [Tell(via, Introduce(B)) for via in (S, T, R)]
    assert HELPERS == 3


def test_both_sides_of_an_introduction_dial_at_once() -> None:
    played = Played(near("r"))
    played.say(Wanted(B))
    played.tick()
    assert played.hear(R, Meet(B, THERE, 20)) == [Dial(B, THERE)]
    other_side = Played(near("r"))  # it did not ask
    assert other_side.hear(R, Meet(B, THERE, 20)) == [Dial(B, THERE)]


def meeting(*helpers: Helper, to_b: dict[str, float]) -> Played:
    """Introductions were asked for, and came to nothing."""
    played = Played(*helpers)
    played.say(Wanted(B))
    played.tick()
    for via, rtt_ms in to_b.items():
        played.hear(via, Meet(B, THERE, rtt_ms))
    return played


def test_when_nothing_direct_works_the_relay_with_the_shortest_way_is_asked() -> None:
    played = meeting(near("r", 10), near("s", 50), to_b={R: 100, S: 20})
    assert played.tick() == [Tell(S, Carry(B))]
    assert played.hear(S, Carried(B, 7)) == [DialOver(B, S, 7)]
    played.say(Linked(B, relayed=True))
    assert played.core.next_timer() == played.now + FIRST_DIRECT_S


def test_one_who_only_relays_is_preferred_for_it() -> None:
    played = meeting(near("r", 10), near("s", 50, relay_only=True), to_b={R: 10, S: 50})
    assert played.tick() == [Tell(S, Carry(B))]


def test_a_relay_that_refuses_or_does_not_answer_or_leads_nowhere_is_followed_by_the_next() -> None:
    played = meeting(near("r", 1), near("s", 2), near("t", 3), to_b={R: 1, S: 1, T: 1})
    assert played.tick() == [Tell(R, Carry(B))]
    assert played.hear(R, Apart(B, "full")) == [Tell(S, Carry(B))]
    assert played.tick() == [Tell(T, Carry(B))]  # silence
    assert played.hear(S, Carried(B, 1)) == []  # too late, and not asked any more
    assert played.hear(T, Carried(B, 2)) == [DialOver(B, T, 2)]
    assert played.tick() == []  # nobody left
    assert played.core.next_timer() == played.now + FIRST_PAUSE_S


def test_nothing_is_asked_of_a_helper_that_is_gone() -> None:
    played = meeting(near("r", 1), near("s", 2), to_b={R: 1, S: 1})
    played.say(HelperGone(R))
    assert played.tick() == [Tell(S, Carry(B))]


def test_with_nobody_to_ask_it_waits_for_one() -> None:
    played = Played()
    played.say(Wanted(B))
    assert played.tick() == []
    assert played.say(near("r")) == [Tell(R, Introduce(B))]


def test_pauses_grow_while_nobody_can_help() -> None:
    played = Played(near("r"))
    played.say(Wanted(B))
    pauses = []
    for _ in range(8):
        played.tick()
        before = played.now
        played.hear(R, Apart(B, "unreachable"))
        pauses.append(round((played.core.next_timer() or 0) - before))
    assert pauses == [2, 4, 8, 16, 30, 30, 30, 30]


def test_a_relayed_link_looks_for_a_direct_path_ever_more_slowly() -> None:
    played = Played(near("r"))
    played.say(Linked(B, relayed=True))
    times = []
    for _ in range(8):
        assert played.tick() == [Tell(R, Introduce(B))]
        times.append(played.now)
    pauses = [round(later - earlier) for earlier, later in pairwise(times)]
    assert pauses == [20, 40, 80, 160, 300, 300, 300]
    assert LAST_DIRECT_S == 300
    assert played.hear(R, Meet(B, THERE, 5)) == [Dial(B, THERE)]
    assert played.say(Moved()) == [Tell(R, Introduce(B))]
    played.say(Linked(B, relayed=False))
    assert played.core.next_timer() is None


def test_the_death_of_a_relay_is_answered_by_asking_the_next_at_once() -> None:
    played = meeting(near("r", 1), near("s", 2), to_b={R: 1, S: 1})
    played.tick()
    played.hear(R, Carried(B, 1))
    played.say(Linked(B, relayed=True))
    played.say(HelperGone(R))
    assert played.say(Wanted(B)) == [Tell(S, Carry(B))]


def test_a_direct_link_that_falls_silent_is_given_another_path_unless_it_is_heard_again() -> None:
    played = Played(near("r"))
    assert played.say(Silent(B)) == [Tell(R, Introduce(B))]
    assert played.say(Silent(B)) == []
    played.hear(R, Meet(B, THERE, 5))
    assert played.tick() == [Tell(R, Carry(B))]
    played.say(Linked(B, relayed=False))
    assert played.core.next_timer() is None


def test_a_relayed_link_that_falls_silent_asks_for_another_relay() -> None:
    played = meeting(near("r", 1), near("s", 2), to_b={R: 1, S: 1})
    played.tick()
    played.hear(R, Carried(B, 1))
    played.say(Linked(B, relayed=True))
    assert played.say(Silent(B)) == [Tell(S, Carry(B))]
    passive = Played(near("r"), near("s"))  # the other side asked nobody, and knows no other relay
    passive.say(Linked(B, relayed=True))
    assert passive.say(Silent(B)) == [Tell(R, Introduce(B)), Tell(S, Introduce(B))]


def test_an_introducer_cannot_make_us_dial_all_the_time_nor_strangers_nor_ourselves() -> None:
    played = Played(near("r"))
    assert played.hear(R, Meet(B, THERE, 1)) == [Dial(B, THERE)]
    assert played.hear(R, Meet(B, THERE, 1)) == []
    played.now += REDIAL_S
    assert played.hear(R, Meet(B, THERE, 1)) == [Dial(B, THERE)]
    assert played.hear(R, Meet(node("x"), THERE, 1)) == []
    played.members.add(US)
    assert played.hear(R, Meet(US, THERE, 1)) == []
    assert played.hear(S, Meet(T, THERE, 1)) == []  # no direct link to who says so


def test_all_introducers_together_cannot_make_us_spray_packets() -> None:
    played = Played(near("r"))
    crowd = [chr(ord("a") + number % 26) + chr(ord("a") + number // 26) + "z" * 24 for number in range(250)]
    played.members.update(crowd)
    dials = sum(len(played.hear(R, Meet(peer, THERE, 1))) for peer in crowd)
    assert dials == DIALS_AT_ONCE


def test_who_is_no_member_any_more_is_not_looked_for() -> None:
    played = Played(near("r"))
    played.say(Wanted(B))
    played.say(Unwanted(B))
    assert played.core.next_timer() is None


EVENTS = st.one_of(
    st.builds(Wanted, st.sampled_from([B, S])),
    st.builds(Unwanted, st.sampled_from([B, S])),
    st.builds(Silent, st.sampled_from([B, S])),
    st.builds(Linked, st.sampled_from([B, S]), st.booleans()),
    st.builds(Helper, st.sampled_from([R, S, T]), st.floats(0, 500), st.booleans()),
    st.builds(HelperGone, st.sampled_from([R, S, T])),
    st.builds(
        Heard,
        st.sampled_from([R, S, T]),
        st.one_of(
            st.builds(Meet, st.sampled_from([B, S, US]), st.just(THERE), st.floats(0, 500)),
            st.builds(Carried, st.sampled_from([B, S]), st.integers(0, 9)),
            st.builds(Apart, st.sampled_from([B, S]), st.just("full")),
        ),
    ),
    st.just(Moved()),
    st.just(Tick()),
)


def test_a_member_that_introduces_itself_is_not_asked_for_a_way_to_itself() -> None:
    played = Played(Helper(R, 1.0, False), Helper(S, 1.0, False))
    played.say(Silent(S))
    assert played.say(Heard(S, Meet(S, THERE, 0.0))) == []
    asked = [effect for _ in range(5) for effect in played.tick() if isinstance(effect, Tell)]
    assert all(tell.via == R for tell in asked)


# Whatever happens in whatever order: nobody is asked to reach itself, only present helpers are asked, timers lie ahead,
# and what is asked for stays bounded in time.
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 3)), max_size=40))
def test_no_order_of_events_confuses_it(steps: list[tuple[crossing.Event, float]]) -> None:
    played = Played()
    helpers: set[str] = set()
    for event, pause in steps:
        played.now += pause
        if isinstance(event, Helper):
            helpers.add(event.node)
        elif isinstance(event, HelperGone):
            helpers.discard(event.node)
        for effect in played.say(event):
            if isinstance(effect, Tell):
                assert effect.via in helpers
                assert effect.via != effect.message.target
    for _ in range(50):
        due = played.core.next_timer()
        if due is None:
            break
        before = played.now
        played.tick()
        after = played.core.next_timer()
        assert after is None or after > before or after > played.now - 1e-9


# -- what is done for others -------------------------------------------------------------------------------------------


def facts(letter: str, *addresses: str) -> NodeFacts:
    return NodeFacts(
        id=node(letter), version=1, name=letter, role="worker", mesh_version="0", engine="", backend="", devices=(),
        budget_bytes=0, threads=1, models=(), wants="", addresses=addresses, crosses=True,
    )  # fmt: skip


def reach(letter: str, seen: str, *told: str, rtt_ms: float = 10.0) -> Reached:
    return Reached(seen, facts(letter, *told), rtt_ms)


REACHED = {
    US: reach("a", "203.0.113.1:4000", "192.168.1.2:7842"),
    B: reach("b", "203.0.113.2:5000", "home.example:7842", "192.168.1.2:7842", "203.0.113.2:5000"),
}


def test_an_introduction_tells_both_where_the_other_is() -> None:
    said = Introducer().introduce(US, Introduce(B), REACHED, 0)
    assert said == [
        (B, Meet(US, ("203.0.113.1:4000", "192.168.1.2:7842"), 10.0)),
        (US, Meet(B, ("203.0.113.2:5000", "192.168.1.2:7842"), 10.0)),
    ]


@pytest.mark.parametrize(("asker", "target"), [(US, T), (T, B), (US, US)])
def test_only_members_that_are_linked_directly_are_introduced(asker: str, target: str) -> None:
    assert Introducer().introduce(asker, Introduce(target), REACHED, 0) == [(asker, Apart(target, "unreachable"))]


def test_introductions_are_bounded_for_who_asks_and_for_who_is_asked_for() -> None:
    introducer = Introducer()
    answers = [introducer.introduce(US, Introduce(B), REACHED, 0) for _ in range(500)]
    assert sum(len(answer) == 2 for answer in answers) == Introducer.ASKS_AT_ONCE
    assert answers[-1] == [(US, Apart(B, "too-many"))]
    introducer.gone(US)  # coming back does not help
    assert introducer.introduce(US, Introduce(B), REACHED, 0) == [(US, Apart(B, "too-many"))]
    assert len(introducer.introduce(US, Introduce(B), REACHED, 10)) == 2
    many = {node(letter): reach(letter, "203.0.113.9:1") for letter in "cdefghijkl"} | REACHED
    told = sum(len(introducer.introduce(asker, Introduce(B), many, 10)) == 2 for asker in many for _ in range(40))
    assert told <= Introducer.MEETS_AT_ONCE


def test_addresses_that_could_harm_others_are_not_passed_on_nor_taken() -> None:
    evil = (
        "224.0.0.1:7", "255.255.255.255:7", "0.0.0.0:7", "127.0.0.1:7", "169.254.1.1:7", "[ff02::1]:7", "[::1]:7",
        "[::ffff:127.0.0.1]:7", "[fe80::1]:7", "[::]:7", "kitchen:7", "nonsense", "1.2.3.4:0", "1.2.3.4:99999",
    )  # fmt: skip
    assert sane_addresses(evil, loopback=False) == ()
    assert sane_addresses((*evil, "198.51.100.4:7"), loopback=False) == ("198.51.100.4:7",)
    assert sane_addresses(("127.0.0.1:7",), loopback=True) == ("127.0.0.1:7",)
    many = reach("b", "203.0.113.2:5000", *(f"198.51.100.{number}:1" for number in range(16)))
    assert len(meeting_addresses(many)) == MAX_MEETING


@given(st.lists(st.text(max_size=40) | st.ip_addresses().map(lambda ip: f"[{ip}]:5" if ip.version == 6 else f"{ip}:5")))
def test_any_text_is_an_address_or_left_out(texts: list[str]) -> None:
    assert set(sane_addresses(texts, loopback=True)) <= set(texts)


def test_a_pair_has_one_channel_and_only_it_may_use_it() -> None:
    table = RelayTable(1e6)
    [(to, there), (asker, here)] = table.carry(US, Carry(B), REACHED, 0)
    assert (to, asker) == (B, US)
    assert isinstance(here, Carried) and isinstance(there, Carried)
    assert here.channel == there.channel
    again = table.carry(B, Carry(US), REACHED, 1)[1][1]
    assert isinstance(again, Carried) and again.channel == here.channel
    assert table.pass_on(US, here.channel, 1200, 1) == B
    assert table.pass_on(B, here.channel, 1200, 1) == US
    assert table.pass_on(T, here.channel, 1200, 1) is None
    assert table.pass_on(US, here.channel + 1, 1200, 1) is None
    table.gone(B)
    assert table.pass_on(US, here.channel, 1200, 1) is None


def test_what_is_over_the_rate_is_dropped_and_counted() -> None:
    table = RelayTable(100_000)
    channel = table.carry(US, Carry(B), REACHED, 0)[0][1].channel  # type: ignore[union-attr]
    passed = sum(table.pass_on(US, channel, 1000, second / 100) is not None for second in range(1000) for _ in range(5))
    assert passed * 1000 <= 100_000 * 10 + 65_536
    assert passed * 1000 >= 100_000 * 9
    assert table.dropped == 5000 - passed
    assert table.carried_bytes == passed * 1000


def test_pairs_are_bounded_and_those_that_fell_silent_make_room() -> None:
    letters = "cdefghijklmnopqrstuvwxyz"
    reached = {node(letter): reach(letter, "203.0.113.9:1") for letter in letters}
    table = RelayTable(1e6)
    answers = [table.carry(node("c"), Carry(node(letter)), reached, 0) for letter in letters[1:]]
    assert sum(len(answer) == 2 for answer in answers) == MAX_PAIRS_OF_ONE
    assert answers[-1] == [(node("c"), Apart(node("z"), "full"))]
    for asker in letters:
        for target in letters:
            table.carry(node(asker), Carry(node(target)), reached, 0)
    assert table.pairs == MAX_PAIRS
    assert len(table.carry(node("c"), Carry(node("z")), reached, IDLE_S)) == 2


def test_who_has_no_rate_carries_nothing() -> None:
    assert RelayTable(0).carry(US, Carry(B), REACHED, 0) == [(US, Apart(B, "no-relay"))]


# Over any time a bucket lets through its burst and its rate, and no more.
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(1, 500)), max_size=60))
def test_a_bucket_keeps_its_rate(takes: list[tuple[float, float]]) -> None:
    bucket, now, taken = Bucket(100, 300, 0), 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.take(amount, now):
            taken += amount
        assert taken <= 300 + 100 * now + 1e-6
