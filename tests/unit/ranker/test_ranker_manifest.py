"""A ranker's manifest says what it weighs, and what is wrong with it."""

import json

import pytest

from services.ranker.manifest import MAX_FEATURES, RankerManifest, RankerRefused

SHOP = {"name": "shop", "version": "3", "features": {"similarity": 1, "sales": 0.4}}


def of(**facts: object) -> RankerManifest:
    return RankerManifest.of(json.dumps({**SHOP, **facts}).encode())


def test_it_is_read_and_written() -> None:
    manifest = of()
    assert (manifest.model, manifest.features) == ("shop@3", {"similarity": 1.0, "sales": 0.4})
    assert RankerManifest.of(manifest.encode()) == manifest


def test_what_ranks_alike_is_one_variant() -> None:
    assert of().variant == of(version="4", features={"sales": 0.4, "similarity": 1.0}).variant
    assert of().variant != of(features={"similarity": 1, "sales": 0.5}).variant


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"features": {}}, "features: 0, where 1 to"),
        ({"features": {f"f{i}": 1 for i in range(MAX_FEATURES + 1)}}, f"features: {MAX_FEATURES + 1}"),
        ({"features": {"sales": 1e7}}, "features.sales: the weight must be at most 1e[+]06"),
        ({"features": {"sales": "much"}}, r"Expected `float`, got `str` - at `\$.features"),
        ({"features": ["sales"]}, r"Expected `object`, got `array` - at `\$.features`"),
        ({"weights": {}}, "unknown field `weights`"),
        ({"kind": "forest"}, r"Invalid enum value 'forest' - at `\$.kind`"),
        ({"name": 3}, r"Expected `str`, got `int` - at `\$.name`"),
    ],
)
def test_what_is_none_is_refused(facts: dict[str, object], what: str) -> None:
    with pytest.raises(RankerRefused, match=what):
        of(**facts)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": "shop"}', b"\xff"])
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(RankerRefused):
        RankerManifest.of(data)
