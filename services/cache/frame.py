"""How values lie in Redis: MessagePack [format version, xxh3_64 of the payload, payload].

Redis is shared with other writers and other releases: what does not check out is a miss, never an
error. Elements may be added at the end; anything else takes a new format version.
"""

import msgspec
from xxhash import xxh3_64_intdigest

FORMAT_VERSION = 1


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag=FORMAT_VERSION, gc=False):
    checksum: int
    payload: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Frame)


def seal(payload: bytes) -> bytes:
    """The payload in its frame, some 15 bytes longer."""
    return _encoder.encode(_Frame(xxh3_64_intdigest(payload), payload))


def unseal(data: bytes) -> bytes | None:
    """The payload; None where the frame is foreign, cut short or damaged."""
    try:
        frame = _decoder.decode(data)
    except msgspec.DecodeError:
        return None
    return frame.payload if frame.checksum == xxh3_64_intdigest(frame.payload) else None
