"""How much may be on the way: a cubic window (RFC 9438) fit for bursts.

Differences to what aioquic brings, each for a failure seen with it:

- A window of 64 KB to begin with, never forgotten when idle: a token's activations leave in one burst, whatever the
  pause before. Ten packets would cost a whole trip.
- The window grows only while it is used; an idle ring must not end up with a window that floods a slow uplink.
- Slow start ends on a rise of the round trip that lasts (RFC 9406), not on scheduling jitter.
- Pacing allows bursts that outlast the millisecond an event loop's timer is late by.
"""

from __future__ import annotations

from collections.abc import Iterable

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer

NAME = "mesh"
INITIAL_WINDOW = 64 * 1024
_CUBIC_C = 0.4
_BETA = 0.7
_ROUND_SAMPLES = 8
_CAREFUL = 4
_DOUBT_ROUNDS = 5
_BURST_PACKETS = 64
_BURST_S = 0.004
_PACING_GAIN = 1.25
_QUANTUM_PACKETS = 16
_QUANTUM_S = 0.003
"""What a sender that had to stop gathers before it goes on: 23 KB, less than a TCP stack sends in a row."""


class BurstyCubic(QuicCongestionControl):
    """Bytes that may be unacknowledged at once, by packets acknowledged and lost."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.congestion_window = INITIAL_WINDOW
        self._segment = max_datagram_size
        self._least = 4 * max_datagram_size
        self._recovery_since = 0.0
        self._limited_at = 0.0
        # Cubic's own: the window before the last loss, in bytes, and when and where growth started anew.
        self._plateau = 0.0
        self._epoch: float | None = None
        self._epoch_window = 0.0
        self._reno_window = 0.0
        # The round of slow start.
        self._rtt = 0.1
        self._round_end = 0.0
        self._round_min: float | None = None
        self._previous_min: float | None = None
        self._samples = 0
        self._doubts = 0  # rounds since the round trip rose; 0: it did not
        self._doubted_min = 0.0

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self.bytes_in_flight += packet.sent_bytes
        if 2 * self.bytes_in_flight >= self.congestion_window:
            self._limited_at = packet.sent_time or 0.0

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.bytes_in_flight -= packet.sent_bytes
        sent = packet.sent_time or 0.0
        # Packets of a flight that did not fill the window say nothing about a larger one.
        if sent <= self._recovery_since or sent > self._limited_at:
            return
        if self.ssthresh is None or self.congestion_window < self.ssthresh:
            self.congestion_window += packet.sent_bytes // (_CAREFUL if self._doubts else 1)
        else:
            self._grow(now, packet.sent_bytes)

    def _grow(self, now: float, acked: int) -> None:
        if self._epoch is None:
            self._epoch = now
            self._epoch_window = self._reno_window = float(self.congestion_window)
            self._plateau = max(self._plateau, self._epoch_window)
        inflection = ((self._plateau - self._epoch_window) / self._segment / _CUBIC_C) ** (1 / 3)
        elapsed = now - self._epoch + self._rtt
        target = self._plateau + _CUBIC_C * (elapsed - inflection) ** 3 * self._segment
        self._reno_window += self._segment * acked / self.congestion_window
        target = min(max(target, self._reno_window), 1.5 * self.congestion_window)
        if target > self.congestion_window:
            step = (target - self.congestion_window) * acked / self.congestion_window
            self.congestion_window += max(1, int(step))

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        newest = 0.0
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            newest = max(newest, packet.sent_time or 0.0)
        if newest <= self._recovery_since:  # losses of one flight are one event
            return
        self._recovery_since = now
        window = float(self.congestion_window)
        # Below the last plateau another flow wants its share: leave it some.
        self._plateau = window * (1 + _BETA) / 2 if window < self._plateau else window
        self.congestion_window = max(int(window * _BETA), self._least)
        self.ssthresh = self.congestion_window
        self._epoch = None

    def on_persistent_congestion(self) -> None:
        self.congestion_window = self._least
        self._recovery_since = 0.0
        self._epoch = None

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self._rtt = rtt
        if self.ssthresh is not None:
            return
        if now >= self._round_end and self._samples >= _ROUND_SAMPLES:
            self._end_round(now + rtt)
        self._round_min = rtt if self._round_min is None else min(rtt, self._round_min)
        self._samples += 1
        if self._previous_min is not None and not self._doubts and self._samples >= _ROUND_SAMPLES:
            rise = min(max(self._previous_min / 8, 0.004), 0.016)
            if self._round_min >= self._previous_min + rise:
                self._doubts, self._doubted_min = 1, self._round_min

    def _end_round(self, next_end: float) -> None:
        least = self._round_min
        self._previous_min, self._round_min = least, None
        self._samples, self._round_end = 0, next_end
        if not self._doubts:
            return
        self._doubts += 1
        if least is not None and least < self._doubted_min:
            self._doubts = 0  # it was only jitter
        elif self._doubts > _DOUBT_ROUNDS:
            self.ssthresh = self.congestion_window


class Pacer(QuicPacketPacer):
    """Spreads a window over the round trip, in bursts that a 1 ms timer can keep up with.

    Who has used up what it may send at once waits until it may send several packets again: one at a time costs both
    ends a wake-up for each, of the processor that an engine computes with.
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self._rests = False

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]  # theirs says float, returns None
        """When to send next; None: now."""
        if self.packet_time is None:
            return None
        self.update_bucket(now=now)
        self._rests = self._rests or self.bucket_time <= 0
        quantum = min(_QUANTUM_PACKETS * self.packet_time, _QUANTUM_S, self.bucket_max)
        if self._rests and self.bucket_time < quantum:
            return now + quantum - self.bucket_time
        self._rests = False
        return None

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        rate = _PACING_GAIN * congestion_window / max(smoothed_rtt, 1e-4)
        self.packet_time = max(self._max_datagram_size / rate, 1e-7)
        self.bucket_max = max(_BURST_PACKETS * self.packet_time, _BURST_S)
        self.bucket_time = min(self.bucket_time, self.bucket_max)


register_congestion_control(NAME, BurstyCubic)
