"""The accuracy gate: how close a built model comes to the FP32 model it stands for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from index_builder.models.engine import Engine
from index_builder.models.manifest import Agreement
from index_builder.models.tokenizer import Tokenizer, padded

#: An artifact whose first percentile falls below this does not speak for its space.
LOWEST_P1 = 0.99
#: Neighbours of a text that are compared.
NEAREST = 10

#: Held aside: nothing is tuned on them. Short and long, prose, code, names, other scripts.
TEXTS = (
    "fast json parser",
    "async web framework",
    "plot charts in the terminal",
    "How do I roll back a failed database migration?",
    "best hiking boots for wide feet under 150 euros",
    "a",
    "???",
    "Python HTTP for Humans.",
    "Fundamental package for array computing in Python",
    "Extensions to the standard Python datetime module",
    "import numpy as np; x = np.linspace(0, 1, 100)",
    "SELECT id, name FROM users WHERE created_at > now() - interval '7 days' ORDER BY id",
    "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)",
    "The mitochondrion is the powerhouse of the cell.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Le conseil municipal a voté hier soir le budget de l'année prochaine.",
    "東京の天気予報は明日も晴れです。",
    "Москва — столица России и её крупнейший город.",
    "12 eggs, 200 g flour, a pinch of salt, 350 ml milk",
    "v2.11.3-rc.1+build.20240229",
    "https://example.org/docs/reference/api?lang=en#section-4",
    "Patient reports intermittent chest pain radiating to the left arm for two days.",
    "The appellate court affirmed the judgment, holding that the statute of limitations had run.",
    "Quarterly revenue rose 8 percent, while operating margins narrowed on higher freight costs.",
    "lorem ipsum dolor sit amet consectetur adipiscing elit",
    "🎉 shipping day! 🚀 thanks to everyone who tested the beta",
    "Error: ECONNREFUSED 127.0.0.1:5432 - is the server running and accepting connections?",
    "A violin concerto in three movements, of which the slow one is a passacaglia.",
    "Two trains leave stations 300 km apart at 08:00, at 90 km/h and at 110 km/h; when do they meet?",
    "Sourdough needs time more than skill: mix flour, water and starter in the evening, fold the dough a few "
    "times, and let it rest overnight in a cool place before shaping it in the morning.",
    "Consistent hashing places both keys and servers on a ring; a key belongs to the first server found "
    "clockwise from it. When a server joins, it takes keys only from its neighbours, and when one leaves, "
    "only its own keys move, so that caches stay warm while the cluster changes size.",
    "The Black Death reached Sicily in October 1347 with a fleet of Genoese galleys. Within three years it "
    "had crossed most of Europe, killing a third of its people or more. Labour became scarce, wages "
    "rose, and landlords who had counted on serfs found themselves bargaining; several historians see in "
    "that shift the beginning of the end of the feudal order, though its pace differed between regions.",
    "Vector search turns a question about meaning into one about distance. An encoder maps every document to "
    "a point; a query becomes another point, and the answer is whatever lies nearest. Exact search compares "
    "the query with everything, which is simple and, for a few hundred thousand points, often fast enough. "
    "Graph indexes visit a few thousand points instead and miss a little; inverted lists read only the "
    "cells near the query; quantization shrinks each point so that more of them fit into memory. Each of "
    "these trades a share of recall for speed, and the right trade depends on the data, on the filters that "
    "come with a query, and on how often documents change. That is why a service should measure rather "
    "than assume, keep the raw vectors at hand, and be able to rebuild any index from them.",
)


def vectors_of(model: bytes | Path, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Vectors of a model, each text alone in its batch, float32 [texts, dim]."""
    engine = Engine.load(model, threads=1)
    rows = []
    for text in texts:
        ids, mask = padded(tokenizer.encode([text]).ids)
        rows.append(engine.run({"input_ids": ids, "attention_mask": mask}))
    return np.concatenate(rows)


def agreement(vectors: np.ndarray, reference: np.ndarray) -> Agreement:
    """Cosine row by row of two matrices of unit vectors, [texts, dim] each."""
    cosine = np.einsum("td,td->t", vectors, reference, dtype=np.float64)
    return Agreement(
        mean=round(float(cosine.mean()), 6),
        p1=round(float(np.percentile(cosine, 1)), 6),
        worst=round(float(cosine.min()), 6),
    )


def nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    """For each row the `k` others nearest to it, int64 [texts, k], fewer where there are fewer."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]


def overlap(vectors: np.ndarray, reference: np.ndarray) -> float:
    """Share of each row's ten nearest that are the same in both, [texts, any dim] each; 0 to 1."""
    pairs = zip(nearest(vectors, NEAREST), nearest(reference, NEAREST), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in pairs]))
