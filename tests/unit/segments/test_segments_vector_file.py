import gc
import os
from pathlib import Path

import numpy as np
import pytest

from index_builder.segments.vector_file import VectorFile
from shard_router.errors import SegmentCorrupt

ROWS, DIM = 4096, 96
VECTORS = np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "vectors").write_bytes(VECTORS.tobytes())
    return tmp_path / "vectors"


def resident_bytes(path: Path) -> int:
    """What this process has mapped of a file, and in memory."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head:
            found = rest[-1:] == [str(path)]
        elif found and head == "Rss:":
            total += int(rest[0]) * 1024
    return total


def test_rows_are_taken_as_they_are_mapped(path: Path) -> None:
    vectors = VectorFile(path, ROWS, DIM)
    rows = np.random.default_rng(4).integers(0, ROWS, (5, 7))
    taken = vectors.take(rows)
    assert taken.shape == (5, 7, DIM)
    assert taken.tobytes() == vectors.mapped[rows].tobytes() == VECTORS[rows].tobytes()
    assert vectors.take(np.zeros((3, 0), np.int64)).shape == (3, 0, DIM)
    assert vectors.take(np.array([-1, 5]))[1].tobytes() == VECTORS[5].tobytes()


def test_taking_rows_maps_nothing_and_scanned_pages_can_be_let_go(path: Path) -> None:
    vectors = VectorFile(path, ROWS, DIM)
    vectors.take(np.arange(ROWS))
    assert resident_bytes(path) == 0
    assert vectors.mapped.sum() == pytest.approx(VECTORS.sum(), rel=1e-3)
    assert resident_bytes(path) >= VECTORS.nbytes
    vectors.release()
    assert resident_bytes(path) == 0


def test_a_file_that_became_shorter_is_corrupt(path: Path) -> None:
    vectors = VectorFile(path, ROWS, DIM)
    os.truncate(path, VECTORS.nbytes - 1)
    with pytest.raises(SegmentCorrupt, match="vectors ends early"):
        vectors.take(np.array([0, ROWS - 1]))
    assert vectors.take(np.array([0])).tobytes() == VECTORS[:1].tobytes()


def test_a_file_of_another_size_is_refused_and_files_are_closed(path: Path) -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="reshape"):
        VectorFile(path, ROWS + 1, DIM)
    vectors = VectorFile(path, ROWS, DIM)
    del vectors
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
