"""A release: one version of a model, built from its source in every precision; the gate keeps one."""

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from index_builder.models import gate
from index_builder.models.build import RECIPE, ModelInaccurate, Progress, quantized, static_int8
from index_builder.models.conversions import NothingToConvert, half, int8_per_token, weight_only
from index_builder.models.engine import CUDA, ENGINE, Engine
from index_builder.models.export import Float32, encoder
from index_builder.models.manifest import (
    GRAPH_FILE,
    TOKENIZER_FILE,
    Gate,
    Measured,
    ModelManifest,
    Requirements,
)
from index_builder.models.observation import Candidate
from index_builder.models.publication import BUILDING, publish, sole_builder
from index_builder.models.reduction import Reduction, principal_axes, reduced, truncated
from index_builder.models.source import ModelSource, OtherArchitecture
from index_builder.models.space import variant_id
from index_builder.models.tokenizer import Tokenizer, padded
from index_builder.models.torch_export import export
from index_builder.models.tuner import choose, tune

PRECISIONS = ("fp32", "int8", "weight8", "fp16")
MODEL = re.compile(r"(?P<name>[a-z0-9_][a-z0-9_.-]{0,127})@(?P<version>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})")
#: A traced graph that is further from its model than this was traced wrongly.
LEAST_COSINE_TO_SOURCE = 0.9999
DEFAULT_REQUIREMENTS = Requirements()
#: Texts embedded at once while a reduction is fitted.
FIT_BATCH = 32

log = logging.getLogger(__name__)


class ReleaseRefused(ValueError):
    """What was asked for cannot be released; the message says why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a release should be. `texts` judge it, `fit_texts` fit a reduction; none of them are kept."""

    model: str
    precisions: Sequence[str] = PRECISIONS
    threads: Sequence[int] = (1,)
    #: "pca:192", "int8", or none.
    reduction: str = ""
    #: Lengths at which the model was trained to let its vectors' heads stand alone.
    dimensions: Sequence[int] = ()
    requirements: Requirements = DEFAULT_REQUIREMENTS
    prefer: str = "throughput"
    texts: Sequence[str] = gate.TEXTS
    fit_texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Origin:
    """A source as a float32 graph, whichever way it was made, and what else there is to know of it."""

    graph: bytes
    tokenizer: bytes
    max_tokens: int
    prompts: dict[str, str]
    space: str
    #: What makes its INT8 graph with weights of so many bits.
    int8: Callable[[Tokenizer], Callable[[int], bytes]]
    #: Vectors of its own library, where that is at hand.
    reference: Callable[[Sequence[str]], np.ndarray] | None = None


@dataclass(slots=True)
class _Bench:
    """A release under construction, in a directory that is nobody's yet."""

    directory: Path
    tokenizer: Tokenizer
    graphs: dict[str, Path] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)

    def add(self, precision: str, graph: bytes) -> None:
        self.graphs[precision] = self.directory / f"{precision}.onnx"
        self.graphs[precision].write_bytes(graph)


def release(source: Path, out: Path, wanted: Wanted, progress: Progress) -> ModelManifest:
    """Build, measure and keep the fastest way to run the model that passes, in `out`/NAME@VERSION/PRECISION.

    The manifest holds everything that was measured. A released version never changes: ReleaseRefused where
    it is there already, and for requests that make no sense. ModelMissing, ModelUnsupported,
    ReductionImpossible; ModelInaccurate where nothing passes.
    """
    _check(wanted)
    parent = out / wanted.model
    parent.mkdir(parents=True, exist_ok=True)
    with sole_builder(parent):
        if released := sorted(path.parent.name for path in parent.glob("*/manifest.json")):
            raise ReleaseRefused(f"{parent}: is released already ({', '.join(released)}); name a new version")
        progress("read", 0.0)
        origin = _origin(source)
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=parent) as directory:
            return _build(Path(directory), parent, origin, wanted, progress)


