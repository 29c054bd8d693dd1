"""Recommend: near what is liked, away from what is not, ranked, diversified, and told stage by stage."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import brute_force
import numpy as np
import pytest

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from ringfort.results import SearchResult

MakeCollection = Callable[..., str]

ROWS, DIM = 300, 16
IDS = [f"d{i:03}" for i in range(ROWS)]
RNG = np.random.default_rng(3)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
#: A permutation, so that rank says nothing of place or likeness.
RANKS = RNG.permutation(ROWS)


@pytest.fixture(scope="module")
def documents(client: Client) -> Iterator[str]:
    """Vectors with a number, a flag, a group and, in every third, none of them."""
    name = f"r-{uuid4().hex[:12]}"
    client.create_collection(name, dim=DIM, attributes={"rank": "int", "free": "bool", "group": "keyword"})
    client.upsert(
        name,
        [
            {
                "id": id,
                "vector": VECTORS[i],
                "text": f"text of {id}",
                "attributes": {}
                if i % 3 == 0
                else {"rank": int(RANKS[i]), "free": i % 2 == 0, "group": f"g{i % 4}"},
            }
            for i, id in enumerate(IDS)
        ],
    )
    yield name
    client.delete_collection(name)


def ids(result: SearchResult) -> list[str]:
    return [hit.id for hit in result]


def direction(*rows: int) -> np.ndarray:
    units = VECTORS[list(rows)] / np.linalg.norm(VECTORS[list(rows)], axis=1, keepdims=True)
    mean: np.ndarray = units.mean(axis=0)
    return mean


def nearest(taste: np.ndarray, k: int, *without: int) -> list[str]:
    allowed = ~np.isin(np.arange(ROWS), without)
    return brute_force.best(brute_force.scores("cosine", taste, VECTORS), IDS, k, allowed)


# -- retrieval


def test_what_is_near_one_liked_document_is_recommended_without_it(client: Client, documents: str) -> None:
    found = client.recommend(documents, like=["d010"], k=10)
    assert ids(found) == nearest(VECTORS[10], 10, 10)
    scores = brute_force.scores("cosine", VECTORS[10], VECTORS)
    for hit in found:
        assert hit.score == pytest.approx(scores[IDS.index(hit.id)], abs=1e-5)
    assert found.served_from == "INDEX"
    assert found.coverage.complete


def test_several_likes_count_alike_and_dislikes_push_away(client: Client, documents: str) -> None:
    liked = client.recommend(documents, like=["d010", "d020", "d030"], k=10)
    assert ids(liked) == nearest(direction(10, 20, 30), 10, 10, 20, 30)
    both = client.recommend(documents, like=["d010", "d020", "d030"], unlike=["d040", "d050"], k=10)
    taste = direction(10, 20, 30) - 0.5 * direction(40, 50)
    assert ids(both) == nearest(taste, 10, 10, 20, 30, 40, 50)
    assert ids(both) != ids(liked)


def test_an_unliked_document_keeps_its_kind_away(client: Client, collection: str) -> None:
    kinds = {"json": "a fast json parser", "pie": "a recipe for apple pie", "web": "an async web framework"}
    client.upsert(
        collection,
        [{"id": f"{kind}{i}", "text": f"{text}, take {i}"} for kind, text in kinds.items() for i in range(5)],
    )
    # A taste for both, and then for one of them only.
    liked = client.recommend(collection, like=["json0", "web0"], k=8)
    assert {id[:3] for id in ids(liked)} == {"jso", "web"}
    pushed = client.recommend(collection, like=["json0", "web0"], unlike=["web1", "web2"], k=4)
    assert {id[:3] for id in ids(pushed)} == {"jso"}


def test_an_example_may_be_an_id_a_vector_or_a_text(client: Client, collection: str, documents: str) -> None:
    by_id = client.recommend(documents, like=["d010"], k=10)
    by_vector = client.recommend(documents, like=[VECTORS[10]], exclude=["d010"], k=10)
    assert ids(by_id) == ids(by_vector)
    client.upsert(collection, [{"id": str(i), "text": f"text number {i}"} for i in range(20)])
    by_text = client.recommend(collection, like=[{"text": "text number 7"}], k=5)
    assert ids(by_text) == ids(client.search(collection, text="text number 7", k=5))


def test_what_is_excluded_leaves_room_for_others(client: Client, documents: str) -> None:
    first = ids(client.recommend(documents, like=["d010"], k=20))
    found = client.recommend(documents, like=["d010"], exclude=[*first[:10], "unknown"], k=10)
    assert ids(found) == first[10:]


def test_candidates_are_filtered_and_bounded(client: Client, documents: str) -> None:
    found = client.recommend(documents, like=["d010"], filter="free = true", k=50)
    assert len(found) == 50
    assert all(hit.attributes["free"] is True for hit in found)
    few = client.recommend(documents, like=["d010"], candidates=7, k=5)
    assert next(stage for stage in few.stages if stage.name == "retrieve").candidates == 7
    # As many candidates as answers are wanted, at the least.
    assert len(client.recommend(documents, like=["d010"], candidates=3, k=12)) == 12


def test_l2_recommends_the_nearest_points(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=DIM, metric="l2")
    # Of very different lengths: in L2 a direction says little.
    lengths = np.linspace(0.1, 10, ROWS, dtype=np.float32)[:, None]
    vectors = VECTORS * lengths
    client.upsert(name, [{"id": id, "vector": v} for id, v in zip(IDS, vectors, strict=True)])
    found = client.recommend(name, like=["d200", "d210"], k=10)
    allowed = ~np.isin(np.arange(ROWS), (200, 210))
    scores = brute_force.scores("l2", vectors[[200, 210]].mean(axis=0), vectors)
    assert ids(found) == brute_force.best(scores, IDS, 10, allowed)


# -- ranking


def test_a_weight_changes_the_order_as_it_should(client: Client, documents: str) -> None:
    plain = client.recommend(documents, like=["d010"], k=100)
    high = client.recommend(documents, like=["d010"], rank={"similarity": 0.0, "rank": 1.0}, k=100)
    low = client.recommend(documents, like=["d010"], rank={"similarity": 0.0, "rank": -1.0}, k=100)
    assert sorted(ids(high)) == sorted(ids(low)) == sorted(ids(plain))
    ranks = [hit.attributes.get("rank", -1) for hit in high]
    assert ranks == sorted(ranks, reverse=True)
    ranks = [hit.attributes.get("rank", -1) for hit in low if "rank" in hit.attributes]
    assert ranks == sorted(ranks)
    # In between, what is told of the features explains each score and the order.
    mixed = client.recommend(documents, like=["d010"], rank={"similarity": 1.0, "rank": 0.3}, k=100)
    assert ids(mixed) not in (ids(plain), ids(high))
    for hit in mixed:
        assert set(hit.features) == {"similarity", "rank"}
        assert 0 <= hit.features["rank"] <= 1
        assert hit.score == pytest.approx(hit.features["similarity"] + 0.3 * hit.features["rank"], abs=1e-5)
    assert [hit.score for hit in mixed] == sorted((hit.score for hit in mixed), reverse=True)


def test_similarity_counts_fully_where_no_weight_is_named(client: Client, documents: str) -> None:
    unnamed = client.recommend(documents, like=["d010"], rank={"rank": 0.3}, k=20)
    named = client.recommend(documents, like=["d010"], rank={"rank": 0.3, "similarity": 1.0}, k=20)
    assert ids(unnamed) == ids(named)
    assert unnamed.ranker == "blend@1"


def test_a_flag_can_be_a_feature(client: Client, documents: str) -> None:
    found = client.recommend(documents, like=["d010"], rank={"free": 100.0}, k=100)
    flags = [hit.attributes.get("free") is True for hit in found]
    assert flags == sorted(flags, reverse=True)
    assert any(flags)
    assert not all(flags)


# -- diversity


def test_mmr_trades_likeness_for_variety(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=4)
    noise = RNG.normal(size=(20, 4)).astype(np.float32) * 0.001
    near, far = np.array([1, 0.1, 0, 0], np.float32), np.array([1, 0, 2, 0], np.float32)
    clusters = {"near": near, "far": far}
    client.upsert(
        name,
        [
            {"id": f"{cluster}{i}", "vector": centre + noise[i]}
            for cluster, centre in clusters.items()
            for i in range(10)
        ],
    )
    like = [np.array([1, 0, 0, 0], np.float32)]

    def kinds(mmr_lambda: float | None) -> set[str]:
        return {id[:3] for id in ids(client.recommend(name, like=like, k=4, mmr_lambda=mmr_lambda))}

    assert kinds(None) == kinds(1.0) == {"nea"}
    assert kinds(0.3) == {"nea", "far"}
    assert ids(client.recommend(name, like=like, k=1, mmr_lambda=0.3))[0].startswith("near")
    assert len(client.recommend(name, like=like, k=20, mmr_lambda=0.3)) == 20


@pytest.mark.parametrize("per_group", [1, 3])
def test_a_group_fills_no_more_than_its_share(client: Client, documents: str, per_group: int) -> None:
    found = client.recommend(
        documents, like=["d010"], filter="exists(group)", group_by="group", per_group=per_group, k=20
    )
    groups = [hit.attributes["group"] for hit in found]
    assert sorted(groups) == sorted(["g0", "g1", "g2", "g3"] * per_group)
    # The best of each group, in the order they have anyway.
    everyone = client.recommend(documents, like=["d010"], filter="exists(group)", k=100)
    wanted, seen = [], dict.fromkeys(groups, 0)
    for hit in everyone:
        seen[hit.attributes["group"]] += 1
        if seen[hit.attributes["group"]] <= per_group:
            wanted.append(hit.id)
    assert ids(found) == wanted


def test_documents_of_no_group_are_not_limited(client: Client, documents: str) -> None:
    found = client.recommend(documents, like=["d010"], group_by="group", per_group=1, k=20)
    assert len(found) == 20
    groups = [hit.attributes["group"] for hit in found if "group" in hit.attributes]
    assert len(groups) == len(set(groups))


def test_mmr_and_groups_hold_together(client: Client, documents: str) -> None:
    found = client.recommend(documents, like=["d010"], group_by="group", per_group=2, mmr_lambda=0.5, k=20)
    groups = [hit.attributes["group"] for hit in found if "group" in hit.attributes]
    assert len(found) == 20
    assert max(groups.count(group) for group in set(groups)) <= 2


# -- what is told


def test_every_stage_says_what_it_did_or_why_not(client: Client, documents: str) -> None:
    plain = client.recommend(documents, like=["d010"], k=5)
    assert [stage.name for stage in plain.stages] == ["retrieve", "rank", "diversify"]
    retrieve, rank, diversify = plain.stages
    assert (retrieve.candidates, retrieve.skipped) == (100, "")
    assert (rank.candidates, rank.skipped) == (100, "")
    assert retrieve.took_ms > 0
    assert diversify.skipped
    spread = client.recommend(documents, like=["d010"], k=5, mmr_lambda=0.5).stages[2]
    assert (spread.candidates, spread.skipped) == (5, "")
    assert plain.timings.total_ms >= plain.timings.search_ms > 0


def test_a_recommendation_carries_the_parts_asked_for(client: Client, documents: str) -> None:
    (hit,) = client.recommend(documents, like=["d010"], k=1, include=["vector"], rank={"rank": 1.0})
    assert (hit.text, hit.attributes) == (None, {})
    np.testing.assert_allclose(
        hit.vector, VECTORS[IDS.index(hit.id)] / np.linalg.norm(VECTORS[IDS.index(hit.id)]), atol=1e-5
    )
    (hit,) = client.recommend(documents, like=["d010"], k=1, mmr_lambda=0.5)
    assert hit.text == f"text of {hit.id}"
    assert hit.vector is None


# -- registered rankers


@pytest.fixture
def ranker(client: Client, tmp_path: Path) -> Callable[..., str]:
    """Registers versions of a ranker of the test's own from weights; gives its name."""
    name = f"rank-{uuid4().hex[:8]}"

    def register(version: str, **features: float) -> str:
        file = tmp_path / f"{name}-{version}.json"
        file.write_text(json.dumps({"name": name, "version": version, "features": features}))
        made = client.register_model(str(file), kind="RANKER")
        assert (made.kind, made.state, made.dim) == (pb.Model.RANKER, pb.Model.STAGED, 0)
        return name

    return register


