"""Models that are no BERT encoders, exported by torch; needs the extra `models` (`make test-models`)."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.models import gate
from index_builder.models.release import Wanted, release
from index_builder.models.source import ModelUnsupported, packaged_model
from index_builder.models.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the extra `models` is not here"),
    # torch and transformers warn of their own plans at import.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module", params=["mean", "cls"])
def distilled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DistilBERT with random weights and MiniLM's vocabulary, as sentence-transformers writes it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=30522, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=64
    )
    DistilBertModel(config).save_pretrained(directory / "base")
    PreTrainedTokenizerFast(
        tokenizer_file=str(packaged_model() / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(directory / "base")  # fmt: skip
    modules = [
        Transformer(str(directory / "base"), max_seq_length=48),
        Pooling(64, pooling_mode=request.param),
        Normalize(),
    ]
    model: Any = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query: "})
    model.save(str(directory / "source"))
    return directory / "source"


def test_an_exported_model_equals_its_source(distilled: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    made = release(
        distilled, tmp_path, Wanted("distil@1", precisions=("fp32", "int8", "weight8")), lambda *_: None
    )
    assert made.gate is not None
    fp32, int8, weight8 = made.gate.table
    assert not fp32.failed
    for converted in (int8, weight8):
        assert converted.agreement is not None
        assert converted.agreement.p1 > 0.99
        assert converted.batch_invariance > 0.99999
    assert (made.max_tokens, made.prompts, made.dim) == (48, {"query": "query: "}, 64)
    source: Any = SentenceTransformer(str(distilled), device="cpu")
    wanted = source.encode(list(gate.TEXTS), prompt="", convert_to_numpy=True, normalize_embeddings=True)
    tokenizer = Tokenizer(made.directory / "tokenizer.json", max_tokens=made.max_tokens)
    vectors = gate.vectors_of(made.directory / "model.onnx", tokenizer, gate.TEXTS)
    assert (vectors * wanted).sum(axis=1).min() >= (0.99999 if made.precision == "fp32" else 0.99)


def test_the_published_formats_of_one_model_are_one_model(tmp_path: Path) -> None:
    """The packaged weights, written again by the library of today, are read alike."""
    from sentence_transformers import SentenceTransformer

    from index_builder.models.source import ModelSource

    model: Any = SentenceTransformer(str(packaged_model()), device="cpu")
    model.save(str(tmp_path / "again"))
    first, again = ModelSource.open(packaged_model()), ModelSource.open(tmp_path / "again")
    assert again.max_tokens == first.max_tokens
    assert again.prompts == first.prompts
    assert np.array_equal(
        again.weights["embeddings.word_embeddings.weight"],
        first.weights["embeddings.word_embeddings.weight"],
    )


def test_a_model_that_ranks_by_length_is_refused(distilled: Path, tmp_path: Path) -> None:
    facts = json.loads((distilled / "config_sentence_transformers.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in distilled.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config_sentence_transformers.json").unlink()
    (other / "config_sentence_transformers.json").write_text(
        json.dumps({**facts, "similarity_fn_name": "dot"})
    )
    with pytest.raises(ModelUnsupported, match="compares by dot"):
        release(other, tmp_path / "out", Wanted("distil@1"), lambda *_: None)
