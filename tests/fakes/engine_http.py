"""A llama-server that needs no model: real HTTP over TCP or any stream, and every misfortune on demand.

Asked by an ingress it traces its answers and continues them, as the patched engine does: one group of blocks for each
word, whose token is :func:`token_of` its place. Of answers that are no streams it tells word by word, then says them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import h11

from mesh.errors import MeshError
from mesh.proxy.tcp import TcpStream
from mesh.transport.lane import Stream
from mesh.tunnel.pump import LocalEnd

KEY = "engine-key"
METRICS = b"# HELP llamacpp:prompt_tokens_total Prompt tokens.\nllamacpp:prompt_tokens_total 7\n"
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@dataclass
class Seen:
    """One request as it reached the engine."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    cancelled: bool = False


@dataclass
class FakeEngine:
    """Answers like llama-server, word by word.

    Args:
        words: what it generates.
        step: when set, each word waits for one ``release()`` of it.
        break_after: cut the connection after so many words.
        dies_after: the same, counted from where each answer begins or is continued.
        break_at: cut the connection after so many bytes of a stream's events; once.
        end_after: end the stream in good order after so many words, but without its end mark.
        blocks: of how many blocks a word's group consists.
        choices: answers to each streamed request, in turns.
        traces: say which tokens a group stands for; an engine without the patch does not.
        refuses: continue nothing (409).
        error_after: say so many words of a stream, then an error event.
        loading: answer 503 as while the model is read.
        hang: take requests and never answer.
        whole_status: of answers that are no streams and were told of.
        large_answer: bytes added to answers that echo the request, or were told of.
        cut_bodies: reset the connection in the middle of such answers.
    """

    words: list[str] = field(default_factory=lambda: ["one ", "two ", "three "])
    step: asyncio.Semaphore | None = None
    break_after: int | None = None
    dies_after: int | None = None
    break_at: int | None = None
    end_after: int | None = None
    error_after: int | None = None
    blocks: int = 1
    choices: int = 1
    traces: bool = True
    refuses: bool = False
    loading: bool = False
    hang: bool = False
    api_key: str = KEY
    whole_status: int = 200
    large_answer: int = 0
    cut_bodies: bool = False
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    open_streams: set[Stream] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def listen(self, port: int = 0) -> int:
        """Serve on loopback; returns the port."""
        self._server = await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self) -> LocalEnd:
        end = LocalEnd()
        self.attach(TcpStream(end))
        return end

    def attach(self, stream: Stream) -> None:
        """Serve one connection over ``stream``."""
        task = asyncio.create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def die(self) -> None:
        """As by ``kill -9``: every connection is reset, nothing listens any more."""
        if self._server is not None:
            self._server.close()
        for stream in list(self.open_streams):
            stream.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop_idle(self) -> None:
        """Close every connection, as after the keep-alive time."""
        for stream in list(self.open_streams):
            stream.abort()

    @property
    def active(self) -> int:
        return len(self.open_streams)

    # -- one connection ----------------------------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        self.connections += 1
        self.open_streams.add(stream)
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                seen = await self._read(connection, stream)
                if seen is None:
                    return
                self.seen.append(seen)
                await self._answer_or_cancel(connection, stream, seen)
                if connection.our_state is not h11.DONE:
                    return
                connection.start_next_cycle()
        except (MeshError, OSError, h11.ProtocolError):
            pass
        finally:
            stream.abort()
            self.open_streams.discard(stream)

    async def _read(self, connection: h11.Connection, stream: Stream) -> Seen | None:
        seen: Seen | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.read(65536))
            elif isinstance(event, h11.Request):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                seen = Seen(event.method.decode(), event.target.decode(), headers, b"")
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert seen is not None
                seen.body = bytes(body)
                return seen
            else:
                return None

    async def _answer_or_cancel(self, connection: h11.Connection, stream: Stream, seen: Seen) -> None:
        """Stop generating when the client hangs up, as llama-server does."""
        answer = asyncio.create_task(self._answer(connection, stream, seen))
        hangup = asyncio.create_task(_hangup(stream))
        try:
            await asyncio.wait([answer, hangup], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                seen.cancelled = True
                return
            if answer.exception() is not None:
                seen.cancelled = True
            answer.result()
            if hangup.done() and (early := hangup.result()):
                connection.receive_data(early)  # the next request, already
        finally:
            for task in (answer, hangup):
                task.cancel()
            await asyncio.gather(answer, hangup, return_exceptions=True)

    # -- one answer --------------------------------------------------------------------------------------------------

    async def _answer(self, connection: h11.Connection, stream: Stream, seen: Seen) -> None:
        if self.loading:
            await _send_json(connection, stream, 503, LOADING)
            return
        if seen.headers.get("authorization") != f"Bearer {self.api_key}":
            await _send_json(connection, stream, 401, {"error": {"message": "Invalid API Key", "code": 401}})
            return
        if self.hang:
            await asyncio.Event().wait()
        path = seen.target.partition("?")[0]
        ask = json.loads(seen.body) if b"{" in seen.body[:4] else {}
        given: list[int] = []
        start = 0
        if "x-mesh-resume" in seen.headers:
            if self.refuses:
                problem = {"message": "not this one", "type": "cannot_resume", "code": 409}
                await _send_json(connection, stream, 409, {"error": problem})
                return
            given = [0 if one is None else 1 + len(one["tokens"]) + one["end"] for one in ask["choices"]]
            start = max(0 if one is None else len(one["tokens"]) for one in ask["choices"])
            for choice in filter(None, ask["choices"]):
                assert choice["tokens"] == [token_of(n) for n in range(len(choice["tokens"]))], "what the client has"
            ask = ask["body"]
        if path == "/metrics":
            await _send(connection, stream, 200, METRICS, "text/plain; version=0.0.4")
        elif ask.get("bad"):
            await _send_json(connection, stream, 400, {"error": {"message": "bad\nfield", "code": 400}})
        elif ask.get("stream") is True:
            traces = self.traces and "x-mesh-request" in seen.headers
            await self._stream(connection, stream, path, given, start, traces)
        elif path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            await self._whole(connection, stream, start, self.traces and "x-mesh-request" in seen.headers)
        elif self.break_after == 0:
            stream.abort()
        else:
            echo = {"path": seen.target, "method": seen.method, "size": len(seen.body)}
            echo["sha256"] = hashlib.sha256(seen.body).hexdigest()
            if self.large_answer:
                echo["large"] = "x" * self.large_answer
            await _send_json(connection, stream, 200, echo, cut=self.cut_bodies)

    async def _generate(self, start: int = 0) -> AsyncIterator[str]:
        for word in self.words[start:]:
            if self.step is not None:
                await self.step.acquire()
            yield word

    async def _whole(self, connection: h11.Connection, stream: Stream, start: int, tells: bool) -> None:
        answer: dict[str, object] = {"choices": [{"text": "".join(self.words)}]}
        if self.large_answer:
            answer["large"] = "x" * self.large_answer
        dies_at = self.break_after if self.dies_after is None else start + self.dies_after
        said = start
        if tells:
            headers = [
                ("Content-Type", "text/event-stream"),
                ("Transfer-Encoding", "chunked"),
                ("X-Mesh-Whole", "1"),
                ("X-Engine", "fake"),
            ]
            await stream.write(connection.send(h11.Response(status_code=200, headers=headers)) or b"")
        async for _ in self._generate(start):
            if said == dies_at:
                break
            if tells:
                trace = f": mesh 0 1 {token_of(said)}\n:\n\n".encode()
                await stream.write(connection.send(h11.Data(data=trace)) or b"")
            said += 1
        if said == dies_at:
            stream.abort()
        elif tells:
            event = f"event: {self.whole_status}\ndata: {json.dumps(answer)}\n\n".encode()
            await stream.write(connection.send(h11.Data(data=event)) or b"")
            await stream.write(connection.send(h11.EndOfMessage()) or b"")
        else:
            await _send_json(connection, stream, 200, answer)

    async def _stream(
        self, connection: h11.Connection, stream: Stream, path: str, given: list[int], start: int, traces: bool
    ) -> None:
        """``given``: groups of each choice (its preamble is one) that the client has; ``start``: words of all."""
        headers = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"), ("Server", "llama.cpp")]
        head = connection.send(h11.Response(status_code=200, headers=headers)) or b""

        left, self.break_at = self.break_at, None

        async def say(data: bytes) -> None:
            nonlocal head, left
            if left is not None:
                data, left = data[:left], left - len(data)
            if data:
                await stream.write(head + (connection.send(h11.Data(data=data)) or b""))
                head = b""
            if left is not None and left <= 0:
                raise ConnectionResetError("cut, as asked")

        sent = start
        dies_at = self.break_after if self.dies_after is None else sent + self.dies_after
        for choice in range(self.choices):
            if not (given[choice] if choice < len(given) else 0):
                await say(self._group(path, choice, preamble(path), [], traces))
        async for word in self._generate(sent):
            if dies_at == sent:
                # Half an event, then nothing: the worst place to be cut.
                half = self._group(path, 0, self._said(path, word), [token_of(sent)], traces)
                await say(half[: len(half) - 5])
                stream.abort()
                return
            if self.end_after == sent:
                break
            if self.error_after == sent:
                await say(b'data: {"error":{"message":"Compute error.","code":500}}\n\n')
                break
            for choice in range(self.choices):
                if (given[choice] if choice < len(given) else 0) < 2 + sent:
                    await say(self._group(path, choice, self._said(path, word), [token_of(sent)], traces))
            sent += 1
        if self.end_after != sent and self.error_after != sent:
            for choice in range(self.choices):
                if (given[choice] if choice < len(given) else 0) < 2 + sent:
                    await say(self._group(path, choice, closing(path), [], traces, ends=True))
            await say(end(path))
        await stream.write(head + (connection.send(h11.EndOfMessage()) or b""))

    def _said(self, path: str, word: str) -> bytes:
        return chunk(path, word) + b"".join(chunk(path, "") for _ in range(self.blocks - 1))

    def _group(
        self, path: str, choice: int, blocks: bytes, tokens: list[int], traces: bool, *, ends: bool = False
    ) -> bytes:
        if not blocks or not traces:
            return blocks
        trace = " ".join(map(str, [choice, blocks.count(b"\n\n"), *tokens, *(["end"] if ends else [])]))
        return f": mesh {trace}\n".encode() + blocks


_NATIVE = frozenset({"/completion", "/completions", "/infill"})


def token_of(place: int) -> int:
    """The id of the word at ``place``."""
    return 1000 + place


def preamble(path: str) -> bytes:
    """What comes before the first word."""
    if path == "/v1/messages":
        return b'event: message_start\ndata: {"type":"message_start"}\n\n'
    if path.endswith("/responses"):
        return b"event: response.created\ndata: {}\n\nevent: response.in_progress\ndata: {}\n\n"
    if path.endswith("/chat/completions"):
        return b'data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
    return b""


def closing(path: str) -> bytes:
    """The last group, where the end mark is not part of it."""
    if path.endswith("/completions") and path not in _NATIVE:
        usage = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
        return b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n' + usage
    return b""


def chunk(path: str, word: str) -> bytes:
    """The event that carries ``word``."""
    if path.endswith("/responses"):
        return b"event: response.output_text.delta\ndata: " + json.dumps({"delta": word}).encode() + b"\n\n"
    if path == "/v1/messages":
        return b"event: content_block_delta\ndata: " + json.dumps({"delta": {"text": word}}).encode() + b"\n\n"
    if path in _NATIVE:
        return b"data: " + json.dumps({"content": word, "stop": False}, separators=(",", ":")).encode() + b"\n\n"
    return b"data: " + json.dumps({"choices": [{"text": word}]}).encode() + b"\n\n"


def end(path: str) -> bytes:
    """What says that a stream is complete."""
    if path.endswith("/responses"):
        return b"event: response.completed\ndata: {}\n\n"
    if path == "/v1/messages":
        return b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    if path in _NATIVE:
        return b'data: {"content":"","stop":true}\n\n'
    return b"data: [DONE]\n\n"


def whole(path: str, words: list[str], *, blocks: int = 1, choices: int = 1) -> bytes:
    """The stream a client gets of an answer that nothing went wrong with."""
    said = b"".join((chunk(path, word) + chunk(path, "") * (blocks - 1)) * choices for word in words)
    return preamble(path) * choices + said + closing(path) * choices + end(path)


async def _hangup(stream: Stream) -> bytes:
    # These clients send nothing while they wait, so whatever comes means that they are gone.
    try:
        return await stream.read(1)
    except (MeshError, OSError):
        return b""


async def _send_json(
    connection: h11.Connection, stream: Stream, status: int, value: object, *, cut: bool = False
) -> None:
    await _send(connection, stream, status, json.dumps(value).encode(), "application/json", cut=cut)


async def _send(
    connection: h11.Connection, stream: Stream, status: int, body: bytes, kind: str, *, cut: bool = False
) -> None:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("X-Engine", "fake")]
    head = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    if cut:
        await stream.write(head + body[: len(body) // 2])
        stream.abort()
        return
    await stream.write(head + (connection.send(h11.Data(data=body)) or b""))
    await stream.write(connection.send(h11.EndOfMessage()) or b"")
