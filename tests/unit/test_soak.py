"""How a soak decides what happens and judges what it saw, without a network."""

from __future__ import annotations

import json

import pytest

from bench.soak import flaps
from bench.soak.asking import Fate, Lost, Outcome, Request, read_events, read_whole
from bench.soak.verdicts import Soak, growth, slope_per_min, verdicts
from bench.soak.watching import Sample

EXPECTED = " many union cell"


def event(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"text": text}]})


ERROR = "data: " + json.dumps({"error": {"message": "the host is gone", "code": "stream_interrupted"}})


# -- what happens --------------------------------------------------------------------------------------------------


def plan(seed: int, seconds: float = 600) -> list[flaps.Flap]:
    return flaps.forecast(seed, seconds, "abcd", homes=["d"], movers=["c"], every_s=6)


def test_the_seed_decides_what_flaps() -> None:
    assert plan(3) == plan(3) != plan(4)
    assert {flap.kind for flap in plan(3, 3000)} == set(flaps.KINDS)


def test_a_path_suffers_one_thing_at_a_time() -> None:
    busy: dict[frozenset[str], float] = {}
    for flap in plan(5, 3000):
        if flap.b:
            pair = frozenset((flap.a, flap.b))
            assert flap.at_s >= busy.get(pair, 0.0)
            busy[pair] = flap.at_s + flap.for_s
            assert flaps.SHORTEST_S <= flap.for_s <= flaps.LONGEST_S


def test_only_homes_are_rebooted_and_only_movers_move() -> None:
    for flap in plan(6, 3000):
        if flap.kind in flaps.OF_PLACES:
            assert flap.a == ("c" if flap.kind == "move" else "d")


