"""One segment out of several: their live rows, in order, written anew.

Large merges run in a child process, `python -m index_builder.segments.merge`: in a thread, the rows they
make one by one would hold up everything else that runs Python. The child is niced, is told its job on
standard input, and ends when that closes, so it never outlives who started it.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import msgspec
import numpy as np

from index_builder.segments.contents import Draft
from index_builder.segments.segment import Segment
from shard_router.model import AttributeType, Schema

_NICE = 10
#: Vectors copied at once.
_BLOCK_ROWS = 4096


class _Job(msgspec.Struct, frozen=True):
    directory: str
    #: Each segment's directory, and its rows as little-endian int64.
    sources: list[tuple[str, bytes]]
    schema: dict[str, AttributeType]


def merge(directory: Path, sources: Sequence[tuple[Segment, np.ndarray]], schema: Schema) -> Segment | None:
    """Write the named rows of each source as one segment, in the order given; None where there are none.

    sources: segments of one metric and dimension, each with row numbers int64 [n]. OSError where the
    disk is full or fails; nothing is left behind then.
    """
    if not any(len(picks) for _, picks in sources):
        return None
    draft = Draft.joined([(segment.contents, picks) for segment, picks in sources], schema)
    covers = (
        min(segment.covers[0] for segment, _ in sources),
        max(segment.covers[1] for segment, _ in sources),
    )
    metric = sources[0][0].metric
    return Segment.write_draft(directory, draft, _vectors(sources), metric, schema, covers=covers)


def _vectors(sources: Sequence[tuple[Segment, np.ndarray]]) -> Iterator[np.ndarray]:
    """The picked vectors, a block at a time, without keeping what was read in memory."""
    for segment, picks in sources:
        for start in range(0, len(picks), _BLOCK_ROWS):
            yield segment.vectors[picks[start : start + _BLOCK_ROWS]]
        segment.release_vectors()


async def merge_in_child(
    directory: Path, sources: Sequence[tuple[Segment, np.ndarray]], schema: Schema
) -> Segment | None:
    """`merge`, in a child process. OSError with the child's last words where it fails.

    Cancelled, it ends the child, which leaves at most a draft that the next write removes.
    """
    job = _Job(
        str(directory),
        [(str(segment.directory), picks.astype("<i8").tobytes()) for segment, picks in sources],
        dict(schema),
    )
    body = msgspec.msgpack.encode(job)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    assert child.stderr is not None
    try:
        child.stdin.write(len(body).to_bytes(8, "little") + body)
        words = await child.stderr.read()
        if await child.wait() != 0:
            last = words.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the merge ended with {child.returncode}: {last}")
    finally:
        child.stdin.close()
        if child.returncode is None:
            child.kill()
            await child.wait()
    if not await asyncio.to_thread(directory.exists):
        return None
    return await asyncio.to_thread(Segment.open, directory, schema, False)


def _main() -> None:
    """The child: one job from standard input."""
    os.nice(_NICE)
    faiss.omp_set_num_threads(1)
    given = sys.stdin.buffer
    job = msgspec.msgpack.decode(given.read(int.from_bytes(given.read(8), "little")), type=_Job)

    def end_with_parent() -> None:
        # Past the buffer, whose lock the interpreter wants at its end.
        os.read(given.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    sources = [
        (Segment.open(Path(path), job.schema, verify=True), np.frombuffer(rows, "<i8"))
        for path, rows in job.sources
    ]
    merge(Path(job.directory), sources, job.schema)


if __name__ == "__main__":
    _main()
