"""How a client reaches the service: address, credentials, retries, keepalive."""

import json
import os

import grpc

Metadata = tuple[tuple[str, str | bytes], ...]

DEFAULT_SERVER = "127.0.0.1:7700"
SERVER_VARIABLE = "RINGFORT_SERVER"
DEFAULT_TIMEOUT_S = 30.0

#: Methods that gRPC may send again while the service is away: reads, and writes that say a whole state.
REPEATABLE = (
    "CollectionService/Get",
    "CollectionService/List",
    "CollectionService/SetAlias",
    "DocumentService/Upsert",
    "DocumentService/Patch",
    "DocumentService/Delete",
    "DocumentService/Get",
    "DocumentService/Scan",
    "DocumentService/Count",
    "EmbeddingService/Embed",
    "EmbeddingService/Rerank",
    "SearchService/Search",
    "SearchService/BatchSearch",
    "SearchService/Recommend",
    "IndexService/GetJob",
    "IndexService/ListJobs",
    "ModelService/List",
    "ClusterService/Describe",
    "ClusterService/HotKeys",
    "ClusterService/CacheStats",
)

#: https://grpc.io/docs/guides/service-config, https://github.com/grpc/proposal/blob/master/A6-client-retries.md
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": f"ringfort.v1.{service}", "method": method}
                    for service, method in (name.split("/") for name in REPEATABLE)
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A restarted service is found again within seconds, not after gRPC's own two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A page of long documents with their vectors, or a large BatchSearch.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)


def server_address(server: str | None) -> str:
    """The address given, or RINGFORT_SERVER, or 127.0.0.1:7700."""
    return server or os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER


def options(*, retries: bool) -> list[tuple[str, str | int]]:
    """The options of a channel, with retries or without."""
    if retries:
        return [*_OPTIONS, ("grpc.service_config", _SERVICE_CONFIG)]
    return [*_OPTIONS, ("grpc.enable_retries", 0)]


def credentials(tls: bool | grpc.ChannelCredentials | None) -> grpc.ChannelCredentials | None:
    """Credentials for a channel: none, the system's roots (True), or those given."""
    if isinstance(tls, bool):
        return grpc.ssl_channel_credentials() if tls else None
    return tls


def metadata(api_key: str | None) -> Metadata:
    """What every call carries."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
