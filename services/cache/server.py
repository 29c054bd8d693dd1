"""One Redis server: its connections, and the commands that the cache gives it."""

from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AskError, ClusterDownError, InvalidResponse, MovedError, RedisError

from services.cache.redis_url import RedisUrl
from services.cache.slots import Address
from services.cache.survey import Numbers

#: A command and its arguments.
Command = tuple[Any, ...]


class Server:
    """A standalone server. Every method raises RedisError, OSError or TimeoutError when it fails."""

    def __init__(self, url: RedisUrl, address: Address, *, connections: int, op_timeout_ms: int) -> None:
        self.address = address
        pool = url.pool(address, connections=connections, op_timeout_ms=op_timeout_ms)
        self._redis = Redis.from_pool(pool)

    async def get(self, keys: Sequence[bytes]) -> Sequence[object]:
        """What it has of the keys, in order: bytes, None, or an error of one key."""
        replies = await self._redis.mget(keys)
        return _matching(replies, len(keys))

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to the commands of one pipeline, in order; what it refuses is a ResponseError there."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)

    async def ping(self) -> None:
        """Whether it answers."""
        await self._redis.ping()

    async def numbers(self) -> Numbers:
        """Its figures; ResponseError where it forbids us to ask."""
        memory, stats = await self._redis.info("memory"), await self._redis.info("stats")
        return Numbers(
            entries=int(await self._redis.dbsize()),
            bytes=int(memory["used_memory"]),
            evicted=int(stats["evicted_keys"]),
            expired=int(stats["expired_keys"]),
        )

    async def slots(self) -> Sequence[Any]:
        """Its reply to CLUSTER SLOTS."""
        reply: Sequence[Any] = await self._redis.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
        return reply

    async def close(self) -> None:
        """Ends every connection."""
        await self._redis.aclose()


class ClusterServer(Server):
    """A server of a Cluster: where a key is on another one by now, it is asked there, once.

    `other` gives the server at an address, None where we do not know it; `moved` hears that a slot has
    another owner.
    """

    def __init__(
        self,
        url: RedisUrl,
        address: Address,
        *,
        connections: int,
        op_timeout_ms: int,
        other: Callable[[Address], "ClusterServer | None"],
        moved: Callable[[int, Address], None],
    ) -> None:
        super().__init__(url, address, connections=connections, op_timeout_ms=op_timeout_ms)
        self._other = other
        self._moved = moved

    async def get(self, keys: Sequence[bytes]) -> Sequence[object]:
        """As of one server; keys of different slots cannot share an MGET."""
        return await self.run([("GET", key) for key in keys])

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """As of one server, redirections followed; fails as a whole where the Cluster is down here."""
        replies = _matching(await super().run(commands), len(commands))
        elsewhere: dict[Address, list[int]] = {}
        for i, reply in enumerate(replies):
            if isinstance(reply, AskError):  # MOVED is one, too
                owner = (reply.host or self.address[0], reply.port)
                elsewhere.setdefault(owner, []).append(i)
                if isinstance(reply, MovedError):
                    self._moved(reply.slot_id, owner)
        for owner, places in elsewhere.items():
            server = self._other(owner)
            if server is None:
                continue
            try:
                found = await server._redirected([commands[i] for i in places])
            except (RedisError, OSError):
                continue  # the redirection stays the answer; that server's health is judged by its own work
            for i, reply in zip(places, found, strict=True):
                replies[i] = reply
        if replies and all(isinstance(reply, ClusterDownError) for reply in replies):
            raise replies[0]
        return replies

    async def _redirected(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands that another server sent here; ASKING lets them into a slot on its way."""
        asking: list[Command] = []
        for command in commands:
            asking += [("ASKING",), command]
        return _matching(await Server.run(self, asking), len(asking))[1::2]


def _matching(replies: object, count: int) -> list[Any]:
    if not isinstance(replies, list) or len(replies) != count:
        raise InvalidResponse(f"{count} requests were not answered with as many replies")
    return replies
