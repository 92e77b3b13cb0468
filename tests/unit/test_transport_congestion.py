"""How much may be on the way."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mesh.transport.congestion import INITIAL_WINDOW, BurstyCubic, Pacer

SEGMENT = 1200


@dataclass
class Packet:
    sent_time: float
    sent_bytes: int = SEGMENT


class Flow:
    """A sender that has ``flight`` packets on the way per round trip."""

    def __init__(self) -> None:
        self.cc = BurstyCubic(max_datagram_size=SEGMENT)
        self.now = 1.0

    def round(self, packets: int | None = None, *, lost: int = 0, rtt: float = 0.04) -> None:
        count = self.cc.congestion_window // SEGMENT if packets is None else packets
        flight = [Packet(self.now) for _ in range(count)]
        for packet in flight:
            self.cc.on_packet_sent(packet=packet)  # type: ignore[arg-type]
        self.now += rtt
        if lost:
            self.cc.on_packets_lost(now=self.now, packets=flight[:lost])  # type: ignore[arg-type]
        for packet in flight[lost:]:
            self.cc.on_packet_acked(now=self.now, packet=packet)  # type: ignore[arg-type]
            self.cc.on_rtt_measurement(now=self.now, rtt=rtt)


def test_a_full_window_doubles_in_slow_start() -> None:
    flow = Flow()
    flow.round()
    assert flow.cc.congestion_window > 1.9 * INITIAL_WINDOW


def test_a_trickle_leaves_the_window_alone_and_idling_does_not_shrink_it() -> None:
    flow = Flow()
    for _ in range(100):
        flow.round(5)
    flow.now += 3600
    flow.round(5)
    assert flow.cc.congestion_window == INITIAL_WINDOW


def test_losses_of_one_flight_count_once() -> None:
    flow = Flow()
    for _ in range(4):
        flow.round()
    before = flow.cc.congestion_window
    flight = [Packet(flow.now) for _ in range(20)]
    for packet in flight:
        flow.cc.on_packet_sent(packet=packet)  # type: ignore[arg-type]
    for packet in flight:
        flow.cc.on_packets_lost(now=flow.now + 0.05, packets=[packet])  # type: ignore[list-item]
    assert flow.cc.congestion_window == int(before * 0.7)


def test_after_a_loss_the_window_comes_back() -> None:
    flow = Flow()
    for _ in range(4):
        flow.round()
    before = flow.cc.congestion_window
    flow.round(lost=3)
    flow.now += 0.001
    assert flow.cc.congestion_window < before
    for _ in range(400):
        flow.round()
    assert flow.cc.congestion_window > before


def test_a_lasting_rise_of_the_round_trip_ends_slow_start() -> None:
    flow = Flow()
    for n in range(12):
        flow.round(rtt=0.040 + 0.010 * n)
    assert flow.cc.ssthresh is not None


def test_jitter_does_not_end_slow_start() -> None:
    flow = Flow()
    for n in range(12):
        flow.round(rtt=0.060 if n % 3 == 2 else 0.040)
    assert flow.cc.ssthresh is None


# Whatever happens to the packets, the count of bytes on the way ends at zero and the window stays open.
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.floats(0.001, 0.5)), max_size=40))
def test_the_books_balance(rounds: list[tuple[int, int, float]]) -> None:
    flow = Flow()
    for packets, lost, rtt in rounds:
        flow.round(packets, lost=min(lost, packets), rtt=rtt)
        assert flow.cc.bytes_in_flight == 0
        assert flow.cc.congestion_window >= 4 * SEGMENT


def test_a_burst_of_a_tokens_size_is_not_paced() -> None:
    pacer = Pacer(max_datagram_size=SEGMENT)
    pacer.update_rate(INITIAL_WINDOW, 0.04)
    sent = 0
    while pacer.next_send_time(now=10.0) is None:
        pacer.update_after_send(now=10.0)
        sent += 1
    assert 60 <= sent <= 80
    assert pacer.next_send_time(now=10.05) is None
