"""One service at a time: the claim to a database, and which log it holds."""

import asyncio
import logging
import time

import psycopg

from services.metadata.database import Connection, first_line
from services.metadata.schema import OLDEST_SERVER, StartupRefused, migrate
from services.metadata.statements import bare_statement
from shard_router.errors import StorageUnavailable

log = logging.getLogger(__name__)

#: Advisory lock of the service ("ringfort" in ASCII); advisory locks are per database.
LOCK_KEY = int.from_bytes(b"ringfort", "big")
#: A killed predecessor's lock goes when its server process notices.
LOCK_WAIT_S = 2.0
#: An idle claim is checked this often, for a server that vanished without a word.
PROBE_S = 30.0
#: A writer waits so long for a lost claim to be taken again.
REGAIN_WAIT_S = 2.0
#: Pauses between attempts to reconnect.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class Ownership:
    """The claim of this process to its database, kept as long as it can be kept.

    A session advisory lock on a connection of its own: the server drops it with the process. When the
    connection is lost it is taken again; until then `require` refuses, so two services never both write.
    """

    def __init__(self, arguments: dict[str, object]) -> None:
        self._arguments = arguments
        self._connection: Connection | None = None
        self._watch: asyncio.Task[None] | None = None
        #: Why the claim is not held; None while it is.
        self._lost: str | None = "not taken yet"
        #: Set while the claim is held.
        self._taken = asyncio.Event()
        self.log_id = ""

    async def take(self, wait_s: float) -> None:
        """Wait for the server, claim the database, bring its schema up to date.

        Raises StartupRefused.
        """
        self._connection = await self._connect(wait_s)
        await self._check_server(self._connection)
        if not await self._lock(self._connection, LOCK_WAIT_S):
            raise StartupRefused(f"{self._where()} is already in use by another Ringfort service.")
        try:
            await migrate(self._connection, self._where())
        except psycopg.Error as error:
            raise StartupRefused(f"{self._where()} cannot be prepared: {first_line(error)}.") from error
        await self._confirm(self._connection)
        self._watch = asyncio.create_task(self._keep(), name="metadata-ownership")

    async def require(self, left_s: float) -> None:
        """Return while the claim is held; wait a moment for it to be taken again, then StorageUnavailable."""
        if self._lost is None:
            return
        try:
            async with asyncio.timeout(min(left_s, REGAIN_WAIT_S)):
                await self._taken.wait()
        except TimeoutError:
            raise StorageUnavailable(self._lost or "the claim to the database was lost again") from None

    @property
    def held(self) -> bool:
        """Whether this process holds the database now."""
        return self._lost is None

    async def close(self) -> None:
        """Let the database go."""
        self._lost = "closed"
        self._taken.clear()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._connection is not None:
            await self._connection.close()

    def _where(self) -> str:
        name, host, port = (self._arguments.get(part, "") for part in ("dbname", "host", "port"))
        return f"The database {name!r} at {host}:{port}"

    async def _connect(self, wait_s: float) -> Connection:
        until_s = time.monotonic() + wait_s
        while True:
            try:
                return await psycopg.AsyncConnection.connect(**self._arguments)  # type: ignore[arg-type]
            except psycopg.OperationalError as error:
                refused = any(sign in str(error) for sign in ("authentication failed", "does not exist"))
                if refused or time.monotonic() >= until_s:
                    raise StartupRefused(
                        f"{self._where()} cannot be reached: {first_line(error)}."
                    ) from error
            await asyncio.sleep(FIRST_PAUSE_S)

    async def _check_server(self, connection: Connection) -> None:
        cursor = await connection.execute(bare_statement("server_facts"))
        version, encoding, _ = await cursor.fetchone() or (0, "", False)
        if version < OLDEST_SERVER:
            raise StartupRefused(
                f"{self._where()} runs PostgreSQL {version // 10_000}; "
                f"{OLDEST_SERVER // 10_000} or newer is needed."
            )
        if encoding != "UTF8":
            raise StartupRefused(f"{self._where()} is encoded in {encoding}; UTF8 is needed.")

    async def _lock(self, connection: Connection, wait_s: float) -> bool:
        until_s = time.monotonic() + wait_s
        while True:
            cursor = await connection.execute(bare_statement("take_service_lock"), {"key": LOCK_KEY})
            row = await cursor.fetchone()
            if row is not None and row[0]:
                return True
            if time.monotonic() >= until_s:
                return False
            await asyncio.sleep(FIRST_PAUSE_S)

    async def _confirm(self, connection: Connection) -> None:
        cursor = await connection.execute(bare_statement("confirm_log"))
        row = await cursor.fetchone()
        assert row is not None, "the migration made this row"
        if self.log_id not in ("", row[0]):
            log.warning("the database is another than before: its log is %s", row[0])
        self.log_id, self._lost = row[0], None
        self._taken.set()

    async def _keep(self) -> None:
        while True:
            assert self._connection is not None
            try:
                async for _ in self._connection.notifies(timeout=PROBE_S):
                    pass
                await self._connection.execute(bare_statement("ping"))
            except Exception as error:
                self._taken.clear()
                self._lost = f"the claim to the database was lost: {first_line(error)}"
                log.warning("%s", self._lost, exc_info=not isinstance(error, psycopg.Error))
                await self._take_again()

    async def _take_again(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._lost is not None:
            try:
                assert self._connection is not None
                await self._connection.close()
                self._connection = await self._connect(0.0)
                if await self._lock(self._connection, 0.0):
                    await self._confirm(self._connection)
                    log.info("the claim to the database is held again")
                else:
                    self._lost = f"{self._where()} was taken over by another Ringfort service"
                    log.error("%s", self._lost)
            except (StartupRefused, psycopg.Error) as error:
                log.debug("the database is still away: %s", error)
            if self._lost is not None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
