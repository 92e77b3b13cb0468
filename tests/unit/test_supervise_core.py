"""What runs on a node, and when: decided without a process in sight."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.supervise.core import RUNNING, TRANSITIONS, Deadlines, EngineCore, IllegalEventError, State
from mesh.supervise.events import (
    Adopt,
    AnnounceServing,
    Answered,
    AwaitDrain,
    Drained,
    Effect,
    EngineFailed,
    Event,
    HostConnected,
    LoadSeen,
    MemberLoading,
    MemberReady,
    OpenTunnels,
    ProbeToken,
    ProcessExited,
    ProcessStarted,
    ReportDown,
    ReportProgress,
    Shutdown,
    StartLlamaServer,
    StartRpcServer,
    StopEngine,
    Stopped,
    TellHost,
    Tick,
    TunnelFailed,
    TunnelsOpen,
)
from mesh.supervise.reasons import ProcessKind, exit_reason
from mesh.wire.facts import Epoch
from mesh.wire.messages import WorkerReady
from tests.fakes.processes import layout_of, node_id

A, B, C = (node_id(letter) for letter in "abc")
ONE, TWO, THREE = (Epoch(n, A) for n in (1, 2, 3))
SOLO, SPLIT = layout_of("a"), layout_of("a", "b", "c")
RPC, SERVER = ProcessKind.RPC, ProcessKind.SERVER
EVERY_EVENT = Event.__args__  # type: ignore[attr-defined]


class Node:
    """A core and its clock."""

    def __init__(self, me: str = A, deadlines: Deadlines | None = None) -> None:
        self.core = EngineCore(me, deadlines)
        self.now = 100.0

    def tell(self, *events: Event) -> list[Effect]:
        """The effects of the last of ``events``."""
        effects: list[Effect] = []
        for event in events:
            effects = self.core.handle(event, self.now)
        return effects

    def wait_for_timer(self) -> list[Effect]:
        due = self.core.next_timer()
        assert due is not None
        self.now = max(self.now, due)
        return self.tell(Tick())


def serving(layout=SPLIT) -> Node:  # type: ignore[no-untyped-def]
    node = Node()
    node.tell(Adopt(ONE, layout))
    if layout.workers:
        node.tell(MemberReady(B, ONE), MemberReady(C, ONE), TunnelsOpen(ONE, ("127.0.0.1:1", "127.0.0.1:2")))
    node.tell(ProcessStarted(ONE, SERVER, 8080), Answered(ONE))
    assert node.core.state is State.SERVING
    return node


def working() -> Node:
    node = Node(B)
    node.tell(Adopt(ONE, SPLIT), ProcessStarted(ONE, RPC, 5000))
    assert node.core.state is State.WORKING
    return node


def test_a_worker_starts_its_rpc_server_and_tells_the_host_once_it_listens() -> None:
    node = Node(B)
    assert node.tell(Adopt(ONE, SPLIT)) == [StartRpcServer(ONE, SPLIT)]
    assert node.tell(ProcessStarted(ONE, RPC, 5000)) == [TellHost(A, WorkerReady(ONE))]


def test_a_worker_repeats_that_it_is_ready_until_the_host_has_come() -> None:
    node = working()
    assert node.wait_for_timer() == [TellHost(A, WorkerReady(ONE))]
    assert node.wait_for_timer() == [TellHost(A, WorkerReady(ONE))]
    node.tell(HostConnected(ONE))
    assert node.core.next_timer() is None


def test_a_host_goes_from_ready_workers_to_tunnels_to_server_to_token_to_serving() -> None:
    node = Node()
    assert node.tell(Adopt(ONE, SPLIT)) == []
    assert node.tell(MemberReady(C, ONE)) == []
    assert node.tell(MemberReady(B, ONE)) == [OpenTunnels(ONE, (B, C))]
    endpoints = ("127.0.0.1:1", "127.0.0.1:2")
    assert node.tell(TunnelsOpen(ONE, endpoints)) == [StartLlamaServer(ONE, SPLIT, endpoints)]
    assert node.tell(ProcessStarted(ONE, SERVER, 8080)) == [ProbeToken(ONE)]
    assert node.tell(Answered(ONE)) == [AnnounceServing(ONE)]


def test_a_worker_may_be_ready_before_the_host_has_heard_of_the_epoch() -> None:
    node = Node()
    node.tell(MemberReady(B, ONE), MemberReady(C, ONE))
    assert node.tell(Adopt(ONE, SPLIT)) == [OpenTunnels(ONE, (B, C))]


def test_being_ready_for_another_epoch_does_not_count() -> None:
    node = Node()
    node.tell(MemberReady(B, ONE), MemberReady(C, TWO), Adopt(TWO, SPLIT))
    assert node.core.state is State.GATHERING
    assert node.tell(MemberReady(B, TWO)) == [OpenTunnels(TWO, (B, C))]


def test_a_host_alone_needs_neither_workers_nor_tunnels() -> None:
    assert Node().tell(Adopt(ONE, SOLO)) == [StartLlamaServer(ONE, SOLO, ())]


def test_a_node_outside_the_ring_rests() -> None:
    node = Node(node_id("z"))
    assert node.tell(Adopt(ONE, SPLIT)) == []
    assert node.core.state is State.IDLE


def test_nothing_new_starts_before_everything_old_is_gone() -> None:
    node = serving()
    assert node.tell(Adopt(TWO, SOLO)) == [StopEngine()]
    assert node.tell(Stopped()) == [StartLlamaServer(TWO, SOLO, ())]


def test_the_newest_of_several_layouts_that_come_during_a_stop_is_the_one_that_starts() -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO))
    assert node.tell(Adopt(THREE, layout_of("b", "a"))) == []
    assert node.tell(Adopt(TWO, SOLO)) == []
    assert node.tell(Stopped()) == [StartRpcServer(THREE, layout_of("b", "a"))]


HOST_STEPS: tuple[Event, ...] = (
    Adopt(ONE, SPLIT), MemberReady(B, ONE), MemberReady(C, ONE), TunnelsOpen(ONE, ("127.0.0.1:1", "127.0.0.1:2")),
    ProcessStarted(ONE, SERVER, 8080), LoadSeen(ONE, 1, 2), Answered(ONE),
)  # fmt: skip
WORKER_STEPS: tuple[Event, ...] = (Adopt(ONE, SPLIT), ProcessStarted(ONE, RPC, 5000), HostConnected(ONE))


@pytest.mark.parametrize(
    ("me", "steps"),
    [(A, HOST_STEPS[:n]) for n in range(1, len(HOST_STEPS) + 1)]
    + [(B, WORKER_STEPS[:n]) for n in range(1, len(WORKER_STEPS) + 1)],
)
def test_a_restart_may_come_at_any_step_and_come_again(me: str, steps: tuple[Event, ...]) -> None:
    node = Node(me)
    node.tell(*steps)
    assert node.tell(Adopt(ONE, SPLIT)) == [], "what is followed already is followed already"
    newer = layout_of(me[0])
    assert node.tell(Adopt(TWO, newer)) == [StopEngine()]
    assert node.tell(Adopt(TWO, newer)) == []
    late = [event for event in HOST_STEPS + WORKER_STEPS if not isinstance(event, Adopt | MemberReady)]
    assert node.tell(*late) == [], "what was begun has nothing more to say"
    assert node.tell(Stopped()) == [StartLlamaServer(TWO, newer, ())]
    assert node.tell(Adopt(TWO, newer)) == []
    assert node.tell(Adopt(THREE, None)) == [StopEngine()], "and it may be called off"
    assert node.tell(Stopped()) == []
    assert node.core.state is State.IDLE


def test_no_layout_means_stop_and_rest() -> None:
    node = serving()
    assert node.tell(Adopt(TWO, None)) == [StopEngine()]
    assert node.tell(Stopped()) == []
    assert node.core.state is State.IDLE


def test_an_epoch_not_newer_than_ours_changes_nothing() -> None:
    node = serving()
    assert node.tell(Adopt(ONE, SOLO)) == []
    assert node.core.state is State.SERVING


def test_what_an_engine_of_an_older_epoch_still_says_is_not_heard() -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO), Stopped())
    assert node.tell(ProcessExited(ONE, SERVER, -9, ())) == []
    assert node.tell(TunnelFailed(ONE, B, "reset")) == []
    assert node.core.state is State.LAUNCHING


def test_the_exit_of_a_wanted_process_is_reported_with_its_last_words() -> None:
    node = working()
    stop, report = node.tell(ProcessExited(ONE, RPC, 1, ("loading", "CUDA error: out of memory", "")))
    assert stop == StopEngine()
    assert report == ReportDown(ONE, "rpc-server exited with code 1: CUDA error: out of memory")
    assert node.tell(Stopped()) == []
    assert node.core.state is State.IDLE


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mesh-rpc-lost 127.0.0.1:1 closed the connection", "lost node b: closed the connection"),
        ("mesh-refused 127.0.0.1:12 blk.3.attn_q: other contents", "refused by node c: blk.3.attn_q: other contents"),
    ],
)
def test_a_server_that_lost_a_worker_names_it(line: str, words: str) -> None:
    node = Node()
    node.tell(Adopt(ONE, SPLIT), MemberReady(B, ONE), MemberReady(C, ONE))
    node.tell(TunnelsOpen(ONE, ("127.0.0.1:1", "127.0.0.1:12")))
    _, report = node.tell(ProcessExited(ONE, SERVER, 75, ("starting", line, "error: cannot load model")))
    assert report == ReportDown(ONE, f"llama-server exited with code 75: {words}")


def test_a_broken_tunnel_is_reported_with_the_name_of_the_node() -> None:
    assert serving().tell(TunnelFailed(ONE, C, "connection lost")) == [
        StopEngine(),
        ReportDown(ONE, "the tunnel to node c failed: connection lost"),
    ]


def test_after_a_failure_the_next_epoch_starts() -> None:
    node = serving()
    node.tell(EngineFailed(ONE, "no"), Adopt(TWO, SOLO))
    assert node.tell(Stopped()) == [StartLlamaServer(TWO, SOLO, ())]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((), "node b, node c"),
        ((MemberReady(B, ONE),), "that node c is ready"),
        ((MemberReady(B, ONE), MemberReady(C, ONE)), "tunnels did not open"),
        ((MemberReady(B, ONE), MemberReady(C, ONE), TunnelsOpen(ONE, ("x", "y"))), "did not listen"),
    ],
)
def test_a_step_of_the_host_that_takes_too_long_says_what_is_missing(events: tuple[Event, ...], words: str) -> None:
    node = Node()
    node.tell(Adopt(ONE, SPLIT), *events)
    stop, report = node.wait_for_timer()
    assert stop == StopEngine()
    assert isinstance(report, ReportDown)
    assert words in report.reason


def test_loading_may_take_long_while_it_moves() -> None:
    node = Node(deadlines=Deadlines(load_stall_s=10))
    node.tell(Adopt(ONE, SPLIT), MemberReady(B, ONE), MemberReady(C, ONE), TunnelsOpen(ONE, ("x", "y")))
    node.tell(ProcessStarted(ONE, SERVER, 8080))
    for _ in range(10):
        node.now += 9
        assert node.tell(MemberLoading(B, ONE), Tick()) == []
    node.now += 10
    assert [type(effect) for effect in node.tell(MemberLoading(B, TWO), Tick())] == [StopEngine, ReportDown]


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    node = working()
    assert node.tell(LoadSeen(ONE, 1, 100)) == [ReportProgress(ONE, 1, 100)]
    assert node.tell(LoadSeen(ONE, 2, 100)) == []
    node.now += 1
    assert node.tell(LoadSeen(ONE, 50, 100)) == [ReportProgress(ONE, 50, 100)]
    assert node.tell(LoadSeen(ONE, 100, 100)) == [ReportProgress(ONE, 100, 100)]


def test_an_engine_that_will_not_end_is_asked_again_and_the_next_epoch_is_given_up_once() -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO))
    stop, report = node.wait_for_timer()
    assert stop == StopEngine()
    assert isinstance(report, ReportDown) and report.epoch == TWO
    assert node.wait_for_timer() == [StopEngine()]
    assert node.tell(Stopped()) == []
    assert node.core.state is State.IDLE


def test_shutdown_ends_everything_and_nothing_starts_after_it() -> None:
    node = serving()
    assert node.tell(Shutdown()) == [StopEngine()]
    assert node.tell(Adopt(TWO, SOLO)) == []
    assert node.tell(Stopped()) == []
    assert node.core.state is State.CLOSED
    assert node.tell(Adopt(THREE, SOLO)) == []


def test_shutdown_during_a_stop_does_not_stop_twice() -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO))
    assert node.tell(Shutdown()) == []
    node.tell(Stopped())
    assert node.core.state is State.CLOSED


@pytest.mark.parametrize("event", [Answered(ONE), TunnelsOpen(ONE, ()), Stopped(), TunnelFailed(ONE, A, "")])
def test_what_cannot_happen_to_a_worker_is_a_bug_and_says_so(event: Event) -> None:
    with pytest.raises(IllegalEventError, match=f"{type(event).__name__} while working"):
        working().tell(event)


def test_every_state_takes_what_may_come_at_any_time() -> None:
    for state in State:
        for event in (Adopt, MemberReady, MemberLoading, Shutdown, Tick):
            assert (state, event) in TRANSITIONS


def test_the_table_knows_only_events_that_exist() -> None:
    assert {event for _, event in TRANSITIONS} == set(EVERY_EVENT)


def test_every_running_state_has_a_way_out() -> None:
    for state in RUNNING:
        assert (state, EngineFailed) in TRANSITIONS
        assert (state, ProcessExited) in TRANSITIONS


@pytest.mark.parametrize(
    ("code", "tail", "reason"),
    [
        (0, (), "llama-server exited with code 0"),
        (-6, ("ggml-rpc.cpp:99: ASSERT failed",), "llama-server was killed by SIGABRT: ggml-rpc.cpp:99: ASSERT failed"),
        (-9, (), "llama-server was killed by SIGKILL (by another program, or by the system for lack of memory)"),
        (-64, ("all slots are idle",), "llama-server was killed by signal 64"),
        (0xC0000005, (), "llama-server crashed with status 0xC0000005 (access violation)"),
        (1, ("error: no such file", "bye"), "llama-server exited with code 1: error: no such file"),
    ],
)
def test_an_exit_reads_like_a_sentence(code: int, tail: tuple[str, ...], reason: str) -> None:
    assert exit_reason(SERVER, code, tail) == reason


def test_a_reason_fits_into_its_message() -> None:
    stop, report = working().tell(EngineFailed(ONE, "x" * 5000 + "the end"))
    assert stop == StopEngine()
    assert isinstance(report, ReportDown)
    assert len(report.reason) <= 1024
    assert report.reason.endswith("the end")


# -- drains ----------------------------------------------------------------------------------------------------------


def test_a_host_answers_what_it_was_asked_before_a_planned_change_stops_it() -> None:
    node = serving()
    assert node.tell(Adopt(TWO, SOLO, drain_s=10.0)) == [AwaitDrain(ONE, hosting=True)]
    assert node.tell(Drained(ONE)) == [StopEngine()]
    assert node.tell(Stopped()) == [StartLlamaServer(TWO, SOLO, ())]


def test_a_worker_carries_until_its_host_has_gone() -> None:
    node = working()
    assert node.tell(Adopt(TWO, None, drain_s=10.0)) == [AwaitDrain(ONE, hosting=False)]
    assert node.core.state is State.DRAINING
    assert node.tell(Drained(ONE)) == [StopEngine()]


def test_a_drain_ends_in_its_time() -> None:
    node = serving()
    began = node.now
    node.tell(Adopt(TWO, SOLO, drain_s=10.0))
    assert node.wait_for_timer() == [StopEngine()]
    assert node.now == began + 10.0


@pytest.mark.parametrize(
    "lost", [ProcessExited(ONE, SERVER, 1, ()), TunnelFailed(ONE, B, "gone"), EngineFailed(ONE, "no")]
)
def test_a_loss_during_a_drain_ends_it_and_blames_nobody(lost: Event) -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO, drain_s=10.0))
    assert node.tell(lost) == [StopEngine()]
    assert node.tell(Stopped()) == [StartLlamaServer(TWO, SOLO, ())]


def test_a_newer_epoch_that_waits_for_nobody_ends_a_drain() -> None:
    node = serving()
    node.tell(Adopt(TWO, SOLO, drain_s=10.0))
    assert node.tell(Adopt(THREE, SOLO)) == [StopEngine()]
    assert node.tell(Stopped()) == [StartLlamaServer(THREE, SOLO, ())]


def test_a_newer_epoch_gives_a_drain_no_more_time() -> None:
    node = serving()
    began = node.now
    node.tell(Adopt(TWO, None, drain_s=10.0), Adopt(THREE, SOLO, drain_s=30.0))
    node.wait_for_timer()
    assert node.now == began + 10.0
    assert node.tell(Stopped()) == [StartLlamaServer(THREE, SOLO, ())]


def test_an_older_epoch_ends_no_drain() -> None:
    node = serving()
    assert node.tell(Adopt(THREE, SOLO, drain_s=10.0), Adopt(TWO, None)) == []
    assert node.core.state is State.DRAINING


def test_what_does_not_serve_yet_is_stopped_at_once() -> None:
    node = Node(B)
    node.tell(Adopt(ONE, SPLIT))
    assert node.tell(Adopt(TWO, None, drain_s=10.0)) == [StopEngine()]


def test_a_node_that_goes_while_it_drains_stops_its_engine() -> None:
    node = serving()
    node.tell(Adopt(TWO, None, drain_s=10.0))
    assert node.tell(Shutdown()) == [StopEngine()]


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order from outside, and however each step ends: at most one epoch's engine exists,
    nothing starts while a stop is under way, and the newest layout wins."""

    def __init__(self) -> None:
        super().__init__()
        self.core = EngineCore(A)
        self.now = 0.0
        self.newest: Adopt | None = None
        self.pending: list[Effect] = []
        """Steps under way: what the adapter was asked to do and has not answered."""
        self.stopping = False
        self.closed = False

    def tell(self, event: Event) -> None:
        for effect in self.core.handle(event, self.now):
            match effect:
                case StopEngine():
                    self.pending.clear()
                    self.stopping = True
                case StartRpcServer() | OpenTunnels() | StartLlamaServer() | ProbeToken():
                    assert not self.stopping
                    assert self.newest is not None and effect.epoch == self.newest.epoch
                    self.pending.append(effect)
                case AwaitDrain():
                    assert not self.stopping and effect.epoch == self.core.epoch
                    self.pending.append(effect)

    @rule(
        number=st.integers(1, 6),
        layout=st.sampled_from([None, SOLO, SPLIT, layout_of("b", "a"), layout_of("b")]),
        drain_s=st.sampled_from([0.0, 10.0]),
    )
    def adopt(self, number: int, layout, drain_s: float) -> None:  # type: ignore[no-untyped-def]
        event = Adopt(Epoch(number, A), layout, drain_s)
        if not self.closed and (self.newest is None or event.epoch > self.newest.epoch):
            self.newest = event
        self.tell(event)

    @rule(node=st.sampled_from([B, C]), number=st.integers(1, 6))
    def member_ready(self, node: str, number: int) -> None:
        self.tell(MemberReady(node, Epoch(number, A)))

    @precondition(lambda self: self.stopping)
    @rule()
    def stopped(self) -> None:
        self.stopping = False
        self.tell(Stopped())

    @precondition(lambda self: self.pending)
    @rule(ok=st.booleans())
    def step_ends(self, ok: bool) -> None:
        effect = self.pending.pop(0)
        epoch = effect.epoch  # type: ignore[union-attr]
        if not ok:
            self.tell(EngineFailed(epoch, "no"))
            return
        match effect:
            case StartRpcServer():
                self.tell(ProcessStarted(epoch, RPC, 1))
            case OpenTunnels(_, workers):
                self.tell(TunnelsOpen(epoch, ("x",) * len(workers)))
            case StartLlamaServer():
                self.tell(ProcessStarted(epoch, SERVER, 1))
            case ProbeToken():
                self.tell(Answered(epoch))
            case AwaitDrain():
                self.tell(Drained(epoch))

    @rule(late=st.booleans())
    def exits(self, late: bool) -> None:
        self.tell(ProcessExited(self.core.epoch if not late else Epoch(0, A), SERVER, 1, ()))

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())

    @rule()
    def shutdown(self) -> None:
        self.closed = True
        self.tell(Shutdown())

    @invariant()
    def a_stop_is_awaited_in_the_states_that_say_so(self) -> None:
        assert self.stopping == (self.core.state in (State.STOPPING, State.CLOSING))

    @invariant()
    def whatever_takes_time_has_a_deadline(self) -> None:
        unbounded = {State.WORKING, State.SERVING, State.IDLE, State.CLOSED}
        if self.core.state not in unbounded or self.stopping:
            assert self.core.next_timer() is not None


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
