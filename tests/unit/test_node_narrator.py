"""Each thing is said once, with its reason, in words a person can act on."""

from __future__ import annotations

import msgspec

import mesh.election.events as election
import mesh.membership.events as membership
from mesh.membership.view import Departed, Member, View
from mesh.node.narrator import Narrator
from mesh.notice import Notice
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeFacts, RingMember
from mesh.wire.messages import LoadProgress
from tests.fakes.clock import FakeClock
from tests.unit.test_plan_search import MB, a_model, a_node, layout_of, node_id

ME, OTHER = node_id(1), node_id(2)


class Screen:
    """A view that keeps what it was shown."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.bars: list[tuple[str, float, float]] = []

    def show(self, notice: Notice) -> None:
        self.notices.append(notice)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        self.bars.append((label, done, total))

    def close(self) -> None:
        pass

    @property
    def lines(self) -> list[str]:
        return [f"{notice.kind} {notice.text}" for notice in self.notices]


def named(number: int, name: str, role: str = "worker") -> NodeFacts:
    return msgspec.structs.replace(a_node(number), name=name, role=role)  # type: ignore[arg-type]


class Stage:
    """A narrator, its screen and the mesh it talks of."""

    def __init__(self, *others: NodeFacts) -> None:
        self.clock = FakeClock()
        self.screen = Screen()
        self.mesh = View(ME, (Member(named(1, "kitchen")), *map(Member, others)))
        self.narrator = Narrator(self.screen, ME, "home", lambda: self.mesh, self.clock.now)
        self.narrator.api_url = "http://localhost:9337"
        self.narrator.invite = lambda: "mesh up --join mesh1abc"

    def adopt(self, layout: Layout | None, reason: str, lifts: Epoch = NO_EPOCH) -> None:
        self.narrator.adopted(election.Adopt(Epoch(3, ME), layout, reason, lifts))


SOLO = layout_of(a_node(1), model=a_model(name="qwen"))
SPLIT = msgspec.structs.replace(
    SOLO,
    mode="split",
    ring=(RingMember(ME, "kitchen", (0, 2), 300 * MB, "CPU"), RingMember(OTHER, "attic", (3, 7), 500 * MB, "CPU")),
    predicted_ms_per_token=60.7,
)


def test_who_comes_is_named_once_with_the_size_of_the_mesh() -> None:
    stage = Stage(named(2, "attic"))
    alive = membership.MemberAlive(OTHER, named(2, "attic"))
    stage.narrator.member(alive, stage.mesh)
    stage.narrator.member(alive, stage.mesh)
    assert stage.screen.lines == ['mesh attic is in; "home" has 2 machines']


def test_a_lite_client_is_called_one() -> None:
    stage = Stage(named(2, "laptop", "client"))
    stage.narrator.member(membership.MemberAlive(OTHER, named(2, "laptop", "client")), stage.mesh)
    assert stage.screen.lines == ['mesh lite client laptop is in; "home" has 2 machines']


def test_who_goes_is_named_with_why_and_may_come_back() -> None:
    stage = Stage()
    stage.mesh = View(ME, stage.mesh.members, (Departed(named(2, "attic"), "unreachable"),))
    stage.narrator.member(membership.MemberLost(OTHER, "unreachable"), stage.mesh)
    stage.narrator.member(membership.MemberAlive(OTHER, named(2, "attic")), stage.mesh)
    assert [line.partition(";")[0] for line in stage.screen.lines] == [
        "change attic is unreachable",
        "mesh attic is in",
    ]


def test_a_solo_layout_says_where_and_why() -> None:
    stage = Stage()
    stage.adopt(SOLO, "kitchen alone holds qwen")
    assert stage.screen.lines == ["plan qwen, 900 MB: all 8 layers on this machine (kitchen alone holds qwen)"]


def test_a_split_names_every_share_in_data_flow_order() -> None:
    stage = Stage(named(2, "attic"))
    stage.adopt(SPLIT, "too large for one")
    assert stage.screen.lines == [
        "plan qwen, 900 MB: this machine 3 layers + output > attic 5 layers, predicted 61 ms/token (too large for one)"
    ]
    assert stage.screen.bars == [("loading on this machine", 0, 0), ("loading on attic", 0, 0)]


def test_the_same_layout_under_a_new_number_is_not_news() -> None:
    stage = Stage()
    stage.adopt(SOLO, "kitchen alone holds qwen", lifts=Epoch(2, ME))
    assert stage.screen.lines == []


def test_no_layout_is_a_wait_with_its_reason_told_once() -> None:
    stage = Stage(named(2, "attic"))
    for _ in range(2):
        stage.adopt(None, "2 GB are missing on kitchen")
    assert stage.screen.lines == ["plan waiting: 2 GB are missing on kitchen"]


def test_the_first_ready_of_a_lone_node_shows_the_command_for_the_next_machine_once() -> None:
    stage = Stage()
    stage.narrator.served(SOLO)
    stage.narrator.served(SOLO)
    assert stage.screen.lines == [
        "ready http://localhost:9337/v1   qwen, hosted here",
        "invite the next machine joins with (once, within the hour):\nmesh up --join mesh1abc",
        "ready http://localhost:9337/v1   qwen, hosted here",
    ]


def test_a_lone_node_that_waits_shows_it_too() -> None:
    stage = Stage()
    stage.adopt(None, "2 GB are missing on kitchen")
    stage.narrator.served(SOLO)
    assert [notice.kind for notice in stage.screen.notices] == ["plan", "invite", "ready"]


def test_a_node_among_others_shows_no_secret() -> None:
    stage = Stage(named(2, "attic"))
    stage.narrator.served(SOLO)
    stage.mesh = View(ME, stage.mesh.members[:1])
    stage.narrator.served(SOLO)
    assert stage.screen.lines == [
        "ready http://localhost:9337/v1   qwen, hosted here   (another machine: mesh invite)",
        "ready http://localhost:9337/v1   qwen, hosted here",
    ]


def test_a_lite_client_offers_nothing() -> None:
    stage = Stage(named(2, "attic"))
    stage.narrator.invite = None
    stage.narrator.served(msgspec.structs.replace(SOLO, host=OTHER))
    assert stage.screen.lines == ["ready http://localhost:9337/v1   qwen, hosted on attic"]


def test_a_loss_is_told_once_and_the_return_with_its_time() -> None:
    stage = Stage(named(2, "attic"))
    stage.narrator.invite = None
    stage.narrator.served(SPLIT)
    stage.mesh = View(ME, stage.mesh.members[:1], (Departed(named(2, "attic"), "crashed"),))
    stage.narrator.member(membership.MemberLost(OTHER, "crashed"), stage.mesh)
    stage.narrator.unserved("attic crashed")
    stage.clock.advance(2.14)
    stage.adopt(SOLO, "attic crashed; kitchen alone holds qwen")
    stage.narrator.served(SOLO)
    assert stage.screen.lines[1:] == [
        "change attic crashed",
        "plan qwen, 900 MB: all 8 layers on this machine (attic crashed; kitchen alone holds qwen)",
        "ready http://localhost:9337/v1   qwen, hosted here, back in 2.1 s",
    ]


def test_an_engine_that_ends_is_told_with_what_it_means() -> None:
    stage = Stage()
    stage.narrator.unserved("engine on kitchen: out of memory")
    assert stage.screen.lines == ["change engine on kitchen: out of memory; requests wait"]


def test_a_reason_that_the_plan_told_is_not_told_again() -> None:
    stage = Stage(named(2, "attic"))
    stage.adopt(SPLIT, "attic joined")
    stage.narrator.unserved("attic joined")
    assert [notice.kind for notice in stage.screen.notices] == ["plan"]


def test_what_a_stopping_node_does_to_itself_needs_no_words() -> None:
    stage = Stage()
    stage.narrator.stopping()
    stage.narrator.unserved("this machine is shutting down")
    stage.narrator.member(membership.MemberLost(OTHER, "left"), stage.mesh)
    assert stage.screen.lines == []


def test_loading_is_told_by_name_and_bytes() -> None:
    stage = Stage(named(2, "attic"))
    stage.narrator.loading(LoadProgress(Epoch(3, ME), OTHER, 3, 9))
    stage.narrator.loading(LoadProgress(Epoch(3, ME), ME, 0, 0))
    assert stage.screen.bars == [("loading on attic", 3, 9), ("loading on this machine", 0, 1)]


def test_leftovers_that_were_ended_are_counted() -> None:
    stage = Stage()
    for count in (0, 1, 3):
        stage.narrator.swept(count)
    assert stage.screen.lines == [
        "change ended an engine process that an earlier run left behind",
        "change ended 3 engine processes that an earlier run left behind",
    ]
