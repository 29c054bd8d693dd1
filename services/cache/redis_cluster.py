"""The second tier on a Redis Cluster: one `RedisTier` for each of its servers, keys routed by slot.

Every server has its own lanes and its own breaker, so one that is away costs its own keys and no others.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from services import tasks
from services.cache.background import start
from services.cache.keys import copy_of, original_of
from services.cache.reads import NOTHING, Values
from services.cache.redis_tier import CONNECTIONS, RedisTier, described, wait
from services.cache.redis_url import CONNECT_TIMEOUT_MS, RedisUrl
from services.cache.server import ClusterServer
from services.cache.slots import Address, SlotTable, slot_of

logger = logging.getLogger(__name__)

#: Besides a server's own work: redirections that other servers' lanes follow to it.
_REDIRECTIONS = 8
#: How often the Cluster is asked for its slots; sooner when it redirects us or a server goes away, but
#: never more often than the pause.
REFRESH_EVERY_S, REFRESH_PAUSE_S = 10.0, 0.2
#: How often a Cluster is looked for of which no server has answered yet.
SEARCH_EVERY_S = 1.0
#: Copies of a hot key, each in a slot of its own. A gateway reads one of them and writes them all.
COPIES = 4


class RedisCluster:
    """Values by key on a Cluster, which one of the URL's servers tells of."""

    def __init__(
        self,
        url: RedisUrl,
        on_value: Callable[[bytes, bytes], None],
        *,
        op_timeout_ms: int,
        max_pending: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._on_value = on_value
        self._op_timeout_ms, self._max_pending = op_timeout_ms, max_pending
        self._rng, self._clock = rng, clock
        self._table = SlotTable()
        #: Those that own slots, and those of which redirections told us.
        self._nodes: dict[Address, RedisTier] = {}
        self._stale = asyncio.Event()
        #: Set once it was looked for, found or not.
        self._looked = asyncio.Event()
        self._away = False
        self._refresher: asyncio.Task[None] | None = None
        #: Counters of servers that left the Cluster.
        self._left: Counter[str] = Counter()
        self._moved = 0
        #: Keys whose slot nobody owned.
        self._ownerless = 0
        self._hot: frozenset[bytes] = frozenset()
        #: The copy of hot keys that this gateway reads; 0 is the key itself.
        self._copy = rng.randrange(COPIES)

    async def open(self) -> None:
        """As of any second tier."""
        self._refresher = start(self._keep_fresh())
        await wait(self._looked, CONNECT_TIMEOUT_MS / 1000)

    async def close(self) -> None:
        """As of any second tier."""
        await tasks.end(self._refresher)
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    async def fetch(self, keys: Sequence[bytes]) -> Values:
        """As of any second tier."""
        if not (self._copy and self._hot):
            return await self._fetch(keys)
        names = {key: copy_of(key, self._copy) if key in self._hot else key for key in keys}
        found = await self._fetch(list(names.values()))
        values = {key: found[name] for key, name in names.items() if name in found}
        # A gateway that does not know yet that a key is hot writes the key alone.
        rest = [key for key, name in names.items() if name != key and key not in values]
        return {**values, **await self._fetch(rest)} if rest else values

    async def _fetch(self, keys: Sequence[bytes]) -> Values:
        fetches = []
        for address, mine in self._table.group(keys).items():
            node = self._nodes.get(address) if address else None
            if node is None:
                self._ownerless += len(mine)
            else:
                fetches.append(node.fetch(mine))
        if len(fetches) <= 1:
            return await fetches[0] if fetches else NOTHING
        values: dict[bytes, bytes] = {}
        for found in await asyncio.gather(*fetches):
            values.update(found)
        return values

    def offer(self, key: bytes, payload: bytes, ttl_s: float | None) -> None:
        """As of any second tier."""
        copies = range(COPIES if key in self._hot else 1)
        for name in (copy_of(key, number) for number in copies):
            if (node := self._node_of(name)) is not None:
                node.offer(name, payload, ttl_s)

    async def run(self, key: bytes, *command: Any) -> Any:
        """As of any second tier."""
        node = self._node_of(key)
        if node is None:
            raise RedisConnectionError("no server of the cluster is known to own the key's slot")
        return await node.run(key, *command)

    async def evaluate(self, script: str, keys: Sequence[bytes], *arguments: Any) -> bytes:
        """As of any second tier; a call for each slot, as none may have keys of two."""
        slots: dict[int, list[bytes]] = {}
        for key in keys:
            slots.setdefault(slot_of(key), []).append(key)
        told = await asyncio.gather(
            *(self.run(mine[0], "EVAL", script, len(mine), *mine, *arguments) for mine in slots.values())
        )
        said: dict[bytes, int] = {}
        for mine, reply in zip(slots.values(), told, strict=True):
            said.update(zip(mine, reply, strict=True))
        return bytes(said[key] for key in keys)

    def spread(self, hot: frozenset[bytes]) -> None:
        """From now on these keys have copies in several slots."""
        self._hot = hot

    def _node_of(self, key: bytes) -> RedisTier | None:
        owner = self._table.owner(key)
        return self._nodes.get(owner) if owner else None

    def _other(self, address: Address) -> ClusterServer | None:
        node = self._nodes.get(address)
        if node is None:
            self._stale.set()
            return None
        assert isinstance(node.server, ClusterServer), "a Cluster's servers are all made here"
        return node.server if node.health.allows else None

    def _redirected(self, slot: int, owner: Address) -> None:
        self._moved += 1
        if owner in self._nodes:
            self._table.moved(slot, owner)
        self._stale.set()

    async def _keep_fresh(self) -> None:
        while True:
            self._stale.clear()
            await self._refresh()
            self._looked.set()
            await asyncio.sleep(REFRESH_PAUSE_S)
            await wait(self._stale, REFRESH_EVERY_S if self._nodes else SEARCH_EVERY_S)

    async def _refresh(self) -> None:
        """Takes over the Cluster's own word on who owns what: servers that came are opened, others closed."""
        told = await self._ask_for_slots()
        if told is None:
            if not self._nodes and not self._away:
                self._away = True
                logger.warning("redis is away, going on without it: no server of the cluster tells its slots")
            return
        self._away = False
        came = told.addresses - self._nodes.keys()
        for address in came:
            self._nodes[address] = self._node(address)
        await asyncio.gather(*(self._nodes[address].open() for address in came))
        self._table = told
        gone = [self._nodes.pop(address) for address in self._nodes.keys() - told.addresses]
        for node in gone:
            self._left.update({name: v for name, v in node.stats().items() if name.endswith("_total")})
        await asyncio.gather(*(node.close() for node in gone))

    async def _ask_for_slots(self) -> SlotTable | None:
        """The table of the first server that answers, those first that were well when last heard of."""
        nodes = sorted(self._nodes.values(), key=lambda node: not node.health.allows)
        seeds = [self._server(address) for address in self._url.seeds]
        try:
            for server in (*(node.server for node in nodes), *seeds):
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_MS / 1000):
                        table = SlotTable.of(await server.slots(), server.address)
                except Exception as error:  # whatever went wrong, the next one may know
                    logger.debug("%s:%d did not tell the cluster's slots: %s", *server.address, error)
                else:
                    if table.addresses:
                        return table
        finally:
            await asyncio.gather(*(server.close() for server in seeds))
        return None

    def _server(self, address: Address) -> ClusterServer:
        return ClusterServer(
            self._url,
            address,
            connections=CONNECTIONS + _REDIRECTIONS,
            op_timeout_ms=self._op_timeout_ms,
            other=self._other,
            moved=self._redirected,
        )

    def _node(self, address: Address) -> RedisTier:
        return RedisTier(
            self._server(address),
            self._take,
            op_timeout_ms=self._op_timeout_ms,
            max_pending=self._max_pending,
            rng=self._rng,
            clock=self._clock,
            on_outage=self._stale.set,
        )

    def _take(self, name: bytes, value: bytes) -> None:
        self._on_value(original_of(name), value)

    def describe(self) -> dict[str, int | str]:
        """As of any second tier; `partly` where some of the servers are away."""
        allowed = {node.health.allows for node in self._nodes.values()}
        state = "partly" if len(allowed) == 2 else "up" if allowed == {True} else "down"
        return described(self.stats(), state)

    def stats(self) -> Mapping[str, float]:
        """As of any second tier: sums over the servers."""
        sums: Counter[str] = Counter(self._left)
        for node in self._nodes.values():
            sums.update(node.stats())
        sums["redis_up"] = bool(self._nodes) and all(n.health.allows for n in self._nodes.values())
        sums["redis_misses_total"] += self._ownerless
        sums["redis_cluster_servers"] = len(self._nodes)
        sums["redis_cluster_moved_total"] = self._moved
        return sums
