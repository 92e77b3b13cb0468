"""What we rely on in aioquic without a promise. When one of these fails, do not move the pin before reading why."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic import tls
from aioquic.quic.connection import QuicConnection, QuicNetworkPath
from aioquic.quic.packet import encode_quic_retry
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketRecovery
from aioquic.quic.stream import QuicStreamReceiver, QuicStreamSender
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import mesh
from mesh.clock import SystemClock
from mesh.errors import MeshError
from mesh.identity.key import NodeKey
from mesh.transport.congestion import Pacer
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.quic import STRANGER_WINDOW, PinnedQuic, configure
from mesh.transport.strangers import read_first_packet
from tests.eventually import eventually

SERVER, CLIENT = NodeKey.from_seed(b"s" * 32), NodeKey.from_seed(b"c" * 32)


@pytest.fixture
async def seen() -> list[PeerConnection]:
    return []


@pytest.fixture
async def server(seen: list[PeerConnection]) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(SERVER, SystemClock(), on_connection=seen.append)
    endpoint.listening = (await endpoint.start([("127.0.0.1", 0)]))[0]  # type: ignore[attr-defined]
    yield endpoint
    await endpoint.close()


async def dial(server: Endpoint, alter: Callable[[Endpoint], None]) -> MeshError | PeerConnection:
    client = Endpoint(CLIENT, SystemClock(), on_connection=lambda connection: None)
    alter(client)
    await client.start([("127.0.0.1", 0)])
    try:
        connection = await client.dial(server.listening, expect=SERVER.id, timeout=3)  # type: ignore[attr-defined]
        await eventually(lambda: connection.closed, within=1.5)
        return connection
    except MeshError as error:
        return error
    finally:
        await client.close()


async def test_a_client_without_a_certificate_is_refused(server: Endpoint, seen: list[PeerConnection]) -> None:
    def alter(client: Endpoint) -> None:
        client._as_client.certificate = None
        client._as_client.private_key = None

    await dial(server, alter)
    assert seen == []


async def test_a_client_that_shows_anothers_certificate_is_refused(
    server: Endpoint, seen: list[PeerConnection]
) -> None:
    """The certificate is a member's, the signature is not: CertificateVerify must fail."""

    def alter(client: Endpoint) -> None:
        client._as_client.certificate = NodeKey.generate().certificate()[0]
        client._as_client.private_key = Ed25519PrivateKey.generate()

    await dial(server, alter)
    assert seen == []


async def test_a_client_with_a_key_of_another_kind_is_refused(server: Endpoint, seen: list[PeerConnection]) -> None:
    def alter(client: Endpoint) -> None:
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([])
        day = datetime.datetime(2020, 1, 1)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(1).not_valid_before(day).not_valid_after(day + datetime.timedelta(90000))
        client._as_client.certificate = builder.sign(key, hashes.SHA256())
        client._as_client.private_key = key

    await dial(server, alter)
    assert seen == []


async def test_a_server_that_cannot_sign_for_its_certificate_is_refused(
    server: Endpoint, seen: list[PeerConnection]
) -> None:
    server._as_server.private_key = Ed25519PrivateKey.generate()
    assert isinstance(await dial(server, lambda client: None), MeshError)
    assert seen == []


async def test_another_protocol_is_refused(server: Endpoint, seen: list[PeerConnection]) -> None:
    def alter(client: Endpoint) -> None:
        client._as_client.alpn_protocols = ["h3"]

    assert isinstance(await dial(server, alter), MeshError)

    def no_alpn(client: Endpoint) -> None:
        client._as_client.alpn_protocols = None

    await dial(server, no_alpn)
    assert seen == []


async def test_both_sides_know_the_key_when_the_handshake_completes(
    server: Endpoint, seen: list[PeerConnection]
) -> None:
    client = Endpoint(CLIENT, SystemClock(), on_connection=lambda connection: None)
    await client.start([("127.0.0.1", 0)])
    connection = await client.dial(server.listening, expect=None)  # type: ignore[attr-defined]
    await eventually(lambda: seen)
    assert (connection.peer, connection.peer_key) == (SERVER.id, SERVER.public)
    assert (seen[0].peer, seen[0].peer_key) == (CLIENT.id, CLIENT.public)
    await client.close()


