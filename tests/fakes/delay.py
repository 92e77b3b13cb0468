"""A link with a long way: bytes come out as they went in, each a fixed time later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class DelayedLink:
    """A loopback port in front of another. ``up``, ``down``: bytes carried; ``cut`` ends every connection at once."""

    target: int
    delay_s: float
    port: int = 0
    up: int = 0
    down: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _carrying: set[asyncio.Task[None]] = field(default_factory=set)

    async def close(self) -> None:
        """End every connection; none is left when it returns."""
        self.cut()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    def cut(self) -> None:
        """As when a cable is pulled and the system notices."""
        for writer in self._open:
            writer.transport.abort()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, until either side ends."""
        task = asyncio.ensure_future(self._carry(reader, writer))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._open |= ends
        try:
            await asyncio.gather(self._one_way(reader, far_writer, "up"), self._one_way(far_reader, writer, "down"))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _one_way(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                sink.write(data)
                setattr(self, way, getattr(self, way) + len(data))

        delivering = asyncio.ensure_future(deliver())
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 18):
                    on_the_way.put_nowait((loop.time() + self.delay_s, data))
            on_the_way.put_nowait((loop.time() + self.delay_s, b""))
            with contextlib.suppress(OSError):
                await delivering
        finally:
            delivering.cancel()
            # Either direction's end is the connection's: the engine knows no half-closed ones.
            sink.close()


@contextlib.asynccontextmanager
async def delayed(target: int, delay_s: float) -> AsyncIterator[DelayedLink]:
    """A way to loopback port ``target`` that takes ``delay_s`` in each direction."""
    link = DelayedLink(target, delay_s)
    server = await asyncio.start_server(link.accept, "127.0.0.1", 0)
    link.port = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        await link.close()
