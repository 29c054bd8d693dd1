"""Memory stays what it is, however many texts of however many lengths have come by.

SOAK texts are embedded (`make long` takes 100,000); a few of them by default.
"""

import asyncio
import os
import random
from pathlib import Path

import numpy as np
import psutil

from index_builder.models.build import ensure_model
from services.deadline import Deadline
from services.embedder.embedder import Embedder, InputType
from services.embedder.onnx_model import OnnxModel

TEXTS = int(os.environ.get("SOAK", "400"))
#: Texts after which every size of batch has been seen, more or less.
WARM_UP = max(200, TEXTS // 20)
ROUND_TEXTS = 100
MOST_WORDS = 270
WORDS = ("the", "of", "a", "river", "stone", "light", "under", "between", "many", "people", "say", "that")
GROWTH = 1.05


def texts(rng: random.Random, count: int) -> list[str]:
    """Of one word to beyond the model's limit, most of them short."""
    return [" ".join(rng.choices(WORDS, k=round(MOST_WORDS ** rng.random()))) for _ in range(count)]


async def test_memory_does_not_grow_with_the_texts_embedded(model_dir: Path) -> None:
    model = OnnxModel.load(ensure_model(model_dir), threads=1, threads_alone=2)
    embedder = Embedder(model, workers=2)
    process, rng = psutil.Process(), random.Random(5)
    resident: list[int] = []

    async def one(batch: list[str]) -> None:
        answer = await embedder.embed(batch, InputType.DOCUMENT, Deadline.after(600))
        assert np.isfinite(answer.vectors).all()

    try:
        for done in range(ROUND_TEXTS, TEXTS + 1, ROUND_TEXTS):
            # Bulk calls, and single ones with and without company, so that batches are cut in every way.
            mixed = texts(rng, ROUND_TEXTS)
            await asyncio.gather(one(mixed[:60]), *(one([text]) for text in mixed[60:80]))
            for text in mixed[80:]:
                await one([text])
            if done >= WARM_UP:
                resident.append(process.memory_info().rss)
    finally:
        await embedder.close()
    print(f"texts={TEXTS} MB first={resident[0] / 1e6:.0f} last={resident[-1] / 1e6:.0f}", end=" ")
    print(f"most={max(resident) / 1e6:.0f}")
    assert max(resident) <= GROWTH * resident[0], [round(each / 1e6) for each in resident]
