"""Hashes that outlive a release: an id's slot, and the digest behind every content key.

Both are XXH3 (https://github.com/Cyan4973/xxHash). Stored data depends on them, so golden vectors
are committed with the tests.
"""

from collections.abc import Iterable

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_digest


def slot_of(id: str, slots: int) -> int:
    """The slot of an id, the same on every machine and in every release: xxh3_64(UTF-8 id) mod slots."""
    return xxh3_64_intdigest(id.encode()) % slots


def hashes_of(ids: Iterable[bytes]) -> np.ndarray:
    """xxh3_64 of each id's UTF-8, uint64 [n]."""
    return np.fromiter(map(xxh3_64_intdigest, ids), dtype=np.uint64)


def slots_of(ids: Iterable[str], slots: int) -> np.ndarray:
    """slot_of of each id, int32 [n]."""
    return (hashes_of(id.encode() for id in ids) % np.uint64(slots)).astype(np.int32)


def digest(*parts: bytes) -> bytes:
    """16 bytes that two different sequences of parts do not share: xxh3_128, each part after its length.

    Fast, not cryptographic: keys of what one tenant asked must carry the tenant as a part.
    """
    framed = (piece for part in parts for piece in (len(part).to_bytes(8, "little"), part))
    return xxh3_128_digest(b"".join(framed))
