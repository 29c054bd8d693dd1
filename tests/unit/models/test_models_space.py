"""Spaces and variants are told apart by everything that changes vectors, and by nothing else."""

import pytest

from index_builder.models.space import space_id, variant_id

SPACE = {
    "weights_sha256": "aa",
    "architecture": {"heads": 12, "layers": 6},
    "tokenizer_sha256": "bb",
    "max_tokens": 256,
    "pooling": "mean",
    "prompts": {"query": "q: "},
    "dim": 384,
    "normalized": True,
}
VARIANT = {"space": "s", "precision": "int8", "engine": "onnx", "artifact_sha256": "cc"}


def test_identities_are_the_same_on_every_machine() -> None:
    assert space_id(**SPACE) == "9a37e0729ab9e252"
    assert variant_id(**VARIANT) == "a029b1acb5cb57d3"


def test_the_order_of_facts_does_not_matter() -> None:
    assert space_id(**{**SPACE, "architecture": {"layers": 6, "heads": 12}}) == space_id(**SPACE)


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("weights_sha256", "ab"),
        ("architecture", {"heads": 6, "layers": 6}),
        ("tokenizer_sha256", "ba"),
        ("max_tokens", 128),
        ("pooling", "cls"),
        ("prompts", {}),
        ("dim", 192),
        ("normalized", False),
    ],
)
def test_every_fact_makes_another_space(fact: str, other: object) -> None:
    assert space_id(**{**SPACE, fact: other}) != space_id(**SPACE)


@pytest.mark.parametrize("fact", list(VARIANT))
def test_every_fact_makes_another_variant(fact: str) -> None:
    assert variant_id(**{**VARIANT, fact: "other"}) != variant_id(**VARIANT)
