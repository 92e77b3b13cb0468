"""What can be wrong with what a client says: seeded changes of everything that is right."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from dataclasses import dataclass, field, replace

import numpy as np

from tests.net.rpc_client import (
    ALLOC_BUFFER,
    DEVICE_COUNT,
    GET_TENSOR,
    GRAPH_COMPUTE,
    GRAPH_RECOMPUTE,
    HELLO,
    SET_TENSOR,
    Client,
    sequence,
)
from tests.net.rpc_frames import (
    F32,
    FIELDS,
    GRAPH_HEAD,
    N_OPS,
    OP,
    TENSOR_SIZE,
    UNCHECKED,
    Arena,
    Graph,
    Tensor,
    digest_of,
)
from tests.net.rpc_graphs import GRAPHS, build

ARENA, ZEROS = 1 << 16, 1 << 12
FREE_BUFFER, BUFFER_CLEAR, COPY_TENSOR, INIT_TENSOR, MEMSET_TENSOR, LOAD_LOCAL = 4, 5, 9, 12, 17, 18
PUSH_HELLO, PUSH_OPEN, PUSH_EXPECT = 19, 20, 23
GENERATION = 7
EDGES = (0, 1, 2, 3, 7, 31, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1)
ITEM = struct.Struct("<64sII4QQQQQ")


@dataclass(frozen=True)
class Message:
    """A command, its body, and whether it is answered."""

    command: int
    body: bytes
    answered: bool = False


@dataclass
class Session:
    """One client that was let in, and has two buffers."""

    client: Client
    arena: int
    arena_base: int
    zeros: int
    zeros_base: int

    @classmethod
    async def begin(cls, port: int, secret: bytes) -> Session:
        """Comes in, and sees that the server computes rightly."""
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        client.writer.write(secret)
        await client.ask(HELLO, bytes(24))
        session = cls(client, *await client.buffer(ARENA), *await client.buffer(ZEROS))
        session.clear()
        await session.compute()
        return session

    def clear(self) -> None:
        """Zeros are valid as numbers of any type, and as the number of a row."""
        for handle in (self.arena, self.zeros):
            self.client.tell(BUFFER_CLEAR, struct.pack("<QB", handle, 0))

    async def compute(self) -> None:
        """A product of two matrices, and twice: what is wrong is seen."""
        numbers = np.arange(48, dtype=np.float32)
        a, b = numbers[:32].reshape(4, 8), numbers[16:].reshape(4, 8) % 7
        arena = Arena(self.arena, self.arena_base, ARENA)
        arena.place(F32, (8, 4))
        arena.place(F32, (8, 4))
        arena.place(F32, (4, 4), op=OP["MUL_MAT"], src=(1, 2))
        for tensor, values in zip(arena.tensors, (a, b), strict=False):
            self.client.tell(SET_TENSOR, tensor.packed() + struct.pack("<BQ", 0, 0) + values.tobytes())
        self.client.tell(GRAPH_COMPUTE, arena.graph().message(place=3))
        self.client.tell(GRAPH_RECOMPUTE, struct.pack("<II", 0, 3))
        got = await self.client.ask(GET_TENSOR, arena.tensors[2].packed() + struct.pack("<QQB", 0, 64, 0))
        assert np.array_equal(np.frombuffer(got, np.float32).reshape(4, 4), b @ a.T)

    def graph(self, name: str) -> Graph:
        arenas = Arena(self.arena, self.arena_base, ARENA), Arena(self.zeros, self.zeros_base, ZEROS)
        return build(name, *arenas)

    async def end(self) -> None:
        self.client.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.client.writer.wait_closed()


def _tensor(session: Session, chance: random.Random) -> Tensor:
    size = chance.choice([16, 64, 1024])
    return Tensor(F32, (size, 1, 1, 1), session.arena, session.arena_base + 64 * chance.randrange(32))


def messages(session: Session, chance: random.Random) -> list[Message]:
    """One of every command, all as they should be but for what they free or wait for."""
    tensor, other = _tensor(session, chance), replace(_tensor(session, chance), data=session.arena_base + 32768)
    push = struct.pack("<IQQQQB", 0, 0, session.arena, session.arena_base, 64, chance.randrange(2))
    item = ITEM.pack(b"blk.0.attn_norm.weight", 0, 0, 128, 1, 1, 1, 512, 0, session.arena, session.arena_base)
    device = struct.pack("<I", 0)
    return [
        Message(ALLOC_BUFFER, struct.pack("<IQ", 0, 4096), True),
        Message(1, device, True),
        Message(2, device, True),
        Message(3, struct.pack("<Q", session.arena), True),
        Message(FREE_BUFFER, struct.pack("<Q", session.zeros)),
        Message(BUFFER_CLEAR, struct.pack("<QB", session.arena, 1)),
        Message(SET_TENSOR, tensor.packed() + struct.pack("<BQ", chance.choice((0, 2)), 0) + bytes(32)),
        Message(7, tensor.packed() + struct.pack("<QQ", 0, 1), True),
        Message(GET_TENSOR, tensor.packed() + struct.pack("<QQB", 0, 64, chance.randrange(2)), True),
        Message(COPY_TENSOR, tensor.packed() + replace(other, ne=tensor.ne).packed(), True),
        Message(GRAPH_COMPUTE, session.graph(chance.choice(GRAPHS)).message()),
        Message(11, device, True),
        Message(INIT_TENSOR, tensor.packed()),
        Message(13, device + tensor.packed() + other.packed() + bytes(9 * TENSOR_SIZE), True),
        Message(HELLO, bytes(24)),
        Message(DEVICE_COUNT, b"", True),
        Message(GRAPH_RECOMPUTE, struct.pack("<II", 0, chance.randrange(16))),
        Message(MEMSET_TENSOR, tensor.packed() + struct.pack("<QQB", 0, 64, 1)),
        Message(LOAD_LOCAL, b"f" * 64 + item, True),
        Message(PUSH_OPEN, struct.pack("<Q", GENERATION)),
        Message(21, struct.pack("<QI128s", GENERATION, 0, b"nobody"), True),
        Message(
            24, struct.pack("<5Q", session.arena, session.arena_base, session.arena, session.arena_base + 4096, 64)
        ),
        Message(25, struct.pack("<QI128s", GENERATION, 1, b"nobody")),
        Message(22, push),
        Message(PUSH_EXPECT, push),
    ]


def changed(chance: random.Random, body: bytes, places: list[tuple[int, int]], near: tuple[int, ...]) -> bytes:
    """The body with one number of it made another: an edge, a neighbour, or one of ``near``."""
    at, size = chance.choice(places)
    old = int.from_bytes(body[at : at + size], "little")
    new = chance.choice(
        [*EDGES, *(n + chance.choice([-64, -1, 0, 0, 1, 4, 64]) for n in near), old - 1, old + 1, 2 * old, old // 2]
        + [old ^ 1 << chance.randrange(8 * size) for _ in range(4)]
    )
    return body[:at] + (new & (1 << 8 * size) - 1).to_bytes(size, "little") + body[at + size :]


def places_in(message: Message) -> list[tuple[int, int]]:
    """Where numbers are in a body."""
    if message.command == 13:
        return [(4 + n * TENSOR_SIZE + at, size) for n in range(2) for at, size in FIELDS] + [(0, 4)]
    if message.command in (SET_TENSOR, 7, GET_TENSOR, COPY_TENSOR, INIT_TENSOR, MEMSET_TENSOR):
        rest = range(TENSOR_SIZE, len(message.body) - 7, 1)
        tail = [(at, 8) for at in rest][:24] * 4
        # its parameters and sources mean nothing to these
        return [field for field in FIELDS if not 56 <= field[0] < 204] * 2 + tail
    return [(at, size) for size in (1, 4, 8) for at in range(0, len(message.body) - size + 1, min(size, 4))]


def changed_graph(chance: random.Random, session: Session) -> Message:
    """A graph that was right, with one to three numbers of its tensors, its list of nodes or its head made others."""
    graph = session.graph(chance.choice(GRAPHS))
    form = graph.form()
    nodes = 8 * len(graph.nodes)
    near = (
        session.arena,
        session.arena_base,
        session.arena_base + ARENA,
        session.zeros,
        session.zeros_base,
        len(graph.tensors),
        N_OPS,
    )
    fields = [(nodes + n * TENSOR_SIZE + at, size) for n in range(len(graph.tensors)) for at, size in FIELDS]
    shapes = [field for field in fields if (field[0] - nodes) % TENSOR_SIZE < 56]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = chance.choice([fields, shapes, shapes, [(at, 8) for at in range(0, nodes, 8)]])
        after = changed(chance, form, places, near)
        if not UNCHECKED & {
            struct.unpack_from("<I", after, at)[0] for at, _ in fields if (at - nodes) % TENSOR_SIZE == 52
        }:
            form = after
    message = bytearray(graph.message(place=chance.randrange(4)))
    message[GRAPH_HEAD.size :] = form
    if chance.random() < 0.95:
        message[20:28] = struct.pack("<Q", digest_of(form))
    body = bytes(message)
    if chance.random() < 0.1:
        body = changed(chance, body, [(at, 4) for at in range(0, 20, 4)], (1, 16, 2**26))
    return Message(GRAPH_COMPUTE, body)


def deep_graph(session: Session, depth: int) -> Message:
    """A chain of views, each of the one before: as long as a message may be."""
    first = Tensor(F32, (16, 1, 1, 1), session.arena, session.arena_base)
    link = replace(first, op=OP["VIEW"], src=(1,), view=1).packed(2)
    form = struct.pack("<Q", depth) + first.packed(1) + link * (depth - 1)
    head = GRAPH_HEAD.pack(0, 0, 2**32 - 1, 1, depth, digest_of(form))
    return Message(GRAPH_COMPUTE, head + form)


def coded(chance: random.Random, message: Message) -> tuple[bytes, int]:
    """The body as a coding that is wrong somewhere, and the size it claims to have."""
    body = message.body
    half = len(body) // 2
    good = bytearray(sequence(body))
    if half >= 4 and chance.random() < 0.5:
        good = bytearray(sequence(body[:4], half, 4) + sequence(body[half + 4 :]))
    size = len(body)
    for _ in range(chance.randrange(4)):
        good[chance.randrange(min(len(good), 24))] = chance.choice(
            [0, 1, 15, 0x7F, 0x80, 0xF0, 0xFF, chance.randrange(256)]
        )
    if chance.random() < 0.2:
        good = good[: chance.randrange(len(good))]
    size = chance.choice([size, size, size, size - 1, size + 1, 0, 2 * size, 2**30, 2**30 + 1, 2**62, 2**64 - 1])
    return bytes(good), size


@dataclass
class Fuzz:
    """Says one wrong thing after the other to the server at ``port``; begins again whenever it is let go."""

    port: int
    secret: bytes
    session: Session | None = None
    refused: int = 0
    obeyed: int = 0
    peers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def case(self, chance: random.Random) -> None:
        """One case; afterwards the server has answered, or let us go and another one in."""
        if self.session is None:
            self.session = await Session.begin(self.port, self.secret)
        kinds = [self._graph] * 8 + [self._number] * 8 + [self._coded] * 3 + [self._length, self._cut, self._command]
        await chance.choice([*kinds, self._freed, self._stranger, self._peer])(chance, self.session)

    async def end(self) -> None:
        for writer in self.peers:
            writer.transport.abort()
        self.peers.clear()
        if self.session is not None:
            await self.session.end()
            self.session = None

    async def _say(self, session: Session, message: Message) -> None:
        with contextlib.suppress(ConnectionError):
            session.client.tell(message.command, message.body)
        await self._heard(session, message.answered)

    async def _heard(self, session: Session, answered: bool) -> None:
        """Waits until the server has dealt with what was said."""
        try:
            session.client.tell(DEVICE_COUNT, b"")
            for _ in range(answered + 1):
                last = await asyncio.wait_for(session.client.answer(), 10)
            assert last == struct.pack("<I", 1)
            self.obeyed += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._begin_again(session)

    async def _begin_again(self, session: Session) -> None:
        self.refused += 1
        await session.end()
        self.session = await Session.begin(self.port, self.secret)

    async def _graph(self, chance: random.Random, session: Session) -> None:
        session.clear()
        message = changed_graph(chance, session)
        if chance.random() < 0.01:
            message = deep_graph(session, chance.choice([1000, 100_000]))
        await self._say(session, message)

    async def _number(self, chance: random.Random, session: Session) -> None:
        message = chance.choice(messages(session, chance))
        near = (session.arena, session.arena_base, session.arena_base + ARENA, session.zeros)
        body = message.body
        for _ in range(chance.choice([1, 1, 2, 3])):
            places = places_in(message)
            body = changed(chance, body, places, near) if places else body
        if chance.random() < 0.15:
            body = chance.choice(
                [body[: chance.randrange(len(body) + 1)], body + chance.randbytes(chance.randrange(20)), b""]
            )
        await self._say(session, replace(message, body=body))

    async def _coded(self, chance: random.Random, session: Session) -> None:
        message = chance.choice([m for m in messages(session, chance) if len(m.body) > 8])
        body, size = coded(chance, message)
        with contextlib.suppress(ConnectionError):
            session.client.tell_coded(message.command, body, size)
        await self._heard(session, message.answered)

    async def _length(self, chance: random.Random, session: Session) -> None:
        message = chance.choice(messages(session, chance))
        length = chance.choice([*EDGES, len(message.body) + 1, 2**40, 1 << 63 | 100])
        session.client.tell(message.command, message.body, length)
        await self._leave(session)

    async def _cut(self, chance: random.Random, session: Session) -> None:
        message = chance.choice(messages(session, chance))
        whole = struct.pack("<BQ", message.command, len(message.body)) + message.body
        session.client.writer.write(whole[: chance.randrange(len(whole))])
        await self._leave(session)

    async def _command(self, chance: random.Random, session: Session) -> None:
        message = chance.choice(messages(session, chance))
        session.client.tell(chance.randrange(256), message.body)
        await self._leave(session)

    async def _leave(self, session: Session) -> None:
        with contextlib.suppress(ConnectionError):
            await session.client.writer.drain()
        await self._begin_again(session)

    async def _freed(self, chance: random.Random, session: Session) -> None:
        """What was given back is used again: by a graph, by one that was kept, by a tensor, by a push."""
        graph = session.graph(chance.choice(GRAPHS)).message(place=5)
        session.clear()
        session.client.tell(GRAPH_COMPUTE, graph)
        session.client.tell(FREE_BUFFER, struct.pack("<Q", session.arena))
        if chance.random() < 0.5:
            session.client.tell(GRAPH_RECOMPUTE, struct.pack("<II", 0, 5))
        elif chance.random() < 0.3:
            session.client.tell(GRAPH_COMPUTE, graph)
        else:
            message = chance.choice([m for m in messages(session, chance) if m.command != HELLO])
            session.client.tell(message.command, message.body)
        await self._leave(session)

    async def _stranger(self, chance: random.Random, session: Session) -> None:
        """Somebody whose secret is wrong, or who says no more than that; the client stays."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        wrong = bytes([self.secret[0] ^ 1]) + self.secret[1:]
        writer.write(
            chance.choice([wrong, self.secret[: chance.randrange(1, 32)], chance.randbytes(40), wrong + bytes(33)])
        )
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()
        await self._heard(session, False)

    async def _peer(self, chance: random.Random, session: Session) -> None:
        """Another server's words: a greeting that may be wrong, then pushes; the client may wait for them."""
        generation = chance.choice([GENERATION, GENERATION, *EDGES])
        session.client.tell(PUSH_OPEN, struct.pack("<Q", GENERATION))
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        hello = struct.pack(
            "<BQQI", PUSH_HELLO, chance.choice([12, 12, 12, *EDGES]), generation, chance.choice([0, 0, *EDGES]) % 2**32
        )
        writer.write(self.secret + hello)
        for _ in range(chance.randrange(3)):
            data = chance.randbytes(chance.choice([0, 1, 64, 64, 5000]))
            size = chance.choice([len(data), len(data), len(data), *EDGES])
            writer.write(struct.pack("<QQ", chance.choice([0, *EDGES]), size) + data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()
        if chance.random() < 0.3:
            number, size = chance.choice([0, *EDGES]), chance.choice([64, 64, *EDGES])
            await self._say(
                session,
                Message(PUSH_EXPECT, struct.pack("<IQQQQB", 0, number, session.arena, session.arena_base, size, 0)),
            )
        else:
            await self._heard(session, False)
