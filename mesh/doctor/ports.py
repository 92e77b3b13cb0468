"""Are the ports that a node needs free, and if not, who has them; or does the running node really listen?"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from mesh.doctor.finding import Finding, ok, problem, warning
from mesh.doctor.patient import Patient
from mesh.node.run import api_hosts
from mesh.transport.address import split_address

CHECK = "ports"
Kind = Literal["UDP", "TCP"]


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a node binds. ``flag`` chooses another."""

    flag: str
    kind: Kind
    host: str
    number: int


@dataclass(frozen=True, slots=True)
class Owner:
    """A program that has a port. ``state_dir`` when it is a node of ours and says which."""

    pid: int
    name: str
    state_dir: str = ""
    is_node: bool = False


def check(patient: Patient) -> Iterator[Finding]:
    """Ports of a node that runs are its own; of one that does not, they must be free."""
    if patient.running is not None:
        yield from _of_running(patient)
        return
    settings = patient.settings
    wanted = [Port("--bind-port", "UDP", host, settings.bind_port) for host in settings.bind_host]
    wanted += [Port("--bind-port", "TCP", host, settings.bind_port) for host in settings.bind_host]
    wanted += [Port("--api-port", "TCP", host, settings.api_port) for host in api_hosts(settings.api_host)]
    told: set[tuple[str, Kind, int]] = set()
    for port in wanted:
        if (port.flag, port.kind, port.number) in told:
            continue
        trouble = refused(port)
        owner = owner_of(port) if trouble == errno.EADDRINUSE else None
        found = judge(port, trouble, owner, _free_port(port) if trouble else 0)
        if found.level != "ok":
            told.add((port.flag, port.kind, port.number))
            yield found
    for flag, kind in dict.fromkeys((port.flag, port.kind) for port in wanted):
        number = next(port.number for port in wanted if port.flag == flag and port.kind == kind)
        if (flag, kind, number) not in told:
            yield ok(CHECK, f"{kind} {number} ({flag}) is free" if number else f"any {kind} port ({flag} 0)")


def refused(port: Port) -> int:
    """Why it cannot be bound (an ``errno``); 0 when it can, or when this machine has no such address family."""
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM if port.kind == "UDP" else socket.SOCK_STREAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port.kind == "TCP":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((port.host, port.number))
            if port.kind == "TCP":
                probe.listen()
    except OSError as error:
        return error.errno if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL) else 0
    return 0


def owner_of(port: Port) -> Owner | None:
    """Who has it, as far as this user may know."""
    try:
        connections = psutil.net_connections("udp" if port.kind == "UDP" else "tcp")
    except (psutil.Error, OSError):
        return None
    for connection in connections:
        local = connection.laddr
        bound = port.kind == "UDP" or connection.status == psutil.CONN_LISTEN
        if local and local.port == port.number and bound and connection.pid:
            return _describe(connection.pid)
    return None


def _describe(pid: int) -> Owner | None:
    try:
        process = psutil.Process(pid)
        name, words = process.name(), process.cmdline()
    except psutil.Error:
        return Owner(pid, "a program")
    is_node = any(word in ("up", "client") for word in words) and any("mesh" in word for word in words)
    state_dir = words[words.index("--state-dir") + 1] if "--state-dir" in words[:-1] else ""
    return Owner(pid, "mesh" if is_node else name, state_dir, is_node)


def judge(port: Port, trouble: int, owner: Owner | None, instead: int) -> Finding:
    """Pure.

    Args:
        trouble: why it could not be bound; 0: it could.
        instead: another number, which was free a moment ago.
    """
    name = f"{port.kind} port {port.number} ({port.flag})"
    other = f"mesh up {port.flag} {instead}"
    if not trouble:
        return ok(CHECK, f"{name} is free")
    if trouble == errno.EADDRNOTAVAIL:
        return problem(CHECK, "no-address", f"{port.host} is no address of this machine", "mesh up --bind-host ADDRESS")
    if trouble == errno.EACCES:
        return problem(CHECK, "port-forbidden", f"{name} may not be used by this user", other)
    if owner is not None and owner.is_node:
        down = "mesh down" + (f" --state-dir {owner.state_dir}" if owner.state_dir else "")
        return problem(
            CHECK,
            "port-taken",
            f"{name} belongs to another node of this machine (pid {owner.pid})",
            f"{down}   or: {other}",
        )
    who = f"{owner.name} (pid {owner.pid})" if owner is not None else "another program"
    if port.kind == "TCP" and port.flag == "--bind-port":
        return warning(
            CHECK,
            "port-taken",
            f"{name} is taken by {who}: others reach this node over UDP only, slower on a LAN",
            other,
        )
    return problem(CHECK, "port-taken", f"{name} is taken by {who}", other)


def _free_port(port: Port) -> int:
    for number in range(port.number + 1, min(port.number + 100, 65536)):
        kinds: tuple[Kind, ...] = ("UDP", "TCP") if port.flag == "--bind-port" else ("TCP",)
        if all(not refused(Port(port.flag, kind, port.host, number)) for kind in kinds):
            return number
    return 0


def _of_running(patient: Patient) -> Iterator[Finding]:
    if patient.checkup is None:
        return
    assert patient.running is not None
    yield ok(CHECK, f"this node listens on UDP {', '.join(patient.checkup['bound'])}")
    mine = patient.running.pid
    for address in patient.checkup["bound"]:
        host, number = split_address(address)
        owner = owner_of(Port("--bind-port", "TCP", host, number))
        if owner is not None and owner.pid != mine:
            port = Port("--bind-port", "TCP", host, number)
            yield judge(port, errno.EADDRINUSE, owner, _free_port(port))
            return
    yield ok(CHECK, f"the API answers at {patient.running.api_url}")
