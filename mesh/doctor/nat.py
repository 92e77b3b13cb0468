"""Where others see this machine: what its node has found out, or one round of STUN from a fresh socket."""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mesh.discovery import stun
from mesh.discovery.addresses import own_addresses
from mesh.discovery.public import Kind, Witnesses
from mesh.doctor.finding import Finding, ok, warning
from mesh.doctor.patient import Patient
from mesh.node.whereabouts import STUN_PORT
from mesh.transport.address import join_address, split_address

CHECK = "nat"
WITHIN_S = 4.0
_KINDS: dict[Kind, str] = {
    "open": "others see this machine under its own address",
    "cone": "behind a NAT that others can cross: they see {address}",
    "symmetric": "behind a NAT that gives every partner another port (symmetric)",
    "unknown": "nobody outside has said how this machine is seen",
}


def check(patient: Patient) -> Iterator[Finding]:
    """Asked of the node's own socket when there is a node: a fresh one has another mapping."""
    if patient.checkup is not None:
        found = patient.checkup
        yield from judge(found["nat"], found["stun"], found["addresses"], len(found["settings"]["stun"]))
        return
    servers = [split_address(server, default_port=STUN_PORT) for server in patient.settings.stun]
    if not servers or all(host.startswith("127.") or host == "::1" for host in patient.settings.bind_host):
        yield from judge("unknown", "off", [], 0)
        return
    kind, addresses, answered = look(servers, WITHIN_S)
    yield from judge(kind, "answered" if answered else "silent", addresses, len(servers))


def judge(kind: Kind, state: str, addresses: Sequence[str], asked: int) -> Iterator[Finding]:
    """Pure.

    Args:
        state: ``off``, ``silent`` or ``answered``.
        asked: how many servers.
    """
    if state == "off":
        yield ok(CHECK, "no STUN server is asked (stun none): others learn where this machine is from members", "off")
        return
    if state == "silent" and kind == "unknown":
        yield warning(
            CHECK,
            "stun-silent",
            f"none of {asked} STUN servers answered: without an internet connection, or UDP is blocked. On one network "
            "everything works; from elsewhere this machine may not be reached",
            "try another server:  MESH_STUN=HOST:PORT mesh up\nor ask none, on purpose:  MESH_STUN=none mesh up",
        )
        return
    text = _KINDS[kind].format(address=addresses[-1] if addresses else "its public address")
    if kind == "symmetric":
        yield warning(
            CHECK,
            "symmetric-nat",
            f"{text}: two machines behind such need a third that both reach",
            "forward the port in the router, then:  mesh up --advertise HOST:PORT\n"
            "or run on a small public machine:  mesh up --relay-only",
        )
    else:
        yield ok(CHECK, text)


def look(servers: Sequence[tuple[str, int]], within_s: float) -> tuple[Kind, tuple[str, ...], bool]:
    """One round from a fresh socket: the NAT, the addresses seen, and whether anybody answered."""
    targets = _resolve(servers, within_s / 2)
    witnesses, client = Witnesses(), stun.StunClient(secrets.token_bytes)
    answered = False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        sock.setblocking(False)
        deadline = time.monotonic() + within_s
        effects = client.handle(stun.Look(tuple(targets)), time.monotonic())
        while True:
            for effect in effects:
                match effect:
                    case stun.Query(data, target):
                        _send(sock, data, target)
                    case stun.Answered(server, address):
                        answered = True
                        witnesses.server(server[0], join_address(*address))
            due, now = client.next_timer(), time.monotonic()
            if due is None or now >= deadline:
                break
            readable, _, _ = select.select([sock], [], [], max(0.0, min(due, deadline) - now))
            effects = _receive(sock, client) if readable else client.handle(stun.Tick(), time.monotonic())
        own = own_addresses([join_address("0.0.0.0", sock.getsockname()[1])], ())  # noqa: S104 - as it is bound
    seen = witnesses.conclude(own)
    return seen.kind, (*seen.addresses, *seen.unconfirmed), answered


def _receive(sock: socket.socket, client: stun.StunClient) -> list[stun.Effect]:
    try:
        data, source = sock.recvfrom(2048)
    except OSError:  # somebody said that nobody listens there
        return []
    return client.handle(stun.Received(data, (source[0], source[1])), time.monotonic())


def _send(sock: socket.socket, data: bytes, target: stun.Target) -> None:
    with contextlib.suppress(OSError):  # no way there: it will count as silent
        sock.sendto(data, target)


def _resolve(servers: Sequence[tuple[str, int]], within_s: float) -> list[stun.Target]:
    """An IPv4 address for each; a resolver that hangs does not hold up the others."""

    def one(server: tuple[str, int]) -> stun.Target | None:
        try:
            found = socket.getaddrinfo(*server, family=socket.AF_INET, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError):
            return None
        return (str(found[0][4][0]), int(found[0][4][1]))

    pool = ThreadPoolExecutor(max_workers=max(1, min(8, len(servers))))
    tasks = [pool.submit(one, server) for server in servers]
    deadline = time.monotonic() + within_s
    found: list[stun.Target] = []
    for task in tasks:
        try:
            target = task.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            continue
        found += [target] if target is not None else []
    pool.shutdown(wait=False, cancel_futures=True)
    return found