class Paths:
    """A lab that only remembers what is wrong with it."""

    def __init__(self) -> None:
        self.wrong: set[tuple[str, ...]] = set()
        self.ever = 0

    def _begin(self, *what: str) -> None:
        self.ever += 1
        self.wrong.add(what)

    def cut(self, a: str, b: str, *, both: bool = True) -> None:
        self._begin("cut", a, b, str(both))

    def heal(self, a: str, b: str, *, both: bool = True) -> None:
        self.wrong.remove(("cut", a, b, str(both)))

    def block(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None:
        self._begin(protocol, a, b)

    def unblock(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None:
        self.wrong.remove((protocol, a, b))

    def set_link(self, a: str, b: str, link: str, *, both: bool = True) -> None:
        if link == "lan":
            self.wrong.remove(("link", a, b))
        else:
            self._begin("link", a, b)

    def reboot_nat(self, name: str) -> None:
        self.ever += 1

    def renumber(self, name: str) -> str:
        self.ever += 1
        return "11.77.0.9"

    def move(self, node: str, to: str | None = None) -> str:
        self.ever += 1
        return "11.77.0.10"


def test_every_flap_is_made_good_again() -> None:
    told = [flaps.Flap(n / 50, 0.01, kind, "a", "b") for n, kind in enumerate(flaps.KINDS)]
    lab = Paths()
    flaps.play(lab, told, "lan", lambda flap: None)
    assert (lab.ever, lab.wrong) == (len(flaps.KINDS), set())


# -- what became of a request --------------------------------------------------------------------------------------


def test_a_stream_is_answered_when_it_ends_with_the_right_text() -> None:
    lines = [": hold on", event(" many"), "", event(" union cell"), "data: [DONE]"]
    assert read_events(lines, EXPECTED) == (Fate.ANSWERED, "")


def test_a_stream_that_ends_in_an_error_says_so_and_is_not_lost() -> None:
    assert read_events([event(" many"), ERROR], EXPECTED) == (Fate.REFUSED, "stream_interrupted")


@pytest.mark.parametrize(
    "lines",
    [
        [event(" many")],
        [],
        [event(" many"), "data: [DONE]"],
        [event(" many"), event(" cell")],
        [event(EXPECTED + "!"), "data: [DONE]"],
        [event(" few"), ERROR],
    ],
    ids=["cut", "empty", "short", "another word", "longer", "wrong before its error"],
)
def test_a_stream_that_merely_stops_or_says_something_else_is_lost(lines: list[str]) -> None:
    with pytest.raises(Lost):
        read_events(lines, EXPECTED)


def test_whoever_goes_away_half_way_has_cancelled() -> None:
    assert read_events([event(" many"), event(" union")], EXPECTED, gives_up_after=2) == (Fate.CANCELLED, "")


def test_an_answer_in_one_piece_is_right_refused_or_lost() -> None:
    right = json.dumps({"choices": [{"message": {"content": EXPECTED}}]}).encode()
    refused = json.dumps({"error": {"message": "no", "code": "mesh_not_serving"}}).encode()
    assert read_whole(200, right, EXPECTED) == (Fate.ANSWERED, "")
    assert read_whole(503, refused, EXPECTED) == (Fate.REFUSED, "mesh_not_serving")
    for status, body in [
        (200, b'{"choices": [{"text": " few"}]}'),
        (502, b"<html>"),
        (500, b'{"error": null}'),
        (200, b""),
    ]:
        with pytest.raises(Lost):
            read_whole(status, body, EXPECTED)


# -- what it is held to --------------------------------------------------------------------------------------------


def sample(at_s: float, *, rss: float = 90e6, descriptors: int = 30, active: int = 0) -> Sample:
    return Sample(at_s, int(rss), descriptors, 3, 20, active, 0, 1)


def outcome(fate: Fate) -> Outcome:
    return Outcome("a", Request("Hello", 8), fate, "", 1.0, 0.5, 0.1)


def a_soak(fate: Fate = Fate.ANSWERED, rss_per_min: float = 0.0, more_tasks: int = 0, stuck: int = 0) -> Soak:
    soak = Soak(600.0, [outcome(Fate.ANSWERED), outcome(fate)], again_s={"a": 2.0}, whole_s=3.0)
    soak.samples["a"] = [sample(at, rss=90e6 + rss_per_min * at / 60) for at in range(0, 600, 5)]
    rest = [(sample(0), {"asyncio.Task": 20}), (sample(650, active=stuck), {"asyncio.Task": 20 + more_tasks})]
    soak.idle["a"] = rest
    return soak


def missed(soak: Soak) -> list[str]:
    return [verdict.what for verdict in verdicts(soak) if verdict.met is False]


def test_a_flat_soak_meets_every_bar() -> None:
    assert missed(a_soak()) == []
    assert missed(a_soak(Fate.REFUSED)) == []


def test_one_lost_request_is_one_too_many() -> None:
    assert missed(a_soak(Fate.LOST)) == ["requests neither answered rightly nor refused"]


def test_growth_of_a_megabyte_a_minute_is_a_leak() -> None:
    assert missed(a_soak(rss_per_min=1e6)) == ["memory per minute, second half"]
    assert missed(a_soak(rss_per_min=-1e6)) == []


def test_tasks_that_stay_behind_and_requests_that_never_end_are_seen() -> None:
    assert missed(a_soak(more_tasks=9)) == ["tasks at rest, before -> after"]
    assert missed(a_soak(stuck=1)) == ["requests under way when nobody asks"]


def test_a_mesh_that_never_answers_again_has_failed() -> None:
    soak = a_soak()
    soak.again_s["a"] = None
    assert missed(soak) == ["right answer after the last flap, s"]


def test_nothing_seen_is_nothing_met() -> None:
    assert len(missed(Soak(600.0))) >= 6


def test_a_slope_is_not_moved_by_an_outlier() -> None:
    points = [(float(at), 5.0 * at) for at in range(20)]
    points[7] = (7.0, 10_000.0)
    assert slope_per_min(points) == pytest.approx(300)


def test_growth_is_told_by_class_most_first() -> None:
    assert growth({"x": 1, "y": 5}, {"x": 4, "y": 4, "z": 9}) == {"z": 9, "x": 3}
