"""What holds on a CPU holds on a GPU: the same vectors, whatever the batch."""

import numpy as np
import onnxruntime
import pytest

from index_builder.models import gate
from index_builder.models.conversions import half
from index_builder.models.engine import CUDA, Engine
from index_builder.models.export import Float32, encoder
from index_builder.models.source import ModelSource, packaged_model
from index_builder.models.tokenizer import Tokenizer, padded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("fp16", 0.999)])
def test_a_gpu_gives_the_vectors_of_the_cpu(precision: str, least: float) -> None:
    graph = encoder(ModelSource.open(packaged_model()), Float32())
    tokenizer = Tokenizer(packaged_model() / "tokenizer.json", max_tokens=256)
    reference = gate.vectors_of(graph, tokenizer, gate.TEXTS)
    engine = Engine.load(
        graph if precision == "fp32" else half(graph), threads=1, device="cuda", precision=precision
    )
    ids, mask = padded(tokenizer.encode(gate.TEXTS).ids)
    crowd = engine.run({"input_ids": ids, "attention_mask": mask})
    assert gate.agreement(crowd, reference).worst >= least
    pairs = [padded([row]) for row in tokenizer.encode(gate.TEXTS).ids]
    alone = [engine.run({"input_ids": ids, "attention_mask": mask}) for ids, mask in pairs]
    assert gate.agreement(np.concatenate(alone), crowd).worst >= least
