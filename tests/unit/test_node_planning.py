"""From the election's question to the planner's, and a plan that is only tried out."""

from __future__ import annotations

import msgspec
import pytest

from mesh.election.events import NeedPlan
from mesh.node.planning import Trial, answer_plan, tried
from mesh.wire.facts import LinkFact, NodeFacts
from tests.unit.test_plan_search import GB, HOST, MB, WORKER, a_model, a_node, cpu, node_id

MODEL = a_model(fingerprint="1" * 64, name="one")
OTHER = a_model(fingerprint="2" * 64, name="two")
ME = node_id(1)


def node(number: int, free: int = 4 * GB, **changes: object) -> NodeFacts:
    facts = a_node(number, models=(MODEL,), wants=MODEL.fingerprint)
    return msgspec.structs.replace(facts, devices=(cpu(free),), **changes)


def question(*members: NodeFacts, cuts: frozenset[tuple[str, str]] = frozenset(), **excluded: str) -> NeedPlan:
    return NeedPlan(7, members, None, excluded, cuts)


def test_the_answer_bears_the_number_of_the_question() -> None:
    assert answer_plan(question(node(1)), ME, ()).request_id == 7


def test_a_mesh_without_a_model_says_so() -> None:
    planned = answer_plan(question(a_node(1)), ME, ())
    assert planned.layout is None
    assert "mesh up --model FILE" in planned.reason


def test_who_is_held_back_carries_nothing_and_is_told_why() -> None:
    held = {node_id(2): "failed three times"}
    request = NeedPlan(7, (node(1), node(2, split="always")), None, held, frozenset())
    planned = answer_plan(request, ME, ())
    assert planned.layout is not None
    assert planned.layout.mode == "solo"
    assert planned.excluded == held


def test_a_host_is_given_no_worker_that_it_cannot_reach() -> None:
    """Three that must share; the first two do not hear each other, so the ring is made without one of them."""
    room = HOST + 500 * MB
    members = tuple(node(n, room, split="always") for n in (1, 2, 3))
    pair = (node_id(1), node_id(2))
    planned = answer_plan(
        question(*members, cuts=frozenset({pair})), node_id(3), (LinkFact(node_id(1), 1.0), LinkFact(node_id(2), 1.0))
    )
    assert planned.layout is not None
    ring = {member.id for member in planned.layout.ring}
    assert not (planned.layout.host in pair and ring.issuperset(pair))


def test_a_cut_between_workers_is_named_as_the_reason() -> None:
    members = (node(1, HOST + 500 * MB, split="always"), node(2, WORKER + 500 * MB, split="always"))
    planned = answer_plan(
        question(*members, cuts=frozenset({(node_id(1), node_id(2))})), ME, (LinkFact(node_id(2), 1.0),)
    )
    assert planned.layout is None or planned.layout.mode == "solo"
    assert any("cannot reach each other" in why for why in planned.excluded.values())


def test_a_trial_with_nothing_in_it_changes_nothing() -> None:
    members = (node(1), node(2))
    assert tried(members, ME, Trial()) == members


@pytest.mark.parametrize(
    ("trial", "field", "value"),
    [
        (Trial(ctx_size=9000), "ctx_size", 9000),
        (Trial(parallel=3), "parallel", 3),
        (Trial(split="always"), "split", "always"),
        (Trial(max_memory=GB), "budget_bytes", GB),
    ],
)
def test_a_trial_changes_this_node_alone(trial: Trial, field: str, value: object) -> None:
    mine, other = tried((node(1), node(2)), ME, trial)
    assert getattr(mine, field) == value
    assert other == node(2)


def test_a_model_that_is_tried_is_the_one_that_is_planned() -> None:
    """Both others were started for another one, and would win by their number."""
    members = tried((node(1), node(2), node(3)), ME, Trial(model=OTHER))
    planned = answer_plan(NeedPlan(0, members, None, {}, frozenset()), ME, ())
    assert planned.layout is not None
    assert planned.layout.model.name == "two"
    assert planned.layout.host == ME
