"""Some rows of an immutable block, in each form that a search wants them in."""

import numpy as np

#: Vectors are kept with a set where they come to no more than this.
_KEPT_BYTES = 4 << 20
#: Two lists of rows, int64, that lie in each other's place.
Swap = tuple[np.ndarray, np.ndarray]


class RowSet:
    """Which rows of a block may be found; counted once, and each form of it made once, when asked for.

    Never changes, and safe to read from many threads: two may make a form at once, and make the same.
    """

    __slots__ = ("_bitmap", "_kept_bytes", "_rows", "_vectors", "count", "mask")

    def __init__(self, mask: np.ndarray, kept_dim: int = 0) -> None:
        """kept_dim: the dimension of the rows' vectors where few of them may be kept, 0 where none are."""
        #: bool [rows]; not to be changed.
        self.mask = mask
        #: How many rows are in it.
        self.count = int(np.count_nonzero(mask))
        self._rows: np.ndarray | None = None
        self._bitmap: np.ndarray | None = None
        self._vectors: np.ndarray | None = None
        vectors_bytes = 4 * kept_dim * self.count
        self._kept_bytes = vectors_bytes if vectors_bytes <= _KEPT_BYTES else 0

    def intersection(self, other: "RowSet", kept_dim: int = 0) -> "RowSet":
        """The rows that are in both."""
        return RowSet(self.mask & other.mask, kept_dim)

    @property
    def rows(self) -> np.ndarray:
        """The row numbers, ascending, int64 [count]."""
        if self._rows is None:
            self._rows = np.flatnonzero(self.mask)
        return self._rows

    def vectors(self, block: np.ndarray) -> np.ndarray:
        """The rows' vectors, float32 [count, dim], out of the block's [rows, dim]; the same at every call.

        Copying them out takes four times as long as scoring them, so where they may they are kept.
        """
        if self._vectors is not None:
            return self._vectors
        vectors: np.ndarray = block[self.rows]
        if self._kept_bytes:
            self._vectors = vectors
        return vectors

    @property
    def share(self) -> float:
        """The part of all rows that is in it."""
        return self.count / max(1, len(self.mask))

    def bitmap(self, swap: Swap | None = None) -> np.ndarray:
        """A bit a row, least significant first, uint8 [rows / 8, rounded up].

        swap: rows that an index has in each other's place; the same at every call, for a set is of one
        block and that has one index.
        """
        if self._bitmap is None:
            mask = self.mask
            if swap is not None:
                mask = mask.copy()
                mask[swap[0]], mask[swap[1]] = self.mask[swap[1]], self.mask[swap[0]]
            self._bitmap = np.packbits(mask, bitorder="little")
        return self._bitmap

    @property
    def nbytes(self) -> int:
        """Bytes it may come to hold: numbers are asked for of sets that are not large."""
        numbers_bytes = 8 * min(self.count, len(self.mask) // 4)
        return len(self.mask) + len(self.mask) // 8 + numbers_bytes + self._kept_bytes
