"""The process between the machines: it owns every TUN device, and time.

Started by :class:`bench.lab.Lab` as ``python -m bench.lab.router FD``, where FD is a socket that carries one JSON
object per line each way. It makes the namespaces, moves packets until told to stop or until its parent is gone, and
takes everything down with it.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic
from typing import Any

from bench.lab import namespaces, tun
from bench.lab.links import Link
from bench.lab.nat import KINDS, TIMEOUTS_S, Nat
from bench.lab.packet import PROTOCOLS, Endpoint
from bench.lab.path import Path
from bench.lab.routes import HomeNetwork, Routes

BATCH = 64
"""Packets read from one device before the others have their turn."""
_IP = tun.HEADER
"""Where the IP header begins in what a device hands over."""
TOLERANCE_S = 0.002


class Router:
    """Moves packets between devices.

    Args:
        devices: file descriptors, one per node.
        routes: who has which address.
        link: of every pair, until changed.
        seed: of loss and jitter.
    """

    def __init__(self, devices: list[int], routes: Routes, link: Link, seed: int, mtu: int) -> None:
        self._devices = devices
        self.routes = routes
        self._read_size = tun.HEADER + max(mtu, tun.TRAIN_BYTES + 256)
        chance = random.Random(seed).random
        count = len(devices)
        self.paths = {(i, j): Path(link, chance) for i in range(count) for j in range(count) if i != j}
        self._scheduled: set[tuple[int, int]] = set()
        self._heap: list[tuple[float, tuple[int, int]]] = []
        self._index = {fd: i for i, fd in enumerate(devices)}
        self.late = 0
        self.delivered = 0
        self.worst_s = 0.0
        self.links_changed()

    def links_changed(self) -> None:
        """Let the kernel leave segments together where no link out of a machine could tell."""
        for i, fd in enumerate(self._devices):
            tun.allow_trains(fd, all(path.link.takes_trains for (a, _), path in self.paths.items() if a == i))

    def run(self, control: int) -> None:
        """Move packets until ``control`` has something to say."""
        watched = [*self._devices, control]
        heap = self._heap
        while True:
            self._deliver()
            timeout = 1.0
            if heap:
                timeout = max(0.0, heap[0][0] - monotonic())
            ready = select.select(watched, (), (), timeout)[0]
            if control in ready:
                return
            for fd in ready:
                self._read(fd)
            if not ready and timeout == 1.0:
                return

    def _read(self, fd: int) -> None:
        source = self._index[fd]
        read, size, addresses = os.read, self._read_size, self.routes.near(source)
        try:
            for _ in range(BATCH):
                packet = read(fd, size)
                four = packet[_IP] >> 4 == 4
                goal = addresses.get(packet[_IP + 16 : _IP + 20] if four else packet[_IP + 24 : _IP + 40])
                if goal is None:
                    if is_for_many(packet):
                        self._flood(source, packet)
                    elif self.routes.homes:
                        self._leave(source, packet)
                elif goal != source:
                    self._push((source, goal), packet)
        except BlockingIOError:
            pass
        except OSError:  # the device went away under us: its namespace is being removed
            pass

    def _push(self, pair: tuple[int, int], packet: bytes) -> None:
        path = self.paths[pair]
        if path.blocked and packet[_IP + (9 if packet[_IP] >> 4 == 4 else 6)] in path.blocked:
            path.dropped += 1
            return
        due = path.push(packet, monotonic(), *tun.wire_size(packet))
        if due is not None and pair not in self._scheduled:
            self._scheduled.add(pair)
            heappush(self._heap, (due, pair))

    def _flood(self, source: int, packet: bytes) -> None:
        for goal in self.routes.neighbours(source):
            self._push((source, goal), packet)

    def _leave(self, source: int, packet: bytes) -> None:
        crossing = self.routes.leave(source, packet[_IP:], monotonic(), partial=bool(packet[0] & tun.PARTIAL_CHECKSUM))
        if crossing is None:
            return
        goal, translated = crossing
        if goal != source:
            self._push((source, goal), packet[:_IP] + translated)
        else:  # through its own router back to itself: there is no link to cross
            self._arrive(goal, packet[:_IP] + translated)

    def _arrive(self, goal: int, packet: bytes) -> None:
        crossing = self.routes.arrive(goal, packet[_IP:], monotonic(), partial=bool(packet[0] & tun.PARTIAL_CHECKSUM))
        if crossing is not None:
            with contextlib.suppress(OSError):
                os.write(self._devices[crossing[0]], packet[:_IP] + crossing[1])

    def _deliver(self) -> None:
        heap, write = self._heap, os.write
        now = monotonic()
        while heap and heap[0][0] <= now:
            _, pair = heappop(heap)
            queue = self.paths[pair].queue
            fd = self._devices[pair[1]]
            behind_nat = self.routes.behind_nat(pair[1])
            for _ in range(BATCH):
                if not queue or queue[0][0] > now:
                    break
                due, packet = queue.popleft()
                if behind_nat:
                    self._arrive(pair[1], packet)
                else:
                    # A device that is going down refuses packets: so does a machine.
                    with contextlib.suppress(OSError):
                        write(fd, packet)
                self.delivered += 1
                if now - due > TOLERANCE_S:
                    self.late += 1
                    if now - due > self.worst_s:
                        self.worst_s = now - due
            if queue:
                heappush(heap, (queue[0][0], pair))
            else:
                self._scheduled.discard(pair)
            now = monotonic()


def is_for_many(packet: bytes) -> bool:
    """Whether an IP packet goes to a multicast or broadcast address (every lab net is a /24)."""
    if packet[_IP] >> 4 == 4:
        return 224 <= packet[_IP + 16] < 240 or packet[_IP + 19] == 255
    return packet[_IP + 24] == 0xFF


class Keeper:
    """What the parent may ask of a running router, one method per operation."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request["op"]
        if operation == "ping":
            return {}
        if operation == "counters":
            return self._counters(bool(request.get("reset")))
        if operation == "move":
            self._router.routes.place(request["node"], _packed(request["addresses"]), request["home"])
            return {}
        if "home" in request:
            return self._nat(operation, self._router.routes.homes[request["home"]].nat, request)
        paths = [self._router.paths[i, j] for i, j in request["pairs"]]
        for path in paths:
            if operation == "link":
                path.change(Link(**request["link"]))
            elif operation == "cut":
                path.sever()
            elif operation == "heal":
                path.cut = False
            elif operation == "block":
                path.blocked |= {PROTOCOLS[request["protocol"]]}
            elif operation == "unblock":
                path.blocked -= {PROTOCOLS[request["protocol"]]}
        if operation == "link":
            self._router.links_changed()
        return {}

    def _nat(self, operation: str, nat: Nat, request: dict[str, Any]) -> dict[str, Any]:
        if operation == "reboot":
            nat.reboot()
        elif operation == "renumber":
            nat.renumber(_packed([request["public"]])[0])
        elif operation == "forward":
            inside = Endpoint(_packed([request["address"]])[0], request["port"])
            nat.forward(PROTOCOLS[request["protocol"]], request["outside_port"], inside)
        names = {number: name for name, number in PROTOCOLS.items()}
        leases = [
            (
                names[lease.protocol],
                socket.inet_ntoa(lease.inside.host),
                lease.inside.port,
                lease.port,
                len(lease.remotes),
            )
            for lease in nat.leases(monotonic())
        ]
        return {"leases": leases, "refused_in": nat.refused_in, "refused_out": nat.refused_out}

    def _counters(self, reset: bool) -> dict[str, Any]:
        router = self._router
        rows = [(i, j, path.bytes, path.packets, path.dropped) for (i, j), path in router.paths.items()]
        report = {"rows": rows, "delivered": router.delivered, "late": router.late, "worst_s": router.worst_s}
        if reset:
            for path in router.paths.values():
                path.reset_counter()
            router.delivered = router.late = 0
            router.worst_s = 0.0
        return report


