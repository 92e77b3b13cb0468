"""Who is not a member gets a refusal, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.errors import TransportError
from mesh.identity.grants import found_mesh, sign_grant
from mesh.identity.key import NodeKey
from mesh.membership import greeting
from mesh.membership.door import JoinGate, choose
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection, Stream
from mesh.wire.codec import control_decoder, encode, read_frame
from mesh.wire.facts import Epoch
from mesh.wire.messages import (
    PROTOCOL,
    Control,
    Grant,
    Hello,
    OpenControl,
    OpenRpc,
    Ping,
    Refused,
)  # fmt: skip
from tests.eventually import eventually
from tests.net.party import Node, Party, facts_of


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


@pytest.fixture
async def stranger(party: Party) -> AsyncIterator[Endpoint]:
    lane = await party.lane()
    yield lane
    await lane.close()


async def say(lane: Endpoint, node: Node, *words: object) -> tuple[Connection, Stream, Control]:
    connection = await lane.dial(node.address, expect=node.key.id)
    stream = await connection.open_stream()
    await stream.write(encode(OpenControl()) + b"".join(encode(word) for word in words))
    return connection, stream, await read_frame(stream, control_decoder)


def hello(party: Party, lane: Endpoint, grants: tuple[Grant, ...] = ()) -> Hello:
    return Hello(PROTOCOL, party.founder.id, grants, (), facts_of(lane.key, "eve"))


async def refusal_of(lane: Endpoint, node: Node, word: object) -> str:
    connection, _, answer = await say(lane, node, word)
    connection.close()
    assert isinstance(answer, Refused)
    assert not node.ups
    return answer.code


async def test_a_valid_key_without_a_grant_is_refused(party: Party, stranger: Endpoint) -> None:
    anna = await party.node("anna")
    assert await refusal_of(stranger, anna, hello(party, stranger)) == "not-a-member"


async def test_grants_from_nobody_are_refused_and_leave_no_trace(party: Party, stranger: Endpoint) -> None:
    anna = await party.node("anna")
    eve = stranger.key
    own = found_mesh(eve, party.wall)
    forged = sign_grant(eve, mesh=party.founder.id, subject=eve.public, role="worker", wall=party.wall)
    known = anna.roster.grants
    assert await refusal_of(stranger, anna, hello(party, stranger, (own, forged))) == "not-a-member"
    assert anna.roster.grants == known


async def test_another_members_chain_does_not_help(party: Party, stranger: Endpoint) -> None:
    anna = await party.node("anna")
    ben = party.member_key()
    chain = tuple(party.grants)
    assert await refusal_of(stranger, anna, hello(party, stranger, chain)) == "not-a-member"
    impostor = Hello(PROTOCOL, party.founder.id, chain, (), facts_of(ben, "ben"))
    assert await refusal_of(stranger, anna, impostor) == "impostor"


async def test_other_meshes_and_protocols_are_named(party: Party, stranger: Endpoint) -> None:
    anna = await party.node("anna")
    facts = facts_of(stranger.key, "eve")
    assert await refusal_of(stranger, anna, Hello(PROTOCOL, stranger.key.id, (), (), facts)) == "wrong-mesh"
    assert await refusal_of(stranger, anna, Hello(PROTOCOL + 1, party.founder.id, (), (), facts)) == "protocol"


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 64, (1 << 30).to_bytes(4, "big"), b"\x00\x00\x00\x01\x05", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_garbage_instead_of_a_greeting_is_shown_out(party: Party, stranger: Endpoint, garbage: bytes) -> None:
    anna = await party.node("anna")
    connection = await stranger.dial(anna.address, expect=anna.key.id)
    stream = await connection.open_stream()
    await stream.write(garbage)
    await eventually(lambda: connection.closed)


@pytest.mark.parametrize("word", [Ping(1), Refused("x", "y"), OpenRpc(Epoch(1, ""))])
async def test_nothing_else_is_understood_at_the_door(party: Party, stranger: Endpoint, word: object) -> None:
    anna = await party.node("anna")
    connection = await stranger.dial(anna.address, expect=anna.key.id)
    stream = await connection.open_stream()
    await stream.write(encode(OpenControl()) + encode(word))
    await eventually(lambda: connection.closed)
    assert not anna.messages
    assert not anna.bulk


async def test_an_rpc_stream_is_not_opened_to_a_stranger(party: Party, stranger: Endpoint) -> None:
    anna = await party.node("anna")
    connection = await stranger.dial(anna.address, expect=anna.key.id)
    first, second = await connection.open_stream(), await connection.open_stream()
    await first.write(encode(OpenControl()))  # looks like a greeting, and hangs
    await second.write(encode(OpenRpc(Epoch(1, ""))))
    with pytest.raises(TransportError):
        await second.read()
    assert not anna.bulk


async def test_a_silent_connection_is_closed(party: Party, stranger: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREET_WITHIN_S", 0.3)
    anna = await party.node("anna")
    silent = await stranger.dial(anna.address, expect=anna.key.id)
    slow = await stranger.dial(anna.address, expect=anna.key.id)
    stream = await slow.open_stream()
    await stream.write(encode(OpenControl())[:-1])
    await eventually(lambda: silent.closed and slow.closed, within=3)
    await eventually(lambda: anna.endpoint.connections == 0)


async def test_a_stranger_cannot_make_us_hold_much(party: Party, stranger: Endpoint) -> None:
    """Before admission the receive window is small: the rest of a flood stays on the stranger's side."""
    anna = await party.node("anna")
    connection = await stranger.dial(anna.address, expect=anna.key.id)
    streams = [await connection.open_stream() for _ in range(20)]
    floods = [asyncio.create_task(stream.write(bytes(1 << 20))) for stream in streams]
    await asyncio.wait(floods, timeout=0.5)
    for held in [c for c in anna.endpoint._connections if not c.dialed]:
        assert held.quic._local_max_data.value <= 1 << 20
    for flood in floods:
        flood.cancel()
    await asyncio.gather(*floods, return_exceptions=True)


