"""What a replica's files are at one moment: its segments, which of their rows are dead, and how far.

Each change of the set of segments writes the next generation of the manifest; the newest that is
complete wins. Rows that died after it was written are found again in the log, which is read from
`position` on, so a manifest may know of later deaths than its position, never of fewer.
"""

import msgspec
import numpy as np

from index_builder.segments import frame
from index_builder.segments.index_spec import IndexKind
from shard_router.errors import SegmentCorrupt

_MAGIC, _FORMAT = b"RFMF", 1
_PREFIX = "manifest-"


class SegmentEntry(msgspec.Struct, frozen=True):
    """One segment; `dead` is a bitmap of its rows, least significant bit first, empty for none."""

    name: str
    rows: int
    dead: bytes
    #: What it was written to be, whatever came of it.
    kind: IndexKind = IndexKind.FLAT
    #: Its documents come from the positions (after, upto] of the log; None where that was not written down.
    covers: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, dead: np.ndarray, kind: IndexKind, covers: tuple[int, int]) -> "SegmentEntry":
        """The entry of a segment with these dead rows, bool [rows]."""
        bitmap = np.packbits(dead, bitorder="little").tobytes() if dead.any() else b""
        return cls(name, len(dead), bitmap, kind, covers)

    def dead_rows(self) -> np.ndarray:
        """bool [rows]. SegmentCorrupt where the bitmap is of another length."""
        if not self.dead:
            return np.zeros(self.rows, dtype=np.bool_)
        if len(self.dead) != (self.rows + 7) // 8:
            raise SegmentCorrupt(self.name, f"{len(self.dead)} bytes are no bitmap of {self.rows} rows")
        bits = np.unpackbits(np.frombuffer(self.dead, np.uint8), count=self.rows, bitorder="little")
        return bits.astype(np.bool_)


class Manifest(msgspec.Struct, frozen=True):
    """Together the segments hold every document of `slots` as the log had it at `position`.

    They may hold documents of further slots, of which no such thing can be said.
    """

    generation: int
    log_id: str
    position: int
    space: str
    segments: tuple[SegmentEntry, ...]
    #: None where that was not written down: those that the shard had in the collection's first map.
    slots: tuple[int, ...] | None = None


def encode(manifest: Manifest) -> bytes:
    """The manifest's file: MessagePack by field name in a checksummed frame, so fields may be added."""
    return frame.seal(_MAGIC, _FORMAT, msgspec.msgpack.encode(manifest))


def decode(record: bytes, name: str = "manifest") -> Manifest:
    """The manifest of a file's bytes. SegmentCorrupt(name) for anything but what `encode` made."""
    body = frame.unseal(_MAGIC, _FORMAT, record, name)
    try:
        return msgspec.msgpack.decode(body, type=Manifest)
    except msgspec.MsgspecError as error:
        raise SegmentCorrupt(name, str(error)) from error


def file_name(generation: int) -> str:
    """The name of a generation's file; names sort as generations do."""
    return f"{_PREFIX}{generation:016d}"


def newest_first(names: list[str]) -> list[str]:
    """Those names that are manifests', latest generation first."""
    return sorted((name for name in names if name.startswith(_PREFIX)), reverse=True)
