"""A relay on the client's side of the network that counts blocking round trips: how often the server speaks after the
client did. On the client's side, and with a delay behind it, questions that are asked at once count once.

    python -m bench.turns LISTEN_PORT SERVER_ADDRESS SERVER_PORT

Writes the number so far to its output after every turn, eight digits in place, over all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys


class Turns:
    """Counts, and shows the count in a file that others read."""

    def __init__(self, shown: int) -> None:
        self.n = 0
        self._shown = shown
        self.show()

    def show(self) -> None:
        os.pwrite(self._shown, b"%08d" % self.n, 0)


async def _serve(port: int, address: str, server_port: int, turns: Turns) -> None:
    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(address, server_port)
        asked = False

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, asks: bool) -> None:
            nonlocal asked
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 18):
                    if asks:
                        asked = True
                    elif asked:
                        asked = False
                        turns.n += 1
                        turns.show()
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, far_writer, True), pump(far_reader, writer, False))

    server = await asyncio.start_server(carry, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Turns(sys.stdout.fileno())))
