"""Between which values the inputs of a model's products lie, channel by channel, as seen in FP32."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime

from index_builder.models.export import Float32, Sites, encoder
from index_builder.models.graph import GraphWriter
from index_builder.models.source import ModelSource
from index_builder.models.tokenizer import Tokenizer, padded

#: Words of each probe, and how many probes of each length.
PROBE_WORDS, PROBES_EACH = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89), 3


@dataclass(frozen=True, slots=True)
class Range:
    """The least and greatest value of every channel, float32 [channels] each."""

    least: np.ndarray
    greatest: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude of every channel."""
        largest: np.ndarray = np.maximum(self.greatest, -self.least)
        return largest


def observe(source: ModelSource, tokenizer: Tokenizer) -> Mapping[str, Range]:
    """Ranges over `probes`, by site; where attention is read, those of the values that it mixes.

    A mix of values lies between them, whatever the text; what a few probes happen to mix would not do.
    """
    watching = _Watching()
    session = onnxruntime.InferenceSession(
        encoder(source, watching), _one_thread(), providers=["CPUExecutionProvider"]
    )
    names = list(watching.outputs)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for ids in tokenizer.encode(probes(tokenizer)).ids:
        matrix, mask = padded([ids])
        for name, values in zip(
            names, session.run(names, {"input_ids": matrix, "attention_mask": mask}), strict=True
        ):
            seen[name].append(values)
    found = {}
    for site, (least, greatest) in watching.sites.items():
        found[site] = Range(np.min(seen[least], axis=0), np.max(seen[greatest], axis=0))
    for layer in range(source.architecture.layers):
        at = Sites(layer)
        values = slice(-source.architecture.hidden, None)
        mixed = found[_results(at.heads)]
        found[at.mixed] = Range(mixed.least[values], mixed.greatest[values])
    return found


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts of words drawn from all of the vocabulary, the same every time; of no language or subject."""
    words = tokenizer.words()
    state = 1

    def word() -> str:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return words[(state >> 33) % len(words)]

    return [" ".join(word() for _ in range(size)) for size in PROBE_WORDS for _ in range(PROBES_EACH)]


class _Watching(Float32):
    """Writes, beside the vectors, the range of every operand, and of what attention mixes."""

    def __init__(self) -> None:
        #: The outputs' names for the least and greatest values of a site.
        self.sites: dict[str, tuple[str, str]] = {}
        self.outputs: list[str] = []

    def operand(self, graph: GraphWriter, site: str, rows: str) -> str:
        self._watch(graph, site, rows)
        return rows

    def product(
        self, graph: GraphWriter, site: str, operand: str, weight: np.ndarray, bias: np.ndarray
    ) -> str:
        result = super().product(graph, site, operand, weight, bias)
        if site.endswith(".self"):
            self._watch(graph, _results(site), result)
        return result

    def _watch(self, graph: GraphWriter, site: str, rows: str) -> None:
        flat = graph.node("Flatten", [rows], axis=-1)
        axes_0 = graph.constant("axes_0", np.array([0], np.int64))
        least, greatest = (graph.node(op, [flat, axes_0], keepdims=0) for op in ("ReduceMin", "ReduceMax"))
        graph.expose(least, greatest)
        self.sites[site] = (least, greatest)
        self.outputs += [least, greatest]


def _results(site: str) -> str:
    return f"{site}.results"


def _one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options
