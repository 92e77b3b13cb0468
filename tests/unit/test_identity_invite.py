"""Tokens survive copy and paste, and open the door as often as they say."""

from __future__ import annotations

import base64
import hashlib
import secrets
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import AdmissionError, StateError, UsageError
from mesh.identity.invite import Invite, InviteBook, create_invite
from mesh.identity.key import NodeKey

KEY = NodeKey.from_seed(bytes(32))
ADDRESSES = st.lists(st.from_regex(r"[0-9]{1,3}\.[0-9]{1,3}\.0\.1:[0-9]{1,5}", fullmatch=True), max_size=16).map(tuple)
INVITES = st.builds(
    Invite,
    mesh=st.just(KEY.id),
    inviter=st.binary(min_size=32, max_size=32),
    addresses=ADDRESSES,
    secret=st.binary(min_size=16, max_size=32),
    expires_at=st.integers(0, 2**53),
    uses=st.integers(1, 2**20),
    role=st.sampled_from(["worker", "client"]),
)
ONE = Invite(KEY.id, KEY.public, ("192.168.1.5:7842",), b"s" * 16, 1_700_000_000, 1, "worker")


def code(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        Invite.decode(text)
    assert caught.value.remedy
    return caught.value.code


# Reading what was written gives the same invite.
@given(INVITES)
def test_a_token_reads_back(invite: Invite) -> None:
    assert Invite.decode(invite.encode()) == invite


# Line breaks, indentation, quotes and capitals of a mail program change nothing.
@given(INVITES, st.lists(st.tuples(st.integers(0, 600), st.sampled_from([" ", "\n", "\r\n  ", "\t"])), max_size=6))
def test_a_mangled_paste_reads_the_same(invite: Invite, breaks: list[tuple[int, str]]) -> None:
    text = invite.encode().upper()
    for at, gap in breaks:
        text = text[:at] + gap + text[at:]
    assert Invite.decode(f"  '{text}'\n") == invite


# One wrong, missing or doubled character is called a typo.
@given(
    st.integers(5, 10_000),
    st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789"),
    st.sampled_from(["swap", "drop", "add"]),
)
def test_a_typo_is_called_a_typo(at: int, letter: str, how: str) -> None:
    token = ONE.encode()
    at = 5 + at % (len(token) - 5)
    bad = {
        "swap": token[:at] + letter + token[at + 1 :],
        "drop": token[:at] + token[at + 1 :],
        "add": token[:at] + letter + token[at:],
    }[how]
    if bad != token:
        assert code(bad) == "token-typo"


@given(st.text(max_size=200))
def test_any_text_is_refused_politely(text: str) -> None:
    assert code("x" + text) == "not-a-token"


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", max_size=300))
def test_any_base32_is_refused_politely(text: str) -> None:
    assert code("mesh1" + text) == "token-typo"


def test_a_token_whose_text_is_no_text_is_a_typo_not_a_crash() -> None:
    """Its checksum right, made by somebody who means harm: found by bin/fuzz."""
    body = msgspec.msgpack.encode((b"m" * 16, KEY.public, ("10.0.0.1:1",), b"s" * 16, 0, 1, "worker"))
    for bad in (body.replace(b"10.0.0.1:1", b"10.0\xb1\xff.1:1"), body.replace(b"worker", b"work\xe9r"), b"\x91" * 900):
        sealed = bad + hashlib.sha256(b"mesh token 1\0" + bad).digest()[:4]
        assert code("mesh1" + base64.b32encode(sealed).decode().rstrip("=").lower()) == "token-typo"


def test_what_is_wrong_with_a_token_is_said() -> None:
    assert code("") == "not-a-token"
    assert code("https://example.org") == "not-a-token"
    assert code("mesh2" + ONE.encode()[5:]) == "token-version"
    assert code("mesh1" + "a" * 100_000) == "not-a-token"
    assert code(ONE.encode()[:-10]) == "token-typo"


def test_a_token_is_one_line_without_odd_characters() -> None:
    token = ONE.encode()
    assert token.isalnum()
    assert token.islower()
    assert len(token) < 250


def test_an_invite_is_worth_its_uses_and_no_more() -> None:
    book = InviteBook(None)
    book.issue(b"s" * 16, role="client", uses=2, expires_at=2000, wall=1000)
    assert [book.redeem(b"s" * 16, wall=1500), book.redeem(b"s" * 16, wall=1500)] == ["client", "client"]
    assert refusal(book, b"s" * 16, wall=1500) == "spent"


def refusal(book: InviteBook, secret: bytes, wall: float) -> str:
    with pytest.raises(AdmissionError) as caught:
        book.redeem(secret, wall=wall)
    assert caught.value.remedy
    return caught.value.code


def test_expired_and_unknown_are_told_apart() -> None:
    book = InviteBook(None)
    book.issue(b"s" * 16, role="worker", uses=1, expires_at=2000, wall=1000)
    assert refusal(book, b"s" * 16, wall=2000) == "expired"
    assert refusal(book, b"t" * 16, wall=1500) == "unknown"


def test_an_invite_without_expiry_stays_good() -> None:
    book = InviteBook(None)
    book.issue(b"s" * 16, role="worker", uses=1, expires_at=0, wall=1000)
    assert book.redeem(b"s" * 16, wall=1e10) == "worker"


def test_a_burned_use_stays_burned_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "invites.json"
    InviteBook(path).issue(b"s" * 16, role="worker", uses=1, expires_at=2000, wall=1000)
    InviteBook(path).redeem(b"s" * 16, wall=1500)
    assert refusal(InviteBook(path), b"s" * 16, wall=1500) == "spent"


def test_a_book_that_is_no_text_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "invites.json"
    InviteBook(path).issue(b"s" * 16, role="worker", uses=1, expires_at=2000, wall=1000)
    path.write_bytes(path.read_bytes().replace(b"worker", b"work\xe9r"))
    with pytest.raises(StateError, match="damaged"):
        InviteBook(path)


def test_the_book_holds_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "invites.json"
    secret = secrets.token_bytes(16)
    InviteBook(path).issue(secret, role="worker", uses=1, expires_at=2000, wall=1000)
    data = path.read_bytes()
    assert secret not in data
    assert msgspec.json.encode(secret).strip(b'"') not in data
    assert secret.hex().encode() not in data


def test_nobody_is_let_in_when_the_use_cannot_be_burned(tmp_path: Path) -> None:
    path = tmp_path / "invites.json"
    book = InviteBook(path)
    book.issue(b"s" * 16, role="worker", uses=1, expires_at=2000, wall=1000)
    book._path = tmp_path / "invites.json" / "is-a-file"
    with pytest.raises(StateError):
        book.redeem(b"s" * 16, wall=1500)


def test_an_invite_is_made_of_given_randomness() -> None:
    book = InviteBook(None)
    invite = create_invite(
        book, mesh=KEY.id, inviter=KEY.public, addresses=(), randomness=lambda n: b"r" * n, wall=1000, lifetime_s=3600
    )
    assert (invite.secret, invite.expires_at, invite.inviter_id) == (b"r" * 16, 4600, KEY.id)
    assert book.redeem(invite.secret, wall=1001) == "worker"


@pytest.mark.parametrize(("uses", "lifetime"), [(0, 60), (2**30, 60), (1, 0), (1, -5)])
def test_senseless_invites_are_refused(uses: int, lifetime: float) -> None:
    with pytest.raises(UsageError):
        create_invite(
            InviteBook(None), mesh=KEY.id, inviter=KEY.public, addresses=(), randomness=secrets.token_bytes,
            wall=0, lifetime_s=lifetime, uses=uses,
        )  # fmt: skip
