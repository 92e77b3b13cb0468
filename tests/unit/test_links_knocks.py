"""Announced tickets: good once, for some seconds, for who announced them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.membership.knocks import MAX_EACH, VALID_S, Knocks

ANNA, BEN = "a" * 26, "b" * 26


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_a_ticket_is_good_once() -> None:
    knocks = Knocks()
    assert knocks.expect(ANNA, digest(1), 0.0)
    assert knocks.claim(digest(1), 1.0) == ANNA
    assert knocks.claim(digest(1), 1.0) is None


def test_a_ticket_that_nobody_announced_is_nobodys() -> None:
    assert Knocks().claim(digest(1), 0.0) is None


def test_a_ticket_expires_and_is_gone_then() -> None:
    knocks = Knocks()
    knocks.expect(ANNA, digest(1), 0.0)
    assert knocks.claim(digest(1), VALID_S) is None
    assert len(knocks) == 0


def test_a_lost_link_takes_its_tickets_with_it() -> None:
    knocks = Knocks()
    knocks.expect(ANNA, digest(1), 0.0)
    knocks.expect(BEN, digest(2), 0.0)
    knocks.forget(ANNA)
    assert knocks.claim(digest(1), 0.0) is None
    assert knocks.claim(digest(2), 0.0) == BEN


def test_nobody_can_take_over_a_ticket() -> None:
    knocks = Knocks()
    knocks.expect(ANNA, digest(1), 0.0)
    assert not knocks.expect(BEN, digest(1), 0.0)
    assert knocks.claim(digest(1), 0.0) == ANNA


def test_one_member_holds_a_bounded_number_and_the_others_do_not_pay_for_it() -> None:
    knocks = Knocks()
    taken = [knocks.expect(ANNA, digest(number), 0.0) for number in range(MAX_EACH + 5)]
    assert taken == [True] * MAX_EACH + [False] * 5
    assert knocks.expect(BEN, digest(1000), 0.0)
    assert knocks.expect(ANNA, digest(1001), VALID_S), "the old ones make room"
    assert len(knocks) == 2


# However members announce, show, leave and wait: never more than the bound is held, and both indexes agree.
@given(
    st.lists(
        st.tuples(st.sampled_from("xcf"), st.sampled_from([ANNA, BEN]), st.integers(0, 100), st.floats(0, 2)),
        max_size=200,
    )
)
def test_what_is_held_stays_bounded(steps: list[tuple[str, str, int, float]]) -> None:
    knocks, now = Knocks(), 0.0
    for kind, peer, number, pause in steps:
        now += pause
        if kind == "x":
            knocks.expect(peer, digest(number), now)
        elif kind == "c":
            knocks.claim(digest(number), now)
        else:
            knocks.forget(peer)
        assert len(knocks) == sum(map(len, knocks._expected.values())) <= 2 * MAX_EACH
