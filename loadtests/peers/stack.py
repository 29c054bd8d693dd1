"""What one builds in an afternoon: FastAPI, sentence-transformers and FAISS in one process.

`.venv-bench/bin/python -m loadtests.peers.stack MODEL MATERIAL PORT` serves POST /search {"text", "k"} over
the vectors of an .npz, and GET /ready.
"""

import sys

import faiss
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

_LINKS, _EF_CONSTRUCTION, _EF_SEARCH = 32, 200, 64


class Question(BaseModel):
    """What is looked for."""

    text: str
    k: int = 10


def app(model: str, material: str) -> FastAPI:
    """The service, with all vectors in its index."""
    encoder = SentenceTransformer(model, device="cpu")
    vectors = np.load(material)["vectors"]
    index = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EF_CONSTRUCTION
    index.add(vectors)
    index.hnsw.efSearch = _EF_SEARCH

    def ready() -> dict[str, bool]:
        return {"ready": True}

    def search(question: Question) -> dict[str, list[dict[str, float]]]:
        vector = encoder.encode([question.text], normalize_embeddings=True)
        scores, rows = index.search(np.asarray(vector, np.float32), question.k)
        return {
            "hits": [
                {"id": float(row), "score": float(score)}
                for row, score in zip(rows[0], scores[0], strict=True)
            ]
        }

    made = FastAPI()
    made.add_api_route("/ready", ready, methods=["GET"])
    made.add_api_route("/search", search, methods=["POST"])
    return made


if __name__ == "__main__":
    uvicorn.run(app(sys.argv[1], sys.argv[2]), host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
