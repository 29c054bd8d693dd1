"""Between messages and values."""

import numpy as np
import pytest

from protos.ringfort import v1 as pb
from services import wire
from shard_router import filters
from shard_router.errors import DimensionMismatch, InvalidField, InvalidFilter
from shard_router.model import AttributeType

SCHEMA = {
    "name": AttributeType.KEYWORD, "stars": AttributeType.INT, "score": AttributeType.FLOAT,
    "live": AttributeType.BOOL, "made": AttributeType.TIMESTAMP, "tags": AttributeType.KEYWORDS,
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "worst"), [(pb.F32, 0), (pb.F16, 1e-3), (pb.I8, 1e-2)])
def test_a_matrix_survives_the_wire(dtype: int, worst: float) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    vectors[3] = 0
    message = pb.Matrix.FromString(wire.matrix_from(vectors, dtype).SerializeToString())
    back = wire.array_from(message, "v", dim=7)
    assert back.dtype == np.float32
    assert np.abs(back - vectors).max() <= worst * np.abs(vectors).max()


@pytest.mark.parametrize(
    ("matrix", "field"),
    [
        (pb.Matrix(data=b"1234", rows=1, dim=2), "v.data"),
        (pb.Matrix(data=b"12", rows=1, dim=2, dtype=pb.I8), "v.scales"),
        (pb.Matrix(data=b"12", rows=1, dim=2, dtype=9), "v.dtype"),  # type: ignore[arg-type]
        (pb.Matrix(data=np.float32([1, np.nan]).tobytes(), rows=1, dim=2), "v"),
        (pb.Matrix(data=np.float32([np.inf, -np.inf]).tobytes(), rows=1, dim=2), "v"),
    ],
)
def test_a_matrix_that_is_none_names_its_field(matrix: pb.Matrix, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        wire.array_from(matrix, "v")
    assert refused.value.field == field


def test_another_dimension_is_its_own_error() -> None:
    with pytest.raises(DimensionMismatch) as refused:
        wire.array_from(pb.Matrix(data=b"\0" * 8, rows=1, dim=2), "v", dim=3)
    assert (refused.value.got, refused.value.want) == (2, 3)


def test_attributes_survive_the_wire() -> None:
    attributes = {
        "name": "é", "stars": 2**62, "score": -0.5, "live": False, "made": -1_234_567, "tags": ("a", "b"),
    }  # fmt: skip
    message = pb.Document(attributes=wire.attributes_on_wire(attributes, SCHEMA))
    back = pb.Document.FromString(message.SerializeToString())
    assert wire.AttributeReader(SCHEMA, 1000).read(back.attributes, back.ByteSize()) == attributes


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"stars": pb.Value(keyword="many")}, "attributes.stars"),
        ({"nope": pb.Value(int=1)}, "attributes.nope"),
        ({"score": pb.Value(float=float("nan"))}, "attributes.score"),
        ({"name": pb.Value(keyword="a\0b")}, "attributes.name"),
        ({"name": pb.Value(keyword="x" * 2000)}, "attributes"),
    ],
)
def test_bad_attributes_name_their_field(value: dict[str, pb.Value], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        wire.AttributeReader(SCHEMA, 1000).read(value, 1001)
    assert refused.value.field == field


def test_an_int_is_taken_for_a_float() -> None:
    assert wire.AttributeReader(SCHEMA, 100).read({"score": pb.Value(int=3)}, 0) == {"score": 3.0}


def test_a_filter_message_means_what_its_text_says() -> None:
    message = pb.Filter(
        all=pb.FilterList(
            filters=[
                pb.Filter(compare=pb.Compare(attribute="stars", op=pb.Compare.LT, value=pb.Value(int=500))),
                pb.Filter(**{"in": pb.In(attribute="name", values=[pb.Value(keyword="ray")])}),
                pb.Filter(**{"not": pb.Filter(exists=pb.Exists(attribute="live"))}),
            ]
        )
    )
    text = pb.Filter(text='stars < 500 and name in ("ray") and not exists(live)')
    one, other = wire.filter_from(message), wire.filter_from(text)
    assert one is not None
    assert other is not None
    assert filters.check(one, SCHEMA) == filters.check(other, SCHEMA)


def test_a_timestamp_in_a_filter_keeps_its_microseconds() -> None:
    value = pb.Value(timestamp=wire.timestamp(1_700_000_000_123_457))
    found = wire.filter_from(pb.Filter(range=pb.Range(attribute="made", gte=value)))
    assert found is not None
    checked = filters.check(found, SCHEMA)
    assert filters.matches(checked, {"made": 1_700_000_000_123_457})
    assert not filters.matches(checked, {"made": 1_700_000_000_123_456})


def test_filters_nest_only_so_deep() -> None:
    message = pb.Filter(exists=pb.Exists(attribute="name"))
    for _ in range(wire.MAX_FILTER_DEPTH + 1):
        message = pb.Filter(**{"not": message})
    with pytest.raises(InvalidFilter):
        wire.filter_from(message)


@pytest.mark.parametrize(
    "message",
    [
        pb.Filter(all=pb.FilterList()),
        pb.Filter(compare=pb.Compare(attribute="stars")),
        pb.Filter(range=pb.Range(attribute="stars")),
        pb.Filter(compare=pb.Compare(value=pb.Value(int=1))),
    ],
)
def test_an_empty_part_of_a_filter_is_refused(message: pb.Filter) -> None:
    with pytest.raises(InvalidFilter):
        wire.filter_from(message)
