"""What is fuzzed: functions that take a stranger's bytes. Each raises only when something is wrong with us.

``bin/fuzz`` drives them by coverage; the tests run them over their seeds and over what Hypothesis thinks of.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.discovery.stun import MAX_ANSWER, decode_answer, encode_request
from mesh.errors import UsageError, WireError
from mesh.identity.grants import Roster, found_mesh, sign_grant, sign_revocation
from mesh.identity.invite import Invite
from mesh.identity.key import NodeKey
from mesh.membership.door import Admitted, weigh_hello
from mesh.transport.address import join_address, split_address
from mesh.transport.received import read_exactly
from mesh.transport.strangers import Admitted as Begun
from mesh.transport.strangers import Porter, read_first_packet
from mesh.wire.codec import (
    MAX_OPEN_FRAME,
    control_decoder,
    decode,
    encode,
    open_decoder,
    open_reply_decoder,
    read_frame,
)
from mesh.wire.facts import Epoch, NodeFacts
from mesh.wire.messages import (
    PROTOCOL,
    Grant,
    Hello,
    Join,
    Knock,
    MemberAddress,
    Members,
    Opened,
    OpenFailed,
    OpenHttp,
    OpenRpc,
    Ping,
    Propose,
    Refused,
    Revoke,
    Rumour,
)

KEY, GUEST = NodeKey.from_seed(b"k" * 32), NodeKey.from_seed(b"g" * 32)
WALL = 1_700_000_000
FACTS = NodeFacts(
    id=GUEST.id, version=1, name="n", role="worker", mesh_version="0", engine="", backend="cpu", devices=(),
    budget_bytes=0, threads=1, models=(), wants="", addresses=("10.0.0.1:7842",),
)  # fmt: skip
FOUNDED = found_mesh(KEY, WALL)
GRANTED = sign_grant(KEY, mesh=KEY.id, subject=GUEST.public, role="worker", wall=WALL)
REVOKED = sign_revocation(KEY, mesh=KEY.id, subject=GUEST.public, wall=WALL)
INVITE = Invite(KEY.id, KEY.public, ("10.0.0.1:7842", "[fd00::1]:7842"), b"s" * 16, WALL, 1, "worker")
EPOCH = Epoch(1, KEY.id)


@dataclass(frozen=True, slots=True)
class Target:
    """One function under test, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _reads_back(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        message = decode(decoder, data)
    except WireError:
        return None
    # Not equality: a float may be no number, which equals nothing.
    if repr(decode(decoder, encode(message)[4:])) != repr(message):
        raise AssertionError(f"{message!r} does not read back")
    return message


def control(data: bytes) -> None:
    """A control message's body."""
    _reads_back(control_decoder, data)


def opening(data: bytes) -> None:
    """The first frame of a stream, and the answer to it."""
    _reads_back(open_decoder, data)
    _reads_back(open_reply_decoder, data)


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, limit: int) -> bytes:
        piece = self.data[: min(limit, 7)]
        self.data = self.data[len(piece) :]
        return piece

    async def read_exactly(self, n: int) -> bytes:
        return await read_exactly(self.read, n)


def frames(data: bytes) -> None:
    """What a stranger says on its first stream, in pieces."""

    async def listen() -> None:
        stream = _Stream(data)
        await read_frame(stream, open_decoder, MAX_OPEN_FRAME)
        while True:
            await read_frame(stream, control_decoder)

    coroutine = listen()
    try:
        coroutine.send(None)  # nothing in it ever waits
    except (WireError, EOFError, StopIteration):
        return
    finally:
        coroutine.close()


def token(data: bytes) -> None:
    """What somebody pasted for a token."""
    try:
        invite = Invite.decode(data.decode("utf-8", "replace"))
    except UsageError as error:
        if not error.remedy:
            raise AssertionError("no way out was named") from error
        return
    if Invite.decode(invite.encode()) != invite:
        raise AssertionError("the token does not read back")


def token_body(data: bytes) -> None:
    """A token whose checksum is right, whatever is in it: what somebody would make who means harm."""
    check = hashlib.sha256(b"mesh token 1\0" + data).digest()[:4]
    token(b"mesh1" + base64.b32encode(data + check).rstrip(b"=").lower())


