"""Texts become the ids that the model was trained on, at most its limit, and never padding."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from index_builder.models import tokenizer as module
from index_builder.models.tokenizer import Tokenizer, padded


@pytest.fixture
def tokenizer(tiny_source: Path) -> Tokenizer:
    return Tokenizer(tiny_source / "tokenizer.json", max_tokens=32)


def test_neither_the_published_padding_nor_its_truncation_is_kept(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["red fox", "a " * 20, ""])
    assert [len(ids) for ids in tokens.ids] == [4, 22, 2]
    assert tokens.truncated == [False, False, False]


def test_a_text_over_the_limit_is_cut_and_said_to_be(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["a " * 30, "a " * 31])
    assert [len(ids) for ids in tokens.ids] == [32, 32]
    assert tokens.truncated == [False, True]
    assert tokens.ids[1][-1] == tokens.ids[0][-1] == 3, "the end token stays"


@pytest.mark.parametrize(
    "text",
    [
        "red fox " * 5_000,
        "x" * 20_000,
        " " * 20_000 + "fox",
        "é " * 5_000,
        "x" * 600 + " a" * 60,
        "a b " + " " * 600 + "c d",
        "foxes" + "\n" * 700 + "red",
    ],
)
def test_reading_only_the_head_of_a_long_text_changes_nothing(
    tokenizer: Tokenizer, tiny_source: Path, text: str
) -> None:
    assert len(text) > 32 * module.HEAD_CHARS_PER_TOKEN
    whole = tokenizers.Tokenizer.from_file(str(tiny_source / "tokenizer.json"))
    whole.no_padding()
    whole.enable_truncation(32)
    expected = whole.encode(text)
    tokens = tokenizer.encode([text, "fox"])
    assert tokens.ids[0].tolist() == expected.ids
    assert tokens.truncated == [bool(expected.overflowing), False]


def test_padding_goes_to_the_right_and_is_masked() -> None:
    ids, mask = padded([np.array([2, 9, 3], np.int32), np.array([2, 3], np.int32)])
    assert ids.tolist() == [[2, 9, 3], [2, 3, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert ids.dtype == mask.dtype == np.int64