async def test_a_lost_grant_is_reported_to_its_owner(party: Party) -> None:
    anna = await party.node("anna")
    outsider = await party.node("eve", NodeKey.generate(), knows=(anna,), grants=party.grants[:1])
    await eventually(lambda: outsider.expelled)
    assert outsider.expelled[0].code == "not-a-member"
    assert not anna.ups


def test_the_gate_closes_for_a_source_that_keeps_failing() -> None:
    gate = JoinGate(per_source=3, overall=5)
    for at in range(3):
        assert gate.is_open("1.2.3.4", at)
        gate.failed("1.2.3.4", at)
    assert not gate.is_open("1.2.3.4", 3)
    assert gate.is_open("5.6.7.8", 3)
    assert gate.is_open("1.2.3.4", 63)


def test_the_gate_closes_for_all_when_many_fail_together_and_stays_small() -> None:
    gate = JoinGate(per_source=3, overall=5)
    for source in range(5):
        gate.failed(str(source), 0)
    assert not gate.is_open("new", 1)
    assert gate.is_open("new", 61)
    for source in range(5000):
        gate.failed(str(source), 100)
    assert len(gate._sources) <= JoinGate.MAX_SOURCES


@pytest.mark.parametrize(
    ("us", "peer", "dialing", "linked_s", "ours", "verdict"),
    [
        ("a", "b", False, None, False, "take"),
        ("a", "b", True, None, False, "wait"),
        ("b", "a", True, None, False, "take"),
        ("a", "b", False, 0.1, True, "refuse"),
        ("a", "b", False, 60.0, True, "take"),
        ("a", "b", False, 0.1, False, "take"),
        ("b", "a", False, 0.1, True, "take"),
    ],
)
def test_which_of_two_connections_stays(
    us: str, peer: str, dialing: bool, linked_s: float | None, ours: bool, verdict: str
) -> None:
    assert choose(us * 26, peer * 26, dialing=dialing, linked_s=linked_s, linked_by_us=ours) == verdict
