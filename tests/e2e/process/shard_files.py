"""The segment files of a data directory: whether they are whole, how many there were, how to damage them."""

import contextlib
from pathlib import Path
from random import Random

from index_builder.segments import manifest
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt
from shard_router.model import Schema


class ShardFiles:
    """What every shard of a data directory keeps on disk."""

    def __init__(self, data_dir: Path, schema: Schema) -> None:
        self._root, self._schema = data_dir / "segments", schema

    def written(self) -> int:
        """How many segments were ever written: they are numbered. A rewrite counts as one."""
        return sum(max(map(_number, found), default=0) for found in self._by_shard("segment-*"))

    def merged(self) -> int:
        """Segments that hold more than one sealed memtable did."""
        return self.written() - sum(len(found) for found in self._by_shard("segment-*"))

    def kinds(self) -> set[IndexKind]:
        """What the segments are searched with; those are left out that go while it is looked."""
        kinds = set()
        for segment in self._root.glob("*/shard-*/segment-*"):
            with contextlib.suppress(SegmentCorrupt, OSError):
                kinds.add(Segment.open(segment, self._schema, verify=False).kind)
        return kinds

    def quarantined(self) -> list[Path]:
        """Damaged segments that were set aside."""
        return [path for found in self._by_shard("quarantined-*") for path in found]

    def half_written(self) -> set[Path]:
        """Segments that somebody is writing at this moment."""
        return set(self._root.glob("*/shard-*/.*.part"))

    def require_whole(self) -> int:
        """Nobody writes: of every shard the newest manifest reads, and so does every byte it names.

        Returns how many segments that are.
        """
        checked = 0
        for found in self._by_shard("manifest-*"):
            newest = found[0].with_name(manifest.newest_first([path.name for path in found])[0])
            for entry in manifest.decode(newest.read_bytes()).segments:
                segment = Segment.open(newest.with_name(entry.name), self._schema, verify=True)
                assert segment.rows == entry.rows == len(entry.dead_rows())
                checked += 1
        return checked

    def damage(self, rng: Random) -> list[Path]:
        """Nobody writes: a flipped bit in one segment of every shard, a torn file in another where there is
        one; what was damaged."""
        damaged = []
        for found in self._by_shard("segment-*"):
            for segment, tear in zip(rng.sample(found, min(2, len(found))), (False, True), strict=False):
                file = rng.choice([path for path in segment.iterdir() if path.stat().st_size])
                content = bytearray(file.read_bytes())
                if tear:
                    del content[rng.randrange(len(content)) :]
                else:
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                file.write_bytes(content)
                self._require_noticed(segment)
                damaged.append(segment)
        return damaged

    def _require_noticed(self, segment: Path) -> None:
        try:
            Segment.open(segment, self._schema, verify=True)
        except SegmentCorrupt:
            return
        raise AssertionError(f"{segment} is damaged, and opens")

    def _by_shard(self, pattern: str) -> list[list[Path]]:
        """The paths of that name in every shard's directory that has any."""
        found = (sorted(shard.glob(pattern)) for shard in self._root.glob("*/shard-*"))
        return [paths for paths in found if paths]


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
