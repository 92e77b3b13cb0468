"""Which model a mesh serves when its members differ."""

from __future__ import annotations

from mesh.plan.choice import choose_model
from mesh.wire.facts import Layout
from tests.unit.test_plan_search import a_model, a_node, layout_of, node_id

ONE = a_model(fingerprint="1" * 64, name="one")
TWO = a_model(fingerprint="2" * 64, name="two")


def serving_one() -> Layout:
    return layout_of(a_node(1, models=(ONE,)), model=ONE)


def test_the_only_wish_is_followed() -> None:
    choice = choose_model([a_node(1, models=(ONE,), wants=ONE.fingerprint), a_node(2)], None)
    assert choice.model == ONE
    assert choice.reason == "one is wanted by 1 machine"


def test_the_most_wanted_wins_and_the_others_are_told() -> None:
    nodes = [
        a_node(1, models=(ONE,), wants=ONE.fingerprint),
        a_node(2, models=(TWO,), wants=TWO.fingerprint),
        a_node(3, models=(TWO,), wants=TWO.fingerprint),
    ]
    choice = choose_model(nodes, None)
    assert choice.model == TWO
    assert choice.unmet == {node_id(1): "wants one; this mesh serves two"}


def test_a_draw_goes_to_the_lowest_id_in_any_order() -> None:
    nodes = [a_node(1, models=(TWO,), wants=TWO.fingerprint), a_node(2, models=(ONE,), wants=ONE.fingerprint)]
    assert choose_model(nodes, None).model == TWO
    assert choose_model(nodes[::-1], None).model == TWO


def test_the_running_model_stays_while_one_wants_it() -> None:
    nodes = [
        a_node(1, models=(ONE,), wants=ONE.fingerprint),
        a_node(2, models=(TWO,), wants=TWO.fingerprint),
        a_node(3, models=(TWO,), wants=TWO.fingerprint),
    ]
    choice = choose_model(nodes, serving_one())
    assert choice.model == ONE
    assert set(choice.unmet) == {node_id(2), node_id(3)}


def test_the_running_model_stays_when_nobody_wants_anything() -> None:
    assert choose_model([a_node(1, models=(ONE,))], serving_one()).model == ONE


def test_the_running_model_goes_when_only_others_are_wanted() -> None:
    nodes = [a_node(1, models=(ONE, TWO), wants=TWO.fingerprint)]
    assert choose_model(nodes, serving_one()).model == TWO


def test_a_running_model_that_nobody_has_any_more_goes() -> None:
    assert choose_model([a_node(2, models=(TWO,), wants=TWO.fingerprint)], serving_one()).model == TWO


def test_a_wish_that_nobody_can_fulfil_does_not_count() -> None:
    nodes = [a_node(1, models=(), wants="9" * 64), a_node(2, models=(ONE,), wants=ONE.fingerprint)]
    choice = choose_model(nodes, None)
    assert choice.model == ONE
    assert "nobody has" in choice.unmet[node_id(1)]


def test_clients_and_those_who_leave_have_no_say() -> None:
    nodes = [
        a_node(1, models=(ONE,), wants=ONE.fingerprint, role="client"),
        a_node(2, models=(TWO,), wants=TWO.fingerprint, draining=True),
    ]
    choice = choose_model(nodes, None)
    assert choice.model is None and "mesh up --model" in choice.reason


def test_nothing_wanted_says_how_to_want_something() -> None:
    assert "--demo" in choose_model([a_node(1)], None).reason


def test_a_wanted_model_on_no_disk_is_named_as_such() -> None:
    choice = choose_model([a_node(1, models=(), wants="9" * 64)], None)
    assert choice.model is None and "on no machine" in choice.reason
