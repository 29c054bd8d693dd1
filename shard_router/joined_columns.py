"""Attribute columns of several blocks as one, without making a document of any row."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from shard_router.columns import (
    BoolColumn,
    Column,
    Columns,
    Dictionary,
    FloatColumn,
    IntColumn,
    KeywordColumn,
    KeywordsColumn,
)
from shard_router.model import AttributeType, Schema

#: A column's arrays, none where all its rows are null, and the rows to take.
_Pick = tuple[dict[str, np.ndarray], np.ndarray]


def joined(parts: Sequence[tuple[Columns, np.ndarray]], schema: Schema) -> Columns:
    """The columns of these rows of each part, in the order given; as if built from their documents.

    parts: columns of that schema, each with row numbers, int64 [n].
    """
    columns: dict[str, Column] = {}
    for name, kind in schema.items():
        picks = []
        for each, rows in parts:
            column = each.column(name)
            picks.append(({} if column is None else column.arrays(), rows))
        made = _join(kind, picks)
        if made.present().any():
            columns[name] = made
    return Columns(columns, schema, sum(len(rows) for _, rows in parts))


def _join(kind: AttributeType, picks: Sequence[_Pick]) -> Column:
    match kind:
        case AttributeType.KEYWORD:
            return KeywordColumn(
                *_recoded([(arrays, _taken(arrays, rows, "codes", -1)) for arrays, rows in picks])
            )
        case AttributeType.KEYWORDS:
            return _keywords(picks)
        case AttributeType.INT | AttributeType.TIMESTAMP:
            return IntColumn(
                _stacked(picks, "values", np.int64, 0), _stacked(picks, "present", np.bool_, False)
            )
        case AttributeType.FLOAT:
            return FloatColumn(_stacked(picks, "values", np.float64, np.nan))
        case AttributeType.BOOL:
            return BoolColumn(_stacked(picks, "values", np.int8, -1))


def _taken(arrays: dict[str, np.ndarray], rows: np.ndarray, part: str, null: float) -> np.ndarray:
    """One part of a column at these rows."""
    return arrays[part][rows] if arrays else np.full(len(rows), null)


def _stacked(picks: Sequence[_Pick], part: str, dtype: type[np.generic], null: float) -> np.ndarray:
    return np.concatenate([_taken(arrays, rows, part, null) for arrays, rows in picks]).astype(
        dtype, copy=False
    )


def _recoded(parts: Sequence[_Pick]) -> tuple[np.ndarray, Dictionary]:
    """Codes of each part's dictionary (-1 for none) as codes int32 of one dictionary of what they name."""
    texts: list[list[str]] = []
    used: list[np.ndarray] = []
    for arrays, codes in parts:
        named = np.unique(codes[codes >= 0]).astype(np.int64)
        dictionary = Dictionary(arrays["blob"], arrays["offsets"]) if arrays else None
        texts.append([] if dictionary is None else [dictionary.text(code) for code in named.tolist()])
        used.append(named)
    whole, new_codes = Dictionary.of(chain.from_iterable(texts))
    recoded: list[np.ndarray] = []
    for (_, codes), named, here in zip(parts, used, texts, strict=True):
        # The last place, which -1 names, stays -1.
        renamed = np.full(int(named[-1]) + 2 if len(named) else 1, -1, dtype=np.int32)
        renamed[named] = [new_codes[text] for text in here]
        recoded.append(renamed[codes.astype(np.int64, copy=False)])
    return np.concatenate(recoded), whole


def _keywords(picks: Sequence[_Pick]) -> KeywordsColumn:
    lengths: list[np.ndarray] = []
    lists: list[_Pick] = []
    for arrays, rows in picks:
        if not arrays:
            lengths.append(np.zeros(len(rows), np.int64))
            continue
        starts = arrays["starts"][rows]
        counts = arrays["starts"][rows + 1] - starts
        # Where each taken text lies: its list's start, and how far it is into that list.
        into = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        lists.append((arrays, arrays["codes"][np.repeat(starts, counts) + into]))
        lengths.append(counts)
    codes, dictionary = _recoded(lists) if lists else (np.zeros(0, np.int32), Dictionary.of(())[0])
    starts = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
    return KeywordsColumn(starts, codes, _stacked(picks, "present", np.bool_, False), dictionary)
