"""One segment out of several: their live rows, in order, written anew.

Large merges run in a child process, `python -m index_builder.segments.merge`: in a thread, the rows they
make one by one would hold up everything else that runs Python. The child is niced, is told its job on
standard input, and ends when that closes, so it never outlives who started it.
"""

import asyncio
import errno
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import faiss
import msgspec
import numpy as np
import psutil

from index_builder.segments.contents import Draft
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt
from shard_router.model import AttributeType, Schema

_NICE = 15
#: A graph is built by so many threads, all else by one: it is short, and its barriers cost more under load.
_GRAPH_THREADS = 2
#: Vectors copied at once.
_BLOCK_ROWS = 4096


class _Job(msgspec.Struct, frozen=True):
    directory: str
    #: Each segment's directory, and its rows as little-endian int64.
    sources: list[tuple[str, bytes]]
    schema: dict[str, AttributeType]
    kind: IndexKind
    device: str


class _Failure(msgspec.Struct, frozen=True):
    errno: int
    why: str
    #: The directory of the damaged segment, where that is the matter.
    corrupt: str


def merge(
    directory: Path,
    sources: Sequence[tuple[Segment, np.ndarray]],
    schema: Schema,
    kind: IndexKind = IndexKind.FLAT,
    device: str = "cpu",
) -> Segment | None:
    """Write the named rows of each source as one segment of a kind; None where there are none.

    sources: segments of one metric and dimension, each with row numbers int64 [n]; the rows keep that
    order. Every source is verified first, for what is written gets checksums of its own: SegmentCorrupt.
    OSError where the disk is full or fails; nothing is left behind then.
    """
    for segment, _ in sources:
        segment.verify()
    if not any(len(picks) for _, picks in sources):
        return None
    draft = Draft.joined([(segment.contents, picks) for segment, picks in sources], schema)
    covers = (
        min(segment.covers[0] for segment, _ in sources),
        max(segment.covers[1] for segment, _ in sources),
    )
    metric = sources[0][0].metric
    return Segment.write_draft(
        directory, draft, _vectors(sources), metric, schema, covers=covers, kind=kind, device=device
    )


def _vectors(sources: Sequence[tuple[Segment, np.ndarray]]) -> Iterator[np.ndarray]:
    """The picked vectors, a block at a time, without keeping what was read in memory."""
    for segment, picks in sources:
        for start in range(0, len(picks), _BLOCK_ROWS):
            yield segment.vectors[picks[start : start + _BLOCK_ROWS]]
        segment.release_vectors()


async def merge_in_child(
    directory: Path,
    sources: Sequence[tuple[Segment, np.ndarray]],
    schema: Schema,
    kind: IndexKind = IndexKind.FLAT,
    device: str = "cpu",
) -> Segment | None:
    """`merge`, in a child process; it raises the same, and OSError with the child's last words otherwise.

    Cancelled, it ends the child, which leaves at most a draft that the next write removes.
    """
    job = _Job(
        str(directory),
        [(str(segment.directory), picks.astype("<i8").tobytes()) for segment, picks in sources],
        dict(schema),
        kind,
        device,
    )
    body = msgspec.msgpack.encode(job)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        child.stdin.write(len(body).to_bytes(8, "little") + body)
        told, words = await asyncio.gather(child.stdout.read(), child.stderr.read())
        if await child.wait() != 0:
            _raise(told, words, child.returncode)
    finally:
        child.stdin.close()
        if child.returncode is None:
            child.kill()
            await child.wait()
    if not await asyncio.to_thread(directory.exists):
        return None
    return await asyncio.to_thread(Segment.open, directory, schema, False, device=device)


def _raise(told: bytes, words: bytes, code: int | None) -> NoReturn:
    """The child's error, as it told it, or of its last words where it could not."""
    if not told:
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"the merge ended with {code}: {last}")
    failure = msgspec.msgpack.decode(told, type=_Failure)
    if failure.corrupt:
        raise SegmentCorrupt(failure.corrupt, failure.why)
    raise OSError(failure.errno, failure.why)


def _main() -> None:
    """The child: one job from standard input; what is the matter goes to standard output."""
    os.nice(_NICE)
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        with suppress(OSError, psutil.Error):
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    given = sys.stdin.buffer
    job = msgspec.msgpack.decode(given.read(int.from_bytes(given.read(8), "little")), type=_Job)
    cpus = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(min(_GRAPH_THREADS, cpus) if job.kind is IndexKind.HNSW else 1)

    def end_with_parent() -> None:
        # Past the buffer, whose lock the interpreter wants at its end.
        os.read(given.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        sources = [
            (Segment.open(Path(path), job.schema, verify=True, vectors_too=False), np.frombuffer(rows, "<i8"))
            for path, rows in job.sources
        ]
        merge(Path(job.directory), sources, job.schema, job.kind, job.device)
    except SegmentCorrupt as error:
        _tell(_Failure(errno.EIO, error.why, error.path))
    except OSError as error:
        _tell(_Failure(error.errno or errno.EIO, error.strerror or str(error), ""))


def _tell(failure: _Failure) -> NoReturn:
    sys.stdout.buffer.write(msgspec.msgpack.encode(failure))
    sys.exit(1)


if __name__ == "__main__":
    _main()
