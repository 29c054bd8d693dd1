import msgspec
import numpy as np
import pytest

from index_builder.segments import frame, manifest
from index_builder.segments.compaction import FACTOR, MAX_ROWS, SegmentFacts, choose
from index_builder.segments.device import resolve
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
    assert SegmentEntry.of("a", dead).dead_rows().tolist() == dead.tolist()
    alive = np.zeros(rows, bool)
    assert SegmentEntry.of("a", alive).dead == b""
    assert SegmentEntry.of("a", alive).dead_rows().tolist() == alive.tolist()


def test_a_bitmap_of_another_length_is_refused() -> None:
    with pytest.raises(SegmentCorrupt, match="no bitmap of 9 rows"):
        SegmentEntry("a", 9, b"\x01").dead_rows()


def test_names_sort_as_generations_do() -> None:
    names = [manifest.file_name(generation) for generation in (9, 10, 100)]
    assert manifest.newest_first([*names, "segment-1", ".manifest-1.part"]) == names[::-1]


def facts(*sizes: tuple[int, int]) -> list[SegmentFacts]:
    return [SegmentFacts(number, rows, live) for number, (rows, live) in enumerate(sizes)]


def test_segments_of_like_size_are_merged_once_there_are_enough() -> None:
    assert choose(facts(*[(8192, 8192)] * (FACTOR - 1))) == ()
    assert choose(facts(*[(8192, 8192)] * (FACTOR + 1))) == tuple(range(FACTOR))


def test_a_large_segment_is_not_rewritten_for_small_ones() -> None:
    assert choose(facts((65_536, 65_536), *[(8192, 8192)] * FACTOR)) == tuple(range(1, FACTOR + 1))
    assert choose(facts(*[(65_536, 65_536)] * 3, *[(8192, 8192)] * 5)) == ()


def test_no_merge_makes_a_segment_too_large() -> None:
    assert choose(facts(*[(MAX_ROWS // FACTOR + 1, MAX_ROWS // FACTOR + 1)] * FACTOR)) == ()


def test_a_mostly_dead_segment_is_rewritten_the_deadest_first() -> None:
    assert choose(facts((100, 50))) == ()
    assert choose(facts((100, 49), (100, 10), (100, 100))) == (1,)
    assert choose(facts((100, 0))) == (0,)


def test_a_steady_load_ends_in_few_segments_and_bounded_work() -> None:
    segments: dict[int, int] = {}
    written, number = 0, 0
    for _ in range(FACTOR**3):
        segments[number] = 100
        number += 1
        while chosen := choose([SegmentFacts(n, rows, rows) for n, rows in segments.items()]):
            rows = sum(segments.pop(n) for n in chosen)
            segments[number] = rows
            written += rows
            number += 1
    assert len(segments) <= 3 * (FACTOR - 1)
    assert written <= 3 * 100 * FACTOR**3


def test_the_cpu_is_the_device_and_others_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("auto") == resolve("cpu") == "cpu"
    assert not caplog.records
    assert resolve("cuda:1") == "cpu"
    assert "cuda:1" in caplog.text
    with pytest.raises(ValueError, match="tpu"):
        resolve("tpu")
