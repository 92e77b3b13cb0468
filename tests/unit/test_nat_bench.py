"""How the table of NATs judges what it saw, without a network."""

from __future__ import annotations

import pytest

from bench.lab.nat import KINDS
from bench.nat import OPEN, Meeting, could_be, meetings_table, pairs_of, parse, peer_of

KINDS_AND_OPEN = [*KINDS, OPEN]


def test_only_a_symmetric_side_and_a_strict_one_need_a_relay() -> None:
    need = {pair for pair in pairs_of(KINDS_AND_OPEN) if could_be(*pair) == "relay"}
    assert need == {("symmetric", "symmetric"), ("port-restricted", "symmetric")}


# Which side is called first changes nothing.
@pytest.mark.parametrize("pair", pairs_of(KINDS_AND_OPEN))
def test_what_could_be_is_the_same_from_both_sides(pair: tuple[str, str]) -> None:
    assert could_be(*pair) == could_be(*reversed(pair))


def test_every_pair_is_tried_once() -> None:
    assert len(pairs_of(list(KINDS))) == 10
    assert parse([]).kind is None


@pytest.mark.parametrize(
    ("paths", "how"),
    [
        (("quic", "tcp"), "direct"),
        (("quic", "quic"), "direct"),
        (("relay", "quic"), "relay"),
        (("relay", "relay"), "relay"),
        (("quic", None), "not at all"),
        ((None, "relay"), "not at all"),
    ],
)
def test_a_meeting_is_as_good_as_its_worse_side(paths: tuple[str | None, str | None], how: str) -> None:
    assert Meeting(("full-cone", "full-cone"), paths).how == how


def test_a_relay_is_sound_only_where_nothing_better_can_be_and_tokens_come() -> None:
    relayed, rates = ("relay", "relay"), (5.0, 6.0)
    assert Meeting(("symmetric", "symmetric"), relayed, tokens_per_s=rates).sound
    assert not Meeting(("symmetric", "symmetric"), relayed).sound
    assert not Meeting(("symmetric", "symmetric"), relayed, tokens_per_s=(5.0, 0.0)).sound
    assert not Meeting(("full-cone", "symmetric"), relayed, tokens_per_s=rates).sound


def test_the_table_shouts_about_what_is_worse_than_it_could_be() -> None:
    fine = Meeting(("full-cone", "symmetric"), ("quic", "quic"), 0.5, 1.25, 20.4, (24.04, 23.96))
    poor = Meeting(("full-cone", "full-cone"), ("relay", "relay"), 0.5, None, 40.0, (9.0, 0.0))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in meetings_table([fine, poor]).splitlines()]
    assert rows[2] == ["full-cone", "symmetric", "direct", "direct", "0.50", "1.25", "20", "24.0 / 24.0"]
    assert rows[3] == ["full-cone", "full-cone", "RELAY", "direct", "0.50", "-", "40", "NO"]


def test_a_peer_that_left_is_nobody() -> None:
    left = {"name": "b", "state": "left", "path": None}
    alive = {"name": "b", "state": "alive", "path": "quic"}
    assert peer_of({"peers": [left, alive]}, "b") == alive
    assert peer_of({"peers": [left]}, "b") == peer_of(None, "b") == {}
