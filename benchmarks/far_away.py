"""A TCP proxy that makes a server on this machine as far away as one elsewhere: each byte arrives later by as much.

    python -m benchmarks.far_away HOST:PORT MILLISECONDS     # prints its own port; runs until killed

Half of the round trip each way. Bandwidth is not limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio import StreamReader, StreamWriter

CHUNK_BYTES = 256 << 10


async def _pass_on(reader: StreamReader, writer: StreamWriter, seconds: float) -> None:
    """Copy what arrives to `writer`, each piece `seconds` after it arrived."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

    async def deliver() -> None:
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                break
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    delivery = asyncio.create_task(deliver())
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            await waiting.put((loop.time() + seconds, data))
    await waiting.put((loop.time() + seconds, b""))
    with contextlib.suppress(ConnectionError, OSError):
        await delivery


async def serve(host: str, port: int, seconds: float) -> None:
    """Listen on a free port, print it, and forward until cancelled. seconds: of one way."""

    async def accept(reader: StreamReader, writer: StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            there_reader, there_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(_pass_on(reader, there_writer, seconds), _pass_on(there_reader, writer, seconds))
            there_writer.close()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    address, _, number = sys.argv[1].rpartition(":")
    asyncio.run(serve(address, int(number), float(sys.argv[2]) / 2000))
