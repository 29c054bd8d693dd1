"""A ranker's name is its live version or, for some keys, its canary."""

import json

import pytest

from services.gateway.rankers import Chosen, Rankers
from services.metadata.models import ModelKind, ModelState, ModelVersion
from services.ranker.ranker import Ranker
from shard_router.errors import NotFound, PreconditionFailed


def version(
    number: str, state: ModelState, percent: int = 0, kind: ModelKind = ModelKind.RANKER, **facts: object
) -> ModelVersion:
    told = {"name": "shop", "version": number, "features": {"sales": float(number)}, **facts}
    return ModelVersion("shop", number, kind, state, percent, "/shop.json", json.dumps(told), 1)


def resolve(rankers: Rankers, name: str, key: bytes = b"k") -> Chosen:
    return rankers.resolve(name, "tenant", key)


def test_the_release_brings_one() -> None:
    rankers = Rankers()
    for name in ("", Ranker.name, Ranker.version):
        assert resolve(rankers, name) == Chosen(Ranker.version, Ranker.version, {})
    with pytest.raises(NotFound) as missing:
        resolve(rankers, "shop")
    assert missing.value.field == "rank.ranker"


def test_a_name_is_its_live_version_and_a_full_name_any() -> None:
    rankers = Rankers()
    rankers.know([version("1", ModelState.LIVE), version("2", ModelState.STAGED)])
    assert resolve(rankers, "shop").model == "shop@1"
    assert resolve(rankers, "shop@2").weights == {"sales": 2.0}
    with pytest.raises(NotFound):
        resolve(rankers, "shop@3")
    rankers.require_live("shop")
    rankers.know([version("2", ModelState.STAGED)])
    with pytest.raises(PreconditionFailed, match="no version of ranker 'shop' is live"):
        resolve(rankers, "shop")
    with pytest.raises(PreconditionFailed):
        rankers.require_live("shop")


def test_a_canary_takes_its_share_of_the_name_and_nothing_of_the_full_names() -> None:
    rankers = Rankers()
    rankers.know([version("1", ModelState.LIVE), version("2", ModelState.CANARY, 30)])
    keys = [b"%d" % i for i in range(1_000)]
    taken = [key for key in keys if resolve(rankers, "shop", key).model == "shop@2"]
    assert 250 < len(taken) < 350
    assert [key for key in keys if resolve(rankers, "shop", key).model == "shop@2"] == taken
    assert {resolve(rankers, "shop@1", key).model for key in keys} == {"shop@1"}
    told = rankers.stats_of_each()
    assert told["shop@2"] == {"requests_total": 2 * len(taken)}
    assert told["shop@1"] == {"requests_total": 3_000 - 2 * len(taken)}


def test_an_answer_is_named_by_what_the_ranker_does() -> None:
    rankers = Rankers()
    rankers.know([version("1", ModelState.LIVE)])
    before = resolve(rankers, "shop").version
    rankers.know([version("1", ModelState.LIVE, features={"sales": 7})])
    assert resolve(rankers, "shop").version != before


def test_what_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rankers = Rankers()
    other = version("3", ModelState.LIVE, kind=ModelKind.EMBEDDING)
    rankers.know([version("1", ModelState.LIVE, kind_of="x"), version("2", ModelState.STAGED), other])
    assert [each.manifest.model for each in rankers.registered()] == ["shop@2"]
    assert "ranker cannot be used ranker=shop@1" in caplog.text
