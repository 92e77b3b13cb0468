"""What the recovery bench makes of what the nodes said, and what it calls a miss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.recovery.__main__ import parse
from bench.recovery.cases import CASES
from bench.recovery.diary import Diary, Entry
from bench.recovery.figures import Recovery, timeline
from bench.recovery.verdicts import recovery_table, verdicts

SOUND = Recovery("worker", 1.4, 0.1, 0.6, 2.2, 1, 3.0)


def entry(at: float, kind: str, **said: object) -> Entry:
    return Entry(at, kind, dict(said))


def a_loss() -> dict[str, list[Entry]]:
    """The tunnel breaks at once, and a layout is made with the dead machine; 1.3 s later it is found to be dead."""
    return {
        "b": [
            entry(9.0, "ready"),
            entry(10.1, "plan", epoch=4),
            entry(11.3, "change", node="v", reason="crashed"),
            entry(11.35, "plan", epoch=5),
            entry(12.0, "ready"),
        ],
        "c": [
            entry(10.12, "plan", epoch=4),
            entry(11.4, "plan", epoch=5),
            entry(11.41, "change", node="v", reason="crashed"),
            entry(12.01, "ready"),
        ],
    }


def test_detection_is_when_the_machine_is_found_missing_not_when_its_tunnel_broke() -> None:
    figures = timeline("worker", 3, 10.0, a_loss(), "b", 12.1, "v")
    assert figures.detected_s == pytest.approx(1.3)
    assert figures.elected_s == pytest.approx(0.1), "until the last of them follows"
    assert figures.load_s == pytest.approx(0.6)
    assert figures.beyond_s == pytest.approx(2.1 - 1.3 - 0.6)
    assert figures.epochs == 2


def test_where_no_machine_is_missing_detection_is_the_first_word_of_the_end() -> None:
    said = {
        "b": [entry(10.02, "change", text="engine on a: killed; requests wait"), entry(10.5, "plan", epoch=4)],
        "c": [entry(10.5, "plan", epoch=4), entry(11.0, "ready")],
    }
    figures = timeline("llama-server", 3, 10.0, said, "c", 11.1)
    assert (figures.detected_s, figures.elected_s) == (pytest.approx(0.02), pytest.approx(0.48))


def test_a_node_that_follows_nothing_new_leaves_the_election_open() -> None:
    said = a_loss()
    said["c"] = said["c"][:1]
    figures = timeline("worker", 3, 10.0, said, "b", 12.1, "v")
    assert figures.elected_s is None and figures.load_s is None


def test_a_diary_begins_when_it_is_opened_and_leaves_out_what_is_no_notice(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    path.write_text(json.dumps({"time": 1.0, "kind": "ready"}) + "\n")
    diary = Diary(path)
    with path.open("a") as file:
        file.write("Traceback\n" + json.dumps({"time": 2.0, "kind": "plan", "epoch": 7}) + "\n" + '{"time": 3.0, "ki')
    assert [(e.at, e.kind, e.said["epoch"]) for e in diary.entries()] == [(2.0, "plan", 7)]


def missed(*done: Recovery) -> list[str]:
    return [v.what for v in verdicts(done) if not v.met]


def test_sound_figures_miss_nothing() -> None:
    assert missed(SOUND, replace(SOUND, case="host"), replace(SOUND, case="leave", detected_s=0.1)) == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (replace(SOUND, detected_s=1.6), "worker: detected"),
        (replace(SOUND, detected_s=None), "worker: detected"),
        (replace(SOUND, elected_s=0.4), "worker: elected after detection"),
        (replace(SOUND, elected_s=None), "worker: elected after detection"),
        (replace(SOUND, token_s=3.1), "worker: next token beyond detection and load"),
        (replace(SOUND, case="leave", detected_s=1.4), "leave: known to the others"),
        (Recovery("stall-1", epochs=1), "stall-1: evicted, or a new epoch"),
        (Recovery("stall-1", accused=1), "stall-1: evicted, or a new epoch"),
        (Recovery("slow-disk", epochs=1, accused=2), "slow-disk: the slow machine taken for dead"),
        (replace(SOUND, orphans=1), "engine processes that outlived their node"),
        (replace(SOUND, case="rpc-server", epochs=0), "faults that led to no new epoch"),
    ],
)
def test_every_bar_can_be_missed(bad: Recovery, what: str) -> None:
    assert what in missed(bad)


def test_the_table_has_a_row_for_each_fault_and_percentiles_from_five_runs_on() -> None:
    lines = recovery_table([SOUND] * 5 + [replace(SOUND, case="host", detected_s=None)]).splitlines()
    assert "| 1.40 / 1.40 / 1.40 " in lines[2]
    assert lines[3].startswith("| host") and "| 2.20 (worst 2.20) " in lines[3]


def test_every_case_can_be_asked_for_and_a_mesh_too_small_is_refused() -> None:
    assert parse([]).runs == 3
    assert parse([word for case in CASES for word in ("--case", case.name)]).case == [case.name for case in CASES]
    with pytest.raises(SystemExit):
        parse(["--machines", "3"])
