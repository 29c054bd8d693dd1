"""Where Redis is, and how to get in: what a URL says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.cache.slots import Address

#: A new connection may take this long, in the background; callers wait op_timeout_ms at most.
CONNECT_TIMEOUT_MS = 1_000
CLUSTER = "+cluster"
DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """`redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]`, `rediss://` with TLS, `unix://`, or a Cluster.

    A Cluster is `redis+cluster://` or `rediss+cluster://` with one or more HOST:PORT, separated by commas,
    any of which tells of the others. Query parameters are the client's, as in
    `?ssl_ca_certs=/etc/ca.pem`.
    """

    #: Where to begin; one unless it is a Cluster.
    seeds: Sequence[Address]
    cluster: bool
    #: Of every connection, but for its address.
    _options: dict[str, Any]

    @classmethod
    def parse(cls, url: str) -> "RedisUrl":
        """What the URL says; ValueError, without what is secret in it, where it is none."""
        scheme, _, rest = url.partition("://")
        cluster = scheme.endswith(CLUSTER)
        if not cluster:
            options: dict[str, Any] = dict(parse_url(url))
            return cls([_popped(options)], False, options)
        netloc, slash, path = rest.partition("/")
        login, at, hosts = netloc.rpartition("@")
        seeds = []
        for host in hosts.split(","):
            try:
                parts = urlsplit(f"//{host}")
                seeds.append((parts.hostname or "", parts.port or DEFAULT_PORT))
            except ValueError:
                seeds.append(("", 0))
            if not seeds[-1][0]:
                raise ValueError(f"a Cluster's URL names HOST:PORT,HOST:PORT, not {host!r}")
        options = dict(parse_url(f"{scheme.removesuffix(CLUSTER)}://{login}{at}localhost{slash}{path}"))
        _popped(options)
        if options.pop("db", 0) != 0:
            raise ValueError("a Cluster has database 0 only")
        return cls(seeds, True, options)

    def pool(self, address: Address, *, connections: int, op_timeout_ms: int) -> ConnectionPool:
        """Connections to one server, so many at most.

        RESP2 and no driver name: a new connection costs no round trip beyond AUTH. Retries are the
        breaker's business.
        """
        place: dict[str, Any] = {"host": address[0], "port": address[1]}
        if "path" in self._options:  # a socket in the file system has neither
            place = {}
        return ConnectionPool(
            **self._options,
            **place,
            max_connections=connections,
            protocol=2,
            driver_info=None,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=op_timeout_ms / 1000,
            socket_connect_timeout=CONNECT_TIMEOUT_MS / 1000,
            socket_read_size=256 * 1024,
        )


def _popped(options: dict[str, Any]) -> Address:
    return options.pop("host", "localhost"), options.pop("port", DEFAULT_PORT)