def build(setup: dict[str, Any]) -> Router:
    """Make the namespaces and devices that ``setup`` describes."""
    devices = []
    chance = random.Random(setup["seed"]).random
    routes = Routes(len(setup["nodes"]), [HomeNetwork(_build_nat(home, chance)) for home in setup["homes"]])
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    for index, node in enumerate(setup["nodes"]):
        name = setup["prefix"] + node["name"]
        namespaces.create(name)
        devices.append(tun.open_device(name))
        tun.configure(name, node["addresses"], setup["mtu"], gateway=bool(setup["homes"]))
        routes.place(index, _packed(node["addresses"]), node["home"])
    namespaces.enter_fd(home)
    tun.set_congestion_control([setup["prefix"] + node["name"] for node in setup["nodes"]], setup["congestion"])
    namespaces.enter_fd(home)
    os.close(home)
    return Router(devices, routes, Link(**setup["link"]), setup["seed"], setup["mtu"])


def _build_nat(home: dict[str, Any], chance: Callable[[], float]) -> Nat:
    timeouts_s = {**TIMEOUTS_S, **{PROTOCOLS[name]: seconds for name, seconds in home["timeouts_s"].items()}}
    return Nat(
        _packed([home["public"]])[0],
        KINDS[home["kind"]],
        chance,
        preserve_port=home["preserve_port"],
        hairpin=home["hairpin"],
        timeouts_s=timeouts_s,
    )


def _packed(addresses: list[str]) -> list[bytes]:
    return [ipaddress.ip_interface(address).packed for address in addresses]


def take_precedence() -> None:
    """The network does not wait for a busy CPU."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(-15)


def serve(control: socket.socket, parent: int) -> None:
    """Build, run and obey until told to stop or left alone."""
    lines = control.makefile("rwb")

    def reply(body: dict[str, Any]) -> None:
        lines.write(json.dumps(body).encode() + b"\n")
        lines.flush()

    setup = json.loads(lines.readline() or b"null")
    if setup is None:
        return
    try:
        router = build(setup)
    except (OSError, namespaces.LabError) as error:
        namespaces.remove_group(setup["prefix"])
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    keeper = Keeper(router)
    take_precedence()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        reply({})
        while os.getppid() == parent:
            router.run(control.fileno())
            if not select.select([control], (), (), 0)[0]:
                continue
            line = lines.readline()
            if not line:
                break
            request = json.loads(line)
            if request["op"] == "stop":
                break
            reply(keeper.answer(request))
    finally:
        namespaces.remove_group(setup["prefix"])
    with contextlib.suppress(OSError):
        reply({})


def main() -> None:
    # An interrupt typed at the terminal is for the parent; it says stop in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    with contextlib.suppress(ConnectionError):
        serve(socket.socket(fileno=int(sys.argv[1])), parent)


if __name__ == "__main__":
    main()
