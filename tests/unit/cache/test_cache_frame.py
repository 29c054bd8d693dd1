import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from services.cache.frame import seal, unseal

SEALED = seal(b"a value")


@given(st.binary())
def test_a_value_is_read_as_it_was_written(payload):
    assert unseal(seal(payload)) == payload
    assert msgpack.unpackb(seal(payload)) == [1, xxhash.xxh3_64_intdigest(payload), payload]


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_a_changed_byte_is_a_miss(place, change):
    damaged = bytearray(SEALED)
    damaged[place] ^= change
    assert unseal(bytes(damaged)) in (None, b"a value")  # the latter: another spelling of the same number
    if place >= len(SEALED) - len(b"a value"):
        assert unseal(bytes(damaged)) is None


@pytest.mark.parametrize("length", range(len(SEALED)))
def test_a_cut_value_is_a_miss(length):
    assert unseal(SEALED[:length]) is None


@pytest.mark.parametrize(
    "foreign",
    [b"", b"17", b"plain text", msgpack.packb({"a": 1}), msgpack.packb([2, 0, b""]), msgpack.packb([1])],
)
def test_what_others_wrote_is_a_miss(foreign):
    assert unseal(foreign) is None


def test_what_a_later_writer_adds_is_passed_over():
    assert unseal(msgpack.packb([*msgpack.unpackb(SEALED), "zstd"])) == b"a value"
