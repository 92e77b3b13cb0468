"""Processes for tests: a fake process table, and a real stand-in for the engine that starts in milliseconds.

Run as a script, this file is the stand-in: ``rpc`` listens, wants the secret and echoes; ``server`` answers ``/health``
and ``/completion`` after a word has been echoed by every ``--rpc`` endpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import os
import signal
import socket
import sys
import threading
import time

if __name__ != "__main__":
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from dataclasses import dataclass, field
    from itertools import count

    from mesh.supervise.output import Output
    from mesh.supervise.reasons import ProcessKind
    from mesh.wire.facts import Epoch, Layout, ModelCost, NodeId, RingMember

    def node_id(letter: str) -> NodeId:
        return letter * 26

    def layout_of(host: str, *workers: str) -> Layout:
        """A layout over nodes named by one letter each; each carries one layer."""
        members = tuple(
            RingMember(node_id(letter), f"node {letter}", (n, n), 1 << 20, "CPU")
            for n, letter in enumerate((host, *workers))
        )
        n = len(members)
        model = ModelCost("0" * 64, "demo", "llama", 1 << 20, n, 64, 100, 512, (1000,) * n, 100, 100, (64,) * n)
        return Layout("split" if workers else "solo", node_id(host), model, members, 512, 1)

    @dataclass(frozen=True)
    class StandIn:
        """A command that runs the stand-in."""

        argv: Sequence[str]
        env: Mapping[str, str] = field(default_factory=dict)

    def stand_in(*arguments: object, **env: str) -> StandIn:
        return StandIn((sys.executable, "-I", "-S", __file__, *map(str, arguments)), env)

    def stand_in_rpc(layout: Layout, port: int, secret: bytes, peers: Mapping[NodeId, str]) -> StandIn:
        return stand_in("rpc", "--port", port, MESH_RPC_SECRET=secret.hex())

    def stand_in_server(layout: Layout, port: int, endpoints: Sequence[str], secret: bytes, api_key: str) -> StandIn:
        return stand_in(
            *("server", "--port", port, "--rpc", ",".join(endpoints)),
            MESH_RPC_SECRET=secret.hex(),
            LLAMA_API_KEY=api_key,
        )

    _pids = count(1_000_000_000)

    class FakeChild:
        """A process that does what the test says."""

        def __init__(self, argv: Sequence[str], env: Mapping[str, str], output: Output) -> None:
            self.argv, self.env, self.output = argv, env, output
            self.pid = next(_pids)
            self.listens = True
            self.dies_when_killed = True
            self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        @property
        def kind(self) -> ProcessKind:
            return ProcessKind.RPC if "rpc" in self.argv else ProcessKind.SERVER

        @property
        def returncode(self) -> int | None:
            return self._ended.result() if self._ended.done() else None

        @property
        def tail(self) -> tuple[str, ...]:
            return self.output.tail

        def listens_on(self, port: int) -> bool:
            return self.returncode is None and self.listens

        def exit(self, code: int) -> None:
            if not self._ended.done():
                self._ended.set_result(code)

        def kill(self) -> None:
            if self.dies_when_killed:
                self.exit(-9)

        async def wait(self) -> int:
            return await asyncio.shield(self._ended)

    class FakeLauncher:
        """A process table. ``gate``, when cleared, holds launches; ``on_launch`` sees each child as it starts."""

        def __init__(self, on_launch: Callable[[FakeChild], None] = lambda child: None) -> None:
            self.children: list[FakeChild] = []
            self.gate = asyncio.Event()
            self.gate.set()
            self.waiting = 0
            self.on_launch = on_launch

        async def launch(
            self, argv: Sequence[str], env: Mapping[str, str], output: Output, book: Callable[[int], None]
        ) -> FakeChild:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1
            child = FakeChild(argv, env, output)
            book(child.pid)
            self.children.append(child)
            self.on_launch(child)
            return child

        @property
        def alive(self) -> list[FakeChild]:
            return [child for child in self.children if child.returncode is None]

    class FakeTunnels:
        """Endpoints that lead nowhere."""

        def __init__(self) -> None:
            self.on_failure: Callable[[Epoch, NodeId, str], None] = lambda epoch, worker, reason: None
            self.opened: list[tuple[Epoch, tuple[NodeId, ...]]] = []
            self.is_open = False

        async def open(self, epoch: Epoch, workers: Sequence[NodeId], secret: bytes) -> tuple[str, ...]:
            assert len(secret) == 32
            self.opened.append((epoch, tuple(workers)))
            self.is_open = True
            return tuple(f"127.0.0.1:{port}" for port, _ in enumerate(workers, 1))

        async def close(self) -> None:
            self.is_open = False


# -- the stand-in ----------------------------------------------------------------------------------------------------


def _secret() -> bytes:
    return bytes.fromhex(os.environ.get("MESH_RPC_SECRET", ""))


def _receive(sock: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n and (piece := sock.recv(n - len(data))):
        data += piece
    return data


def _listen(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", port))
    except OSError as error:
        print(f"stand-in: couldn't bind port {port}: {error}", file=sys.stderr)
        sys.exit(1)
    server.listen(8)
    return server


def _echo(sock: socket.socket) -> None:
    with sock:
        if not hmac.compare_digest(_receive(sock, 32), _secret()):
            return
        while data := sock.recv(65536):
            sock.sendall(data)


def _each_connection(server: socket.socket, serve) -> None:  # type: ignore[no-untyped-def]
    while True:
        sock, _ = server.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def _answer(sock: socket.socket, healthy_at: float, endpoints: list[str]) -> None:
    with sock, contextlib.suppress(OSError):
        request = b""
        while b"\r\n\r\n" not in request:
            piece = sock.recv(65536)
            if not piece:
                return
            request += piece
        status, body = "200 OK", b'{"status":"ok"}'
        if time.monotonic() < healthy_at:
            status, body = "503 Service Unavailable", b'{"error":"Loading model"}'
        elif request.startswith(b"POST /completion"):
            if f"authorization: bearer {os.environ['LLAMA_API_KEY']}".encode() not in request.lower():
                status, body = "401 Unauthorized", b"{}"
            elif not all(map(_echoes, endpoints)):
                os.abort()
            else:
                body = b'{"content":"a","tokens_predicted":1}'
        sock.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)


def _echoes(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(_secret() + b"hello ring")
        return _receive(sock, 10) == b"hello ring"


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["rpc", "server", "exit", "idle", "print"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rpc", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--signal", type=int, default=0)
    parser.add_argument("--say", default="")
    parser.add_argument("--listen-after", type=float, default=0.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.say:
        print(arguments.say, file=sys.stderr, flush=True)
    if arguments.mode == "exit":
        if arguments.signal:
            os.kill(os.getpid(), arguments.signal)
        sys.exit(arguments.code)
    if arguments.mode == "print":
        for line in sys.stdin:
            print(line, end="")
        print(f"pid {os.getpid()} ppid {os.getppid()} pgid {os.getpgrp()}", flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.mode == "idle":
        signal.pause()
    time.sleep(arguments.listen_after)
    server = _listen(arguments.port)
    if arguments.mode == "rpc":
        print("mesh-load 50 100", flush=True)
        print("mesh-load 100 100", flush=True)
        _each_connection(server, _echo)
    endpoints = [endpoint for endpoint in arguments.rpc.split(",") if endpoint]
    healthy_at = time.monotonic() + arguments.load_s
    _each_connection(server, lambda sock: _answer(sock, healthy_at, endpoints))


if __name__ == "__main__":
    _main()
