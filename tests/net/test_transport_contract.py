"""What we rely on in aioquic without a promise. When one of these fails, do not move the pin before reading why."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aioquic import tls
from aioquic.quic.connection import QuicConnection
from aioquic.quic.recovery import QuicPacketRecovery
from aioquic.quic.stream import QuicStreamReceiver, QuicStreamSender
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.clock import SystemClock
from mesh.errors import MeshError
from mesh.identity.key import NodeKey
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.quic import STRANGER_WINDOW, PinnedQuic, configure
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


def test_the_names_we_touch_exist() -> None:
    certificate, key = SERVER.certificate()
    client = PinnedQuic(configure(certificate, key, is_client=True))
    server = PinnedQuic(configure(certificate, key, is_client=False), original_destination_cid=b"12345678")
    quic: Any
    for quic in (client, server):
        for name in (
            "_close_event",
            "_streams",
            "_local_max_data",
            "_local_max_streams_uni",
            "_is_client",
            "_local_next_stream_id_bidi",
            "_remote_max_streams_bidi",
        ):
            assert hasattr(quic, name), name
        assert quic._local_max_data.sent == quic._local_max_data.value == STRANGER_WINDOW
    context: Any = tls.Context(is_client=False)
    for name in ("_request_client_certificate", "_peer_certificate", "_signature_algorithms", "_supported_groups"):
        assert hasattr(context, name), name
    assert {"_buffer_start", "_buffer_stop"} <= vars(QuicStreamSender(0, True)).keys()
    assert {"highest_offset", "is_finished"} <= vars(QuicStreamReceiver(0, True)).keys()
    assert {"_pacer", "_rtt_smoothed", "_rtt_initialized"} <= vars(client._loss).keys()
    assert "_cc" in vars(client._loss), QuicPacketRecovery


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_initialize", ["self", "peer_cid"]),
        ("_payload_received", ["self", "context", "plain", "crypto_frame_required"]),
        ("_write_connection_limits", ["self", "builder", "space"]),
        ("_write_stream_limits", ["self", "builder", "space", "stream"]),
        ("_on_connection_limit_delivery", ["self", "delivery", "limit"]),
        ("_on_max_stream_data_delivery", ["self", "delivery", "stream"]),
    ],
)
def test_the_methods_we_change_still_have_their_shape(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(QuicConnection, name)).parameters) == parameters
