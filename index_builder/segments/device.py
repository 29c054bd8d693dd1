"""Where segments are searched: on the CPU, or flat codes and lists on a GPU."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_builder.segments.candidates import CandidateIndex
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.inverted import InvertedIndex
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

log = logging.getLogger(__name__)

CPU = "cpu"
_CUDA = re.compile(r"cuda:(\d+)")
#: A GPU's selection takes no more.
_MOST_FETCHED = 2048
#: Where fewer are allowed, most of what a GPU finds would be thrown away.
_LEAST_SHARE = 0.5
#: Fetched beyond what the share of allowed rows makes likely.
_OVERFETCH = 1.5

_FlatIndex: Any = faiss.IndexFlat


def resolve(wanted: str) -> str:
    """The device that `auto`, `cpu` or `cuda:N` comes to on this machine: `cpu` or `cuda:N`.

    A GPU asked for by name that FAISS does not find is refused with a warning, not an error, so that one
    configuration serves machines with and without. ValueError for any other word.
    """
    named = _CUDA.fullmatch(wanted)
    if named is None and wanted not in ("auto", CPU):
        raise ValueError(f"device {wanted!r} is none of auto, cpu and cuda:N")
    if wanted == CPU:
        return CPU
    gpus = faiss.get_num_gpus()
    if int(named[1]) < gpus if named else gpus:
        return wanted if named else "cuda:0"
    if named:
        log.warning("segments are searched on the cpu: FAISS finds %d GPUs here, and not %s", gpus, wanted)
    return CPU


def on(device: str, index: CandidateIndex, vectors: np.ndarray, metric: Metric) -> CandidateIndex:
    """The index as that device searches it; a graph stays on the CPU. vectors: float32 [n, dim]."""
    if device == CPU or index.kind is IndexKind.HNSW:
        return index
    return GpuIndex(index, lambda: _clone(int(device.partition(":")[2]), index, vectors, metric))


class GpuIndex:
    """Candidates from a clone on a GPU, which is made when first asked.

    A GPU takes no filter: what is not allowed is fetched besides and dropped, where that is little, and
    selective filters are left to the index on the CPU. One search at a time, for a GPU's scratch memory
    is one.
    """

    def __init__(self, host: CandidateIndex, clone: Callable[[], Any]) -> None:
        """clone: makes the index on the GPU."""
        self._host, self._make = host, clone
        self._lock = threading.Lock()
        self._clone: Any = None
        self.kind, self.shape = host.kind, host.shape
        self.ladder: Sequence[float] = host.ladder
        self.scan_share = host.scan_share

    def pool(self, k: int, knob: float) -> int:
        """How many candidates to score exactly to find the best k."""
        return self._host.pool(k, knob)

    def save(self, path: Path) -> None:
        """Write it as a FAISS index file, which is the CPU's."""
        self._host.save(path)

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None, knob: float) -> np.ndarray:
        """As CandidateIndex says; -1 also where too much of what was fetched is not allowed."""
        fetched = count
        if allowed is not None:
            # Enough for certain, or else very likely.
            barred = self.shape[0] - allowed.count
            fetched += min(barred, int(count * (_OVERFETCH / max(allowed.share, _LEAST_SHARE) - 1)))
        if fetched > _MOST_FETCHED or (allowed is not None and allowed.share < _LEAST_SHARE):
            return self._host.candidates(queries, count, allowed, knob)
        parameters = None
        if isinstance(self._host, InvertedIndex):
            parameters = self._host.parameters(count, None, knob)
        with self._lock:
            if self._clone is None:
                self._clone = self._make()
            _, rows = self._clone.search(queries, min(fetched, self.shape[0]), params=parameters)
        found: np.ndarray = rows
        if allowed is None:
            return found
        found[~allowed.mask[found]] = -1
        kept: np.ndarray = np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), axis=1)
        return kept[:, :count]


def _clone(number: int, index: CandidateIndex, vectors: np.ndarray, metric: Metric) -> Any:
    """The lists as they are; in place of flat codes, for which GPUs have no index, the vectors."""
    gpu: Any = faiss
    if isinstance(index, InvertedIndex):
        source: Any = index.faiss_index
    else:
        measures = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        source = _FlatIndex(vectors.shape[1], measures)
        source.add(vectors)
    return gpu.index_cpu_to_gpu(gpu.StandardGpuResources(), number, source)