async def test_no_session_tickets_and_no_early_data(server: Endpoint, seen: list[PeerConnection]) -> None:
    client = Endpoint(CLIENT, SystemClock(), on_connection=lambda connection: None)
    await client.start([("127.0.0.1", 0)])
    connection = await client.dial(server.listening, expect=None)  # type: ignore[attr-defined]
    await eventually(lambda: seen)
    for quic in (connection.quic, seen[0].quic):
        assert quic.tls.new_session_ticket_cb is None
        assert quic.tls.get_session_ticket_cb is None
        assert not quic.tls.session_resumed
        assert not quic.tls.early_data_accepted
    await client.close()


async def test_windows_follow_what_was_read_not_what_came(server: Endpoint, seen: list[PeerConnection]) -> None:
    client = Endpoint(CLIENT, SystemClock(), on_connection=lambda connection: None)
    await client.start([("127.0.0.1", 0)])
    connection = await client.dial(server.listening, expect=None)  # type: ignore[attr-defined]
    await eventually(lambda: seen)
    stream = await connection.open_stream()
    flood = asyncio.create_task(stream.write(bytes(8 << 20)))
    await eventually(lambda: seen[0].quic._local_max_data.used >= STRANGER_WINDOW - 2000)
    for _ in range(20):
        await asyncio.sleep(0)
    assert seen[0].quic._local_max_data.value == STRANGER_WINDOW
    assert all(s.max_stream_data_local == STRANGER_WINDOW for s in seen[0].quic._streams.values())
    flood.cancel()
    await client.close()


HELD = {
    QuicConnection: {
        "_close_event", "_streams", "_local_max_data", "_local_max_streams_uni", "_is_client", "_loss", "_spaces",
        "_local_next_stream_id_bidi", "_remote_max_streams_bidi", "_remote_max_datagram_frame_size",
        "_datagrams_pending", "_handshake_confirmed", "_network_paths", "_max_datagram_size",
        "_packet_number", "_peer_cid", "_spin_bit", "_version", "_cryptos", "_ack_delay",
    },
    tls.Context: {
        "_request_client_certificate", "_peer_certificate", "_signature_algorithms", "_supported_groups",
    },
    QuicStreamSender: {"_buffer_start", "_buffer_stop"},
    QuicPacketRecovery: {"_pacer", "_rtt_smoothed", "_rtt_initialized", "_pto_count"},
    QuicPacketPacer: {"_max_datagram_size"},
}  # fmt: skip
"""Private attributes of aioquic's objects that mesh/transport reads or sets."""
CALLED = {
    "_initialize": ["self", "peer_cid"],
    "_payload_received": ["self", "context", "plain", "crypto_frame_required"],
    "_write_connection_limits": ["self", "builder", "space"],
    "_write_stream_limits": ["self", "builder", "space", "stream"],
    "_on_connection_limit_delivery": ["self", "delivery", "limit"],
    "_on_max_stream_data_delivery": ["self", "delivery", "stream"],
}
"""Private methods of QuicConnection that we replace or call, and what they are called with."""


def pair() -> tuple[Any, Any]:
    certificate, key = SERVER.certificate()
    client = PinnedQuic(configure(certificate, key, is_client=True))
    server = PinnedQuic(configure(certificate, key, is_client=False), original_destination_cid=b"12345678")
    return client, server


def touched() -> set[str]:
    """Every private name of aioquic's that our transport says; of ``self`` too, where a class extends one of theirs."""
    client, _ = pair()
    theirs = {name for name in dir(QuicConnection) if name.startswith("_") and not name.startswith("__")}
    for one in (client, client._loss, client._loss._pacer, QuicStreamSender(0, True), tls.Context(is_client=False)):
        theirs |= {name for name in vars(one) if name.startswith("_")}
    ours = {"_consumed", "_window", "_stream_window", "_stream_consumed", "_no_limit", "_mtu", "_rests"}
    found: set[str] = set()
    for file in Path(inspect.getfile(PinnedQuic)).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        extends = file.stem in ("quic", "congestion")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and extends and node.name in theirs:
                found.add(node.name)
            if not isinstance(node, ast.Attribute) or node.attr not in theirs - ours:
                continue
            if extends or not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.add(node.attr)
    return found


