"""The merge against brute force, however hits are spread over the answers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shard_router.merge import merge
from shard_router.model import Hit, Version

HITS = st.builds(
    Hit,
    st.sampled_from("abcdefgh"),
    st.integers(-3, 3).map(float),
    st.builds(Version, st.integers(1, 2), st.integers(1, 3)),
)


def brute_force(hits: list[Hit], k: int) -> list[Hit]:
    best: dict[str, Hit] = {}
    for hit in hits:
        seen = best.get(hit.id)
        if seen is None or (hit.version, hit.score) > (seen.version, seen.score):
            best[hit.id] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.id))[:k]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(HITS, st.integers(0, 4)), max_size=40), st.integers(0, 12))
def test_the_merge_is_exact_on_any_partition(placed: list[tuple[Hit, int]], k: int) -> None:
    answers = [
        sorted((hit for hit, answer in placed if answer == number), key=lambda hit: -hit.score)
        for number in range(5)
    ]
    assert merge(answers, k) == brute_force([hit for hit, _ in placed], k)
    assert merge([[hit for hit, _ in placed]], k) == brute_force([hit for hit, _ in placed], k)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 200), st.floats(-1, 1, width=32), max_size=60),
    st.integers(1, 5),
    st.integers(1, 15),
)
def test_merging_each_shards_best_k_is_the_best_k_of_all(
    scores: dict[int, float], shards: int, k: int
) -> None:
    hits = [Hit(f"id-{number}", score, Version(1, number)) for number, score in scores.items()]
    answers = [
        brute_force([hit for hit in hits if hit.version.seq % shards == shard], k) for shard in range(shards)
    ]
    assert merge(answers, k) == brute_force(hits, k)
