"""The fate of requests while layouts come and go, without a socket or a clock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.proxy.core import Core, Limits
from mesh.proxy.events import (
    Abandon,
    Advanced,
    Arrived,
    Began,
    Closing,
    Comfort,
    Completed,
    Departed,
    Dispatch,
    Effect,
    Fail,
    Loss,
    Lost,
    Refused,
    Served,
    Spoiled,
    Stopped,
    Tick,
    Unserved,
)
from mesh.wire.facts import Epoch

ONE, TWO, THREE = Epoch(1, "a" * 26), Epoch(2, "a" * 26), Epoch(3, "b" * 26)


def serving(epoch: Epoch = ONE, limits: Limits | None = None) -> Core:
    core = Core(limits or Limits())
    core.handle(Served(epoch, "tiny"), 0.0)
    return core


def the_failure(effects: list[Effect]) -> tuple[int, str]:
    (fail,) = [effect for effect in effects if isinstance(effect, Fail)]
    return fail.failure.status, fail.failure.code


def test_a_request_goes_to_the_layout_that_serves() -> None:
    assert serving().handle(Arrived(7), 1.0) == [Dispatch(7, 1, ONE)]


def test_requests_wait_for_a_layout_and_go_in_order_of_arrival() -> None:
    core = Core()
    assert [core.handle(Arrived(n), float(n)) for n in (1, 2, 3)] == [[], [], []]
    assert core.counters.held == 3
    assert core.handle(Served(ONE, "tiny"), 5.0) == [Dispatch(n, 1, ONE) for n in (1, 2, 3)]
    assert core.counters.active == 3


def test_who_waited_in_vain_is_told_why_and_when_to_come_back() -> None:
    core = Core()
    core.handle(Unserved("the host died"), 0.0)
    core.handle(Arrived(1), 0.0)
    assert core.next_timer() == 30.0
    assert core.handle(Tick(), 29.9) == []
    (fail,) = core.handle(Tick(), 30.0)
    assert isinstance(fail, Fail)
    assert (fail.failure.status, fail.failure.code, fail.failure.retry_after_s) == (503, "mesh_not_serving", 5)
    assert "the host died" in fail.failure.message and "waited 30 s" in fail.failure.message
    assert core.next_timer() is None
    assert core.counters.failed == 1


def test_a_question_about_the_running_engine_does_not_wait() -> None:
    assert the_failure(Core().handle(Arrived(1, holds=False), 0.0)) == (503, "mesh_not_serving")


def test_the_queue_is_bounded() -> None:
    core = Core(Limits(max_held=2))
    core.handle(Arrived(1), 0.0)
    core.handle(Arrived(2), 0.0)
    assert the_failure(core.handle(Arrived(3), 0.0)) == (429, "queue_full")
    assert core.counters.held == 2


def test_a_waiting_stream_hears_of_it() -> None:
    core = Core()
    core.handle(Arrived(1, streams=True), 0.0)
    core.handle(Arrived(2, streams=False), 0.0)
    heard = []
    while (due := core.next_timer()) is not None and due < 30:
        heard += [(due, effect) for effect in core.handle(Tick(), due)]
    assert heard == [(t, Comfort(1)) for t in (2.0, 7.0, 12.0, 17.0, 22.0, 27.0)]


def test_an_answer_lost_before_its_first_byte_is_asked_for_again_elsewhere() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    assert core.handle(Lost(1, 1, Loss.BROKEN, "reset"), 1.0) == []
    assert core.counters.held == 1
    assert core.handle(Served(TWO, "tiny"), 3.0) == [Dispatch(1, 2, TWO)]
    core.handle(Completed(1, 2), 4.0)
    assert (core.counters.completed, core.counters.resumed, core.counters.failed) == (1, 1, 0)


def test_a_layout_that_still_stands_is_tried_again_with_growing_pauses() -> None:
    core = serving()
    (order,) = core.handle(Arrived(1), 0.0)
    now, tries = 0.0, []
    while isinstance(order, Dispatch):
        core.handle(Lost(1, order.attempt, Loss.UNREACHED, "refused"), now)
        due = core.next_timer()
        assert due is not None
        tries.append(round(due - now, 3))
        now = due
        (order,) = core.handle(Tick(), now)
    assert tries[:6] == [0.05, 0.1, 0.25, 0.5, 1.0, 1.0]
    assert now == 30.0
    assert order.failure.code == "mesh_not_serving" and "refused" in order.failure.message


def test_the_loss_of_an_engine_begins_a_new_wait() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    core.handle(Unserved("the host died"), 100.0)
    assert core.handle(Tick(), 129.9) == []
    assert the_failure(core.handle(Tick(), 130.0)) == (503, "mesh_not_serving")


def test_an_engine_that_still_loads_does_not_begin_a_new_wait() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    core.handle(Lost(1, 1, Loss.LOADING, "loading"), 29.0)
    assert core.handle(Tick(), 29.5) == [Dispatch(1, 2, ONE)]
    assert the_failure(core.handle(Lost(1, 2, Loss.LOADING, "loading"), 30.0)) == (503, "mesh_not_serving")


def test_a_request_that_kills_every_engine_ends_some_day() -> None:
    core = Core(Limits(max_losses=2))
    core.handle(Arrived(1), 0.0)
    for number in (1, 2):
        core.handle(Served(Epoch(number, "a" * 26), "tiny"), float(number))
        assert core.handle(Unserved("crashed"), number + 0.5) == [Abandon(1, number)]
    core.handle(Served(THREE, "tiny"), 3.0)
    assert the_failure(core.handle(Unserved("crashed"), 3.5)) == (502, "engine_lost")


def test_a_node_that_is_about_to_go_lets_nobody_in_and_answers_who_is_here() -> None:
    core = Core()
    core.handle(Arrived(1), 0.0)
    assert core.handle(Closing("about to stop"), 1.0) == []
    assert the_failure(core.handle(Arrived(2), 2.0)) == (503, "mesh_stopping")
    assert core.handle(Served(ONE, "tiny"), 3.0) == [Dispatch(1, 1, ONE)]
    assert the_failure(core.handle(Arrived(3), 4.0)) == (503, "mesh_stopping")
    assert core.handle(Completed(1, 1), 5.0) == [] and core.counters.completed == 1


@pytest.mark.parametrize("told_by", ["the drain", "the engine"])
def test_planned_changes_are_not_held_against_a_request_that_outlasts_their_drains(told_by: str) -> None:
    core = Core(Limits(max_losses=2))
    core.handle(Arrived(1), 0.0)
    for number in range(1, 7):
        now = 20.0 * number
        assert core.handle(Served(Epoch(number, "a" * 26), "tiny"), now)[-1] == Dispatch(
            1, number, Epoch(number, "a" * 26)
        )
        core.handle(Unserved("a machine joins", drain_s=10), now + 1)
        if told_by == "the engine":  # whichever clock is first
            core.handle(Lost(1, number, Loss.BROKEN, "reset"), now + 10.9)
        core.handle(Tick(), now + 11)
    assert core.counters.held == 1 and core.counters.failed == 0


def test_a_stream_cut_after_its_first_token_ends_in_an_error() -> None:
    core = serving()
    core.handle(Arrived(1, streams=True), 0.0)
    core.handle(Began(1, 1), 1.0)
    assert the_failure(core.handle(Lost(1, 1, Loss.BROKEN, "reset"), 2.0)) == (502, "stream_interrupted")


def test_a_stream_whose_transcript_can_be_continued_waits_and_resumes() -> None:
    core = serving()
    core.handle(Arrived(1, streams=True), 0.0)
    core.handle(Began(1, 1, resumable=True), 1.0)
    assert core.handle(Unserved("the host died"), 2.0) == [Abandon(1, 1)]
    assert core.handle(Served(TWO, "tiny"), 5.0) == [Dispatch(1, 2, TWO, resume=True)]
    assert core.handle(Lost(1, 2, Loss.UNREACHED, "refused"), 5.0) == []
    (again,) = core.handle(Tick(), 5.05)
    assert again == Dispatch(1, 3, TWO, resume=True)


def begun(core: Core, epoch: Epoch = ONE) -> Core:
    core.handle(Arrived(1, streams=True), 0.0)
    core.handle(Began(1, 1, resumable=True), 1.0)
    return core


def test_a_stream_whose_record_is_not_complete_any_more_ends_in_an_error() -> None:
    core = begun(serving())
    core.handle(Spoiled(1, 1), 1.5)
    assert the_failure(core.handle(Lost(1, 1, Loss.BROKEN, "reset"), 2.0)) == (502, "stream_interrupted")


def test_an_engine_that_will_not_continue_ends_the_stream() -> None:
    core = begun(serving())
    core.handle(Unserved("the host died"), 2.0)
    core.handle(Served(TWO, "tiny"), 3.0)
    assert the_failure(core.handle(Refused(1, 2, "an image"), 3.1)) == (502, "cannot_resume")
    assert core.counters.failed == 1


def test_a_stream_is_continued_by_the_very_model_it_began_with() -> None:
    for name, fingerprint in [("tiny", "other"), ("small", "f")]:
        core = Core()
        core.handle(Served(ONE, "tiny", "f"), 0.0)
        begun(core).handle(Unserved("the host died"), 2.0)
        assert the_failure(core.handle(Served(TWO, name, fingerprint), 3.0)) == (502, "cannot_resume")
    core = Core()
    core.handle(Served(ONE, "tiny", "f"), 0.0)
    begun(core).handle(Unserved("the host died"), 2.0)
    assert core.handle(Served(TWO, "tiny", "f"), 3.0) == [Dispatch(1, 2, TWO, resume=True)]


def told(core: Core) -> Core:
    """Of an answer that comes whole, some tokens are on record."""
    core.handle(Arrived(1), 0.0)
    core.handle(Advanced(1, 1), 1.0)
    return core


def test_an_answer_that_comes_whole_goes_on_where_its_engine_was_lost() -> None:
    core = told(serving())
    core.handle(Unserved("the host died"), 2.0)
    assert core.handle(Served(TWO, "tiny"), 3.0) == [Dispatch(1, 2, TWO, resume=True)]
    core.handle(Completed(1, 2), 4.0)
    assert (core.counters.completed, core.counters.resumed) == (1, 1)


def test_an_answer_that_comes_whole_and_makes_progress_outlives_any_number_of_engines() -> None:
    core = told(serving(limits=Limits(max_losses=1)))
    for number in range(2, 10):
        core.handle(Unserved("crashed"), float(number))
        (order,) = core.handle(Served(Epoch(number, "a" * 26), "tiny"), number + 0.5)
        assert order == Dispatch(1, number, Epoch(number, "a" * 26), resume=True)
        core.handle(Advanced(1, number), number + 0.6)
    assert core.counters.failed == 0


def test_an_answer_that_comes_whole_begins_anew_where_it_cannot_go_on() -> None:
    core = told(serving())
    core.handle(Unserved("the host died"), 2.0)
    core.handle(Served(TWO, "tiny"), 3.0)
    assert core.handle(Refused(1, 2, "an image"), 40.0) == []
    assert core.handle(Tick(), 40.05) == [Dispatch(1, 3, TWO)]
    # Nobody asks in vain again, and an engine's death at the same place each time comes to an end.
    core.handle(Advanced(1, 3), 41.0)
    core.handle(Unserved("the host died"), 42.0)
    assert core.handle(Served(THREE, "tiny"), 43.0) == [Dispatch(1, 4, THREE)]


def test_an_answer_that_comes_whole_begins_anew_with_another_model() -> None:
    core = Core()
    core.handle(Served(ONE, "tiny", "f"), 0.0)
    told(core).handle(Unserved("the host died"), 2.0)
    assert core.handle(Served(TWO, "tiny", "other"), 3.0) == [Dispatch(1, 2, TWO)]


def test_an_answer_that_comes_whole_and_is_not_all_on_record_begins_anew() -> None:
    core = told(serving())
    core.handle(Spoiled(1, 1), 1.5)
    core.handle(Unserved("the host died"), 2.0)
    assert core.handle(Served(TWO, "tiny"), 3.0) == [Dispatch(1, 2, TWO)]


def test_a_stream_that_makes_progress_outlives_any_number_of_engines() -> None:
    core = Core(Limits(max_losses=1))
    core.handle(Served(ONE, "tiny"), 0.0)
    begun(core)
    for number in range(2, 10):
        core.handle(Unserved("crashed"), float(number))
        assert core.handle(Served(Epoch(number, "a" * 26), "tiny"), number + 0.5) == [
            Dispatch(1, number, Epoch(number, "a" * 26), resume=True)
        ]
        core.handle(Began(1, number, resumable=True), number + 0.6)
    core.handle(Completed(1, 9), 20.0)
    assert (core.counters.completed, core.counters.resumed) == (1, 1)


def test_a_stream_hears_of_us_while_an_engine_computes_again_what_it_has_said() -> None:
    core = begun(serving())
    core.handle(Unserved("the host died"), 2.0)
    core.handle(Served(TWO, "tiny"), 3.0)
    assert core.next_timer() == 4.0
    assert core.handle(Tick(), 4.0) == [Comfort(1)]
    assert core.next_timer() == 9.0
    core.handle(Began(1, 2, resumable=True), 5.0)
    assert core.next_timer() is None


def test_a_stream_that_nothing_was_said_of_yet_is_the_engines_to_begin() -> None:
    # A comment would be a promise of 200, and a wrong request ought to get its 400.
    core = serving()
    core.handle(Arrived(1, streams=True), 0.0)
    assert core.next_timer() is None


def test_answers_under_way_may_finish_when_a_change_is_planned() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    core.handle(Arrived(2), 0.0)
    assert core.handle(Unserved("a worker joins", drain_s=10.0), 1.0) == []
    assert core.handle(Arrived(3), 1.5) == []
    core.handle(Completed(1, 1), 2.0)
    assert core.next_timer() == 11.0
    assert core.handle(Tick(), 11.0) == [Abandon(2, 1)]
    assert core.handle(Served(TWO, "tiny"), 12.0) == [Dispatch(2, 2, TWO), Dispatch(3, 1, TWO)]


def test_a_layout_that_serves_before_the_last_one_has_finished_leaves_it_its_time() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    core.handle(Unserved("a machine joins", drain_s=10.0), 1.0)
    core.handle(Arrived(2), 2.0)
    assert core.handle(Served(TWO, "tiny"), 3.0) == [Dispatch(2, 1, TWO)]
    assert core.next_timer() == 11.0
    assert core.handle(Tick(), 11.0) == [Abandon(1, 1), Dispatch(1, 2, TWO)]


def test_a_new_layout_takes_over_what_the_old_one_still_owes() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    assert core.handle(Served(TWO, "tiny"), 1.0) == [Abandon(1, 1), Dispatch(1, 2, TWO)]


def test_serving_the_same_layout_again_disturbs_nobody() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    assert core.handle(Served(ONE, "tiny"), 1.0) == []


def test_a_client_that_leaves_frees_the_engine() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    assert core.handle(Departed(1), 1.0) == [Abandon(1, 1)]
    assert core.handle(Completed(1, 1), 1.1) == []
    assert core.counters.completed == core.counters.failed == core.counters.active == 0


def test_words_of_an_abandoned_attempt_come_too_late() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    core.handle(Served(TWO, "tiny"), 1.0)
    assert core.handle(Lost(1, 1, Loss.BROKEN, "reset"), 1.1) == []
    assert core.handle(Completed(1, 1), 1.2) == []
    assert core.counters.active == 1


def test_another_model_is_refused_once_it_is_known_which_one_is_served() -> None:
    core = Core()
    assert core.handle(Arrived(1, model="gpt-3.5-turbo"), 0.0) == []
    assert the_failure(core.handle(Served(ONE, "tiny"), 1.0)) == (404, "model_not_found")


def test_a_stopping_node_lets_nobody_wait() -> None:
    core = serving()
    core.handle(Arrived(1), 0.0)
    effects = core.handle(Stopped("bye"), 1.0)
    assert effects[0] == Abandon(1, 1) and the_failure(effects) == (503, "mesh_stopping")
    assert the_failure(core.handle(Arrived(2), 1.0)) == (503, "mesh_stopping")


@dataclass
class Shadow:
    """What the outside world knows of one request."""

    attempt: int = 0
    under_way: bool = False
    speaks: bool = False
    """Something of this attempt has gone to the client."""
    begun: bool = False
    resumable: bool = False
    refused: bool = False
    """It begins anew each time."""
    waits: bool = True
    """For a layout; else it has one chance."""


class RequestsUnderChange(RuleBasedStateMachine):
    """Whatever happens in whatever order, every request has one fate, one upstream at a time, and a bounded wait."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(Limits(max_held=4, max_losses=3))
        self.now = 0.0
        self.number = 0
        self.epoch: Epoch | None = None
        self.last = ONE
        self.requests: dict[int, Shadow] = {}
        self.ended: set[int] = set()
        self.counted = 0

    def send(self, event: object) -> None:
        for effect in self.core.handle(event, self.now):  # type: ignore[arg-type]
            assert effect.request not in self.ended or isinstance(effect, Abandon), "nothing follows an end"
            shadow = self.requests.get(effect.request)
            match effect:
                case Dispatch():
                    assert shadow is not None and not shadow.under_way, "one upstream at a time"
                    assert effect.attempt == shadow.attempt + 1
                    assert effect.epoch == self.epoch, "only the layout that serves is asked"
                    assert effect.resume or not shadow.begun, "an answer that was begun is not asked for from the start"
                    assert effect.resume == shadow.resumable, "what is recorded is continued, and nothing else"
                    shadow.attempt, shadow.under_way, shadow.speaks = effect.attempt, True, False
                case Abandon():
                    if shadow is not None:
                        shadow.under_way = False
                case Fail():
                    del self.requests[effect.request]
                    self.ended.add(effect.request)
                    self.counted += 1

    def some(self, data: st.DataObject) -> tuple[int, Shadow]:
        return data.draw(st.sampled_from(sorted(self.requests.items(), key=lambda item: item[0])))

    @rule(streams=st.booleans(), holds=st.booleans(), model=st.sampled_from([None, "tiny", "other"]))
    def arrives(self, streams: bool, holds: bool, model: str | None) -> None:
        self.number += 1
        self.requests[self.number] = Shadow(waits=holds)
        self.send(Arrived(self.number, streams=streams, model=model, holds=holds))

    @rule(step=st.integers(0, 1))
    def layout_serves(self, step: int) -> None:
        before = self.epoch or self.last
        self.epoch = Epoch(before.number + step, before.coordinator)
        self.send(Served(self.epoch, "tiny"))

    @rule(drain_s=st.sampled_from([0.0, 3.0]))
    def layout_falls(self, drain_s: float) -> None:
        self.last, self.epoch = self.epoch or self.last, None
        self.send(Unserved("gone", drain_s))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        number, _ = self.some(data)
        del self.requests[number]
        self.ended.add(number)
        self.send(Departed(number))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), loss=st.sampled_from(list(Loss)), late=st.booleans())
    def upstream_is_lost(self, data: st.DataObject, loss: Loss, late: bool) -> None:
        number, shadow = self.some(data)
        if shadow.under_way and not late:
            shadow.under_way = False
            self.send(Lost(number, shadow.attempt, loss, "lost"))
        else:
            self.send(Lost(number, shadow.attempt - 1, loss, "late"))

    @precondition(lambda self: any(s.under_way and not s.speaks for s in self.requests.values()))
    @rule(data=st.data(), resumable=st.booleans())
    def answer_begins(self, data: st.DataObject, resumable: bool) -> None:
        ready = [n for n, shadow in self.requests.items() if shadow.under_way and not shadow.speaks]
        number = data.draw(st.sampled_from(ready))
        shadow = self.requests[number]
        shadow.begun = shadow.speaks = True
        shadow.resumable = resumable
        self.send(Began(number, shadow.attempt, resumable))

    @precondition(lambda self: any(s.under_way and not s.begun for s in self.requests.values()))
    @rule(data=st.data())
    def answer_that_comes_whole_advances(self, data: st.DataObject) -> None:
        ready = [n for n, shadow in self.requests.items() if shadow.under_way and not shadow.begun]
        number = data.draw(st.sampled_from(ready))
        shadow = self.requests[number]
        shadow.resumable = not shadow.refused
        self.send(Advanced(number, shadow.attempt))

    @precondition(lambda self: any(s.under_way and (s.speaks or not s.begun) for s in self.requests.values()))
    @rule(data=st.data())
    def record_is_spoiled(self, data: st.DataObject) -> None:
        ready = [n for n, s in self.requests.items() if s.under_way and (s.speaks or not s.begun)]
        number = data.draw(st.sampled_from(ready))
        self.requests[number].resumable = False
        self.send(Spoiled(number, self.requests[number].attempt))

    @precondition(lambda self: any(s.under_way and s.resumable and not s.speaks for s in self.requests.values()))
    @rule(data=st.data())
    def continuation_is_refused(self, data: st.DataObject) -> None:
        ready = [n for n, s in self.requests.items() if s.under_way and s.resumable and not s.speaks]
        number = data.draw(st.sampled_from(ready))
        shadow = self.requests[number]
        shadow.under_way, shadow.resumable, shadow.refused = False, False, True
        self.send(Refused(number, shadow.attempt, "cannot"))
        assert (number in self.ended) is (shadow.begun or not shadow.waits), "who has nothing yet begins anew"

    @precondition(lambda self: any(s.under_way for s in self.requests.values()))
    @rule(data=st.data())
    def answer_is_whole(self, data: st.DataObject) -> None:
        ready = [n for n, shadow in self.requests.items() if shadow.under_way]
        number = data.draw(st.sampled_from(ready))
        attempt = self.requests.pop(number).attempt
        self.ended.add(number)
        self.counted += 1
        self.send(Completed(number, attempt))

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.core.next_timer()) is not None and due <= until:
            assert due >= self.now, "a timer in the past was not served"
            self.now = max(self.now, due)
            self.send(Tick())
            after = self.core.next_timer()
            assert after is None or after > self.now, "a served timer does not ring again at once"
        self.now = until

    @invariant()
    def counters_add_up(self) -> None:
        counters = self.core.counters
        assert counters.active == sum(shadow.under_way for shadow in self.requests.values())
        assert counters.active + counters.held == len(self.requests)
        assert counters.completed + counters.failed == self.counted
        assert counters.resumed <= counters.completed

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        due = self.core.next_timer()
        if self.core.counters.held:
            assert due is not None and due <= self.now + 30.0


TestRequestsUnderChange = RequestsUnderChange.TestCase
TestRequestsUnderChange.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
