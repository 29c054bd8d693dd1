"""A slow network: a TCP proxy before one server that can add a delay to everything that passes.

Bytes keep their order and their number; each piece read is passed on `delay_s` after it came. At most
`BUFFERED` pieces of one way wait; beyond that it reads no further, as a full network would.
"""

import asyncio
import contextlib
import time
from types import TracebackType

PIECE_BYTES = 64 * 1024
BUFFERED = 1_024


class SlowProxy:
    """Listens on a free port of 127.0.0.1 and forwards to (host, port); an asynchronous context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        #: Added to each way, in seconds; may be changed at any time.
        self.delay_s = 0.0
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> "SlowProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        connections = dict(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        for writer in connections.values():
            writer.close()  # of one that was cancelled before it began

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The server would log a cancelled handler as an error; so the connection has a task of its own.
        task = asyncio.create_task(self._connection(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._connections.pop)

    async def _connection(self, near: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        far_writer: asyncio.StreamWriter | None = None
        try:
            far, far_writer = await asyncio.open_connection(self._host, self._port)
            ways = (
                asyncio.create_task(self._way(near, far_writer)),
                asyncio.create_task(self._way(far, near_writer)),
            )
            try:
                await asyncio.wait(ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # the server is away; the client sees its connection end
        finally:
            writers = [writer for writer in (near_writer, far_writer) if writer is not None]
            for writer in writers:
                writer.close()
            for writer in writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFERED)

        async def read() -> None:
            with contextlib.suppress(OSError):
                while piece := await reader.read(PIECE_BYTES):
                    await passing.put((time.monotonic() + self.delay_s, piece))
            await passing.put((time.monotonic() + self.delay_s, b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                due_s, piece = await passing.get()
                if (left_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(left_s)
                if not piece:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass  # the other end has gone
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
