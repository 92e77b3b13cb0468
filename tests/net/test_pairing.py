"""Being let in by a code over real connections: what works, and what those who do not know the code achieve."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from mesh.clock import SystemClock
from mesh.errors import MeshError, TransportError, WireError
from mesh.identity.grants import Roster
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey
from mesh.identity.pairing import Attempt, Member, Newcomer, challenge, make_code, read_code
from mesh.membership.approvals import MAX_PASSED_ON
from mesh.membership.asking import Told, ask
from mesh.membership.join import JoinResult
from mesh.membership.requests import MAX_REQUESTS, MAX_TRIES
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection, Stream
from mesh.wire.codec import control_decoder, encode, open_decoder, read_frame
from mesh.wire.facts import Role
from mesh.wire.messages import (
    PROTOCOL,
    Approve,
    Approved,
    Ask,
    Asked,
    Joined,
    Mistyped,
    OpenControl,
    Prove,
    Proven,
    Still,
)
from tests.eventually import eventually
from tests.net.party import Node, Party


def a_code() -> str:
    return read_code(make_code(secrets.token_bytes))


@dataclass
class Laptop:
    """A machine without a mesh, and what it was told while it waited."""

    endpoint: Endpoint
    code: str = field(default_factory=a_code)
    held: int = 0
    mistyped: int = 0

    @property
    def key(self) -> NodeKey:
        return self.endpoint.key

    def ask(self, address: str, *, role: Role = "worker", prefix: str = "") -> asyncio.Task[JoinResult]:
        newcomer = Newcomer(self.key.public, role, "laptop")
        told = Told(self._held, self._mistyped)
        return asyncio.create_task(
            ask(self.endpoint, (address,), prefix, self.code, newcomer, told, SystemClock().wall)
        )

    def _held(self) -> None:
        self.held += 1

    def _mistyped(self) -> bool:
        self.mistyped += 1
        return self.mistyped < 3


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


@pytest.fixture
async def laptop(party: Party) -> AsyncIterator[Laptop]:
    laptop = Laptop(await party.lane())
    yield laptop
    await laptop.endpoint.close()


async def waiting(node: Node, count: int = 1) -> None:
    await eventually(lambda: len(node.links.requests()) == count)


async def refusal(asking: Awaitable[JoinResult]) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await asking
    return caught.value


async def test_whoever_reads_the_code_lets_the_machine_in(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups)
    asking = laptop.ask(anna.address, prefix=anna.key.id[:8])
    await waiting(anna)
    assert [(request.name, request.role, request.host) for request in anna.asked] == [("laptop", "worker", "127.0.0.1")]
    approved = await anna.links.approve(laptop.code)
    assert approved == Approved(0, "", "", laptop.key.id, "laptop", "worker")
    result = await asking
    assert (result.mesh, result.mesh_name, result.inviter) == (party.founder.id, "home", anna.key.id)
    await eventually(lambda: ben.roster.role_of(laptop.key.public, party.wall) == "worker")
    await laptop.endpoint.close()

    new = Node(
        "laptop", laptop.key, Roster(result.mesh, result.founder, result.grants), InviteBook(None),
        members=result.members,
    )  # fmt: skip
    party.nodes.append(await new.start())
    await eventually(lambda: {*new.ups} == {anna.key.id, ben.key.id})


async def test_the_code_may_be_typed_on_any_member(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups and anna.ups)
    asking = laptop.ask(anna.address)
    await waiting(anna)
    assert (await ben.links.approve(a_code())).code == "wrong-code"
    approved = await ben.links.approve(laptop.code)
    assert (approved.code, approved.node) == ("", laptop.key.id)
    assert (await asking).inviter == anna.key.id


async def test_a_client_that_asks_becomes_a_client(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    asking = laptop.ask(anna.address, role="client")
    await waiting(anna)
    assert (await anna.links.approve(laptop.code)).role == "client"
    result = await asking
    roster = Roster(result.mesh, result.founder, result.grants)
    assert roster.role_of(laptop.key.public, party.wall) == "client"


async def test_a_wrong_code_lets_nobody_in_and_the_machine_is_told(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    asking = laptop.ask(anna.address)
    await waiting(anna)
    assert (await anna.links.approve(a_code())).code == "wrong-code"
    assert laptop.mistyped == 1
    assert (await anna.links.approve(laptop.code)).code == ""
    await asking


async def test_after_three_wrong_codes_the_request_is_dropped(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    laptop.mistyped = -10  # it would wait on
    asking = laptop.ask(anna.address)
    await waiting(anna)
    codes = [(await anna.links.approve(a_code())).code for _ in range(MAX_TRIES)]
    assert codes == ["wrong-code"] * (MAX_TRIES - 1) + ["dropped"]
    assert (await refusal(asking)).code == "dropped"
    assert (await anna.links.approve(laptop.code)).code == "dropped"
    assert anna.roster.role_of(laptop.key.public, party.wall) is None


async def test_a_code_without_a_request_is_for_nobody(party: Party) -> None:
    anna = await party.node("anna")
    assert (await anna.links.approve(a_code())).code == "no-request"


async def test_a_machine_that_gives_up_is_forgotten(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    asking = laptop.ask(anna.address)
    await waiting(anna)
    asking.cancel()
    await waiting(anna, 0)
    assert (await anna.links.approve(laptop.code)).code == "no-request"


async def test_a_member_that_goes_ends_the_wait(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    asking = laptop.ask(anna.address)
    await waiting(anna)
    party.nodes.remove(anna)
    await anna.stop()
    assert isinstance(await refusal(asking), TransportError)


async def test_a_lite_client_lets_nobody_in(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    carl = await party.node("carl", party.member_key("client"), role="client", knows=(anna,))
    await eventually(lambda: carl.ups)
    assert (await refusal(laptop.ask(carl.address))).code == "unknown"
    asking = laptop.ask(anna.address)
    await waiting(anna)
    assert (await carl.links.approve(laptop.code)).code == "refused", "nor through another member"
    answers: list[Approved] = []
    carl.links._approvals.received = lambda link, message: answers.append(message)  # type: ignore[method-assign,assignment,arg-type,func-returns-value]
    carl.links.send(anna.key.id, Approve(1, laptop.code))
    await eventually(lambda: answers)
    assert answers[0].code == "refused", "nor when it says so itself"
    assert anna.roster.role_of(laptop.key.public, party.wall) is None
    asking.cancel()


# -- those who do not know the code ----------------------------------------------------------------------------------


class Mallory:
    """Somebody on the network who answers calls, without a grant of anybody."""

    def __init__(self, behave: Callable[[Stream, Connection], Awaitable[None]]) -> None:
        self.key = NodeKey.generate()
        self.endpoint = Endpoint(self.key, SystemClock(), on_connection=self._called)
        self._behave = behave
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        return (await self.endpoint.start([("127.0.0.1", 0)]))[0]

    def _called(self, connection: Connection) -> None:
        connection.on_close = lambda reason: None
        connection.on_stream = lambda stream: self._tasks.append(
            asyncio.ensure_future(self._behave(stream, connection))
        )

    async def close(self) -> None:
        await self.endpoint.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def hear_ask(stream: Stream) -> Ask:
    await read_frame(stream, open_decoder)
    heard = await read_frame(stream, control_decoder)
    assert isinstance(heard, Ask)
    return heard


async def test_one_who_shows_another_code_is_not_let_in_with_the_typed_one(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    guesser = Laptop(await party.lane())
    asking = [laptop.ask(anna.address), guesser.ask(anna.address)]
    await waiting(anna, 2)
    assert (await anna.links.approve(laptop.code)).node == laptop.key.id
    await asking[0]
    await eventually(lambda: guesser.mistyped == 1)
    assert anna.roster.role_of(guesser.key.public, party.wall) is None
    asking[1].cancel()
    await guesser.endpoint.close()


async def test_one_in_the_middle_is_neither_let_in_nor_believed(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")

    async def relay(stream: Stream, connection: Connection) -> None:
        """Ask in the victim's words, and carry every message from one to the other."""
        heard = await hear_ask(stream)
        onward = await (await mallory.endpoint.dial(anna.address, expect=None)).open_stream()
        await onward.write(encode(OpenControl()) + encode(heard))
        there = asyncio.ensure_future(carry(stream, onward))
        await carry(onward, stream)
        await there

    async def carry(source: Stream, sink: Stream) -> None:
        while True:
            await sink.write(encode(await read_frame(source, control_decoder)))

    mallory = Mallory(relay)
    asking = laptop.ask(await mallory.start())
    await waiting(anna)
    assert (await anna.links.approve(laptop.code)).code == "wrong-code", "the code is right, the machine is not"
    assert laptop.mistyped == 1
    assert anna.roster.role_of(mallory.key.public, party.wall) is None
    asking.cancel()
    await mallory.close()