def hello(data: bytes) -> None:
    """A Hello from a key without a grant: whatever chain it brings, it is refused, and leaves no trace."""
    message = _reads_back(control_decoder, data)
    if not isinstance(message, Hello) or len(message.grants) > 8:
        return
    roster = Roster(KEY.id, KEY.public, [FOUNDED])
    verdict = weigh_hello(message, GUEST.public, roster, WALL + 1)
    if isinstance(verdict, Admitted) and GRANTED not in message.grants:
        raise AssertionError("somebody without a grant was let in")
    if not set(roster.grants) <= {FOUNDED, GRANTED} or not set(roster.revocations) <= {REVOKED}:
        raise AssertionError("a forged record was kept")


def stun(data: bytes) -> None:
    """A datagram that may be an answer of a STUN server."""
    answer = decode_answer(data)
    if answer is not None and (len(data) > MAX_ANSWER or not 0 <= answer[1][1] < 65536):
        raise AssertionError(f"{answer!r} is no answer")


def first_packet(data: bytes) -> None:
    """A first datagram of somebody we know nothing of, on a busy day."""
    packet = read_first_packet(data)
    if packet is None:
        return
    porter = Porter(lambda host: False)
    for _ in range(2):
        verdict = porter.weigh(packet, "192.0.2.1", 1, 0.0)
        if packet.token and isinstance(verdict, Begun):
            raise AssertionError("a token we never made was believed")


def address(data: bytes) -> None:
    """``host:port`` as somebody says it."""
    try:
        host, port = split_address(data.decode("utf-8", "replace"))
    except UsageError:
        return
    if split_address(join_address(host, port)) != (host, port):
        raise AssertionError(f"{host!r} and {port} do not read back")


def _bodies(messages: Iterable[Any]) -> tuple[bytes, ...]:
    return tuple(encode(message)[4:] for message in messages)


def _unsealed(text: str) -> bytes:
    """A token's body without its checksum."""
    coded = text[5:].upper()
    return base64.b32decode(coded + "=" * (-len(coded) % 8))[:-4]


_STUN = b"\x01\x01\x00\x0c" + encode_request(b"t" * 12)[4:] + b"\x00\x20\x00\x08\x00\x01" + b"a" * 6
_HELLO = Hello(PROTOCOL, KEY.id, (FOUNDED, GRANTED), (REVOKED,), FACTS)
_FORGED = Grant(KEY.id, GUEST.public, "worker", KEY.public, WALL, 0, b"\0" * 64)
_CONTROL = (
    _HELLO, Join(PROTOCOL, b"s" * 16, "n"), Refused("code", "message"), Ping(7), Rumour(KEY.id, 3, "suspect"),
    Members((MemberAddress(KEY.id, "n", ("10.0.0.1:1",)),), (FOUNDED,)), Revoke(REVOKED), Knock(b"d" * 32),
    Propose(EPOCH, None, "why", {KEY.id: "small"}),
)  # fmt: skip
_OPEN = (OpenRpc(EPOCH), OpenHttp(EPOCH), Opened(), OpenFailed("fenced", "no"))
_INITIAL = b"\xc0\x00\x00\x00\x01\x08" + b"c" * 8 + b"\x08" + b"s" * 8

TARGETS: dict[str, Target] = {
    "control": Target(control, _bodies(_CONTROL)),
    "opening": Target(opening, _bodies(_OPEN)),
    "frames": Target(frames, tuple(encode(OpenRpc(EPOCH)) + encode(message) for message in _CONTROL)),
    "token": Target(token, (INVITE.encode().encode(), b"mesh2abc", b" 'MESH1 ABC'")),
    "token-body": Target(token_body, (_unsealed(INVITE.encode()),)),
    "hello": Target(
        hello,
        _bodies([_HELLO, Hello(PROTOCOL, KEY.id, (FOUNDED, _FORGED), (), FACTS), Hello(9, KEY.id, (), (), FACTS)]),
    ),
    "stun": Target(
        stun, (b"\x01\x01\x00\x0c" + encode_request(b"t" * 12)[4:] + b"\x00\x20\x00\x08\x00\x01" + b"a" * 6,)
    ),
    "first-packet": Target(first_packet, (_INITIAL + b"\x00\x44\x9e" + bytes(1182), _INITIAL + b"\x04tokn\x01x")),
    "address": Target(address, (b"10.0.0.1:7842", b"[fd00::5]:7842", b"kitchen.lan:1")),
}


def run_all(data: bytes) -> None:
    """Every target over the same bytes."""
    for target in TARGETS.values():
        target.run(data)
