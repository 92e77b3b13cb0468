"""Machines on one switch, as at home: real interfaces that change their addresses, and a tap that sees every frame."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

from bench.lab import namespaces, web

ROOT = Path(__file__).parents[2]
MDNS_PORT = 5353
T = TypeVar("T")
_serials = itertools.count(5000)
_EVERYTHING = 0x0300
_Tap = socket.socket
"""ETH_P_ALL, in network order."""


class Switch:
    """A bridge in a namespace of its own, and one namespace per machine on it.

    Args:
        machines: their names; the first has address 1, and so on.
        ipv4, ipv6: which addresses they have.
    """

    def __init__(self, machines: Sequence[str], *, ipv4: bool = True, ipv6: bool = False) -> None:
        self.machines = tuple(machines)
        self._ipv4, self._ipv6 = ipv4, ipv6
        self._prefix = namespaces.group_prefix(os.getpid(), next(_serials))
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Switch:
        namespaces.sweep()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        namespaces.remove_group(self._prefix)
        for process in self._processes:
            process.wait()

    def _build(self) -> None:
        bridge = self._prefix + "switch"
        namespaces.create(bridge)
        namespaces.run_ip(
            "-netns", bridge, "-batch", "-", script="link add br0 type bridge mcast_snooping 0\nlink set br0 up"
        )
        for number, machine in enumerate(self.machines, 1):
            there = self._prefix + machine
            namespaces.create(there)
            script = f"link add port{number} type veth peer name eth0 netns {there}\n"
            script += f"link set port{number} master br0\nlink set port{number} up"
            namespaces.run_ip("-netns", bridge, "-batch", "-", script=script)
            namespaces.run_ip("-netns", there, "-batch", "-", script="link set lo up\nlink set eth0 up")
            self.move(machine, number)

    def move(self, machine: str, number: int) -> None:
        """Give a machine other addresses, and take its old ones, as a router does that forgot who it was."""
        there = self._prefix + machine
        script = ["addr flush dev eth0"]
        if self._ipv4:
            script += [f"addr add {self.address(number)}/24 dev eth0", "route add default dev eth0"]
        if self._ipv6:
            script += [f"addr add {self.address(number, ipv6=True)}/64 dev eth0 nodad"]
            script += [f"addr add fe80::{number}/64 dev eth0 nodad"]
        namespaces.run_ip("-netns", there, "-batch", "-", script="\n".join(script))

    def address(self, number: int, *, ipv6: bool = False) -> str:
        return f"fd78::{number:x}" if ipv6 else f"10.78.0.{number}"

    def command(self, machine: str, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net={namespaces.path_of(self._prefix + machine)}", "--", *argv]

    def popen(self, machine: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(self.command(machine, argv), **options)
        self._processes.append(process)
        return process

    def socket(self, machine: str, family: int, kind: int) -> socket.socket:
        return namespaces.open_socket(self._prefix + machine, family, kind)

    @contextlib.contextmanager
    def tap(self) -> Iterator[list[tuple[str, int]]]:
        """Every UDP packet to or from the port of mDNS that any machine sends: its name, and how long it was."""
        seen: list[tuple[str, int]] = []
        taps = [(machine, self._tap(f"port{number}")) for number, machine in enumerate(self.machines, 1)]
        for machine, tap in taps:
            threading.Thread(target=_listen, args=(machine, tap, seen), daemon=True).start()
        try:
            yield seen
        finally:
            for _, tap in taps:
                tap.close()

    def _tap(self, port: str) -> _Tap:
        made: list[_Tap] = []

        def make() -> None:
            namespaces.enter(self._prefix + "switch")
            made.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, _EVERYTHING))
            made[0].bind((port, 0x0003))
            made[0].settimeout(0.2)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]


def _listen(machine: str, tap: _Tap, seen: list[tuple[str, int]]) -> None:
    while tap.fileno() >= 0:
        try:
            frame, (_, _, direction, *_) = tap.recvfrom(2048)
        except TimeoutError:
            continue
        except OSError:
            return
        # What comes in at a switch's port was sent by the machine behind it.
        if direction != socket.PACKET_OUTGOING and _is_mdns(frame):
            seen.append((machine, len(frame)))


def _is_mdns(frame: bytes) -> bool:
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and packet[9] == socket.IPPROTO_UDP:
        udp = packet[(packet[0] & 15) * 4 :]
    elif kind == b"\x86\xdd" and packet[6] == socket.IPPROTO_UDP:
        udp = packet[40:]
    else:
        return False
    return MDNS_PORT in (int.from_bytes(udp[:2], "big"), int.from_bytes(udp[2:4], "big"))


def wait_until(condition: Callable[[], T], within: float, what: Callable[[], str]) -> T:
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within:g} s: {what()}"
        time.sleep(0.05)


class SwitchNode:
    """``mesh up`` or ``mesh client`` on a machine of a switch, as a person starts it: no addresses, no ports."""

    def __init__(self, switch: Switch, machine: str, directory: Path) -> None:
        self.switch, self.machine = switch, machine
        self.state = directory / machine
        self.output = directory / f"{machine}.txt"
        self.process: subprocess.Popen[Any] | None = None
        self._from = 0
        self._env = dict(
            os.environ, PYTHONPATH=str(ROOT), MESH_MODELS_DIR=str(directory / "models"), PYTHONUNBUFFERED="1"
        )

    def start(self, *arguments: str) -> SwitchNode:
        argv = [sys.executable, "-m", "mesh.cli", *arguments, "--name", self.machine, "--state-dir", str(self.state)]
        self._from = self.output.stat().st_size if self.output.exists() else 0
        with self.output.open("ab") as output:
            self.process = self.switch.popen(
                self.machine, argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._env,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        return self

    def lines(self) -> list[str]:
        """What it said since it was started."""
        return self.output.read_bytes()[self._from :].decode(errors="replace").splitlines()

    def wait_for(self, words: str, within: float = 20.0) -> str:
        def said() -> str | None:
            line = next((line for line in self.lines() if words in line), None)
            assert line or self.process is None or self.process.poll() is None, "\n".join(self.lines())
            return line

        return str(wait_until(said, within, lambda: f"{words!r} in\n" + "\n".join(self.lines())))

    def code(self) -> str:
        """The newest that it shows."""
        self.wait_for("mesh approve")
        return [line for line in self.lines() if line.startswith("mesh approve")][-1].split()[-1]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "mesh.cli", *arguments, "--state-dir", str(self.state)]
        command = self.switch.command(self.machine, argv)
        return subprocess.run(command, env=self._env, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def peers(self) -> dict[str, dict[str, Any]]:
        """Members that are in, by name."""
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            note = json.loads((self.state / "node.json").read_text())
            client = web.client(lambda family, kind: self.switch.socket(self.machine, family, kind))
            with client:
                headers = {"Authorization": f"Bearer {note['token']}"}
                found = client.get(f"{note['api_url']}/mesh/status", headers=headers, timeout=5).json()
            return {peer["name"]: peer for peer in found["peers"] if peer["state"] == "alive"}
        return {}

    def wait_peers(self, *names: str, within: float = 30.0) -> dict[str, dict[str, Any]]:
        def there() -> dict[str, dict[str, Any]]:
            peers = self.peers()
            return peers if set(names) == set(peers) and all(peer["path"] for peer in peers.values()) else {}

        return wait_until(there, within, lambda: f"{names} on {self.machine}:\n" + "\n".join(self.lines()))

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)
