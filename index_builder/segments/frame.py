"""Small records that prove themselves: a magic word, a format version and a checksum before the body."""

import struct

import xxhash

from shard_router.errors import SegmentCorrupt

#: magic, format version, xxh3_64 of version and body.
_HEAD = struct.Struct("<4sIQ")


def seal(magic: bytes, version: int, body: bytes) -> bytes:
    """The record of a body; `unseal` gives it back. magic: 4 bytes."""
    return _HEAD.pack(magic, version, _checksum(version, body)) + body


def unseal(magic: bytes, newest: int, record: bytes, name: str) -> bytes:
    """The body of a record. SegmentCorrupt(name) where it is torn, damaged, or newer than `newest`."""
    if len(record) < _HEAD.size:
        raise SegmentCorrupt(name, f"{len(record)} bytes are too few")
    found, version, checksum = _HEAD.unpack_from(record)
    body = record[_HEAD.size :]
    if found != magic:
        raise SegmentCorrupt(name, f"begins with {found!r}, not {magic!r}")
    if checksum != _checksum(version, body):
        raise SegmentCorrupt(name, "the checksum does not match")
    if version > newest:
        raise SegmentCorrupt(name, f"format {version} is newer than {newest}, the newest known here")
    return body


def _checksum(version: int, body: bytes) -> int:
    digest = xxhash.xxh3_64(version.to_bytes(4, "little"))
    digest.update(body)
    return digest.intdigest()
