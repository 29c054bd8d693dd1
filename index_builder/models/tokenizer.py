"""A model's own tokenizer, set to what the model was trained for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

#: Characters that hold more than a model's limit of tokens in nearly any text, per token of the limit.
HEAD_CHARS_PER_TOKEN = 16


class Tokens(NamedTuple):
    """The token ids of some texts: `ids[i]`, int32, are those of text i, at most the model's limit."""

    ids: list[np.ndarray]
    #: Which texts were longer than the model's limit.
    truncated: list[bool]


class Tokenizer:
    """Turns texts into token ids on the calling thread, without the GIL; safe to share between threads."""

    def __init__(self, path: Path, *, max_tokens: int) -> None:
        # Callers bring their own threads; the library's pool beside them would only fight for the CPUs.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # Published files often pad every text to a fixed length, which costs more than the model itself.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._head_chars = max_tokens * HEAD_CHARS_PER_TOKEN

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Token ids of each text, special tokens included."""
        heads = [self._head(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(heads)
        truncated = [bool(encoding.overflowing) for encoding in encodings]
        for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if len(head) < len(text) and not truncated[i]:
                [encodings[i]] = self._tokenizer.encode_batch_fast([text])
                truncated[i] = bool(encodings[i].overflowing)
        return Tokens([np.array(encoding.ids, np.int32) for encoding in encodings], truncated)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens it knows; ids are less than that."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    def words(self) -> list[str]:
        """The vocabulary in the order of its ids, parts of words as if they were whole, without marks."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        words = (word.removeprefix("##") for word in by_id if not word.startswith("["))
        return [word for word in words if word]

    def _head(self, text: str) -> str:
        """A text up to a space far beyond what a model reads; words split there, so tokens begin the same."""
        if len(text) <= self._head_chars:
            return text
        end = text.rfind(" ", 0, self._head_chars)
        return text[:end] if end > 0 else text


def padded(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids as one right-padded matrix and its mask, both int64 [texts, longest text]."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    matrix = np.zeros(mask.shape, np.int64)
    matrix[mask] = np.concatenate(ids)
    return matrix, mask.astype(np.int64)
