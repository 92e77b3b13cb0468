"""One socket that listens and dials, whatever arrives on it."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator

import pytest

from mesh.clock import SystemClock
from mesh.errors import AdmissionError, TransportError
from mesh.identity.key import NodeKey
from mesh.transport import strangers
from mesh.transport.address import split_address
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Stream
from mesh.transport.quic import PinnedQuic, configure
from tests.eventually import eventually


class Farm:
    """Endpoints that are closed in the end."""

    def __init__(self) -> None:
        self.arrived: list[PeerConnection] = []
        self.endpoints: list[Endpoint] = []

    async def endpoint(self, host: str = "127.0.0.1", port: int = 0) -> tuple[Endpoint, str]:
        made = Endpoint(NodeKey.generate(), SystemClock(), on_connection=self.arrived.append)
        [address] = await made.start([(host, port)])
        self.endpoints.append(made)
        return made, address


@pytest.fixture
async def farm() -> AsyncIterator[Farm]:
    farm = Farm()
    yield farm
    for one in farm.endpoints:
        await one.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_dialing_and_listening_share_one_port(farm: Farm) -> None:
    anna, at_anna = await farm.endpoint()
    ben, at_ben = await farm.endpoint()
    one, other = await asyncio.gather(anna.dial(at_ben, expect=ben.key.id), ben.dial(at_anna, expect=anna.key.id))
    await eventually(lambda: len(farm.arrived) == 2)
    assert {connection.address for connection in farm.arrived} == {at_anna, at_ben}
    assert (one.address, other.address) == (at_ben, at_anna)
    assert one.dialed
    assert not farm.arrived[0].dialed
    assert one.path == "quic"


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
async def test_ipv6_works_beside_ipv4(farm: Farm) -> None:
    both = Endpoint(NodeKey.generate(), SystemClock(), on_connection=farm.arrived.append)
    addresses = await both.start([("127.0.0.1", 0), ("::1", 0)])
    farm.endpoints.append(both)
    assert len({split_address(address)[1] for address in addresses}) == 1, "the same port on both"
    six, at_six = await farm.endpoint("::1")
    four, at_four = await farm.endpoint()
    assert (await six.dial(addresses[1], expect=both.key.id)).address == addresses[1]
    assert (await both.dial(at_four, expect=four.key.id)).peer == four.key.id
    assert (await both.dial(at_six, expect=six.key.id)).peer == six.key.id
    with pytest.raises(TransportError, match="can reach"):
        await four.dial(addresses[1], expect=both.key.id)


async def test_a_port_in_use_is_named_with_the_way_out(farm: Farm) -> None:
    _, address = await farm.endpoint()
    port = split_address(address)[1]
    with pytest.raises(TransportError, match=str(port)) as caught:
        await farm.endpoint(port=port)
    assert "--bind-port" in str(caught.value)
    assert caught.value.code == "port-in-use"


async def test_an_address_of_another_machine_cannot_be_bound(farm: Farm) -> None:
    with pytest.raises(TransportError) as caught:
        await farm.endpoint("203.0.113.1")
    assert "--bind-host" in str(caught.value)


async def test_another_key_than_expected_is_refused_before_anything_is_sent(farm: Farm) -> None:
    anna, _ = await farm.endpoint()
    _, address = await farm.endpoint()
    with pytest.raises(AdmissionError) as caught:
        await anna.dial(address, expect=NodeKey.generate().id)
    assert caught.value.code == "wrong-key"
    await eventually(lambda: all(one.connections == 0 for one in farm.endpoints))
    assert farm.arrived == [], "the server never learned who we are"


async def test_nobody_there_is_said_in_time(farm: Farm) -> None:
    anna, _ = await farm.endpoint()
    before = asyncio.get_running_loop().time()
    with pytest.raises(TransportError, match="no answer"):
        await anna.dial("127.0.0.1:9", expect=None, timeout=0.3)
    assert asyncio.get_running_loop().time() - before < 2
    await eventually(lambda: anna.connections == 0)


async def test_a_name_that_does_not_resolve_is_said(farm: Farm) -> None:
    anna, _ = await farm.endpoint()
    with pytest.raises(TransportError, match="resolve"):
        await anna.dial("no.such.host.invalid:1", expect=None)


async def test_garbage_does_not_disturb_anyone(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    anna, at_anna = await farm.endpoint()
    ben, _ = await farm.endpoint()
    connection = await ben.dial(at_anna, expect=anna.key.id)
    stream = await connection.open_stream()
    rng = random.Random(4)
    host, port = split_address(at_anna)
    cids = [cid for cid in anna._routes if len(cid) == 8]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        for n in range(2000):
            data = rng.randbytes(rng.choice([0, 1, 7, 20, 60, 300, 1200, 1400]))
            if n % 3 == 0:  # looks like QUIC
                data = bytes([0xC0 | rng.randrange(64)]) + b"\x00\x00\x00\x01\x08" + data
            elif n % 3 == 1:  # meant for a live connection
                data = bytes([0x40 | rng.randrange(64)]) + rng.choice(cids) + data
            noise.sendto(data, (host, port))
            if n % 100 == 0:
                await asyncio.sleep(0)
    await stream.write(b"fine")
    await eventually(lambda: farm.arrived)
    heard: list[bytes] = []

    async def listen() -> None:
        farm.arrived[0].on_stream = lambda stream: streams.append(stream)
        await eventually(lambda: streams)
        heard.append(await streams[0].read_exactly(4))

    streams: list[Stream] = []
    await listen()
    assert heard == [b"fine"]
    assert anna.connections == 1, "noise is not kept as a handshake under way"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_forged_datagrams_are_no_sign_of_life(farm: Farm) -> None:
    anna, at_anna = await farm.endpoint()
    ben, _ = await farm.endpoint()
    await ben.dial(at_anna, expect=anna.key.id)
    await eventually(lambda: farm.arrived)
    at_rest = farm.arrived[0]
    await asyncio.sleep(0.1)  # the handshake's last packets
    heard = at_rest.last_heard
    cid = at_rest.quic.host_cid
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        for _ in range(20):
            noise.sendto(b"\x40" + cid + random.randbytes(60), split_address(at_anna))
    before = at_rest.quic._network_paths[0].bytes_received
    await asyncio.sleep(0.1)
    assert at_rest.last_heard == heard
    assert at_rest.quic._network_paths[0].bytes_received >= before


async def test_half_open_handshakes_are_bounded_and_end(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MAX_HALF_OPEN", 8)
    monkeypatch.setattr(strangers, "HANDSHAKE_DEADLINE_S", 0.5)
    anna, at_anna = await farm.endpoint()
    certificate, key = NodeKey.generate().certificate()
    target = split_address(at_anna)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
        for _ in range(100):
            quic = PinnedQuic(configure(certificate, key, is_client=True))
            quic.connect(target, 0.0)
            for data, _ in quic.datagrams_to_send(0.0):
                flood.sendto(data, target)
        await eventually(lambda: anna.connections == 8)
        await eventually(lambda: anna.connections == 0 and not anna._routes, within=3)
    ben, _ = await farm.endpoint()
    assert (await ben.dial(at_anna, expect=anna.key.id)).peer == anna.key.id


async def test_errors_of_the_network_do_not_stop_the_socket(farm: Farm) -> None:
    """Unroutable and refused targets, then a good one."""
    anna, _ = await farm.endpoint()
    ben, at_ben = await farm.endpoint()
    for bad in ("127.0.0.1:1", "127.255.255.255:9"):
        with pytest.raises(TransportError):
            await anna.dial(bad, expect=None, timeout=0.2)
    assert (await anna.dial(at_ben, expect=ben.key.id)).peer == ben.key.id


async def test_a_closed_endpoint_frees_its_port_and_tells_its_peers(farm: Farm) -> None:
    anna, at_anna = await farm.endpoint()
    ben, _ = await farm.endpoint()
    connection = await ben.dial(at_anna, expect=anna.key.id)
    await eventually(lambda: farm.arrived)
    told: list[str] = []
    farm.arrived[0].on_close = lambda reason: None
    connection.on_close = told.append
    await anna.close()
    await eventually(lambda: told)
    assert "shutting down" in told[0]
    await farm.endpoint(port=split_address(at_anna)[1])
    with pytest.raises(TransportError):
        await anna.dial(at_anna, expect=None)


async def test_an_abandoned_dial_leaves_nothing(farm: Farm) -> None:
    anna, _ = await farm.endpoint()
    dialing = asyncio.create_task(anna.dial("127.0.0.1:9", expect=None, timeout=60))
    await eventually(lambda: anna.connections == 1)
    dialing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialing
    await eventually(lambda: anna.connections == 0)


async def test_a_peer_that_moves_to_another_port_is_followed(farm: Farm) -> None:
    """A laptop changes networks: its packets come from elsewhere, and the connection lives on."""
    anna, at_anna = await farm.endpoint()
    ben, _ = await farm.endpoint()
    connection = await ben.dial(at_anna, expect=anna.key.id)
    await eventually(lambda: farm.arrived)
    streams: list[Stream] = []
    farm.arrived[0].on_stream = streams.append
    stream = await connection.open_stream()
    await stream.write(b"a")
    await eventually(lambda: streams)
    old = ben._sockets[0]
    moved, at_moved = await farm.endpoint()
    moved._sockets[0]._receiver = ben._received
    connection.socket = moved._sockets[0]
    old.close()
    await stream.write(b"b")
    assert await streams[0].read_exactly(2) == b"ab"
    await eventually(lambda: farm.arrived[0].address == at_moved)
    await streams[0].write(b"c")
    assert await stream.read_exactly(1) == b"c"
