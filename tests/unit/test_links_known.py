"""Where members were last seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.membership.known import MAX_ADDRESSES, AddressBook
from mesh.wire.messages import MemberAddress

ANNA, BEN = "a" * 26, "b" * 26


def test_hearsay_adds_and_a_meeting_replaces() -> None:
    book = AddressBook([MemberAddress(ANNA, "anna", ("1.1.1.1:1",))])
    assert book.hear(MemberAddress(ANNA, "anna", ("2.2.2.2:2", "1.1.1.1:1")))
    assert book.addresses(ANNA) == ("1.1.1.1:1", "2.2.2.2:2")
    assert not book.hear(MemberAddress(ANNA, "anna", ("2.2.2.2:2",)))
    assert book.meet(MemberAddress(ANNA, "anna", ("3.3.3.3:3",)))
    assert book.addresses(ANNA) == ("3.3.3.3:3",)
    assert not book.meet(MemberAddress(ANNA, "anna", ("3.3.3.3:3", "3.3.3.3:3")))
    assert book.addresses(BEN) == ()


def test_the_forgotten_are_gone() -> None:
    book = AddressBook([MemberAddress(ANNA, "anna", ())])
    book.forget(ANNA)
    book.forget(BEN)
    assert ANNA not in book


# Whatever is said, a member has a bounded list without doubles, and saying it twice changes nothing.
@given(st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from([f"h:{n}" for n in range(30)]), max_size=16))))
def test_addresses_stay_few_and_distinct(said: list[tuple[bool, list[str]]]) -> None:
    book = AddressBook()
    for direct, addresses in said:
        member = MemberAddress(ANNA, "anna", tuple(addresses))
        tell = book.meet if direct else book.hear
        tell(member)
        assert not tell(member)
        known = book.addresses(ANNA)
        assert len(known) == len(set(known)) <= MAX_ADDRESSES


def test_where_members_live_is_known_as_soon_as_they_say_so_and_no_longer() -> None:
    book = AddressBook([MemberAddress(ANNA, "anna", ("10.0.0.5:7842", "[fd00::5]:7842", "no address at all", ""))])
    assert book.is_home("10.0.0.5")
    assert book.is_home("fd00::5")
    assert not book.is_home("10.0.0.6")
    book.hear(MemberAddress(BEN, "ben", ("10.0.0.6:1",)))
    assert book.is_home("10.0.0.6")
    book.meet(MemberAddress(BEN, "ben", ("10.0.0.7:1",)))
    assert not book.is_home("10.0.0.6")
    book.forget(ANNA)
    assert not book.is_home("10.0.0.5")
    assert book.is_home("10.0.0.7")
