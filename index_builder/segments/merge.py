"""One segment out of several: their live rows, in order, written anew."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from index_builder.segments.segment import Segment
from shard_router.model import Schema


def merge(directory: Path, sources: Sequence[tuple[Segment, np.ndarray]], schema: Schema) -> Segment | None:
    """Write the named rows of each source as one segment, in the order given; None where there are none.

    sources: segments of one metric and dimension, each with row numbers int64 [n]. OSError where the
    disk is full or fails; nothing is left behind then.
    """
    rows = [segment.log_row(row) for segment, picks in sources for row in picks.tolist()]
    if not rows:
        return None
    vectors = np.concatenate([segment.vectors[picks] for segment, picks in sources])
    covers = (
        min(segment.covers[0] for segment, _ in sources),
        max(segment.covers[1] for segment, _ in sources),
    )
    return Segment.write(directory, rows, vectors, sources[0][0].metric, schema, covers=covers)
