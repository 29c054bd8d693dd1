"""Columns that are put together hold what columns built from the same documents hold, to the byte."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shard_router.columns import Columns
from shard_router.joined_columns import joined
from shard_router.model import Attributes, AttributeType

SCHEMA = {
    "name": AttributeType.KEYWORD,
    "rank": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "ok": AttributeType.BOOL,
    "at": AttributeType.TIMESTAMP,
    "tags": AttributeType.KEYWORDS,
}
texts = st.text("aé日", max_size=2)
documents = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": texts,
            "rank": st.integers(-(2**63), 2**63 - 1),
            "score": st.floats(allow_nan=False),
            "ok": st.booleans(),
            "at": st.integers(0, 2**60),
            "tags": st.lists(texts, max_size=3).map(tuple),
        },
    ),
    max_size=6,
)


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[list[Attributes], list[int]]]:
    made: list[tuple[list[Attributes], list[int]]] = []
    for rows in draw(st.lists(documents, min_size=1, max_size=4)):
        picks = draw(st.lists(st.sampled_from(range(len(rows))), unique=True)) if rows else []
        made.append((rows, picks))
    return made


@given(parts())
def test_joined_columns_are_those_built_from_the_documents(
    parts: list[tuple[list[Attributes], list[int]]],
) -> None:
    made = joined([(Columns.build(rows, SCHEMA), np.array(picks, np.int64)) for rows, picks in parts], SCHEMA)
    expected = Columns.build([rows[pick] for rows, picks in parts for pick in picks], SCHEMA)
    assert made.rows == expected.rows
    ours, theirs = made.to_arrays(), expected.to_arrays()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name
