"""Which lane carries new bulk streams to one peer: TCP where it is the better one. Pure.

On a LAN TCP wins by far, because the kernel does for it what QUIC does in Python. On a long path our QUIC wins whenever
a token's activations are more than TCP's first ten packets, to which the kernel returns after every pause: each trip
that costs is a trip per token. So on long paths the same burst is sent over both, and TCP must be clearly better.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.transport.lane import Path

LAN_RTT_MS = 5.0
"""A round trip of small packets over TCP up to which nothing needs to be compared."""
CLEARLY = 0.8
"""TCP's burst must take less than this share of QUIC's for a change to TCP; once there, it stays while no worse."""
FIRST_RETRY_S = 10.0
"""Until TCP is tried again after it failed or lost, then twice as long: a first trial may have met a busy machine."""
LOOK_AGAIN_S = 300.0
"""Paths change: after this long any choice is looked at again."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A trial went through.

    Attributes:
        rtt_ms: shortest echo of a small packet over TCP.
        burst_ms: echo of a token's activations over a fresh TCP connection.
        quic_burst_ms: the same over QUIC; None: not measured, or it failed.
        bytes_per_second: of bursts once the connection has warmed up; 0: not measured. ``quic_`` likewise.
        quic_rtt_ms: shortest echo over a QUIC stream; None like the burst.
        jitter_ms: what a usual echo takes more than the shortest, on a link that is not short itself.
    """

    rtt_ms: float
    burst_ms: float
    quic_burst_ms: float | None = None
    bytes_per_second: float = 0.0
    quic_rtt_ms: float | None = None
    quic_bytes_per_second: float = 0.0
    jitter_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class TcpFailed:
    """A trial, or a stream that should have been opened, came to nothing over TCP."""


Event = Measured | TcpFailed


def is_near(rtt_ms: float) -> bool:
    """Is a path of this round trip so short that TCP needs no comparison?"""
    return rtt_ms <= LAN_RTT_MS


class LaneChoice:
    """The choice for one link, which begins with QUIC and a trial at once."""

    def __init__(self, now: float) -> None:
        self.path: Path = "quic"
        self.tried = False
        """There has been an outcome, good or bad."""
        self._next = now
        self._in_vain = 0

    def handle(self, event: Event, now: float) -> None:
        """Take in what happened to TCP."""
        self.tried = True
        match event:
            case TcpFailed():
                self.path = "quic"
            case Measured():
                self.path = "tcp" if self._is_better(event) else "quic"
        if self.path == "tcp":
            self._in_vain = 0
            self._next = now + LOOK_AGAIN_S
        else:
            self._next = now + min(FIRST_RETRY_S * 2**self._in_vain, LOOK_AGAIN_S)
            self._in_vain = min(self._in_vain + 1, 16)

    def next_timer(self) -> float:
        """When TCP is to be tried out (again)."""
        return self._next

    def _is_better(self, seen: Measured) -> bool:
        if is_near(seen.rtt_ms):
            return True
        if seen.quic_burst_ms is None:
            return self.path == "tcp"
        share = 1.0 if self.path == "tcp" else CLEARLY
        return seen.burst_ms < share * seen.quic_burst_ms
