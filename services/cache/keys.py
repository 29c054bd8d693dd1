"""Keys of the two kinds of entry, the same on every machine and in every release that reads `rf1`.

Everything that an entry depends on is part of its key, except what changes with every write: an
answer carries its positions inside and validates itself (envelope.py).
"""

from shard_router.hashing import digest

EMBEDDING_PREFIX = b"rf1:e:"
ANSWER_PREFIX = b"rf1:a:"


def embedding_key(variant: str, input_type: str, dimensions: int, truncate: bool, text: str) -> bytes:
    """The key of one text's embedding, shared by all tenants; 22 bytes. `dimensions` 0 is the model's own."""
    return EMBEDDING_PREFIX + digest(
        variant.encode(), input_type.encode(), b"%d" % dimensions, b"%d" % truncate, text.encode()
    )


def answer_key(
    collection_uid: int,
    tenant: str,
    generation: int,
    schema_version: int,
    ranker_version: str,
    query: bytes,
    options: bytes,
) -> bytes:
    """The key of one answer of one tenant; keys of a collection share the prefix `rf1:a:{uid}:`.

    `query` and `options` are canonical bytes (the filter's digest, k, effort, what is included).
    """
    return (
        ANSWER_PREFIX
        + b"%d:" % collection_uid
        + digest(
            tenant.encode(),
            b"%d" % generation,
            b"%d" % schema_version,
            ranker_version.encode(),
            query,
            options,
        )
    )
