"""The slow network passes every byte in order, later."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loadtests.drive.proxy import SlowProxy


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it is sent, by its port; all it does has ended afterwards."""
    ended: list[asyncio.Event] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(asyncio.Event())
        done = ended[-1]
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            done.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        for each in ended:
            await asyncio.wait_for(each.wait(), 30)


async def test_bytes_pass_in_order_and_are_delayed_each_way() -> None:
    async with echo() as port, SlowProxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        sent = bytes(range(256)) * 4_000
        writer.write(sent)
        assert await asyncio.wait_for(reader.readexactly(len(sent)), 30) == sent
        proxy.delay_s = 0.1
        began = time.monotonic()
        writer.write(b"late")
        assert await asyncio.wait_for(reader.readexactly(4), 30) == b"late"
        assert time.monotonic() - began >= 0.2
        proxy.delay_s = 0.0
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        await writer.wait_closed()


async def test_where_the_server_is_away_the_connection_ends(free_port: int) -> None:
    async with SlowProxy("127.0.0.1", free_port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        await writer.wait_closed()


async def test_leaving_it_ends_what_is_under_way() -> None:
    async with echo() as port:
        async with SlowProxy("127.0.0.1", port) as proxy:
            proxy.delay_s = 60.0
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"never")
            await writer.drain()
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        await writer.wait_closed()
