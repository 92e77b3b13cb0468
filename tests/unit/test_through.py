"""What the comparison through the mesh is held to, without servers."""

from __future__ import annotations

from collections.abc import Sequence

from bench.through import Pairs, Turn, table, verdicts


def pairs_of(case: str, mesh_ms: Sequence[float], bare_ms: Sequence[float], **more: object) -> Pairs:
    pairs = Pairs(case, 0 if case == "solo" else 1, [8, 8], ["quic"], texts={"same"})
    pairs.mesh = [Turn(ms, 50.0, 200.0) for ms in mesh_ms]
    pairs.bare = [Turn(ms, 48.0, 200.0) for ms in bare_ms]
    for name, value in more.items():
        setattr(pairs, name, value)
    return pairs


def missed(pairs: Pairs) -> list[str]:
    return [verdict.what for verdict in verdicts([pairs]) if verdict.met is False]


def test_ratios_are_of_neighbours_so_that_a_slow_minute_meets_both() -> None:
    # Pair by pair the two are equal, although one side's median is far from the other's.
    assert missed(pairs_of("lan", [20, 40, 20], [20, 40, 20])) == []
    assert pairs_of("lan", [20, 40], [20, 40]).generation() == [1.0, 1.0]


def test_the_bar_of_a_lan_is_98_percent_and_of_quic_alone_90() -> None:
    assert missed(pairs_of("lan", [105, 105, 105], [100, 100, 100])) == ["generation, mesh / bare"]
    assert missed(pairs_of("blocked", [105, 105, 105], [100, 100, 100])) == []
    assert missed(pairs_of("blocked", [120, 120, 120], [100, 100, 100])) == ["generation, mesh / bare"]


def test_the_proxy_may_cost_three_milliseconds() -> None:
    assert missed(pairs_of("solo", [20], [20])) == []
    late = pairs_of("solo", [20], [20], mesh=[Turn(20, 51.5, 200.0)])
    assert missed(late) == ["first token, ms later"]


def test_another_text_fails_however_fast_it_came() -> None:
    assert missed(pairs_of("lan", [10], [20], texts={"one", "other"})) == ["texts"]


def test_blocked_tcp_must_have_been_blocked() -> None:
    assert missed(pairs_of("blocked", [20], [20], paths=["quic", "tcp"])) == ["paths"]


def test_the_table_has_both_sides() -> None:
    row = table([pairs_of("lan", [25.04], [24.0])]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")][:5] == ["lan, 1 worker", "8+8", "quic", "25.0", "24.0"]
