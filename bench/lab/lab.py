"""Machines on a network that does what it is told: one namespace per machine, one router between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.lab import namespaces, tun, web
from bench.lab.links import Link
from bench.lab.namespaces import LabError
from bench.lab.packet import PROTOCOLS
from bench.lab.path import Counter
from bench.lab.places import HomeLike, Places, as_link

ROOT = Path(__file__).resolve().parents[2]
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Timing:
    """How well the router kept time since the last reset: packets delivered, those over 2 ms late, and the worst."""

    delivered: int
    late: int
    worst_s: float


@dataclass(frozen=True, slots=True)
class Mapped:
    """A port that a NAT holds open: ``outside`` stands for ``inside``; ``remotes`` have been written to through it."""

    protocol: str
    inside: tuple[str, int]
    outside: tuple[str, int]
    remotes: int


@dataclass(frozen=True, slots=True)
class NatState:
    """What a NAT holds open now, and how many packets it has refused each way since it was made."""

    mapped: tuple[Mapped, ...]
    refused_in: int
    refused_out: int


class Lab:
    """A context manager that holds machines and the links between them.

    Args:
        nodes: names of the machines (lowercase letters and digits).
        link: of every pair, by name, spelt out (see :func:`bench.lab.links.parse_link`), or a :class:`Link`. Between
            machines of one home lies the home's instead.
        nat: machines that sit alone behind a NAT, to its kind (see :data:`bench.lab.nat.KINDS`).
        homes: several machines behind one NAT: name to (kind, machines) or to a :class:`bench.lab.Home`.
        ipv6: give every machine an IPv6 address too.
        cores: how many CPU cores a machine's programs may use (dealt in turn); None for all. Without it, waiting
            threads of one machine's engine spin on the cores that another machine computes with.
        congestion: TCP congestion control in the machines; what most people's systems use, whatever this one does.
        seed: of loss and jitter.

    Raises:
        LabError: no lab can run here, or the router failed.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        link: str | Link = "lan",
        *,
        nat: Mapping[str, str] | None = None,
        homes: Mapping[str, HomeLike] | None = None,
        mtu: int = 1500,
        ipv6: bool = False,
        cores: int | None = None,
        congestion: str = "cubic",
        seed: int = 1,
    ) -> None:
        self.nodes = tuple(nodes)
        self._places = Places(nodes, nat, homes)
        if ipv6 and self._places.homes:
            raise LabError("homes speak IPv4 only: leave out ipv6, nat or homes")
        self._link = as_link(link)
        self._special_links: dict[tuple[str, str], Link] = {}
        self._cores = cores
        self._mtu, self._ipv6, self._congestion, self._seed = mtu, ipv6, congestion, seed
        self._prefix = namespaces.group_prefix(os.getpid(), next(_serials))
        self._lock = threading.Lock()
        self._router: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._processes: list[subprocess.Popen[Any]] = []
        self._clients: dict[str, httpx.Client] = {}

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Lab:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Make the machines and start the router; leftovers of labs whose owner died go first."""
        available, why = namespaces.lab_available()
        if not available:
            raise LabError(f"no lab here: {why}")
        namespaces.sweep()
        ours, theirs = socket.socketpair()
        with theirs:
            self._router = subprocess.Popen(
                [sys.executable, "-m", "bench.lab.router", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        ours.settimeout(30)
        self._control = ours
        try:
            self._send(
                {
                    "prefix": self._prefix,
                    "nodes": [
                        {"name": node, "addresses": self._interfaces(node), "home": self._home(node)}
                        for node in self.nodes
                    ],
                    "homes": self._places.setup(),
                    "link": asdict(self._link),
                    "mtu": self._mtu,
                    "congestion": self._congestion,
                    "seed": self._seed,
                }
            )
            for node in self.nodes if self._places.homes else ():
                self._restore_links(node)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill everything that runs in the machines and remove them; twice does no harm."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        router, self._router = self._router, None
        if router is not None:
            with contextlib.suppress(LabError):
                self._send({"op": "stop"})
            if self._control is not None:
                self._control.close()
            try:
                router.wait(20)
            except subprocess.TimeoutExpired:
                router.kill()
                router.wait()
        self._control = None
        # The router did this already unless it was killed.
        namespaces.remove_group(self._prefix)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    # -- machines --------------------------------------------------------------------------------------------------

    def address(self, node: str, *, ipv6: bool = False) -> str:
        """The machine's own address: on the lab's network or, behind a NAT, in its home."""
        return f"fd77::{self.nodes.index(node) + 1:x}" if ipv6 else self._places.address(node)

    def public_address(self, name: str) -> str:
        """What the internet sees of a machine or a home: its own address, or that of its NAT."""
        return self._places.public_address(name)

    def namespace(self, node: str) -> str:
        """The name to give to ``ip netns exec``."""
        if node not in self.nodes:
            raise LabError(f"no machine {node!r} in this lab: {', '.join(self.nodes)}")
        return self._prefix + node

    def popen(self, node: str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the machine, with :mod:`subprocess`'s ``options``; it dies with the lab at the latest."""
        command = self._command(node, argv)
        process = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def run(
        self, node: str, argv: Sequence[str | os.PathLike[str]], *, timeout: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the machine to its end and return what it said, as text."""
        return subprocess.run(self._command(node, argv), capture_output=True, text=True, timeout=timeout, **options)

    def pids(self, node: str) -> list[int]:
        """Every process in the machine, whoever started it."""
        return namespaces.pids_in(self.namespace(node))

    def socket(self, node: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the machine, usable from here."""
        return namespaces.open_socket(self.namespace(node), family, kind)

    def client(self, node: str, **options: Any) -> httpx.Client:
        """An HTTP client that sits in the machine (``localhost`` is the machine's). The caller closes it."""
        name = self.namespace(node)
        return web.client(lambda family, kind: namespaces.open_socket(name, family, kind), **options)

    def async_client(self, node: str, **options: Any) -> httpx.AsyncClient:
        """Like :meth:`client`, for asyncio."""
        name = self.namespace(node)
        return web.async_client(lambda family, kind: namespaces.open_socket(name, family, kind), **options)

    def http(self, node: str, method: str, url: str, *, timeout: float = 60.0, **options: Any) -> httpx.Response:
        """One request from inside the machine; ``options`` are :meth:`httpx.Client.request`'s."""
        return self._kept_client(node).request(method, url, timeout=timeout, **options)

    @contextlib.contextmanager
    def stream(
        self, node: str, method: str, url: str, *, timeout: float = 60.0, **options: Any
    ) -> Iterator[httpx.Response]:
        """One request whose answer is read as it comes (``response.iter_lines()``); leaving early closes it."""
        with self._kept_client(node).stream(method, url, timeout=timeout, **options) as response:
            yield response

    # -- links -----------------------------------------------------------------------------------------------------

    def set_link(self, a: str, b: str, link: str | Link, *, both: bool = True) -> None:
        """Change what lies between two machines, at once; packets under way keep their time."""
        made = as_link(link)
        self._special_links.update(dict.fromkeys([(a, b), (b, a)] if both else [(a, b)], made))
        self._send({"op": "link", "pairs": self._pairs(a, b, both), "link": asdict(made)})

    def set_all_links(self, link: str | Link) -> None:
        """Change every link, except those within a home."""
        self._link = as_link(link)
        self._special_links.clear()
        for node in self.nodes:
            self._restore_links(node)

    def cut(self, a: str, b: str, *, both: bool = True) -> None:
        """Let nothing pass from ``a`` to ``b`` (and back, when ``both``); what was under way is lost."""
        self._send({"op": "cut", "pairs": self._pairs(a, b, both)})

    def heal(self, a: str, b: str, *, both: bool = True) -> None:
        """Undo :meth:`cut`."""
        self._send({"op": "heal", "pairs": self._pairs(a, b, both)})

    def part(self, these: Sequence[str], those: Sequence[str]) -> None:
        """Cut every link between two groups of machines."""
        self._send({"op": "cut", "pairs": [p for a in these for b in those for p in self._pairs(a, b, True)]})

    def heal_all(self) -> None:
        """Undo every cut."""
        pairs = [pair for a, b in itertools.combinations(self.nodes, 2) for pair in self._pairs(a, b, True)]
        self._send({"op": "heal", "pairs": pairs})

    def block(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None:
        """Swallow one protocol (``tcp``, ``udp`` or ``icmp``) between two machines, as a firewall would."""
        self._send({"op": "block", "pairs": self._pairs(a, b, both), "protocol": _protocol(protocol)})

    def unblock(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None:
        """Undo :meth:`block`."""
        self._send({"op": "unblock", "pairs": self._pairs(a, b, both), "protocol": _protocol(protocol)})

    # -- homes -----------------------------------------------------------------------------------------------------

    def nat_state(self, name: str) -> NatState:
        """What the NAT of a home, or of a machine's home, holds open."""
        home = self._places.need_home(name)
        report = self._send({"op": "nat", "home": self._places.number(home)})
        outside = self.public_address(name)
        mapped = (Mapped(p, (host, port), (outside, public), n) for p, host, port, public, n in report["leases"])
        return NatState(tuple(mapped), report["refused_in"], report["refused_out"])

    def reboot_nat(self, name: str) -> None:
        """Switch the NAT off and on: it forgets every mapping, but not the forwarded ports."""
        self._send({"op": "reboot", "home": self._places.number(self._places.need_home(name))})

    def renumber(self, name: str) -> str:
        """Give a home's NAT another public address, as providers do overnight, and return it; mappings are gone."""
        home = self._places.need_home(name)
        public = self._places.renumber(home)
        self._send({"op": "renumber", "home": self._places.number(home), "public": public})
        return public

    def forward(self, node: str, port: int, *, outside_port: int | None = None, protocol: str = "udp") -> None:
        """Forward a port of the NAT's public address (the same one, unless told otherwise) to a machine behind it."""
        home = self._places.need_home(node)
        request = {"op": "forward", "home": self._places.number(home), "address": self.address(node), "port": port}
        self._send({**request, "outside_port": outside_port or port, "protocol": _protocol(protocol)})

    def move(self, node: str, to: str | None = None) -> str:
        """Take a machine with all that runs in it to another home, or onto the open internet; returns its new address.

        The old address is gone at once (an IPv6 one stays). Links become those of the new place, except where
        :meth:`set_link` said otherwise. ``to`` may be where it is: it gets another address there.
        """
        self._places.move(node, to)
        addresses = self._interfaces(node)
        tun.readdress(self.namespace(node), addresses, gateway=bool(self._places.homes))
        self._send({"op": "move", "node": self.nodes.index(node), "addresses": addresses, "home": self._home(node)})
        self._restore_links(node)
        return self.address(node)

    # -- what was carried ------------------------------------------------------------------------------------------

    def counters(self, *, reset: bool = False) -> dict[tuple[str, str], Counter]:
        """IP bytes and packets that each direction carried since the last reset."""
        report = self._send({"op": "counters", "reset": reset})
        return {(self.nodes[i], self.nodes[j]): Counter(*counts) for i, j, *counts in report["rows"]}

    def reset_counters(self) -> None:
        self.counters(reset=True)

    def timing(self) -> Timing:
        """How well the router kept time since the last reset of the counters."""
        report = self._send({"op": "counters"})
        return Timing(report["delivered"], report["late"], report["worst_s"])

    # -- inside ----------------------------------------------------------------------------------------------------

    def _command(self, node: str, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        # It becomes the program itself: the pid the caller sees is the program's.
        command = ["nsenter", f"--net={namespaces.path_of(self.namespace(node))}", "--"]
        if self._cores is not None:
            ours = sorted(os.sched_getaffinity(0))
            first = self.nodes.index(node) * self._cores
            dealt = {ours[(first + n) % len(ours)] for n in range(self._cores)}
            command += ["taskset", "-c", ",".join(map(str, sorted(dealt)))]
        return [*command, *(os.fspath(word) for word in argv)]

    def _interfaces(self, node: str) -> list[str]:
        return [f"{self.address(node)}/{self._places.prefix_bits(node)}"] + (
            [f"{self.address(node, ipv6=True)}/64"] if self._ipv6 else []
        )

    def _home(self, node: str) -> int | None:
        return self._places.number(self._places.home_of(node))

    def _restore_links(self, node: str) -> None:
        for other in self.nodes:
            for a, b in ((node, other), (other, node)) if other != node else ():
                link = self._special_links.get((a, b)) or self._places.default_link(a, b) or self._link
                self._send({"op": "link", "pairs": self._pairs(a, b, False), "link": asdict(link)})

    def _pairs(self, a: str, b: str, both: bool) -> list[list[int]]:
        i, j = self.nodes.index(a), self.nodes.index(b)
        return [[i, j], [j, i]] if both else [[i, j]]

    def _kept_client(self, node: str) -> httpx.Client:
        if node not in self._clients:
            self._clients[node] = self.client(node)
        return self._clients[node]

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._control is None:
                raise LabError("the lab is closed")
            answer = b""
            try:
                self._control.sendall(json.dumps(request).encode() + b"\n")
                while not answer.endswith(b"\n"):
                    chunk = self._control.recv(1 << 16)
                    if not chunk:
                        raise LabError("the lab's router died")
                    answer += chunk
            except OSError as error:
                raise LabError(f"the lab's router does not answer: {error}") from error
        report: dict[str, Any] = json.loads(answer)
        if "error" in report:
            raise LabError(report["error"])
        return report


def _protocol(name: str) -> str:
    if name not in PROTOCOLS:
        raise LabError(f"{name!r} is no protocol: {', '.join(PROTOCOLS)}")
    return name
