"""A batch of writes, folded at once, is what the same writes come to one after the other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.metadata.fold import Draft, conditional, fold
from shard_router.model import ABSENT, LogRow, Patch, Remove, Upsert, Version, Write

DIM, TERM = 2, 3
IDS = st.sampled_from("abc")
VERSIONS = st.one_of(st.none(), st.just(ABSENT), st.builds(Version, st.just(TERM), st.integers(1, 25)))
ATTRIBUTES = st.dictionaries(st.sampled_from(("x", "y")), st.integers(0, 3), max_size=2)
VECTORS = st.integers(0, 9).map(lambda fill: np.full(DIM, fill, np.float32))
WRITES = st.one_of(
    st.builds(Upsert, IDS, st.sampled_from(("one", "two", None)), ATTRIBUTES, VECTORS, VERSIONS),
    st.builds(Patch, IDS, ATTRIBUTES, st.sampled_from(((), ("x",), ("y", "z"))), VERSIONS),
    st.builds(Remove, IDS, VERSIONS),
)


class Stored:
    """A table that keeps what plans leave behind."""

    def __init__(self) -> None:
        self.seq = 0
        self.rows: dict[str, LogRow] = {}
        self.vectors: dict[str, list[float]] = {}

    def apply(self, writes: list[Write]) -> list[object]:
        needed = conditional(writes)
        current = {id: row for id, row in self.rows.items() if id in needed}
        plan = fold(writes, [0] * len(writes), current, self.seq if needed else None, term=TERM, dim=DIM)
        for draft, row in zip(plan.drafts, plan.rows(self.seq), strict=True):
            assert draft.moves <= (draft.id in self.vectors)
            self.rows[draft.id] = row
            if draft.deleted:
                self.vectors.pop(draft.id, None)
            elif draft.vector is not None:
                self.vectors[draft.id] = draft.vector.tolist()
        outcomes = plan.outcomes(self.seq)
        self.seq += plan.positions
        return [(outcome.version, type(outcome.error), str(outcome.error)) for outcome in outcomes]


@given(before=st.lists(WRITES, max_size=6), batch=st.lists(WRITES, max_size=12))
def test_a_batch_is_its_writes_one_by_one(before: list[Write], batch: list[Write]) -> None:
    at_once, one_by_one = Stored(), Stored()
    for table in (at_once, one_by_one):
        table.apply(before)
    told = [outcome for write in batch for outcome in one_by_one.apply([write])]
    assert at_once.apply(batch) == told
    assert (at_once.seq, at_once.rows, at_once.vectors) == (
        one_by_one.seq,
        one_by_one.rows,
        one_by_one.vectors,
    )


@given(batch=st.lists(WRITES, max_size=12))
def test_rows_come_once_each_in_order_of_position(batch: list[Write]) -> None:
    plan = fold(batch, [0] * len(batch), {}, 0, term=TERM, dim=DIM)
    ordinals = [draft.ordinal for draft in plan.drafts]
    assert ordinals == sorted(set(ordinals))
    assert len({draft.id for draft in plan.drafts}) == len(plan.drafts)
    taken = [result for result in plan.results if isinstance(result, int)]
    assert taken == list(range(1, plan.positions + 1))


def test_a_matrix_has_zeros_where_a_draft_has_no_vector() -> None:
    vector = np.ones(DIM, np.float32)
    plan = fold(
        [Upsert("a", None, {}, vector), Upsert("b", None, {}, vector), Remove("a")],
        [0] * 3,
        {},
        0,
        term=TERM,
        dim=DIM,
    )
    assert [(draft.id, draft.deleted, draft.moves) for draft in plan.drafts] == [
        ("b", False, False),
        ("a", True, False),
    ]
    assert plan.matrix(DIM).tolist() == [[1, 1], [0, 0]]
    assert all(isinstance(draft, Draft) for draft in plan.drafts)


def test_only_what_decides_is_read() -> None:
    vector = np.ones(DIM, np.float32)
    writes: list[Write] = [
        Upsert("free", None, {}, vector),
        Upsert("checked", None, {}, vector, ABSENT),
        Remove("gone"),
        Patch("gone", {"x": 1}),
        Patch("whole", {"x": 1}),
        Remove("whole"),
    ]
    assert conditional(writes) == {"checked": False, "gone": True, "whole": True}
