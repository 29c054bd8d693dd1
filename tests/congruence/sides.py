"""What the cases of both sides share."""

from collections.abc import Awaitable, Callable

from services.gateway.endpoints import ShardEndpoint
from shard_router.model import AttributeType

#: An attribute of every type.
SCHEMA = {
    "rank": AttributeType.INT,
    "name": AttributeType.KEYWORD,
    "share": AttributeType.FLOAT,
    "free": AttributeType.BOOL,
    "released": AttributeType.TIMESTAMP,
    "tags": AttributeType.KEYWORDS,
}
OpenShard = Callable[[], Awaitable[ShardEndpoint]]
