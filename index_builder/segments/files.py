"""Files that are whole or absent: written beside their place, forced to disk, then renamed into it."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import xxhash

_CHUNK_BYTES = 1 << 20
#: A large file is forced to disk in pieces: one long flush would hold up everybody else's small ones.
_SYNC_BYTES = 16 << 20
#: With less room than this the disk is full.
_ROOM_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must look like: its size and the xxh3_128 of its bytes."""

    size_bytes: int
    digest: bytes


def write(path: Path, buffers: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file and force it to disk. OSError where the disk is full or fails."""
    digest, size_bytes, synced_bytes = xxhash.xxh3_128(), 0, 0
    with path.open("wb") as file:
        for buffer in buffers:
            digest.update(buffer)
            size_bytes += file.write(buffer)
            if size_bytes - synced_bytes >= _SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                synced_bytes = size_bytes
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes, digest.digest())


def record(path: Path, pace: Callable[[int], None] | None = None) -> FileRecord:
    """What the file looks like now. OSError where it cannot be read.

    `pace` is told of every piece that was read, in bytes.
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            if pace is not None:
                pace(len(chunk))
    return FileRecord(size_bytes, digest.digest())


def failure(directory: Path, why: str) -> OSError:
    """What a library that does not say so ran into while it wrote there: a full disk, or something else."""
    room = os.statvfs(directory)
    full = room.f_bavail * room.f_frsize < _ROOM_BYTES
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(errno.EIO, why)


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Put a small file in its place, whole or not at all, even if the machine stops half way."""
    beside = path.with_name(f".{path.name}.part")
    write(beside, [content])
    beside.replace(path)
    sync(path.parent)
