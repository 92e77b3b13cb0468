"""Three machines, none of which can hold the model, and a lite client: one ring, one answer, no weights on the wire."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.lab import Lab
from bench.meshnode import MeshNode
from mesh.identity.invite import Invite
from tests.lab.mesh_kit import IN_LAB, ask, covered, model_file, reference

pytestmark = IN_LAB
WORKERS = ("a", "b", "c")
LIMIT = "260MB"
"""Of the 650 MB that the model needs with its caches: two machines do not suffice, three do."""


class Ring:
    """The mesh under test; ``loaded_bytes`` is what crossed each link until it served."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.model = model_file("mid")
        self.nodes = {
            name: MeshNode(lab, name, directory, model=self.model, arguments=("--max-memory", LIMIT))
            for name in WORKERS
        }
        self.client = MeshNode(lab, "d", directory, role="client")
        self.loaded_bytes: dict[tuple[str, str], int] = {}
        self.lonely: dict[str, Any] = {}
        self.status: dict[str, Any] = {}

    def start(self) -> None:
        first, *others = self.nodes.values()
        first.start()
        self.lonely = first.wait(lambda s: s["mesh"]["state"] == "waiting", 60, "waiting for more memory")
        token = first.invite(uses=2)
        self.lab.reset_counters()
        for node in others:
            node.start(join=token)
        self.status = first.wait_serving(120, members=3)
        self.loaded_bytes = {link: counter.bytes for link, counter in self.lab.counters().items()}
        self.client.start(join=first.invite(role="client"))
        self.client.wait_serving(30, members=3)

    def everyone(self) -> list[MeshNode]:
        return [*self.nodes.values(), self.client]

    def stop(self) -> None:
        for node in self.everyone():
            if node.running:
                node.stop()


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    with Lab([*WORKERS, "d", "e"], link="lan", cores=1) as lab:
        made = Ring(lab, tmp_path_factory.mktemp("ring"))
        try:
            made.start()
            yield made
        finally:
            made.stop()


def test_a_machine_too_small_says_how_much_is_missing(ring: Ring) -> None:
    reason = ring.lonely["mesh"]["reason"]
    assert "missing" in reason and "MB" in reason and ring.lonely["layout"] is None


def test_every_layer_is_on_exactly_one_machine(ring: Ring) -> None:
    for node in ring.everyone():
        status = node.status()
        assert status is not None
        assert sorted(covered(status)) == list(range(16))
        assert len(status["layout"]["ring"]) == 3
        assert all(member["bytes"] <= 260e6 for member in status["layout"]["ring"])


def test_the_answer_is_that_of_a_plain_server_on_every_machine(ring: Ring) -> None:
    expected = reference(ring.model)
    assert len(set(expected.split())) > 5, "a text that says nothing proves nothing"
    assert {node.machine: ask(node) for node in ring.everyone()} == {node.machine: expected for node in ring.everyone()}


def test_no_weights_cross_the_network_while_loading(ring: Ring) -> None:
    host = next(name for name in WORKERS if ring.nodes[name].status()["node"]["role"] == "host")  # type: ignore[index]
    sent = {worker: ring.loaded_bytes[host, worker] for worker in WORKERS if worker != host}
    assert all(0 < count < 2_000_000 for count in sent.values()), sent


def test_the_engines_carry_their_own_bytes(ring: Ring) -> None:
    """Every connection of a ring is an engine's at both ends, and none leads to a loopback port."""
    host = next(name for name in WORKERS if ring.nodes[name].status()["node"]["role"] == "host")  # type: ignore[index]
    for machine in WORKERS:
        program = "llama-server" if machine == host else "ggml-rpc-server"
        listed = ring.lab.run(machine, ["ss", "-tnpH", "state", "established"]).stdout.splitlines()
        remote = [line.split()[3].rpartition(":")[0] for line in listed if program[:15] in line]
        assert {ring.lab.address(other) for other in WORKERS} - {ring.lab.address(machine)} == set(remote), listed


