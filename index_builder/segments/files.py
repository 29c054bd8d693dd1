"""Files that are whole or absent: written beside their place, forced to disk, then renamed into it."""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import xxhash

_CHUNK_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must look like: its size and the xxh3_128 of its bytes."""

    size_bytes: int
    digest: bytes


def write(path: Path, buffers: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file and force it to disk. OSError where the disk is full or fails."""
    digest, size_bytes = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for buffer in buffers:
            digest.update(buffer)
            size_bytes += file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes, digest.digest())


def record(path: Path) -> FileRecord:
    """What the file looks like now. OSError where it cannot be read."""
    digest, size_bytes = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileRecord(size_bytes, digest.digest())


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
