"""The code that people read and type, and what the two machines prove by it."""

from __future__ import annotations

import contextlib
import secrets
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import UsageError, WireError
from mesh.identity.pairing import Attempt, Member, Newcomer, challenge, make_code, read_code, show_code

LAPTOP = Newcomer(b"n" * 32, "worker", "laptop")
KITCHEN = Member(b"k" * 32, "m" * 26)
codes = st.binary(min_size=5, max_size=5).map(lambda seed: read_code(make_code(lambda _: seed)))


@given(st.binary(min_size=5, max_size=5))
def test_a_code_is_read_as_it_was_made_however_it_is_typed(seed: bytes) -> None:
    shown = make_code(lambda _: seed)
    assert len(shown) == 9
    code = read_code(shown)
    assert show_code(code) == shown
    for typed in (
        shown.upper(),
        f" {shown} ",
        shown.replace("-", ""),
        shown.replace("-", " "),
        shown.replace("0", "O"),
    ):
        assert read_code(typed) == code
    assert read_code(shown.replace("1", "l")) == code


def bits(number: int, size: int) -> bytes:
    return (number << 3).to_bytes(size, "big")


def test_codes_have_35_random_bits() -> None:
    assert len({make_code(partial(bits, n)) for n in range(1000)}) > 990
    low, high = make_code(lambda _: bytes(5)), make_code(lambda _: b"\xff" * 5)
    assert (low[:7], high[:7]) == ("0000-00", "zzzz-zz")


# One wrong character is a typo, whichever it is: it costs no attempt.
@given(codes, st.integers(0, 7), st.sampled_from("0123456789abcdefghjkmnpqrstvwxyz"))
def test_one_wrong_character_is_called_a_typo(code: str, at: int, other: str) -> None:
    if code[at] == other:
        return
    with pytest.raises(UsageError) as caught:
        read_code(code[:at] + other + code[at + 1 :])
    assert caught.value.code == "code-typo"


@given(st.text(max_size=100))
def test_anything_typed_is_a_code_or_a_usage_error(typed: str) -> None:
    try:
        assert len(read_code(typed)) == 8
    except UsageError as error:
        assert error.code in ("not-a-code", "code-typo")
        assert len(error.message) < 400


@pytest.mark.parametrize("typed", ["", "1234", "k7mp-q2xdk7mp", "ümläüt12", "--------"])
def test_what_is_no_code_is_called_so(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_code(typed)
    assert caught.value.code == "not-a-code"


def meet(
    shown: str,
    typed: str,
    *,
    newcomer: Newcomer = LAPTOP,
    as_seen: Newcomer = LAPTOP,
    member: Member = KITCHEN,
    as_met: Member = KITCHEN,
) -> tuple[bool, bool]:
    """Whether each side believes the other: the newcomer, the member."""
    attempt = Attempt(shown, newcomer, secrets.token_bytes)
    made = challenge(typed, as_seen, member, attempt.element, secrets.token_bytes)
    proof = attempt.answer(as_met, made.element, made.proof)
    return proof is not None, proof is not None and made.is_met_by(proof)


def test_both_sides_believe_in_the_same_code() -> None:
    assert meet("k7mpq2xd", "k7mpq2xd") == (True, True)


@settings(max_examples=15, deadline=None)
@given(codes, codes)
def test_another_code_convinces_nobody(shown: str, typed: str) -> None:
    assert meet(shown, typed) == (shown == typed, shown == typed)


@pytest.mark.parametrize(
    "difference",
    [
        {"as_seen": Newcomer(b"x" * 32, "worker", "laptop")},
        {"as_seen": Newcomer(b"n" * 32, "client", "laptop")},
        {"as_seen": Newcomer(b"n" * 32, "worker", "attic")},
        {"as_met": Member(b"x" * 32, "m" * 26)},
        {"as_met": Member(b"k" * 32, "x" * 26)},
    ],
)
def test_one_in_the_middle_is_not_believed_though_the_code_is_right(difference: dict[str, Newcomer | Member]) -> None:
    assert meet("k7mpq2xd", "k7mpq2xd", **difference) == (False, False)  # type: ignore[arg-type]


def test_the_members_own_proof_does_not_prove_the_newcomer() -> None:
    attempt = Attempt("k7mpq2xd", LAPTOP, secrets.token_bytes)
    made = challenge("k7mpq2xd", LAPTOP, KITCHEN, attempt.element, secrets.token_bytes)
    assert not made.is_met_by(made.proof)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=33, max_size=33) | st.binary(max_size=40).map(lambda rest: b"B" + rest))
def test_bytes_that_are_no_element_are_refused(element: bytes) -> None:
    attempt = Attempt("k7mpq2xd", LAPTOP, secrets.token_bytes)
    with contextlib.suppress(WireError):
        assert attempt.answer(KITCHEN, element, bytes(32)) is None
    with contextlib.suppress(WireError):
        challenge("k7mpq2xd", LAPTOP, KITCHEN, element, secrets.token_bytes)


@pytest.mark.parametrize("side", [b"A", b"B"])
def test_an_element_sent_back_is_refused(side: bytes) -> None:
    attempt = Attempt("k7mpq2xd", LAPTOP, secrets.token_bytes)
    with pytest.raises(WireError):
        attempt.answer(KITCHEN, side + attempt.element[1:], bytes(32))
