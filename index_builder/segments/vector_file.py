"""A segment's vectors on disk: mapped where all of them are read, read row by row where few are."""

import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from shard_router.errors import SegmentCorrupt


class VectorFile:
    """float32 [rows, dim], row-major little-endian; safe to read from many threads."""

    def __init__(self, path: Path, rows: int, dim: int) -> None:
        """Open and map it. OSError; ValueError where it is not of that size."""
        self._path, self._dim = path, dim
        self._row_bytes = dim * 4
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        #: All of them; what is touched of it counts as this process's memory until it is let go.
        self.mapped = np.frombuffer(self._map, "<f4").reshape(rows, dim)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows, int64 [...], as float32 [..., dim]; where a row is -1, any.

        Read with a call each: a page fault would map what lies around a row too, 40 times its size, and a
        few thousand searches all there is. SegmentCorrupt where the file has become shorter.
        """
        file, row_bytes = self._file, self._row_bytes
        places = np.maximum(rows, 0).ravel() * row_bytes
        read = b"".join([os.pread(file, row_bytes, place) for place in places.tolist()])
        if len(read) != len(places) * row_bytes:
            raise SegmentCorrupt(str(self._path.parent), f"{self._path.name} ends early")
        return np.frombuffer(read, "<f4").reshape(*rows.shape, self._dim)

    def release(self) -> None:
        """Let go of the mapped pages in memory; they are mapped again from the file when next read."""
        self._map.madvise(mmap.MADV_DONTNEED)
