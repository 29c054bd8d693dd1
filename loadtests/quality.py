"""What INT8 costs in answers: retrieval on judged collections, and the order of pairs, against FP32."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests.engine import Engine, by_length
from loadtests.run import Run
from loadtests.scoreboard import Measured

COLLECTIONS = ("cranfield", "cisi")
_WITHOUT = "needs judged collections: make bench ONLY=quality IR=DIRECTORY"
_DEPTH = 10
_PAIRS, _PAIR_TEXTS = 20_000, 1_000


@dataclass(frozen=True, slots=True)
class Judged:
    """Documents, queries, and how relevant which documents are to which query, by row."""

    documents: Sequence[str]
    queries: Sequence[str]
    #: By query: document to grade, above 0.
    grades: Mapping[int, Mapping[int, float]]

    @classmethod
    def read(cls, directory: Path) -> "Judged":
        """A directory in the form of BEIR: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
        documents, queries = (_lines(directory / f"{name}.jsonl") for name in ("corpus", "queries"))
        rows, asked = ({each["_id"]: i for i, each in enumerate(part)} for part in (documents, queries))
        grades: dict[int, dict[int, float]] = defaultdict(dict)
        for line in (directory / "qrels" / "test.tsv").read_text().splitlines()[1:]:
            query, document, grade = line.split("\t")
            if float(grade) > 0 and query in asked and document in rows:
                grades[asked[query]][rows[document]] = float(grade)
        return cls([_text(each) for each in documents], [each["text"] for each in queries], grades)


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    engines = {precision: Engine(run.manifest(precision), run.cpus) for precision in ("int8", "fp32")}
    yield _pairs(run, engines)
    for name in COLLECTIONS:
        row = f"quality.ndcg_points.{name}"
        if run.judged is None or not (run.judged / name).is_dir():
            yield Measured(row, None, why=_WITHOUT)
            continue
        judged = Judged.read(run.judged / name)
        scores = {}
        for precision, engine in engines.items():
            documents, queries = (_vectors(engine, texts) for texts in (judged.documents, judged.queries))
            scores[precision] = 100 * ndcg(queries @ documents.T, judged.grades)
        detail = {
            "unit": f"points of nDCG@{_DEPTH}, exact search",
            "documents": len(judged.documents),
            "queries": len(judged.grades),
            **scores,
        }
        yield Measured(row, scores["int8"] - scores["fp32"], detail)


def ndcg(scores: np.ndarray, grades: Mapping[int, Mapping[int, float]]) -> float:
    """Mean nDCG@10 over the judged queries; `scores` is [queries, documents], gains are the grades."""
    discounts = 1 / np.log2(np.arange(_DEPTH) + 2)
    found = []
    for query, relevant in grades.items():
        best = np.argsort(-scores[query], kind="stable")[:_DEPTH]
        gains = np.array([relevant.get(int(document), 0.0) for document in best])
        ideal = np.array(sorted(relevant.values(), reverse=True)[:_DEPTH])
        found.append(float(gains @ discounts[: len(gains)]) / float(ideal @ discounts[: len(ideal)]))
    return float(np.mean(found))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks of two lists without ties."""
    one, other = (np.argsort(np.argsort(each)) for each in (a, b))
    return float(np.corrcoef(one, other)[0, 1])


def _pairs(run: Run, engines: Mapping[str, Engine]) -> Measured:
    """Pairs of descriptions, half of them near each other, ranked by cosine."""
    texts = [package.summary for package in run.packages[: run.sized(_PAIR_TEXTS, 100)]]
    vectors = {precision: _vectors(engine, texts) for precision, engine in engines.items()}
    rng = np.random.default_rng(3)
    count = run.sized(_PAIRS, 500) // 2
    left, right = rng.integers(0, len(texts), (2, count))
    nearest = np.argsort(-(vectors["fp32"] @ vectors["fp32"].T), axis=1)[:, 1:11]
    near = rng.integers(0, len(texts), count)
    left = np.concatenate([left, near])
    right = np.concatenate([right, nearest[near, rng.integers(0, nearest.shape[1], count)]])
    cosines = {name: np.einsum("nd,nd->n", each[left], each[right]) for name, each in vectors.items()}
    detail = {"unit": "100 less Spearman's rank correlation in points", "pairs": len(left)}
    return Measured("quality.rank_points", 100 * (1 - spearman(cosines["int8"], cosines["fp32"])), detail)


def _vectors(engine: Engine, texts: Sequence[str]) -> np.ndarray:
    return engine.run(by_length(engine.tokenize(texts))).vectors


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _text(document: Mapping[str, str]) -> str:
    title, text = document.get("title", ""), document["text"]
    return text if text.startswith(title) else f"{title} {text}"
