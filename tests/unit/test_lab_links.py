"""Links and paths of the lab, without a network."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.links import LINKS, Link, parse_link
from bench.lab.path import Path
from bench.lab.router import is_for_many
from bench.lab.tun import HEADER, wire_size


def never() -> float:
    return 0.999


def test_named_links_are_found_by_name() -> None:
    assert parse_link("wan40") is LINKS["wan40"]
    assert LINKS["wan40"].delay_s == 0.020


def test_a_link_can_be_spelt_out() -> None:
    link = parse_link("5±2ms,30MB/s,1%")
    assert (link.delay_s, link.jitter_s, link.bytes_per_second, link.loss) == (0.005, 0.002, 30e6, 0.01)


@pytest.mark.parametrize("text", ["", "wan", "20", "20ms,", "-1ms", "20ms,200%", "1±2ms", "1ms,1B/s"])
def test_nonsense_is_no_link(text: str) -> None:
    with pytest.raises(ValueError, match="link"):
        parse_link(text)


def test_a_link_describes_itself_in_units() -> None:
    assert LINKS["wifi"].describe() == "5±2 ms, 30 MB/s"
    assert LINKS["bad"].describe() == "150±20 ms, 2% loss"


def test_a_packet_takes_its_size_over_the_rate_and_the_delay() -> None:
    path = Path(Link(delay_s=0.01, bytes_per_second=1e6), never)
    assert path.push(b"x", 5.0, 1000) == pytest.approx(5.011)
    assert path.push(b"y", 5.0, 1000) == pytest.approx(5.012)
    assert path.push(b"z", 9.0, 1000) == pytest.approx(9.011)


def test_a_full_queue_drops_the_newcomer() -> None:
    link = Link(delay_s=0.01, bytes_per_second=1e6)
    path = Path(link, never)
    accepted = sum(path.push(b"", 0.0, 1000) is not None for _ in range(1000))
    assert accepted == pytest.approx(link.queue_s * 1e6 / 1000, abs=2)
    assert path.counter().dropped == 1000 - accepted
    assert path.counter().bytes == accepted * 1000


def test_a_severed_path_loses_what_is_under_way_and_what_comes() -> None:
    path = Path(Link(delay_s=0.01), never)
    path.push(b"a", 0.0, 100)
    path.sever()
    assert not path.queue
    assert path.push(b"b", 0.0, 100) is None
    path.cut = False
    assert path.push(b"c", 1.0, 100) == pytest.approx(1.01)


def test_loss_takes_the_share_it_says() -> None:
    rolls = iter([0.01, 0.03] * 50)
    path = Path(Link(loss=0.02), lambda: next(rolls))
    passed = [path.push(b"", 0.0, 1) is not None for _ in range(100)]
    assert passed == [False, True] * 50


# Packets arrive in the order they were sent, never before the shortest delay, and never before they were sent.
@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(20, 1500), st.floats(0, 0.999)), max_size=60),
    st.floats(0, 0.05),
    st.floats(0, 1),
    st.one_of(st.none(), st.floats(1e4, 1e9)),
)
def test_paths_keep_order(
    packets: list[tuple[float, int, float]], delay: float, share: float, rate: float | None
) -> None:
    roll = [0.0]
    path = Path(Link(delay_s=delay, jitter_s=delay * share, bytes_per_second=rate), lambda: roll[0])
    now, last = 0.0, 0.0
    for gap, size, chance in packets:
        now += gap
        roll[0] = chance
        due = path.push(b"", now, size)
        if due is not None:
            assert due >= last
            assert due >= now + delay * (1 - share) - 1e-9
            last = due


def test_multicast_and_broadcast_are_for_many() -> None:
    def ipv4(goal: str) -> bytes:
        return bytes(HEADER) + b"\x45" + bytes(15) + bytes(int(part) for part in goal.split("."))

    assert is_for_many(ipv4("224.0.0.251"))
    assert is_for_many(ipv4("10.77.0.255"))
    assert not is_for_many(ipv4("10.77.0.2"))
    assert is_for_many(bytes(HEADER) + b"\x60" + bytes(23) + b"\xff\x02" + bytes(14))


def test_a_train_of_segments_counts_as_the_packets_it_stands_for() -> None:
    header = struct.pack("<BBHHHH", 1, 1, 52, 1448, 20, 16)
    assert wire_size(header + bytes(52 + 1448 * 3)) == (1500 * 3, 3)
    assert wire_size(header + bytes(52 + 1448 * 2 + 1)) == (1500 * 2 + 53, 3)
    assert wire_size(bytes(HEADER) + bytes(777)) == (777, 1)