def test_a_registered_ranker_ranks_as_its_weights_would(
    client: Client, documents: str, ranker: Callable[..., str]
) -> None:
    name = ranker("1", similarity=0.2, rank=0.7)
    weighed = client.recommend(documents, like=["d010"], rank={"similarity": 0.2, "rank": 0.7})
    named = client.recommend(documents, like=["d010"], ranker=f"{name}@1")
    assert (ids(named), named.ranker) == (ids(weighed), f"{name}@1")
    with pytest.raises(FailedPrecondition, match="no version of ranker"):
        client.recommend(documents, like=["d010"], ranker=name)
    client.promote_model(name, "1")
    assert ids(client.recommend(documents, like=["d010"], ranker=name)) == ids(weighed)
    own = client.recommend(documents, like=["d010"], ranker=name, rank={"rank": -0.7})
    assert ids(own) == ids(
        client.recommend(documents, like=["d010"], rank={"similarity": 0.2, "rank": -0.7})
    ), "what the request weighs goes before"


def test_a_promoted_ranker_is_not_answered_with_what_the_one_before_made(
    client: Client, documents: str, ranker: Callable[..., str]
) -> None:
    name = ranker("1", similarity=0, rank=1)
    ranker("2", similarity=0, rank=-1)
    client.promote_model(name, "1")
    up = client.recommend(documents, like=["d010"], ranker=name)
    assert client.recommend(documents, like=["d010"], ranker=name).served_from != "INDEX"
    client.promote_model(name, "2")
    down = client.recommend(documents, like=["d010"], ranker=name)
    assert (down.served_from, down.ranker) == ("INDEX", f"{name}@2")
    assert ids(down) != ids(up)


