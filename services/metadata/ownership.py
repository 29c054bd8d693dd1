"""One service at a time: the claim to a database, and which log it holds."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from services import tasks
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


@dataclass(frozen=True, slots=True)
class Belonging:
    """What a database is that is no home: whose, and which by name."""

    service: uuid.UUID
    name: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a write has to carry, and what it makes: versions of `term` in log `log_id`.

    Each time the claim is taken it is another one, and stands in every counter's row. A write that carries
    an older one, whoever sent it and however long it was on its way, writes nothing.
    """

    id: uuid.UUID
    log_id: str
    term: int
    #: Of the server, its timeline and the database in it.
    identity: str


class Ownership:
    """The claim of this process to its database, kept as long as it can be kept.

    A session advisory lock on a connection of its own says who may take it: the server drops the lock with
    the process. When the connection is lost it is taken again; until then `require` refuses. That a write
    already under way does not slip in is for the counters' rows to see to (see Claim).
    """

    def __init__(self, arguments: dict[str, object], belonging: Belonging | None = None) -> None:
        """belonging: what the database is to be, or to become if it is new; None for a home."""
        self._arguments = arguments
        self._belonging = belonging
        #: Whose database it is; known once the claim was taken.
        self.service = uuid.UUID(int=0)
        self._connection: Connection | None = None
        self._watch: asyncio.Task[None] | None = None
        #: Why the claim is not held; None while it is.
        self._lost: str | None = "not taken yet"
        #: Set while the claim is held.
        self._taken = asyncio.Event()
        #: Set by `doubt`, until the claim is taken again.
        self._doubted = asyncio.Event()
        self._claim = Claim(uuid.UUID(int=0), "", 0, "")

    async def take(self, wait_s: float, say: Callable[[str], None]) -> None:
        """Wait for the server, claim the database, bring its schema up to date.

        `say` hears why it is waited, as soon as it is. Raises StartupRefused.
        """
        self._connection = await self._connect(wait_s, say)
        await self._check_server(self._connection)
        if not await self._lock(self._connection, LOCK_WAIT_S):
            raise StartupRefused(f"{self._where()} is already in use by another Ringfort service.")
        await self._prepare(self._connection)
        self._watch = asyncio.create_task(self._keep(), name="metadata-ownership")

    def take_later(self, why: str) -> None:
        """Go on trying in the background; `why` it could not be taken so far."""
        self._lost = why
        self._watch = asyncio.create_task(self._keep(), name="metadata-ownership")

    async def taken(self) -> None:
        """Return while the claim is held."""
        await self._taken.wait()

    @property
    def claim(self) -> Claim:
        """The claim that was taken last, held or not."""
        return self._claim

    async def require(self, left_s: float) -> Claim:
        """The claim, while it is held; waits a moment for it to be taken again, then StorageUnavailable."""
        if self._lost is None:
            return self._claim
        try:
            async with asyncio.timeout(min(left_s, REGAIN_WAIT_S)):
                await self._taken.wait()
        except TimeoutError:
            raise StorageUnavailable(self._lost or "the claim to the database was lost again") from None
        return self._claim

    def doubt(self, why: str) -> None:
        """Something was seen that cannot be while the claim holds: take it again before the next write."""
        if self._lost is None:
            self._lose(why)
            self._doubted.set()

    async def check_identity(self, connection: Connection) -> None:
        """OperationalError, and a doubt, where a connection leads to another database than the claim's."""
        if await _identity(connection) != self._claim.identity:
            why = "the server, its timeline or the database is another than before"
            self.doubt(why)
            raise psycopg.OperationalError(why)

    @property
    def held(self) -> bool:
        """Whether this process holds the database now."""
        return self._lost is None

    @property
    def lost(self) -> str:
        """Why the claim is not held; empty while it is."""
        return self._lost or ""

    async def close(self) -> None:
        """Let the database go."""
        self._lost = "closed"
        self._taken.clear()
        await tasks.end(self._watch)
        if self._connection is not None:
            await self._connection.close()

    def _where(self) -> str:
        name, host, port = (self._arguments.get(part, "") for part in ("dbname", "host", "port"))
        return f"The database {name!r} at {host}:{port}"

    async def _connect(self, wait_s: float, say: Callable[[str], None]) -> Connection:
        until_s, waiting = time.monotonic() + wait_s, False
        while True:
            try:
                return await psycopg.AsyncConnection.connect(**self._arguments)  # type: ignore[arg-type]
            except psycopg.OperationalError as error:
                refused = any(sign in str(error) for sign in ("authentication failed", "does not exist"))
                if refused or time.monotonic() >= until_s:
                    raise StartupRefused(
                        f"{self._where()} cannot be reached: {first_line(error)}."
                    ) from error
                if not waiting:
                    say(f"{self._where()} does not answer; waiting {wait_s:g} s: {first_line(error)}")
                waiting = True
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

    async def _prepare(self, connection: Connection) -> None:
        """Bring a locked database up to date, see that it is ours, and claim it; StartupRefused."""
        try:
            await migrate(connection, self._where())
            await self._belong(connection)
            await self._confirm(connection)
        except psycopg.Error as error:
            raise StartupRefused(f"{self._where()} cannot be prepared: {first_line(error)}.") from error

    async def _belong(self, connection: Connection) -> None:
        """See that the database is what it is taken for; a new one becomes a partition where wanted."""
        if self._belonging is not None:
            wanted = {"service": self._belonging.service, "name": self._belonging.name}
            await connection.execute(bare_statement("become_partition"), wanted)
        cursor = await connection.execute(bare_statement("service"))
        self.service, partition = await cursor.fetchone() or (self.service, None)
        if self._belonging is None:
            if partition is not None:
                raise StartupRefused(f"{self._where()} is a partition of a service ({partition}).")
        elif partition is None:
            raise StartupRefused(f"{self._where()} is the home of another Ringfort service.")
        elif self.service != self._belonging.service:
            raise StartupRefused(f"{self._where()} is a partition of another Ringfort service.")
        elif partition != self._belonging.name:
            raise StartupRefused(
                f"{self._where()} is the partition {partition!r}, not {self._belonging.name!r}."
            )

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
        identity, claim = await _identity(connection), uuid.uuid4()
        async with connection.transaction():
            await connection.execute(bare_statement("await_writers"))
            cursor = await connection.execute(bare_statement("confirm_log"), {"identity": identity})
            row = await cursor.fetchone()
            assert row is not None, "the migration made this row"
            await connection.execute(bare_statement("claim_counters"), {"claim": claim})
        log_id, term = row
        if self._claim.log_id not in ("", log_id):
            log.warning("the database is another than before: its log is %s, term %d", log_id, term)
        self._claim, self._lost = Claim(claim, log_id, term, identity), None
        self._doubted.clear()
        self._taken.set()

    def _lose(self, why: str) -> None:
        self._taken.clear()
        self._lost = f"the claim to the database was lost: {why}"
        log.warning("%s", self._lost)

    async def _keep(self) -> None:
        while True:
            await self._take_again()
            listening = asyncio.create_task(self._listen())
            doubted = asyncio.create_task(self._doubted.wait())
            try:
                await asyncio.wait((listening, doubted), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (listening, doubted):
                    task.cancel()
                await asyncio.gather(listening, doubted, return_exceptions=True)

    async def _listen(self) -> None:
        """Return when the connection is lost."""
        assert self._connection is not None
        try:
            while True:
                async for _ in self._connection.notifies(timeout=PROBE_S):
                    pass
                await self._connection.execute(bare_statement("ping"))
        except Exception as error:
            if self._lost is None:
                self._lose(first_line(error))
            if not isinstance(error, psycopg.Error):
                log.exception("the claim's connection failed")

    async def _take_again(self) -> None:
        """Return once the claim is held."""
        pause_s = FIRST_PAUSE_S
        while self._lost is not None:
            try:
                if self._connection is not None:
                    await self._connection.close()
                self._connection = await self._connect(0.0, log.debug)
                await self._claim_again(self._connection)
            except (StartupRefused, psycopg.Error) as error:
                log.debug("the database is still away: %s", error)
            if self._lost is not None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _claim_again(self, connection: Connection) -> None:
        """Claim a database that answers; where it may not be taken, say why."""
        try:
            await self._check_server(connection)
            # The server may not have noticed yet that our last connection is gone.
            if not await self._lock(connection, LOCK_WAIT_S):
                raise StartupRefused(f"{self._where()} was taken over by another Ringfort service")
            await self._prepare(connection)
        except StartupRefused as refused:
            if self._lost != str(refused):
                self._lost = str(refused)
                log.error("%s", self._lost)
            return
        log.info("the claim to the database is held again")


class BorrowedClaim(Ownership):
    """A claim that another process holds, as that one told it: good to read by, and to write with."""

    def __init__(self) -> None:
        super().__init__({})

    def tell(self, claim: Claim) -> None:
        """The holder's present claim."""
        if claim != self._claim:
            self._claim, self._lost = claim, None
            self._taken.set()

    async def check_identity(self, connection: Connection) -> None:
        """As of every claim; a connection made before the holder was heard waits for it."""
        try:
            async with asyncio.timeout(REGAIN_WAIT_S):
                await self._taken.wait()
        except TimeoutError:
            raise psycopg.OperationalError("the claim to the database was not told yet") from None
        await super().check_identity(connection)


async def _identity(connection: Connection) -> str:
    cursor = await connection.execute(bare_statement("identity"))
    row = await cursor.fetchone()
    assert row is not None, "it is asked of the database it is about"
    return str(row[0])
