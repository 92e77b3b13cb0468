"""Who may push to whom, and what the engine is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.election.core import Election
from mesh.engine.commands import llama_server_command, rpc_server_command
from mesh.supervise.launch import child_environment
from mesh.supervise.output import Output, RotatingLog
from mesh.wire.codec import decode, encode, open_decoder
from mesh.wire.facts import Epoch, Layout
from mesh.wire.messages import OpenPush, Propose
from tests.unit.test_engine_commands import ENGINE, IDS, SECRET, layout, ports

HOST, FIRST, SECOND, THIRD = IDS[:4]
RING = layout([1, 2, 3, 4])
ONE, TWO = Epoch(1, HOST), Epoch(2, HOST)


def following(me: str, epoch: Epoch, ring: Layout | None) -> Election:
    election = Election(me)
    election._following.adopt(Propose(epoch, ring, ""), 0.0)
    return election


def test_each_worker_goes_on_with_what_the_one_before_it_has_computed() -> None:
    assert [RING.successor(node) for node in (HOST, FIRST, SECOND, THIRD)] == [None, SECOND, THIRD, None]
    assert layout([1, 2]).successor(FIRST) is None


@pytest.mark.parametrize("me", [HOST, FIRST, SECOND, THIRD, IDS[7]])
@pytest.mark.parametrize("peer", [HOST, FIRST, SECOND, THIRD, IDS[7]])
def test_only_the_worker_right_before_may_push(me: str, peer: str) -> None:
    assert following(me, TWO, RING).may_push(peer, TWO) is ((peer, me) in {(FIRST, SECOND), (SECOND, THIRD)})


def test_only_in_the_epoch_that_is_followed() -> None:
    second = following(SECOND, TWO, RING)
    assert not second.may_push(FIRST, ONE)
    assert not second.may_push(FIRST, Epoch(3, HOST))
    assert not second.may_push(FIRST, Epoch(2, THIRD))
    assert not following(SECOND, TWO, None).may_push(FIRST, TWO)


def test_a_layout_that_goes_on_under_a_new_number_keeps_its_pushes() -> None:
    second = following(SECOND, ONE, RING)
    second._following.adopt(Propose(TWO, RING, "", {}, ONE), 1.0)
    assert second.may_push(FIRST, ONE)
    assert second.may_push(FIRST, TWO)


def test_the_request_survives_the_wire() -> None:
    assert decode(open_decoder, encode(OpenPush(TWO))[4:]) == OpenPush(TWO)


def test_the_host_is_told_the_ring_and_the_worker_its_way() -> None:
    host = llama_server_command(ENGINE, RING, Path("m"), 8000, ports(3), threads=1, rpc_secret=SECRET)
    assert host.env["MESH_RPC_RING"] == (f"127.0.0.1:7000={FIRST},127.0.0.1:7001={SECOND},127.0.0.1:7002={THIRD}")
    pair = llama_server_command(ENGINE, layout([1, 2]), Path("m"), 8000, ports(1), threads=1, rpc_secret=SECRET)
    assert "MESH_RPC_RING" not in pair.env

    def worker(peers: dict[str, str]) -> dict[str, str]:
        return dict(
            rpc_server_command(
                ENGINE, 9, threads=1, model_files=[], fingerprint="f" * 64, rpc_secret=SECRET, peers=peers
            ).env
        )

    assert worker({SECOND: "127.0.0.1:9"})["MESH_RPC_PEERS"] == f"{SECOND}=127.0.0.1:9"
    assert "MESH_RPC_PEERS" not in worker({})


def test_nobody_elses_ring_is_inherited() -> None:
    inherited = {"MESH_RPC_RING": "x=y", "MESH_RPC_PEERS": "y=z", "MESH_RPC_PUSH_WITHIN_S": "1"}
    launch = rpc_server_command(ENGINE, 9, threads=1, model_files=[], fingerprint="f" * 64, rpc_secret=SECRET)
    assert not set(inherited) & set(child_environment(inherited, launch.env))


def test_a_pair_that_cannot_push_is_heard_of(tmp_path: Path) -> None:
    heard: list[tuple[str, ...]] = []
    output = Output(RotatingLog(tmp_path / "x.log"), on_fallback=lambda *words: heard.append(words))
    output.feed(2, b"mesh-push a b\nmesh-push-fallback b c it did not answer, or not in time\nmesh-push-fallback\n")
    assert heard == [("b", "c", "it did not answer, or not in time")]
