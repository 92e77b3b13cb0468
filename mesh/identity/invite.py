"""Invite tokens, and the book in which the inviter keeps what each is still worth.

A token is ``mesh1`` and lowercase base32 of a msgpack array and a checksum: one line, no character that a shell, a chat
or a mail program changes. The secret is in the token alone; the book has its hash.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from mesh.errors import AdmissionError, UsageError
from mesh.identity.key import node_id
from mesh.identity.store import load, save
from mesh.wire.facts import Address, MeshId, NodeId, Role
from mesh.wire.messages import Key

SECRET_BYTES = 16
MAX_TOKEN = 4096
"""Characters; anything longer is no token."""
_KEEP_S = 7 * 24 * 3600
"""How long a dead invite stays in the book, so that its holder is told why and not merely that it is unknown."""
_MAX_INVITES = 1024


class _Body(Struct, frozen=True, array_like=True):
    mesh: Annotated[bytes, Meta(min_length=16, max_length=16)]
    inviter: Key
    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=32)]
    expires_at: Annotated[int, Meta(ge=0, le=2**53)]
    uses: Annotated[int, Meta(ge=1, le=2**20)]
    role: Role


_body_decoder = msgspec.msgpack.Decoder(_Body)


class Invite(Struct, frozen=True):
    """What a token says. ``expires_at`` is seconds since 1970; 0: never."""

    mesh: MeshId
    inviter: bytes
    addresses: tuple[str, ...]
    secret: bytes
    expires_at: int
    uses: int
    role: Role

    @property
    def inviter_id(self) -> NodeId:
        return node_id(self.inviter)

    def encode(self) -> str:
        """The token: one line of lowercase letters and digits."""
        mesh = base64.b32decode(self.mesh.upper() + "======")
        body = msgspec.msgpack.encode(
            _Body(mesh, self.inviter, self.addresses, self.secret, self.expires_at, self.uses, self.role)
        )
        return "mesh1" + base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Read a token, however it was wrapped or capitalised on its way.

        Raises:
            UsageError: ``not-a-token``, ``token-typo`` or ``token-version``; the message says which.
        """
        token = re.sub(r"[\s\"'`<>​]+", "", text).lower()
        if len(token) > MAX_TOKEN or not re.match(r"mesh[0-9]", token):
            raise UsageError(
                "this is not an invite token: one begins with mesh1",
                remedy="on a machine of the mesh:  mesh invite",
                code="not-a-token",
            )
        if token[4] != "1":
            raise UsageError(
                f"this invite token is of version {token[4]}; this mesh program reads version 1",
                remedy="update this machine:  git pull",
                code="token-version",
            )
        typo = UsageError(
            "this invite token has a typo, or a part of it is missing",
            remedy="copy the whole line again; it ends where `mesh invite` printed it to end",
            code="token-typo",
        )
        text = token[5:].upper()
        try:
            data = base64.b32decode(text + "=" * (-len(text) % 8))
        except ValueError as error:
            raise typo from error
        body, check = data[:-4], data[-4:]
        # Unused low bits of the last character would make two spellings of one token; call the other one a typo.
        canonical = base64.b32encode(data).decode().rstrip("=") == text
        if len(data) < 5 or check != _checksum(body) or not canonical:
            raise typo
        try:
            parts = _body_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise typo from error
        mesh = base64.b32encode(parts.mesh).decode().rstrip("=").lower()
        return cls(mesh, parts.inviter, parts.addresses, parts.secret, parts.expires_at, parts.uses, parts.role)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"mesh token 1\0" + body).digest()[:4]


class _Entry(Struct):
    secret_hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    expires_at: int
    uses_left: int
    role: Role


class _Pages(Struct):
    invites: list[_Entry]


class InviteBook:
    """What each invite of this node is still worth.

    Args:
        path: file to keep it in; None keeps it in memory, for tests.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pages = (load(path, _Pages) if path is not None else None) or _Pages([])

    def issue(self, secret: bytes, *, role: Role, uses: int, expires_at: int, wall: float) -> None:
        """Write down a new invite.

        Args:
            secret: from the system's randomness, :data:`SECRET_BYTES` or more.
            expires_at: seconds since 1970; 0: never.

        Raises:
            UsageError: too many open invites.
            StateError: it could not be written down.
        """
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"an invite's secret has at least {SECRET_BYTES} bytes, not {len(secret)}")
        kept = [entry for entry in self._pages.invites if not entry.expires_at or entry.expires_at + _KEEP_S > wall]
        if len(kept) >= _MAX_INVITES:
            raise UsageError(f"{len(kept)} invites are open already", remedy="wait until some expire")
        self._write([*kept, _Entry(_hash(secret), expires_at, uses, role)])

    def redeem(self, secret: bytes, wall: float) -> Role:
        """Burn one use, on disk before this returns, and say what it buys.

        Raises:
            AdmissionError: code ``unknown``, ``expired`` or ``spent``.
            StateError: the use could not be burned, so nobody is let in.
        """
        sought = _hash(secret)
        found: _Entry | None = None
        for entry in self._pages.invites:  # all of them, each in constant time: timing tells nothing
            if hmac.compare_digest(entry.secret_hash, sought):
                found = entry
        if found is None:
            raise AdmissionError(
                "the inviting machine does not know this token",
                remedy="ask for a new one:  mesh invite",
                code="unknown",
            )
        if found.expires_at and found.expires_at <= wall:
            raise AdmissionError(
                "this invite token has expired", remedy="ask for a new one:  mesh invite", code="expired"
            )
        if found.uses_left <= 0:
            raise AdmissionError(
                "this invite token was used up",
                remedy="ask for a new one:  mesh invite   (or one for several machines:  mesh invite --uses N)",
                code="spent",
            )
        left = _Entry(found.secret_hash, found.expires_at, found.uses_left - 1, found.role)
        self._write([left if entry is found else entry for entry in self._pages.invites])
        return found.role

    def _write(self, entries: list[_Entry]) -> None:
        pages = _Pages(entries)
        if self._path is not None:
            save(self._path, pages)
        self._pages = pages


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(b"mesh invite 1\0" + secret).digest()


def create_invite(
    book: InviteBook,
    *,
    mesh: MeshId,
    inviter: bytes,
    addresses: tuple[str, ...],
    randomness: Callable[[int], bytes],
    wall: float,
    lifetime_s: float | None,
    uses: int = 1,
    role: Role = "worker",
) -> Invite:
    """Make an invite and write it down; ``lifetime_s`` None: it never expires.

    Raises:
        UsageError: ``uses`` or ``lifetime_s`` make no sense, or too many invites are open.
        StateError: it could not be written down.
    """
    if not 1 <= uses <= 2**20:
        raise UsageError(f"an invite for {uses} machines makes no sense", remedy="mesh invite --uses 1")
    if lifetime_s is not None and lifetime_s <= 0:
        raise UsageError("an invite must live for a while", remedy="mesh invite --expires 1h")
    secret = randomness(SECRET_BYTES)
    expires_at = 0 if lifetime_s is None else int(wall + lifetime_s)
    book.issue(secret, role=role, uses=uses, expires_at=expires_at, wall=wall)
    return Invite(mesh, inviter, addresses[:16], secret, expires_at, uses, role)
