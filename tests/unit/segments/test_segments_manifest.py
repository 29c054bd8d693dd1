import msgspec
import numpy as np
import pytest

from index_builder.segments import frame, manifest
from index_builder.segments.device import resolve
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.manifest import Manifest, SegmentEntry
from shard_router.errors import SegmentCorrupt

MANIFEST = Manifest(3, "log-1", 77, "vectors:3", (SegmentEntry("segment-1", 9, b"\x01\x01"),))


def test_a_manifest_is_read_back() -> None:
    assert manifest.decode(manifest.encode(MANIFEST)) == MANIFEST


def test_any_damage_and_any_tear_is_found() -> None:
    whole = manifest.encode(MANIFEST)
    for at in range(len(whole)):
        with pytest.raises(SegmentCorrupt):
            manifest.decode(whole[:at])
        with pytest.raises(SegmentCorrupt):
            manifest.decode(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])


def test_fields_of_a_later_release_are_ignored_and_missing_ones_refused() -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(MANIFEST))
    later = frame.seal(b"RFMF", 1, msgspec.msgpack.encode({**fields, "writer": "9.9"}))
    assert manifest.decode(later) == MANIFEST
    del fields["position"]
    with pytest.raises(SegmentCorrupt, match="position"):
        manifest.decode(frame.seal(b"RFMF", 1, msgspec.msgpack.encode(fields)))
    with pytest.raises(SegmentCorrupt, match="newer"):
        manifest.decode(frame.seal(b"RFMF", 2, msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_dead_rows_are_read_back(rows: int) -> None:
    dead = np.arange(rows) % 3 == 0
    assert entry(dead).dead_rows().tolist() == dead.tolist()
    alive = np.zeros(rows, bool)
    assert entry(alive).dead == b""
    assert entry(alive).dead_rows().tolist() == alive.tolist()


def test_an_entry_of_an_earlier_release_is_flat_and_tells_no_span() -> None:
    whole = Manifest(1, "log-1", 7, "vectors:3", (entry(np.zeros(3, bool)),))
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(whole))
    assert manifest.decode(manifest.encode(whole)) == whole
    for name in ("kind", "covers"):
        del fields["segments"][0][name]
    [read] = manifest.decode(frame.seal(b"RFMF", 1, msgspec.msgpack.encode(fields))).segments
    assert (read.kind, read.covers) == (IndexKind.FLAT, None)


def entry(dead: np.ndarray) -> SegmentEntry:
    return SegmentEntry.of("a", dead, IndexKind.HNSW, (3, 9))


def test_a_bitmap_of_another_length_is_refused() -> None:
    with pytest.raises(SegmentCorrupt, match="no bitmap of 9 rows"):
        SegmentEntry("a", 9, b"\x01").dead_rows()


def test_names_sort_as_generations_do() -> None:
    names = [manifest.file_name(generation) for generation in (9, 10, 100)]
    assert manifest.newest_first([*names, "segment-1", ".manifest-1.part"]) == names[::-1]


def test_the_cpu_is_the_device_and_others_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("auto") == resolve("cpu") == "cpu"
    assert not caplog.records
    assert resolve("cuda:1") == "cpu"
    assert "cuda:1" in caplog.text
    with pytest.raises(ValueError, match="tpu"):
        resolve("tpu")
