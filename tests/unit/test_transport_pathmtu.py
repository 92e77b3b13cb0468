"""How long datagrams may be, and which of them go in one call."""

from __future__ import annotations

from mesh.transport.pathmtu import SIZES, TRIES, PathMtu
from mesh.transport.udp import alike

BASE = 1232
HERE, THERE = ("127.0.0.1", 1), ("127.0.0.1", 2)


def searching() -> PathMtu:
    mtu = PathMtu(BASE)
    assert mtu.next_probe() is None, "nobody asked for it"
    mtu.search()
    return mtu


def test_the_largest_that_arrives_is_kept() -> None:
    mtu = searching()
    assert mtu.next_probe() == SIZES[0]
    assert mtu.largest == BASE, "not before it is known"
    mtu.delivered(SIZES[0])
    assert mtu.largest == SIZES[0]
    assert mtu.next_probe() is None


def test_one_probe_at_a_time() -> None:
    mtu = searching()
    assert mtu.next_probe() == SIZES[0]
    assert mtu.next_probe() is None


def test_each_size_may_be_lost_once_and_then_a_shorter_one_is_tried() -> None:
    mtu = searching()
    for size in SIZES:
        for _ in range(TRIES):
            assert mtu.next_probe() == size
            mtu.lost()
    assert mtu.next_probe() is None
    assert mtu.largest == BASE


def test_an_answer_for_the_path_before_says_nothing_of_this_one() -> None:
    mtu = searching()
    mtu.next_probe()
    mtu.settle(1200)
    mtu.delivered(SIZES[0])
    assert mtu.largest == 1200


def test_a_new_path_begins_anew() -> None:
    mtu = searching()
    mtu.next_probe()
    mtu.delivered(SIZES[0])
    mtu.search()
    assert (mtu.largest, mtu.next_probe()) == (BASE, SIZES[0])


def test_datagrams_of_one_length_to_one_address_go_together_and_a_shorter_one_ends_them() -> None:
    long, short = bytes(1452), bytes(700)
    assert alike([(long, HERE)], 0) == 1
    assert alike([(long, HERE), (long, HERE), (short, HERE), (short, HERE)], 0) == 3
    assert alike([(short, HERE), (long, HERE)], 0) == 1
    assert alike([(long, HERE), (long, THERE)], 0) == 1
    many = [(long, HERE)] * 100
    assert 1 < alike(many, 0) <= 64
    assert alike(many, 99) == 1
    assert sum(len(data) for data, _ in many[: alike(many, 0)]) < 65_000