def test_chat_streams_and_embeddings_are_answered_through_a_lite_client(ring: Ring) -> None:
    node = ring.client
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    whole = node.client.post(f"{node.base_url}/v1/chat/completions", json=chat, timeout=60).json()
    text = whole["choices"][0]["message"]["content"]
    pieces = []
    with node.client.stream("POST", f"{node.base_url}/v1/chat/completions", json={**chat, "stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        pieces += [choice["delta"].get("content") or "" for choice in json.loads(line)["choices"]]
    assert "".join(pieces) == text != ""
    vector = node.client.post(f"{node.base_url}/v1/embeddings", json={"input": "hello"}, timeout=60).json()
    assert len(vector["data"][0]["embedding"]) == 1024
    models = node.client.get(f"{node.base_url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == [ring.status["layout"]["model"]["name"]]


def _listening(node: MeshNode) -> list[tuple[str, int]]:
    """Every TCP socket that listens on the node's machine, as the kernel lists them for its network namespace."""
    assert node.process is not None
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{node.process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            host, _, port = local.partition(":")
            words = [int(host[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(host), 8)]
            if state == "0A":
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def test_no_rpc_or_api_port_is_reached_from_another_machine(ring: Ring) -> None:
    for node in ring.nodes.values():
        address = ring.lab.address(node.machine)
        ports = _listening(node)
        assert ports, "the API, at least"
        assert {ip for ip, _ in ports} <= {"127.0.0.1", "::1", address}
        outside = {port for ip, port in ports if ip == address}
        assert outside <= {7842}, "only the mesh's own port, where nobody is heard without an announced ticket"
        for port in {port for _, port in ports} - outside:
            with ring.lab.socket("e") as stranger:
                stranger.settimeout(3)
                with pytest.raises((ConnectionRefusedError, TimeoutError)):
                    stranger.connect((address, port))


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(64)], ids=["nothing", "http", "zeros"])
def test_a_stranger_at_the_bulk_port_hears_nothing_and_is_let_go(ring: Ring, said: bytes) -> None:
    with ring.lab.socket("e") as stranger:
        stranger.settimeout(20)
        stranger.connect((ring.lab.address("a"), 7842))
        stranger.sendall(said)
        heard = b""
        with contextlib.suppress(ConnectionError):
            while chunk := stranger.recv(4096):
                heard += chunk
        assert len(heard) < 100, "an alert of TLS, at most"


def _refused(ring: Ring, name: str, *, join: str | None, record: Path | None = None) -> str:
    """A stranger on machine ``e`` tries; returns what it was told. Nothing must change for the members."""
    stranger = MeshNode(ring.lab, "e", ring.directory / name, role="client")
    if record is not None:
        stranger.state_dir.mkdir(parents=True, mode=0o700)
        shutil.copy(record, stranger.state_dir / "mesh.json")
        (stranger.state_dir / "mesh.json").chmod(0o600)
    stranger.start(join=join)
    assert stranger.process is not None
    code = stranger.process.wait(30)
    said = stranger.output_path.read_text()
    assert code in (1, 2), said
    status = ring.nodes["a"].status()
    assert status is not None
    assert {peer["name"] for peer in status["peers"] if peer["state"] != "left"} == {"b", "c", "d"}
    return said


def test_a_garbled_token_is_called_a_typo(ring: Ring) -> None:
    token = ring.nodes["a"].invite()
    swapped = token[:40] + ("a" if token[40] != "a" else "b") + token[41:]
    assert "typ" in _refused(ring, "typo", join=swapped)


def test_a_made_up_token_admits_nobody(ring: Ring) -> None:
    real = Invite.decode(ring.nodes["a"].invite())
    forged = Invite(
        real.mesh, real.inviter, real.addresses, secrets.token_bytes(16), real.expires_at, real.uses, real.role
    )
    assert "error" in _refused(ring, "forged", join=forged.encode())


def test_a_spent_token_admits_nobody_else(ring: Ring) -> None:
    token = ring.nodes["a"].invite(role="client")
    other = MeshNode(ring.lab, "e", ring.directory / "first", role="client")
    other.start(join=token)
    other.wait_serving(30)
    other.stop()
    deadline = time.monotonic() + 10
    while any(peer["name"] == "e" and peer["state"] != "left" for peer in ring.nodes["a"].status()["peers"]):  # type: ignore[index]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stranger = MeshNode(ring.lab, "e", ring.directory / "second", role="client")
    stranger.start(join=token)
    assert stranger.process is not None
    assert stranger.process.wait(30) == 1
    assert "used" in stranger.output_path.read_text() or "spent" in stranger.output_path.read_text()


def test_a_key_without_a_grant_is_not_a_member(ring: Ring) -> None:
    record = ring.client.state_dir / "mesh.json"
    assert "not a member" in _refused(ring, "nogrant", join=None, record=record)


def test_a_stranger_who_says_nothing_is_shown_out(ring: Ring) -> None:
    with ring.lab.socket("e", kind=socket.SOCK_DGRAM) as noise:
        for _ in range(200):
            noise.sendto(secrets.token_bytes(1200), (ring.lab.address("a"), 7842))
    assert ask(ring.nodes["a"]) == ask(ring.client)
    assert httpx.codes.is_success(ring.nodes["a"].client.get(f"{ring.nodes['a'].base_url}/mesh/status").status_code)