def test_a_canary_ranks_for_its_share_of_the_users(
    client: Client, documents: str, ranker: Callable[..., str]
) -> None:
    name = ranker("1", rank=1)
    ranker("2", rank=-1)
    client.promote_model(name, "1")
    client.set_traffic(name, "2", 30)

    def met() -> list[str]:
        found = [
            client.recommend(documents, like=["d010"], ranker=name, traffic_key=f"u{i}") for i in range(60)
        ]
        # Users of one version share its answers.
        assert sum(result.served_from == "INDEX" for result in found) <= 2
        return [result.ranker for result in found]

    first = met()
    assert set(first) == {f"{name}@1", f"{name}@2"}
    assert 5 < first.count(f"{name}@2") < 35
    assert met() == first
    client.rollback_model(name)
    assert set(met()) == {f"{name}@1"}


def test_a_ranker_that_does_not_fit_is_refused(
    client: Client, documents: str, ranker: Callable[..., str], tmp_path: Path
) -> None:
    name = ranker("1", sales=1)
    with pytest.raises(FailedPrecondition, match=f"ranker {name}@1 does not fit"):
        client.recommend(documents, like=["d010"], ranker=f"{name}@1")
    file = tmp_path / "ranker.json"
    for text, what in (
        ("{", "Input data was truncated"),
        (json.dumps({"name": name, "version": "2", "features": {"x": 1e9}}), "features.x"),
        (json.dumps({"name": "No Name", "version": "2", "features": {"x": 1}}), "'No Name' is not letters"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidArgument, match=what) as refusal:
            client.register_model(str(file), kind="RANKER")
        assert refusal.value.field == "artifact"
    for taken in ("blend", "similarity", "all-minilm-l6-v2"):
        file.write_text(json.dumps({"name": taken, "version": "9", "features": {"x": 1}}))
        with pytest.raises(AlreadyExists):
            client.register_model(str(file), kind="RANKER")
    with pytest.raises(InvalidArgument, match="No such file"):
        client.register_model(str(tmp_path / "nowhere.json"), kind="RANKER")
