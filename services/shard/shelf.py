"""A replica's directory: manifests, segments, and nothing else for long.

Whatever the newest usable manifest does not name is left from a crash and removed. A damaged segment is
set aside under another name for people to look at; the log has everything it held.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index_builder.segments import files, manifest
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.manifest import Manifest, SegmentEntry
from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt
from shard_router.model import Collection

log = logging.getLogger(__name__)

_SEGMENT, _QUARANTINED = "segment-", "quarantined-"
#: Damaged segments kept for inspection; older ones are removed, for the disk is not theirs.
_QUARANTINED_MOST = 2
#: An older manifest still helps while its segments exist.
_MANIFESTS_KEPT = 2
#: Segments opened at once.
_OPENERS = 4


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the directory held.

    `position`: the log has to be read from there. `slots`: of which every document up to there is here, or is
    missing; None where that was not written down. `segments`: each with its dead rows (bool [rows]) and
    the kind it was written to be; their vectors are not verified yet. `missing`: spans (after, upto] of
    the log up to the position whose documents lay in segments that are damaged or gone.
    """

    position: int
    segments: Sequence[tuple[Segment, np.ndarray, IndexKind]]
    missing: Sequence[tuple[int, int]]
    slots: Sequence[int] | None = None


class Shelf:
    """Reads and writes the directory; its methods block, and one thread at a time calls them."""

    def __init__(self, directory: Path, collection: Collection, log_id: str, device: str) -> None:
        self.directory, self._collection, self._log_id, self._device = directory, collection, log_id, device
        self._generation = 0
        self._last_segment = 0
        #: Segments found damaged.
        self.quarantined = 0

    def recover(self) -> Recovered:
        """Open the newest complete manifest of this log and space; position 0 and nothing without one.

        A damaged segment is set aside; what it held is among what is missing.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self.directory.iterdir()]
        numbers = [int(digits) for name in names if (digits := name.rpartition("-")[2]).isdigit()]
        self._generation = self._last_segment = max(numbers, default=0)
        found: tuple[Manifest, Recovered] | None = None
        for name in manifest.newest_first(names):
            try:
                candidate = manifest.decode((self.directory / name).read_bytes(), name)
                if (candidate.log_id, candidate.space) != (self._log_id, self._collection.space):
                    log.warning(
                        "%s is of log %s, space %s: left out", name, candidate.log_id, candidate.space
                    )
                    continue
                found = candidate, self._open(candidate)
                break
            except (SegmentCorrupt, OSError) as error:
                log.error("cannot recover from %s: %s", name, error)
        keep = set()
        if found is not None:
            keep = {manifest.file_name(found[0].generation), *(entry.name for entry in found[0].segments)}
        for path in list(self.directory.iterdir()):
            if path.name not in keep and not path.name.startswith(_QUARANTINED):
                _remove(path)
        return Recovered(0, (), ()) if found is None else found[1]

    def new_segment(self) -> Path:
        """A directory for the next segment; it does not exist."""
        self._last_segment += 1
        return self.directory / f"{_SEGMENT}{self._last_segment:016d}"

    def publish(self, position: int, entries: Sequence[SegmentEntry], slots: Sequence[int]) -> None:
        """Make these the segments to recover these slots from, at `position`. OSError where that fails."""
        generation = self._generation + 1
        space = self._collection.space
        made = Manifest(generation, self._log_id, position, space, tuple(entries), tuple(slots))
        files.replace(self.directory / manifest.file_name(generation), manifest.encode(made))
        self._generation = generation
        names = manifest.newest_first([path.name for path in self.directory.iterdir()])
        self.drop(names[_MANIFESTS_KEPT:])

    def drop(self, names: Sequence[str]) -> None:
        """Remove files that no manifest in use names; what cannot be removed now is at recovery."""
        for name in names:
            _remove(self.directory / name)

    def quarantine(self, name: str) -> None:
        """Set a damaged segment aside under another name; its documents are in the log."""
        self.quarantined += 1
        path = self.directory / name
        aside = path.with_name(_QUARANTINED + name)
        if path.exists():
            _remove(aside)
            path.rename(aside)
        for old in sorted(self.directory.glob(f"{_QUARANTINED}*"))[:-_QUARANTINED_MOST]:
            _remove(old)

    def _open(self, candidate: Manifest) -> Recovered:
        """Its segments; one that is damaged is set aside. Several at once, for most of it is reading."""
        with ThreadPoolExecutor(_OPENERS, "open segments") as threads:
            opened = list(threads.map(self._open_segment, candidate.segments))
        segments: list[tuple[Segment, np.ndarray, IndexKind]] = []
        missing: list[tuple[int, int]] = []
        for entry, found in zip(candidate.segments, opened, strict=True):
            if isinstance(found, Segment):
                segments.append((found, entry.dead_rows(), entry.kind))
                continue
            log.error("segment %s is set aside and its documents read from the log: %s", entry.name, found)
            self.quarantine(entry.name)
            missing.append(entry.covers or (0, candidate.position))
        return Recovered(candidate.position, segments, missing, candidate.slots)

    def _open_segment(self, entry: SegmentEntry) -> Segment | SegmentCorrupt:
        path = self.directory / entry.name
        expected = (entry.rows, self._collection.dim, self._collection.metric)
        try:
            segment = Segment.open(
                path, self._collection.schema, verify=True, vectors_too=False, device=self._device
            )
            if (segment.rows, segment.dim, segment.metric) != expected:
                raise SegmentCorrupt(str(path), f"is not of {expected}")
            return segment
        except SegmentCorrupt as error:
            return error


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
