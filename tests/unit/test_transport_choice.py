"""Which lane: near paths take TCP, long ones only what is clearly better, and failure means QUIC at once."""

from __future__ import annotations

from mesh.transport.choice import FIRST_RETRY_S, LOOK_AGAIN_S, LaneChoice, Measured, TcpFailed


def test_until_tcp_was_tried_quic_carries() -> None:
    choice = LaneChoice(100.0)
    assert (choice.path, choice.tried, choice.next_timer()) == ("quic", False, 100.0)


def test_a_near_peer_is_reached_over_tcp_without_a_comparison() -> None:
    choice = LaneChoice(0.0)
    choice.handle(Measured(rtt_ms=0.3, burst_ms=0.6), 1.0)
    assert choice.path == "tcp"
    assert choice.next_timer() == 1.0 + LOOK_AGAIN_S


def test_on_a_long_path_tcp_must_be_clearly_better() -> None:
    choice = LaneChoice(0.0)
    choice.handle(Measured(rtt_ms=40, burst_ms=81, quic_burst_ms=43), 0.0)
    assert choice.path == "quic", "a trip lost to slow start"
    choice.handle(Measured(rtt_ms=40, burst_ms=41, quic_burst_ms=43), 0.0)
    assert choice.path == "quic", "too little to change for"
    choice.handle(Measured(rtt_ms=40, burst_ms=41, quic_burst_ms=90), 0.0)
    assert choice.path == "tcp"


def test_a_long_path_that_went_over_tcp_stays_while_it_is_no_worse() -> None:
    choice = LaneChoice(0.0)
    choice.handle(Measured(rtt_ms=40, burst_ms=41, quic_burst_ms=90), 0.0)
    choice.handle(Measured(rtt_ms=40, burst_ms=41, quic_burst_ms=43), 0.0)
    assert choice.path == "tcp"
    choice.handle(Measured(rtt_ms=40, burst_ms=41), 0.0)
    assert choice.path == "tcp", "a comparison that failed says nothing against it"
    choice.handle(Measured(rtt_ms=40, burst_ms=44, quic_burst_ms=43), 0.0)
    assert choice.path == "quic"


def test_a_long_path_without_a_comparison_is_left_to_quic() -> None:
    choice = LaneChoice(0.0)
    choice.handle(Measured(rtt_ms=40, burst_ms=41), 0.0)
    assert choice.path == "quic"
    assert choice.next_timer() == FIRST_RETRY_S, "the machine may just have been busy"


def test_a_failure_means_quic_at_once_and_ever_rarer_trials() -> None:
    choice = LaneChoice(0.0)
    choice.handle(Measured(rtt_ms=0.3, burst_ms=0.6), 0.0)
    pauses = []
    for _ in range(12):
        choice.handle(TcpFailed(), 1000.0)
        assert choice.path == "quic"
        pauses.append(choice.next_timer() - 1000.0)
    assert pauses[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert pauses[-1] == LOOK_AGAIN_S
    choice.handle(Measured(rtt_ms=0.3, burst_ms=0.6), 2000.0)
    choice.handle(TcpFailed(), 2000.0)
    assert choice.next_timer() == 2000.0 + FIRST_RETRY_S, "success forgives"
