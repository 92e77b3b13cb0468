"""``mesh plan`` says what a time is made of, what nearly won, and what would change it."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.cli.plan import read_what_if
from mesh.election.events import NeedPlan
from mesh.errors import UsageError
from mesh.node.planning import Imagined, Trial, describe_plan, tried
from mesh.wire.facts import LinkFact, NodeFacts
from tests.unit.test_plan_search import GB, HOST, MB, MODEL, WORKER, a_node, node_id

ME = node_id(1)


def asked(*members: NodeFacts, links: tuple[LinkFact, ...] = (), trial: Trial | None = None) -> dict[str, Any]:
    wanting = tried(members, ME, Trial(model=MODEL))
    seen = tried(wanting, ME, trial) if trial is not None else wanting
    return describe_plan(NeedPlan(0, seen, None, {}, frozenset()), ME, links)


def test_the_parts_add_up_to_the_time() -> None:
    answer = asked(a_node(1, HOST + 500 * MB), a_node(2, WORKER + 400 * MB), links=(LinkFact(node_id(2), 6.0, 1e6),))
    parts = answer["parts"]
    assert parts["hops_ms"] == 6.0
    assert parts["bytes_ms"] == pytest.approx(2 * 64 * 4 / 1e6 * 1000, abs=0.01)
    assert sum(parts.values()) == pytest.approx(answer["layout"]["predicted_ms_per_token"], abs=0.05)
    assert sum(share["compute_ms"] for share in answer["shares"]) == pytest.approx(parts["compute_ms"], abs=0.05)


def test_every_member_is_shown_with_what_it_could_hold() -> None:
    answer = asked(a_node(1, HOST + 500 * MB), a_node(2, WORKER + 400 * MB), links=(LinkFact(node_id(2), 6.0),))
    assert [share["id"] for share in answer["shares"]] == [member["id"] for member in answer["layout"]["ring"]]
    for member, share in zip(answer["layout"]["ring"], answer["shares"], strict=True):
        assert 0 < member["bytes"] <= share["usable_bytes"]


def test_what_lost_is_named_with_what_it_lost_by() -> None:
    answer = asked(a_node(1, speed=20e9), a_node(2, speed=10e9), links=(LinkFact(node_id(2), 2.0),))
    assert [member["name"] for member in answer["layout"]["ring"]] == ["node1"]
    second = answer["alternatives"][0]
    assert second["ms_per_token"] >= answer["layout"]["predicted_ms_per_token"]
    assert "slower" in second["why"]
    assert all(other["ring"] != ["node1"] for other in answer["alternatives"])


def test_a_gigabyte_that_would_help_is_named_with_its_machine() -> None:
    far = (LinkFact(node_id(2), 40.0),)
    answer = asked(a_node(1, HOST + 500 * MB), a_node(2, WORKER + 400 * MB), links=far)
    assert any(line.startswith("1 GB more on node") and "instead of" in line for line in answer["more"])


def test_a_mesh_without_a_model_explains_nothing() -> None:
    answer = describe_plan(NeedPlan(0, (a_node(1),), None, {}, frozenset()), ME, ())
    assert answer["layout"] is None and answer["reason"] and answer["parts"] is None


# -- what if -------------------------------------------------------------------------------------------------------


def test_a_machine_that_is_imagined_carries_what_it_is_said_to_hold() -> None:
    small = a_node(1, HOST + 500 * MB)
    assert asked(small)["layout"] is None
    answer = asked(small, trial=Trial(what_if=(Imagined("attic", WORKER + 400 * MB, rtt_ms=4.0),)))
    assert {member["name"] for member in answer["layout"]["ring"]} == {"node1", "attic"}
    assert answer["parts"]["hops_ms"] == 4.0


def test_a_machine_that_is_there_may_be_imagined_larger() -> None:
    answer = asked(a_node(1, HOST + 500 * MB), trial=Trial(what_if=(Imagined("node1", 4 * GB),)))
    assert answer["layout"]["mode"] == "solo"
    assert answer["shares"][0]["usable_bytes"] == pytest.approx(4 * GB, rel=0.01)


def test_the_speed_that_is_imagined_counts() -> None:
    trial = Trial(what_if=(Imagined("attic", 20 * GB, bytes_per_second=100e9),))
    answer = asked(a_node(1, speed=1e9), trial=trial)
    assert answer["layout"]["ring"][0]["name"] == "attic"


def test_a_machine_is_read_as_it_is_written() -> None:
    assert read_what_if("node=attic, memory=16GB,speed=20GB/s,rtt=5ms") == Imagined("attic", 16 * GB, 20e9, 5.0)
    assert read_what_if("node=a,memory=1GB") == Imagined("a", GB, 0.0, 1.0)


@pytest.mark.parametrize(
    "text", ["", "attic", "node=a", "memory=1GB", "node=a,memory=lots", "node=a,memory=1GB,rtt=soon", "node=a,node=b"]
)
def test_what_is_no_machine_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_what_if(text)
    assert raised.value.remedy