def _check(wanted: Wanted) -> None:
    if not MODEL.fullmatch(wanted.model):
        raise ReleaseRefused(f"{wanted.model!r} is not NAME@VERSION of letters, digits, '.', '_' and '-'")
    for precision in wanted.precisions:
        if precision not in PRECISIONS:
            raise ReleaseRefused(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if not re.fullmatch(r"|int8|pca:[1-9][0-9]*", wanted.reduction):
        raise ReleaseRefused(f"reduction {wanted.reduction!r} is neither int8 nor pca:DIM")
    if wanted.reduction.startswith("pca:") and not wanted.fit_texts:
        raise ReleaseRefused("a PCA is fitted on texts like those it will be used for; give some")
    if len(wanted.texts) < 2 * gate.NEAREST:
        raise ReleaseRefused(f"{len(wanted.texts)} texts judge nothing; give {2 * gate.NEAREST} or more")


def _build(
    directory: Path, parent: Path, origin: _Origin, wanted: Wanted, progress: Progress
) -> ModelManifest:
    (directory / TOKENIZER_FILE).write_bytes(origin.tokenizer)
    bench = _Bench(directory, Tokenizer(directory / TOKENIZER_FILE, max_tokens=origin.max_tokens))
    progress("build", 0.1)
    unreduced = gate.vectors_of(origin.graph, bench.tokenizer, wanted.texts)
    _require_source_agreement(origin, unreduced, wanted.texts)
    dim = unreduced.shape[1]
    if strange := [d for d in wanted.dimensions if not 1 <= d < dim]:
        raise ReleaseRefused(f"dimension {strange[0]}: the model has {dim}, and fewer are meant")
    reduction, finish = _reduction(origin, bench, wanted, dim)
    _build_precisions(origin, bench, wanted, finish)
    progress("check", 0.4)
    exact = finish(origin.graph)
    reference = gate.vectors_of(exact, bench.tokenizer, wanted.texts)
    candidates = [
        Candidate(
            precision,
            threads,
            str(bench.graphs[precision]) if precision in bench.graphs else None,
            device="cuda" if precision == "fp16" else "cpu",
            obstacle=bench.obstacles.get(precision, ""),
        )
        for precision in wanted.precisions
        for threads in (wanted.threads if precision not in bench.obstacles else wanted.threads[:1])
    ]
    table = tune(
        candidates,
        tokenizer_file=directory / TOKENIZER_FILE,
        max_tokens=origin.max_tokens,
        texts=wanted.texts,
        reference=reference,
        unreduced=unreduced,
        reduction=_label(reduction),
        requirements=wanted.requirements,
        progress=lambda stage, share: progress(stage, 0.4 + 0.5 * share),
    )
    chosen = _chosen(table, bench, wanted)
    precision = table[chosen].precision
    graph = bench.graphs[precision].read_bytes()
    space = origin.space if reduction is None else reduction.space_of(origin.space)
    return _publish(
        graph,
        parent / precision,
        ModelManifest(
            name=wanted.model.partition("@")[0],
            version=wanted.model.partition("@")[2],
            precision=precision,
            space=space,
            variant=variant_id(
                space=space,
                precision=precision,
                engine=ENGINE,
                artifact_sha256=hashlib.sha256(graph).hexdigest(),
            ),
            dim=reference.shape[1],
            max_tokens=origin.max_tokens,
            prompts=origin.prompts,
            files={
                GRAPH_FILE: hashlib.sha256(graph).hexdigest(),
                TOKENIZER_FILE: hashlib.sha256(origin.tokenizer).hexdigest(),
            },
            agreement=table[chosen].agreement
            or gate.agreement(gate.vectors_of(graph, bench.tokenizer, wanted.texts), reference),
            recipe=RECIPE,
            directory=directory,
            threads=table[chosen].threads,
            dimensions=sorted(wanted.dimensions),
            reduction=reduction,
            gate=Gate(
                requirements=wanted.requirements,
                prefer=wanted.prefer,
                texts=len(wanted.texts),
                table=table,
                chosen=chosen,
                kept_at={
                    str(d): round(gate.overlap(truncated(reference, d), reference), 4)
                    for d in sorted(wanted.dimensions)
                },
            ),
        ),
        origin.tokenizer,
        progress,
    )


def _origin(directory: Path) -> _Origin:
    """The source as a graph: written from its weights where it is a BERT encoder, else traced by torch."""
    try:
        source = ModelSource.open(directory)
    except OtherArchitecture as other:
        log.info("%s; exporting it by torch", other)
        made = export(directory)
        return _Origin(
            made.graph,
            made.tokenizer,
            made.max_tokens,
            made.prompts,
            made.space,
            lambda _: lambda weight_bits: int8_per_token(made.graph, weight_bits=weight_bits),
            made.reference,
        )
    return _Origin(
        encoder(source, Float32()),
        source.tokenizer,
        source.max_tokens,
        dict(source.prompts),
        source.space,
        partial(static_int8, source),
    )


def _require_source_agreement(origin: _Origin, vectors: np.ndarray, texts: Sequence[str]) -> None:
    if origin.reference is None:
        return
    found = gate.agreement(vectors, origin.reference(texts))
    if not found.worst >= LEAST_COSINE_TO_SOURCE:
        raise ModelInaccurate(
            f"the exported graph has worst cosine {found.worst:g} to the model it was traced from, less than "
            f"{LEAST_COSINE_TO_SOURCE:g}"
        )


def _reduction(
    origin: _Origin, bench: _Bench, wanted: Wanted, dim: int
) -> tuple[Reduction | None, Callable[[bytes], bytes]]:
    """What becomes of the vectors, and the step that adds it to a graph."""
    if not wanted.reduction:
        return None, lambda graph: graph
    if wanted.reduction == "int8":
        rounding = Reduction("int8", dim)
        return rounding, lambda graph: reduced(graph, rounding)
    axes_wanted = int(wanted.reduction.removeprefix("pca:"))
    engine = Engine.load(origin.graph, threads=1)
    ids = sorted(bench.tokenizer.encode(wanted.fit_texts).ids, key=len)
    parts = []
    for start in range(0, len(ids), FIT_BATCH):
        matrix, mask = padded(ids[start : start + FIT_BATCH])
        parts.append(engine.run({"input_ids": matrix, "attention_mask": mask}))
    axes = principal_axes(np.concatenate(parts), axes_wanted)
    pca = Reduction("pca", axes_wanted, hashlib.sha256(axes.tobytes()).hexdigest())
    return pca, lambda graph: reduced(graph, pca, axes)


def _build_precisions(
    origin: _Origin, bench: _Bench, wanted: Wanted, finish: Callable[[bytes], bytes]
) -> None:
    """Write the graph of every wanted precision, or note why there is none or why it cannot be run here."""
    for precision in wanted.precisions:
        try:
            if precision == "int8":
                exact = gate.vectors_of(origin.graph, bench.tokenizer, gate.TEXTS)
                graph, _ = quantized(origin.int8(bench.tokenizer), bench.tokenizer, exact)
            else:
                graph = {"fp32": _same, "weight8": weight_only, "fp16": half}[precision](origin.graph)
        except (NothingToConvert, ModelInaccurate) as error:
            bench.obstacles[precision] = f"not built: {error}"
            continue
        bench.add(precision, finish(graph))
        if precision == "fp16" and CUDA not in onnxruntime.get_available_providers():
            bench.obstacles[precision] = "not run: needs a CUDA device"


def _chosen(table: Sequence[Measured], bench: _Bench, wanted: Wanted) -> int:
    place = choose(table, wanted.prefer)
    if place is not None:
        return place
    only = set(wanted.precisions)
    if len(only) == 1 and only <= bench.graphs.keys() and only <= bench.obstacles.keys():
        # Asked for by name, for another host than this.
        log.warning("%s %s is released unmeasured: %s", wanted.model, *only, bench.obstacles[min(only)])
        return 0
    rows = "; ".join(f"{row.precision} with {row.threads}: {', '.join(row.failed)}" for row in table)
    raise ModelInaccurate(f"nothing passes the gate on this host: {rows}")


def _publish(
    graph: bytes, target: Path, manifest: ModelManifest, tokenizer: bytes, progress: Progress
) -> ModelManifest:
    progress("write", 0.9)
    building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=target.parent))
    (building / GRAPH_FILE).write_bytes(graph)
    (building / TOKENIZER_FILE).write_bytes(tokenizer)
    (building / "manifest.json").write_bytes(manifest.encode())
    publish(building, target)
    progress("write", 1.0)
    return ModelManifest.load(target)


def _same(graph: bytes) -> bytes:
    return graph


def _label(reduction: Reduction | None) -> str:
    return "" if reduction is None else f"{reduction.kind}-{reduction.dim}"