async def test_nobody_is_drawn_into_a_mesh_without_the_code(party: Party, laptop: Laptop) -> None:
    other = Party()
    eve = await other.node("eve")

    async def welcome(stream: Stream, connection: Connection) -> None:
        await hear_ask(stream)
        await stream.write(encode(Joined(other.founder.id, "trap", other.founder.public, eve.roster.grants, ())))

    mallory = Mallory(welcome)
    assert isinstance(await refusal(laptop.ask(await mallory.start())), WireError)
    await mallory.close()
    await other.over()


async def test_a_false_member_gets_three_guesses(party: Party, laptop: Laptop) -> None:
    guesses: list[object] = []

    async def guess(stream: Stream, connection: Connection) -> None:
        asked = await hear_ask(stream)
        newcomer = Newcomer(connection.peer_key, asked.role, asked.name)
        element = asked.element
        while True:
            us = Member(mallory.key.public, party.founder.id)
            made = challenge(a_code(), newcomer, us, element, secrets.token_bytes)
            await stream.write(encode(Prove(us.mesh, made.element, made.proof)))
            answer = await read_frame(stream, control_decoder)
            while isinstance(answer, Still):
                answer = await read_frame(stream, control_decoder)
            guesses.append(answer)
            assert isinstance(answer, Mistyped)
            element = answer.element

    mallory = Mallory(guess)
    error = await refusal(laptop.ask(await mallory.start()))
    assert error.code == "guessed"
    assert len(guesses) == 2, "the third is not even answered"
    await mallory.close()


