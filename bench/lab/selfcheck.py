"""Does the lab keep its word? Packet timing and TCP throughput of every named link, measured from the outside."""

from __future__ import annotations

import contextlib
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.lab.lab import ROOT, Lab
from bench.lab.links import LINKS, Link

_SO_TIMESTAMPNS = 35
"""The kernel notes when a packet arrived, so that our own waking up does not count."""
_SENDER_STALL_NS = 300_000
PORT = 5077


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What a link did. Errors are seconds beyond what the link promises, either way."""

    name: str
    rtt_ms: float
    error_p50_ms: float
    error_p99_ms: float
    lost: float
    megabytes_per_second: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def timing_errors(lab: Lab, source: str, goal: str, link: Link, count: int, gap_s: float) -> tuple[list[float], float]:
    """Send ``count`` paced datagrams; returns how many seconds each missed its time by, and the share lost.

    A datagram whose sender was held up by the system while sending says nothing about the link, and does not count.
    """
    receiver = lab.socket(goal, kind=socket.SOCK_DGRAM)
    sender = lab.socket(source, kind=socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        receiver.bind((lab.address(goal), PORT))
        receiver.settimeout(link.delay_s + link.jitter_s + 1.0)
        sent: list[int] = []
        unsure: set[int] = set()
        next_at = time.monotonic()
        for index in range(count):
            next_at += gap_s
            while (left := next_at - time.monotonic()) > 0:
                time.sleep(left)
            sent.append(time.time_ns())
            sender.sendto(struct.pack("<I", index) + bytes(60), (lab.address(goal), PORT))
            if time.time_ns() - sent[-1] > _SENDER_STALL_NS:
                unsure.add(index)
        errors, arrived = [], 0
        with contextlib.suppress(TimeoutError):
            for _ in range(count):
                data, ancillary, _, _ = receiver.recvmsg(256, 256)
                arrived += 1
                seconds, nanos = struct.unpack("qq", ancillary[0][2])
                (index,) = struct.unpack_from("<I", data)
                if index not in unsure:
                    took = (seconds * 1_000_000_000 + nanos - sent[index]) / 1e9
                    errors.append(_miss(took, link, len(data) + 28))
    return errors, 1 - arrived / count


def _miss(took: float, link: Link, size: int) -> float:
    early = link.delay_s - link.jitter_s
    late = link.delay_s + link.jitter_s
    if link.bytes_per_second:
        early += size / link.bytes_per_second
        late += size / link.bytes_per_second
    return max(early - took, took - late, 0.0) if link.jitter_s else abs(took - early)


def round_trip_s(lab: Lab, source: str, goal: str, count: int = 15) -> float:
    """Median time of a TCP handshake."""
    took = []
    with lab.socket(goal) as listener:
        listener.bind((lab.address(goal), PORT))
        listener.listen(count)
        for _ in range(count):
            with lab.socket(source) as caller:
                began = time.monotonic()
                caller.connect((lab.address(goal), PORT))
                took.append(time.monotonic() - began)
    return statistics.median(took)


def throughput(lab: Lab, source: str, goal: str, seconds: float, settle_s: float) -> float:
    """Bytes per second that one TCP connection delivers, after ``settle_s`` of warming up."""
    code = (
        "import socket,sys\n"
        "s=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n"
        "b=bytes(1<<18)\n"
        "while True: s.sendall(b)\n"
    )
    with lab.socket(goal) as listener:
        listener.bind((lab.address(goal), PORT))
        listener.listen(1)
        listener.settimeout(10)
        flood = lab.popen(
            source, [sys.executable, "-c", code, lab.address(goal), str(PORT)], stderr=subprocess.DEVNULL, cwd=ROOT
        )
        connection, _ = listener.accept()
        with connection:
            buffer = bytearray(1 << 20)
            _drain(connection, buffer, settle_s)
            began = time.monotonic()
            received = _drain(connection, buffer, seconds)
            took = time.monotonic() - began
        flood.kill()
        flood.wait()
    return received / took


def _drain(connection: socket.socket, buffer: bytearray, seconds: float) -> int:
    received = 0
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([connection], (), (), left)[0]:
            received += connection.recv_into(buffer)
    return received


def check(link: Link, *, packets: int = 300, seconds: float = 3.0) -> LinkReport:
    """Measure one link between two machines."""
    with Lab(["a", "b"], link) as lab:
        errors, lost = timing_errors(lab, "a", "b", link, packets, 0.005)
        rtt = round_trip_s(lab, "a", "b")
        rate = throughput(lab, "a", "b", seconds, settle_s=max(1.0, 20 * link.delay_s))
    return LinkReport(
        link.name,
        rtt * 1e3,
        percentile(errors, 0.5) * 1e3,
        percentile(errors, 0.99) * 1e3,
        lost,
        rate / 1e6,
    )


def main(names: Sequence[str]) -> int:
    """Print the table; 1 when a link's timing is not to be trusted."""
    print("| link | one way | measured RTT ms | timing error p50 / p99 ms | lost | TCP MB/s |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for name in names or LINKS:
        report = check(LINKS[name])
        worst = max(worst, report.error_p99_ms)
        print(
            f"| {name} | {LINKS[name].describe()} | {report.rtt_ms:.2f} | {report.error_p50_ms:.3f} / "
            f"{report.error_p99_ms:.3f} | {report.lost:.1%} | {report.megabytes_per_second:.1f} |",
            flush=True,
        )
    if worst >= 2.0:
        print(f"the lab is not to be trusted now: p99 timing error {worst:.2f} ms (limit 2); is the machine busy?")
        return 1
    return 0
