"""ONNX Runtime alone: the ceiling of everything that embeds."""

import inspect
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from index_builder.models.manifest import ModelManifest
from index_builder.models.tokenizer import padded
from services.embedder.embedder import Embedder
from services.embedder.onnx_model import OnnxModel

#: The embedder's own default, so that both cut alike.
BATCH_TOKENS: int = inspect.signature(Embedder).parameters["batch_tokens"].default

#: Padded ids and their mask, int64 [n, t] each, and which texts they are.
Batch = tuple[np.ndarray, np.ndarray, Sequence[int]]


class Pass(NamedTuple):
    """One run over some batches: vectors float32 [n, dim] in the texts' order, and what it took."""

    vectors: np.ndarray
    seconds: float
    processor_s: float


class Engine:
    """One model and so many threads, each running whole batches."""

    def __init__(self, manifest: ModelManifest, threads: int) -> None:
        self.manifest, self.threads = manifest, threads
        self.model = OnnxModel.load(manifest, threads=1)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32."""
        return self.model.tokenizer.encode(texts).ids

    def run(self, batches: Sequence[Batch]) -> Pass:
        """Embed every text of the batches. Whatever fails in a thread fails the run."""
        waiting: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)
        for _ in range(self.threads):
            waiting.put(None)
        vectors = np.empty((sum(len(rows) for *_, rows in batches), self.manifest.dim), np.float32)
        failures: list[Exception] = []

        def work() -> None:
            try:
                while (batch := waiting.get()) is not None:
                    ids, mask, rows = batch
                    vectors[rows] = self.model.encode(ids, mask)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(self.threads)]
        began, processor = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return Pass(vectors, time.perf_counter() - began, time.process_time() - processor)


def by_length(ids: Sequence[np.ndarray]) -> list[Batch]:
    """Batches as the embedder cuts them when it has all texts before it: longest first, by padded tokens."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches: list[Batch] = []
    while order:
        size = max(1, BATCH_TOKENS // len(ids[order[0]]))
        batches.append(_batch(ids, order[:size]))
        order = order[size:]
    return batches


def in_order(ids: Sequence[np.ndarray], rows: int) -> list[Batch]:
    """Batches of so many texts, in order of arrival, each padded to its longest."""
    order = range(len(ids))
    return [_batch(ids, order[start : start + rows]) for start in range(0, len(order), rows)]


def _batch(ids: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
    return *padded([ids[i] for i in rows]), rows