async def test_another_node_than_the_announced_one_is_not_asked(party: Party, laptop: Laptop) -> None:
    anna = await party.node("anna")
    assert (await refusal(laptop.ask(anna.address, prefix="kitchen2"))).code == "wrong-key"
    assert anna.asked == []


async def test_whoever_holds_the_line_and_says_nothing_is_given_up(party: Party, laptop: Laptop) -> None:
    async def sit(stream: Stream, connection: Connection) -> None:
        await hear_ask(stream)
        await stream.read()

    mallory = Mallory(sit)
    error = await refusal(laptop.ask(await mallory.start()))
    assert isinstance(error, TransportError)
    await mallory.close()


class Asker:
    """A machine that says whatever it likes."""

    def __init__(self, endpoint: Endpoint, connection: Connection, stream: Stream) -> None:
        self.endpoint, self.connection, self.stream = endpoint, connection, stream

    @classmethod
    async def dial(cls, party: Party, address: str) -> Asker:
        endpoint = await party.lane()
        connection = await endpoint.dial(address, expect=None)
        connection.on_close = lambda reason: None
        stream = await connection.open_stream()
        asker = cls(endpoint, connection, stream)
        newcomer = Newcomer(endpoint.key.public, "worker", "x")
        element = Attempt(a_code(), newcomer, secrets.token_bytes).element
        await asker.say(OpenControl(), Ask(PROTOCOL, "x", "worker", element))
        return asker

    async def say(self, *messages: object) -> None:
        await self.stream.write(b"".join(encode(message) for message in messages))

    async def hear(self) -> object:
        return await read_frame(self.stream, control_decoder)


async def test_asking_is_bounded(party: Party) -> None:
    anna = await party.node("anna")
    askers = [await Asker.dial(party, anna.address) for _ in range(14)]
    answers = [await asker.hear() for asker in askers]
    assert sum(isinstance(answer, Asked) for answer in answers) <= MAX_REQUESTS
    assert {answer.code for answer in answers if not isinstance(answer, Asked)} == {"too-many"}  # type: ignore[attr-defined]
    assert len(anna.links.requests()) <= MAX_REQUESTS
    for asker in askers:
        await asker.endpoint.close()
    await waiting(anna, 0)


async def test_who_asks_again_and_again_is_slowed_down(party: Party) -> None:
    anna = await party.node("anna")
    codes = []
    for _ in range(12):
        asker = await Asker.dial(party, anna.address)
        answer = await asker.hear()
        codes.append(getattr(answer, "code", "held"))
        await asker.endpoint.close()
        await waiting(anna, 0)
    assert codes == ["held"] * 10 + ["too-many"] * 2


@pytest.mark.parametrize(
    "words", [(Proven(bytes(32)),), (Mistyped(b"A" + bytes(32)),), (Asked(1.0),), (Still(), Asked(1.0))]
)
async def test_whoever_asks_and_then_talks_nonsense_is_shown_out(party: Party, words: tuple[object, ...]) -> None:
    anna = await party.node("anna")
    asker = await Asker.dial(party, anna.address)
    await waiting(anna)
    await asker.say(*words)
    await waiting(anna, 0)
    await asker.endpoint.close()


async def test_who_asks_much_and_reads_nothing_is_shown_out(party: Party) -> None:
    anna = await party.node("anna")
    asker = await Asker.dial(party, anna.address)
    await waiting(anna)

    async def flood() -> None:
        with contextlib.suppress(TransportError):
            while True:
                await asker.say(*[Still()] * 500)

    flooding = asyncio.ensure_future(flood())
    await waiting(anna, 0)
    await flooding
    assert asker.connection.closed
    await asker.endpoint.close()


async def test_a_member_that_passes_on_code_after_code_is_told_to_wait(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups and anna.ups)
    codes = [(await ben.links.approve(a_code())).code for _ in range(MAX_PASSED_ON + 1)]
    assert codes == ["no-request"] * MAX_PASSED_ON + ["too-many"]


async def test_a_lost_answer_is_given_again_only_for_the_code(party: Party, laptop: Laptop) -> None:
    """The machine is a member already, but knows nothing of it: nobody may be drawn in by saying so."""
    anna = await party.node("anna")
    first = laptop.ask(anna.address)
    await waiting(anna)
    await anna.links.approve(laptop.code)
    await first
    grants = anna.roster.grants
    again = laptop.ask(anna.address)
    await waiting(anna)
    assert not again.done()
    assert (await anna.links.approve(laptop.code)).code == ""
    await again
    assert anna.roster.grants == grants, "one grant is enough"