def test_every_private_name_we_touch_is_held_here() -> None:
    """Whoever touches another one of aioquic's adds it above, and a test of what is relied on."""
    assert touched() == set().union(*HELD.values()) | set(CALLED)


def test_only_few_modules_know_aioquic() -> None:
    knowing = {
        str(file.relative_to(Path(mesh.__file__).parent))
        for file in Path(mesh.__file__).parent.rglob("*.py")
        if "aioquic" in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            )
        }
    }  # fmt: skip
    assert {Path(name).parts[:2] for name in knowing} == {
        ("transport", f"{name}.py") for name in ("quic", "congestion", "connection", "strangers")
    }


def test_the_names_we_touch_exist() -> None:
    client, server = pair()
    context: Any = tls.Context(is_client=False)
    for quic in (client, server):
        assert HELD[QuicConnection] <= vars(quic).keys()
        assert quic._local_max_data.sent == quic._local_max_data.value == STRANGER_WINDOW
        assert HELD[QuicPacketRecovery] <= vars(quic._loss).keys()
        assert HELD[QuicPacketPacer] <= vars(quic._loss._pacer).keys()
    assert HELD[tls.Context] <= vars(context).keys()
    assert HELD[QuicStreamSender] | {"reset"} <= vars(QuicStreamSender(0, True)).keys() | set(dir(QuicStreamSender))
    receiver = QuicStreamReceiver(0, True)
    assert {"highest_offset", "is_finished"} <= vars(receiver).keys()
    assert next(iter(inspect.signature(receiver.stop).parameters)) == "error_code"
    assert "_cc" in vars(client._loss), QuicPacketRecovery


def test_a_path_is_what_we_make_of_it() -> None:
    """The first of the paths is where datagrams go; one that is not validated gets little until it answers."""
    client, _ = pair()
    client.connect(("192.0.2.1", 1), 0.0)
    [path] = client._network_paths
    assert (path.addr, path.is_validated) == (("192.0.2.1", 1), True)
    fresh = QuicNetworkPath(("192.0.2.2", 2))
    assert (fresh.is_validated, fresh.bytes_received, fresh.bytes_sent) == (False, 0, 0)
    assert not fresh.can_send(1)
    fresh.bytes_received += 100
    assert fresh.can_send(300)
    assert not fresh.can_send(301)
    client._network_paths.insert(0, QuicNetworkPath(("192.0.2.3", 3), is_validated=True))
    assert {addr for _, addr in client.datagrams_to_send(0.0)} == {("192.0.2.3", 3)}
    assert client._spaces[tls.Epoch.ONE_RTT].largest_received_packet == -1
    assert client._handshake_confirmed is False


async def test_a_retry_is_obeyed_once_and_checked_to_be_for_us(
    server: Endpoint, seen: list[PeerConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a dialer prove its address is not what makes it talk to somebody else."""
    client, _ = pair()
    client.connect(("192.0.2.1", 1), 0.0)
    [(first, _), *_] = client.datagrams_to_send(0.0)
    packet = read_first_packet(first)
    assert packet is not None
    assert packet.token == b""

    def retry(original: bytes, token: bytes) -> bytes:
        return encode_quic_retry(packet.version, b"new-cid!", packet.source_cid, original, token)

    client.receive_datagram(retry(b"anothers", b"forged"), ("192.0.2.1", 1), 0.1)
    assert client._retry_count == 0, "made by somebody who did not see our first packet"
    client.receive_datagram(retry(packet.cid, b"token"), ("192.0.2.1", 1), 0.1)
    [(again, _), *_] = client.datagrams_to_send(0.2)
    second = read_first_packet(again)
    assert second is not None
    assert (second.token, second.cid) == (b"token", b"new-cid!")
    client.receive_datagram(retry(packet.cid, b"other"), ("192.0.2.1", 1), 0.3)
    assert client._retry_count == 1
    assert client._loss._pacer.__class__ is Pacer, "ours is still in place"
    assert client.tls._supported_groups == [tls.Group.X25519], "and so are the restrictions of the handshake"


@pytest.mark.parametrize(("name", "parameters"), list(CALLED.items()))
def test_the_methods_we_change_still_have_their_shape(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(QuicConnection, name)).parameters) == parameters
