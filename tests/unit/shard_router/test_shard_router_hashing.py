"""Hashes hold stored data together: they may never change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_router.hashing import digest, slot_of, slots_of

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("vector", GOLDEN["slots"], ids=lambda vector: ascii(vector["id"])[:20])
def test_an_id_keeps_its_slot(vector: dict[str, Any]) -> None:
    assert {slots: slot_of(vector["id"], int(slots)) for slots in vector["slots"]} == vector["slots"]


def test_the_slot_is_the_published_xxh3_64() -> None:
    # XXH3_64bits of no bytes, from the reference implementation's test vectors.
    assert slot_of("", 2**61) == 0x2D06800538D394C2 % 2**61


def test_many_slots_at_once_are_the_same_slots() -> None:
    ids = [vector["id"] for vector in GOLDEN["slots"]]
    slots = slots_of(iter(ids), 128)
    assert slots.dtype == np.int32
    assert slots.tolist() == [slot_of(id, 128) for id in ids]
    assert slots_of([], 128).shape == (0,)


@pytest.mark.parametrize("vector", GOLDEN["digests"], ids=lambda vector: str(len(vector["parts"])))
def test_digests_stay(vector: dict[str, Any]) -> None:
    assert digest(*(part.encode() for part in vector["parts"])).hex() == vector["digest"]


def test_a_digest_tells_where_its_parts_end() -> None:
    splits = [(), (b"",), (b"", b""), (b"abc",), (b"ab", b"c"), (b"a", b"bc"), (b"", b"abc"), (b"abc", b"")]
    digests = [digest(*parts) for parts in splits]
    assert len(set(digests)) == len(splits)
    assert {len(value) for value in digests} == {16}
