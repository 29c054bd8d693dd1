"""Keys of the two kinds of entry, the same on every machine and in every release that reads `rf1`.

Everything that an entry depends on is part of its key, except what changes with every write: an
answer carries its positions inside and validates itself (envelope.py).

The digest is BLAKE2b, not a faster hash without a secret: embeddings are shared by all tenants, and nobody
may be able to make two texts that share a key.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

EMBEDDING_PREFIX = b"rf1:e:"
ANSWER_PREFIX = b"rf1:a:"
COPY_PREFIX = b"rf1+"
#: Where gateways tell each other what is hot.
HOT_KEYS = b"rf1:h"
LEASE_PREFIX = b"rf1:l:"
#: All leases lie in so few slots of a Cluster, so that many of them are few calls there.
LEASE_SLOTS = 16


def _told(*parts: bytes) -> bytes:
    """Length-prefixed parts, so that no two lists of parts read alike."""
    return b"".join([b"%d:%b" % (len(part), part) for part in parts])


def _digest(*parts: bytes) -> bytes:
    """16 bytes of BLAKE2b."""
    return hashlib.blake2b(_told(*parts), digest_size=16).digest()


def embedding_key(variant: str, input_type: str, dimensions: int, truncate: bool, text: str) -> bytes:
    """The key of one text's embedding, shared by all tenants; 22 bytes. `dimensions` 0 is the model's own."""
    return EMBEDDING_PREFIX + _digest(
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
    return answer_keys(collection_uid, tenant, generation, schema_version, ranker_version, (query,), options)[
        0
    ]


def answer_keys(
    collection_uid: int,
    tenant: str,
    generation: int,
    schema_version: int,
    ranker_version: str,
    queries: Iterable[bytes],
    options: bytes,
) -> list[bytes]:
    """The same for many queries that have everything else in common."""
    prefix = ANSWER_PREFIX + b"%d:" % collection_uid
    common = hashlib.blake2b(
        _told(tenant.encode(), b"%d" % generation, b"%d" % schema_version, ranker_version.encode()),
        digest_size=16,
    )
    rest = _told(options)
    keys = []
    for query in queries:
        state = common.copy()
        state.update(b"%d:%b%b" % (len(query), query, rest))
        keys.append(prefix + state.digest())
    return keys


def lease_key(key: bytes, positions: Mapping[str, int]) -> bytes:
    """The name of the right to compute what a key stands for, as of at least these positions of its logs."""
    told = (b"%b:%d" % (log_id.encode(), position) for log_id, position in sorted(positions.items()))
    digest = _digest(key, *told)
    return LEASE_PREFIX + b"{%d}" % (digest[0] % LEASE_SLOTS) + digest


class Named(NamedTuple):
    """What a key tells: `embedding` or `answer`, the answer's collection, and the digest of all the rest."""

    kind: str
    collection_uid: int | None
    digest: str


def named(key: bytes) -> Named | None:
    """What a key tells of itself; None for what is no key of ours."""
    try:
        if key.startswith(EMBEDDING_PREFIX):
            return Named("embedding", None, key[len(EMBEDDING_PREFIX) :].hex())
        if key.startswith(ANSWER_PREFIX):
            uid, digest = key[len(ANSWER_PREFIX) :].split(b":", 1)
            return Named("answer", int(uid), digest.hex())
    except ValueError:
        pass
    return None


def copy_of(key: bytes, number: int) -> bytes:
    """The name of a copy of a hot key, in another slot of a Cluster; 0 is the key itself."""
    return COPY_PREFIX + b"%d:" % number + key if number else key


def original_of(name: bytes) -> bytes:
    """The key that a name is a copy of, or is."""
    return name.split(b":", 1)[1] if name.startswith(COPY_PREFIX) else name
