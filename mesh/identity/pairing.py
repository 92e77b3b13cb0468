"""Pairing by a short code: how a person who read it on one machine and typed it on another vouches for both.

The code never travels, nor anything a guess could be tried on afterwards: this is SPAKE2 (see RFC 9382) in the group
of Ed25519, with the code as its password. Both sides mix in whom they talk to, as the handshake of their connection has
proven it, so one in the middle has two keys that do not fit, whatever it relays. Then each proves that it came to the
same key; the member first, because each of the newcomer's elements is good for one guess, and the newcomer counts them.

A code is seven characters of a 32-letter alphabet, 35 bits, and a check character, so that most slips of a finger are
told from a wrong code and cost no attempt.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from mesh.errors import UsageError, WireError
from mesh.wire.facts import MeshId, Role

CODE_LENGTH = 8
ELEMENT_BYTES = 33
PROOF_BYTES = 32
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Without i, l, o and u: what looks like another character, and most words nobody wants on a screen."""
_LOOKS_LIKE = str.maketrans("ilo", "110", " -_\t\r\n")

Randomness = Callable[[int], bytes]


def make_code(randomness: Randomness) -> str:
    """A new code as people read it, ``k7mp-q2xd``; 35 random bits."""
    number = int.from_bytes(randomness(5), "big")
    body = "".join(_ALPHABET[number >> 5 * at & 31] for at in range(CODE_LENGTH - 1))
    return show_code(body + _check(body))


def show_code(code: str) -> str:
    return f"{code[:4]}-{code[4:]}"


def read_code(typed: str) -> str:
    """What somebody typed, without what means nothing: spaces, dashes, capitals, letters taken for digits.

    Raises:
        UsageError: ``not-a-code`` or ``code-typo``.
    """
    code = typed[:64].lower().translate(_LOOKS_LIKE)
    if len(code) != CODE_LENGTH or any(character not in _ALPHABET for character in code):
        raise UsageError(
            f'"{typed[:64]}" is no pairing code: one has eight letters and digits, like k7mp-q2xd',
            remedy="type what the new machine shows:  mesh approve CODE",
            code="not-a-code",
        )
    if _check(code[:-1]) != code[-1]:
        raise UsageError(
            f'the code "{typed[:64]}" has a typo', remedy="look at the new machine again; no attempt was lost",
            code="code-typo",
        )  # fmt: skip
    return code


def _check(body: str) -> str:
    # Odd weights: one wrong character never goes unnoticed, and two swapped ones hardly ever.
    return _ALPHABET[sum((2 * at + 3) * _ALPHABET.index(character) for at, character in enumerate(body)) & 31]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Who wants in, as both sides know it. ``public`` is the key its handshake proved."""

    public: bytes
    role: Role
    name: str

    def identity(self) -> bytes:
        return b"mesh pairing newcomer 1\0" + msgspec.msgpack.encode((self.public, self.role, self.name))


@dataclass(frozen=True, slots=True)
class Member:
    """Who lets in, and into which mesh."""

    public: bytes
    mesh: MeshId

    def identity(self) -> bytes:
        return b"mesh pairing member 1\0" + msgspec.msgpack.encode((self.public, self.mesh))


class Attempt:
    """The newcomer's side of one attempt. ``element`` goes to the member, and is worth one answer."""

    def __init__(self, code: str, newcomer: Newcomer, randomness: Randomness) -> None:
        self._newcomer = newcomer
        self._side = _spake2().SPAKE2_A(code.encode(), idA=newcomer.identity(), entropy_f=randomness)
        self.element: bytes = self._side.start()

    def answer(self, member: Member, element: bytes, proof: bytes) -> bytes | None:
        """Our proof for ``member``; None: what was typed there is not our code, or nothing was.

        Raises:
            WireError: ``element`` is none.
        """
        key = _finish(self._side, element)
        if not hmac.compare_digest(proof, _proof(key, member, "member")):
            return None
        return _proof(key, member, "newcomer")


@dataclass(frozen=True, slots=True)
class Challenge:
    """The member's side: what to send, and what to hear. ``expected`` stays here."""

    element: bytes
    proof: bytes
    expected: bytes

    def is_met_by(self, proof: bytes) -> bool:
        return hmac.compare_digest(proof, self.expected)


def challenge(code: str, newcomer: Newcomer, member: Member, element: bytes, randomness: Randomness) -> Challenge:
    """Answer a newcomer's ``element`` with what somebody typed.

    Raises:
        WireError: ``element`` is none.
    """
    side = _spake2().SPAKE2_B(code.encode(), idA=newcomer.identity(), entropy_f=randomness)
    ours: bytes = side.start()
    key = _finish(side, element)
    return Challenge(ours, _proof(key, member, "member"), _proof(key, member, "newcomer"))


def _finish(side: Any, element: bytes) -> bytes:
    try:
        return bytes(side.finish(element))
    except Exception as error:  # it has an exception of its own for each way in which bytes are no element
        raise WireError(f"a peer sent something that is no pairing element: {error}") from error


def _proof(key: bytes, member: Member, of: Literal["member", "newcomer"]) -> bytes:
    # The newcomer is in the key already; it learns only with the answer which member it has to do with.
    return hmac.digest(key, b"mesh pairing proof 1\0" + of.encode() + b"\0" + member.identity(), "sha256")


def _spake2() -> Any:
    import spake2  # 0.16 s of tables, which only a machine that pairs needs

    return spake2
