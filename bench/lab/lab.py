"""Machines on a network that does what it is told: one namespace per machine, one router between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bench.lab import namespaces, web
from bench.lab.links import Link, parse_link
from bench.lab.namespaces import LabError
from bench.lab.path import Counter

ROOT = Path(__file__).resolve().parents[2]
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Timing:
    """How well the router kept time since the last reset: packets delivered, those over 2 ms late, and the worst."""

    delivered: int
    late: int
    worst_s: float


class Lab:
    """A context manager that holds machines and the links between them.

    Args:
        nodes: names of the machines (lowercase letters and digits).
        link: of every pair, by name, spelt out (see :func:`bench.lab.links.parse_link`), or a :class:`Link`.
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
        mtu: int = 1500,
        ipv6: bool = False,
        cores: int | None = None,
        congestion: str = "cubic",
        seed: int = 1,
    ) -> None:
        self.nodes = tuple(nodes)
        if len(set(self.nodes)) != len(self.nodes) or not all(re.fullmatch("[a-z0-9]{1,12}", n) for n in self.nodes):
            raise LabError(f"machine names are distinct, of 1 to 12 lowercase letters and digits: {nodes}")
        self._link = _as_link(link)
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
                    "nodes": [{"name": node, "addresses": self._interfaces(node)} for node in self.nodes],
                    "link": asdict(self._link),
                    "mtu": self._mtu,
                    "congestion": self._congestion,
                    "seed": self._seed,
                }
            )
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
        """The machine's address on the lab's network."""
        index = self.nodes.index(node) + 1
        return f"fd77::{index:x}" if ipv6 else f"10.77.0.{index}"

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
        self._send({"op": "link", "pairs": self._pairs(a, b, both), "link": asdict(_as_link(link))})

    def set_all_links(self, link: str | Link) -> None:
        """Change every link."""
        pairs = [pair for a, b in itertools.combinations(self.nodes, 2) for pair in self._pairs(a, b, True)]
        self._send({"op": "link", "pairs": pairs, "link": asdict(_as_link(link))})

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
        return [f"{self.address(node)}/24"] + ([f"{self.address(node, ipv6=True)}/64"] if self._ipv6 else [])

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


def _as_link(link: str | Link) -> Link:
    return parse_link(link) if isinstance(link, str) else link
