"""How answers in bad weather are read, excused and judged, without a network."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from bench.endure import questions
from bench.endure.asking import DRAIN_S, Fate, Outcome, Try, excuses
from bench.endure.forms import DELTA, ENDPOINTS, Endpoint, Refused, Said, Stream, Wrong
from bench.endure.roster import Absence, Roster
from bench.endure.throughput import Aggregate
from bench.endure.verdicts import Endured, hit, verdicts
from bench.endure.weather import Happened

BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}


def chat(text: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"delta": {} if text is None else {"content": text}, "finish_reason": None, "index": 0}
    return {"id": "chatcmpl-1", "choices": [choice], **more}


ROLE = chat()
ROLE["choices"][0]["delta"] = {"role": "assistant", "content": None}
FINISH = chat()
FINISH["choices"][0]["finish_reason"] = "length"
USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
ANSWER = (ROLE, chat(" many"), chat(" union"), FINISH, USAGE)
SAID = Said(" many union", "length", 3, 2, ("role", DELTA, "finish", "usage", "[DONE]"))


def listen(*events: dict[str, Any] | str, endpoint: Endpoint = BY_NAME["chat"]) -> Stream:
    stream = Stream(endpoint)
    for event in events:
        stream.line("data: " + (event if isinstance(event, str) else json.dumps(event)))
    return stream


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_what_its_parts_say_together() -> None:
    stream = listen(*ANSWER, "[DONE]")
    assert stream.ended and stream.said() == SAID


def test_comments_are_no_part_of_an_answer() -> None:
    stream = Stream(BY_NAME["chat"])
    assert not stream.line(": waiting for the mesh") and not stream.line("")
    assert stream.line("data: " + json.dumps(ROLE)) and stream.shape == ["role"]


def test_a_stream_that_stops_has_not_ended() -> None:
    assert not listen(*ANSWER).ended


def test_a_second_preamble_is_seen() -> None:
    stream = listen(ROLE, chat(" many"), ROLE, chat(" union"), FINISH, USAGE, "[DONE]")
    assert "shape" in str(stream.said().unlike(SAID))


def test_a_repeated_word_is_seen() -> None:
    stream = listen(ROLE, chat(" many"), chat(" many"), chat(" union"), FINISH, USAGE, "[DONE]")
    assert "text" in str(stream.said().unlike(SAID))


def test_another_id_within_one_answer_is_wrong() -> None:
    with pytest.raises(Wrong, match="two ids"):
        listen(ROLE, {**chat(" many"), "id": "chatcmpl-2"})


def test_more_after_the_end_is_wrong() -> None:
    with pytest.raises(Wrong, match="after the end"):
        listen(*ANSWER, "[DONE]", "[DONE]")


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "gone", "code": "stream_interrupted"}},
        {"type": "error", "code": "stream_interrupted", "message": "gone"},
        {"code": "stream_interrupted", "message": "gone", "type": "server_error"},
    ],
)
def test_an_error_within_a_stream_is_a_refusal(error: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        listen(ROLE, error)
    assert refused.value.code == "stream_interrupted"


def test_what_nobody_can_read_is_wrong() -> None:
    for line in ("{", "[]", '{"choices": [{}]}', '{"nothing": 1}'):
        with pytest.raises(Wrong):
            listen(line)
    with pytest.raises(Wrong):
        BY_NAME["chat"].read_whole(b'{"choices": []}')


def test_an_answer_without_usage_is_wrong() -> None:
    with pytest.raises(Wrong, match="used"):
        listen(ROLE, chat(" many"), FINISH, "[DONE]").said()


def test_a_responses_stream_repeats_what_it_said() -> None:
    endpoint = BY_NAME["responses"]
    delta = {"type": "response.output_text.delta", "item_id": "msg_1", "delta": " many"}
    done = {"type": "response.output_text.done", "item_id": "msg_1", "text": " many"}
    assert listen(delta, done, endpoint=endpoint).text == " many"
    with pytest.raises(Wrong, match="repeats"):
        listen(delta, {**done, "text": " many union"}, endpoint=endpoint)
    with pytest.raises(Wrong, match="two ids"):
        listen(delta, {**delta, "item_id": "msg_2"}, endpoint=endpoint)
    both = ({"type": "response.created", "response": {"id": "resp_1"}}, delta)
    assert listen(*both, endpoint=endpoint).shape == ["response.created", DELTA]


def test_pings_of_a_messages_stream_are_nothing_new() -> None:
    ping = {"type": "ping"}
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": " many"}}
    assert listen(delta, ping, delta, endpoint=BY_NAME["messages"]).shape == [DELTA]


def test_the_seed_decides_what_is_asked() -> None:
    drawn = questions.draw(3, 400, questions.LENGTHS)
    assert drawn == questions.draw(3, 400, questions.LENGTHS) != questions.draw(4, 400, questions.LENGTHS)
    assert {(r.endpoint.name, r.streams) for r in drawn} == {(name, s) for name in BY_NAME for s in (False, True)}
    assert {r.tokens for r in drawn} == set(questions.LENGTHS)


def test_what_is_expected_has_the_text_of_the_prompt_and_the_shape_of_the_endpoint() -> None:
    request = random.Random(1).choice([r for r in questions.draw(1, 50, {64: 1}) if r.endpoint.name == "chat"])
    texts = {(True, request.prompt, 64): Said(" many union cell", "max_tokens", 9, 64)}
    reference = questions.Reference(texts, {("chat", request.streams): SAID})
    assert reference.expected(request) == Said(" many union cell", "length", 9, 64, SAID.shape)


# -- excuses -----------------------------------------------------------------------------------------------------------


def test_a_node_that_is_killed_takes_its_clients_with_it() -> None:
    killed = Absence(5.0, None, planned=False)
    assert excuses(killed, Fate.CUT, 1.0, 6.0, heard_any=True)
    assert not excuses(killed, Fate.ALTERED, 1.0, 6.0, heard_any=True), "a wrong text is nobody's right"
    assert not excuses(None, Fate.CUT, 1.0, 6.0, heard_any=False)


def test_a_node_that_leaves_finishes_what_it_has_begun() -> None:
    leaving = Absence(5.0, None, planned=True)
    assert not excuses(leaving, Fate.CUT, 4.0, 7.0, heard_any=False)
    assert not excuses(leaving, Fate.REFUSED, 6.0, 7.0, heard_any=True)
    assert excuses(leaving, Fate.REFUSED, 6.0, 7.0, heard_any=False), "what came after it was told to go"
    assert excuses(leaving, Fate.REFUSED, 4.0, 5.0 + DRAIN_S, heard_any=True), "what its time was too short for"


def test_an_absence_counts_only_for_what_it_overlaps() -> None:
    roster = Roster(["a", "b"])
    assert roster.is_up("a") and roster.absence("a", 0, 1e9) is None
    before = roster.now()
    roster.goes("a", planned=True)
    roster.goes("a")
    away = roster.absence("a", roster.now(), roster.now())
    assert away is not None and away.planned and not roster.is_up("a")
    roster.is_back("a")
    after = roster.now()
    assert roster.is_up("a") and roster.absence("a", before, after) is not None
    assert roster.absence("a", after + 1, after + 2) is None and roster.absence("b", 0, after) is None


# -- verdicts ----------------------------------------------------------------------------------------------------------

ASKED = questions.Request(BY_NAME["chat"], "Hello", 64, True)
WELL = Try("a", Fate.ANSWERED, "", 0.0, 20.0, 3.0)
LOST = replace(WELL, fate=Fate.CUT, gone=True)


def endured(*tries: tuple[Try, ...]) -> Endured:
    happened = [Happened(10.0, "node killed", "a", "host")]
    return Endured("kills", len(tries), happened, [Outcome(ASKED, each) for each in tries], 1.0)


def missed(found: Endured) -> set[str]:
    return {verdict.what for verdict in verdicts(found) if verdict.met is False}


def test_all_is_well_when_everything_was_answered() -> None:
    assert missed(endured((WELL,), (LOST, WELL))) == set()


@pytest.mark.parametrize(
    ("fate", "what"),
    [
        (Fate.REFUSED, "requests failed"),
        (Fate.CUT, "answers truncated"),
        (Fate.ALTERED, "answers altered"),
    ],
)
def test_one_fault_in_a_thousand_is_one_too_many(fate: Fate, what: str) -> None:
    assert missed(endured(*[(WELL,)] * 999, (replace(WELL, fate=fate),))) == {what, "requests answered"}


def test_a_fault_is_not_made_good_by_asking_again() -> None:
    assert missed(endured((replace(WELL, fate=Fate.CUT), WELL))) == {"answers truncated"}


def test_those_who_lost_their_node_must_be_answered_in_the_end() -> None:
    assert missed(endured((WELL,), (LOST, LOST))) == {
        "requests answered",
        "lost with the machine they were asked at, answered when asked again",
    }


def test_a_run_in_which_nothing_happened_proves_nothing() -> None:
    quiet = endured((WELL,))
    quiet.happened.clear()
    assert missed(quiet) == {"kills", "requests under way when it happened"}


def test_the_pause_is_that_of_requests_under_way_when_something_happened() -> None:
    later = replace(WELL, began_s=11.0, ended_s=12.0)
    assert [one for _, one in hit(endured((WELL,), (later,)))] == [WELL]


def test_a_mesh_that_stays_in_pieces_or_a_node_that_ends_by_itself_is_a_miss() -> None:
    found = endured((WELL,))
    found.whole_s, found.ended = None, ["b"]
    assert missed(found) == {"all machines in one ring again after, s", "nodes that ended by themselves"}


def test_eight_streams_are_compared_turn_by_turn() -> None:
    # The machine was half as fast in the second turn, for both.
    assert Aggregate(0, [96.0, 48.0], [100.0, 50.0]).verdict().met is True
    assert Aggregate(0, [94.0], [100.0]).verdict().met is False
    assert Aggregate(3, [50.0], [100.0]).verdict().met is None, "a ring is not held to one machine's speed"
