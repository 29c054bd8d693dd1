"""Our graphs against the model's own library. Needs the extra `models`; `make test-models` runs it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.models.build import ensure_model
from index_builder.models.source import packaged_model
from services.deadline import Deadline
from services.embedder.embedder import Embedder, InputType
from services.embedder.onnx_model import OnnxModel

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the extra `models` is not here"),
    # torch and transformers warn of their own plans at import.
    pytest.mark.filterwarnings("default"),
]

TEXTS = [
    "fast json parser",
    "The quick brown fox jumps over the lazy dog.",
    "Ein Satz auf Deutsch, mit Umlauten: äöü ß.",
    "日本語のテキスト",
    "",
    " ".join(["a long passage about vectors and their neighbours"] * 60),
    *(f"document number {i} about topic {i % 7}" for i in range(26)),
]


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """What sentence-transformers makes of TEXTS, float32 [n, 384]."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(packaged_model()), device="cpu")
    vectors: np.ndarray = model.encode(TEXTS, normalize_embeddings=True, convert_to_numpy=True)
    return vectors


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999999), ("int8", 0.99)])
async def test_agrees_with_sentence_transformers(
    reference: np.ndarray, tmp_path: Path, precision: str, least: float
) -> None:
    model = OnnxModel.load(ensure_model(tmp_path, precision=precision), threads=1)
    embedder = Embedder(model, workers=2)
    try:
        made = await embedder.embed(TEXTS, InputType.DOCUMENT, Deadline.after(120))
    finally:
        await embedder.close()
    cosines = (made.vectors * reference).sum(axis=1)
    assert cosines.min() >= least
    assert made.truncated.sum() == 1, "the long passage is over the model's limit, and says so"
