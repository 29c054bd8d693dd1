"""Connections to Postgres, with the driver's errors told as the service's."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import msgspec
import psycopg
import psycopg_pool
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import set_json_loads

from services.telemetry import stage
from shard_router.errors import DeadlineExceeded, Overloaded, StorageUnavailable

log = logging.getLogger(__name__)

Connection = psycopg.AsyncConnection[psycopg.rows.TupleRow]

_POOL, _POSTGRES = stage("pool"), stage("postgres")

#: Callers that may wait for a connection; beyond it they are refused.
WAITING_LIMIT = 256
#: Whoever stops in the middle of a transaction keeps others from the log that it writes to for no longer.
STOPPED_MS = 2_000
#: A server that gives no connection for so long is away.
CONNECT_WAIT_S = 2.0
#: A connection is tried for so long, with growing pauses; after that anew, as soon as somebody wants one.
RECONNECT_S = 5.0
#: What the server says when it ends a connection: nothing that was asked last is known to have happened.
HANG_UPS = (errors.AdminShutdown, errors.CrashShutdown, errors.CannotConnectNow, errors.DatabaseDropped)
#: Every statement of the room finds its rows by index, also while a table is new and its statistics are
#: missing or wrong; so its plan can be made once.
BY_INDEX = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
}


def connection_arguments(url: str, statement_timeout_ms: int) -> dict[str, object]:
    """Arguments of every connection of the room: its schema, its timeout, quick notice of a dead server."""
    given = conninfo_to_dict(url)
    settings = {
        "search_path": "ringfort",
        "statement_timeout": str(statement_timeout_ms),
        "idle_in_transaction_session_timeout": str(STOPPED_MS),
        "default_transaction_isolation": r"read\ committed",
        "client_min_messages": "warning",
        "jit": "off",
    } | BY_INDEX
    return {
        "application_name": "ringfort",
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        **given,
        "client_encoding": "utf-8",
        "options": " ".join(
            [str(given.get("options", "")), *(f"-c {k}={v}" for k, v in settings.items())]
        ).strip(),
        "autocommit": True,
    }


def first_line(error: BaseException) -> str:
    """What an error says, without the driver's further lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hung_up(error: psycopg.Error, connection: Connection) -> bool:
    """Whether the connection was lost, so that the fate of what was sent is unknown."""
    return connection.closed or isinstance(error, HANG_UPS)


@asynccontextmanager
async def piped_transaction(connection: Connection) -> AsyncIterator[psycopg.AsyncPipeline]:
    """A transaction whose statements travel together; before an answer is read, and at the end, `sync` it.

    Else the server takes whoever is stopped there for busy, and never ends that transaction: it looks at the
    time only after a Sync with nothing behind it, and the driver's own transactions flush once more.
    """
    async with connection.pipeline() as pipeline:
        await connection.execute("BEGIN", prepare=False)
        try:
            yield pipeline
        except BaseException:
            with suppress(psycopg.Error):  # of a connection that was lost there is nothing to roll back
                await connection.rollback()
            raise
        await connection.execute("COMMIT", prepare=False)


@contextmanager
def told_as_ours() -> Iterator[None]:
    """Turns the driver's errors into StorageUnavailable, DeadlineExceeded or Overloaded; data errors pass."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded("database") from None
    except errors.QueryCanceled as error:
        raise DeadlineExceeded("database") from error
    except psycopg_pool.TooManyRequests as error:
        raise Overloaded("the queue for a database connection", WAITING_LIMIT) from error
    except (errors.ProgramLimitExceeded, errors.DataError):
        raise
    except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
        raise StorageUnavailable(first_line(error)) from error


class Database:
    """A bounded pool of connections to one database.

    A connection whose server hung up is noticed before it is lent. A statement ends at the caller's
    deadline or at the statement timeout, whichever comes first.
    """

    def __init__(
        self,
        arguments: dict[str, object],
        *,
        pool_size: int,
        statement_timeout_ms: int,
        check_identity: Callable[[Connection], Awaitable[None]],
    ) -> None:
        """`check_identity` raises OperationalError where a new connection leads elsewhere than it should."""

        async def configure(connection: Connection) -> None:
            set_json_loads(msgspec.json.decode, connection)
            await check_identity(connection)

        self._limit_s = statement_timeout_ms / 1000 + 1.0
        self._pool: psycopg_pool.AsyncConnectionPool[Connection] = psycopg_pool.AsyncConnectionPool(
            kwargs=arguments,
            min_size=max(1, pool_size // 2),
            max_size=pool_size,
            max_waiting=WAITING_LIMIT,
            configure=configure,
            check=_check,
            reconnect_timeout=RECONNECT_S,
            open=False,
            name="metadata",
        )

    async def open(self) -> None:
        """Start connecting; the first caller waits for what is not there yet."""
        await self._pool.open()

    async def close(self) -> None:
        """Give every connection back; callers that still wait get StorageUnavailable."""
        await self._pool.close()

    @asynccontextmanager
    async def connection(self, left_s: float | None = None) -> AsyncIterator[Connection]:
        """A connection for one piece of work of at most `left_s` seconds.

        Raises StorageUnavailable (no server, or it went away), DeadlineExceeded, Overloaded.
        """
        limit_s = self._limit_s if left_s is None else min(left_s, self._limit_s)
        until_s = asyncio.get_running_loop().time() + limit_s
        asked_s = time.perf_counter()
        with told_as_ours():
            async with self._pool.connection(timeout=min(limit_s, CONNECT_WAIT_S)) as connection:
                lent_s = time.perf_counter()
                _POOL.took(lent_s - asked_s)
                try:
                    async with asyncio.timeout_at(until_s):
                        yield connection
                finally:
                    _POSTGRES.took(time.perf_counter() - lent_s)

    def stats(self) -> dict[str, float]:
        """The pool as it is now."""
        now = self._pool.get_stats()
        return {
            "pool_connections": float(now.get("pool_size", 0)),
            "pool_available": float(now.get("pool_available", 0)),
            "pool_waiting": float(now.get("requests_waiting", 0)),
        }


async def _check(connection: Connection) -> None:
    # Reads what lies in the socket, which on an idle connection is a goodbye: a system call, no round trip.
    # The second call sees the end of file behind the server's last words.
    for _ in range(2):
        connection.pgconn.consume_input()
    if connection.closed:
        raise psycopg.OperationalError("the server closed the connection")
