from itertools import combinations

from services.cache.keys import answer_key, embedding_key

EMBEDDING = ("minilm@1-int8", "QUERY", 384, False, "fast json parser")
ANSWER = (7, "acme", 3, 1, "blend@1", b"query", b"options")

GOLDEN_EMBEDDING = "7266313a653a7a02e05d704b5d58527df6ef28960704"
GOLDEN_ANSWER = "7266313a613a373adf146804d238c69e0470b82cd5b972fa"


def test_keys_are_the_same_in_every_release():
    assert embedding_key(*EMBEDDING).hex() == GOLDEN_EMBEDDING
    assert answer_key(*ANSWER).hex() == GOLDEN_ANSWER


def test_each_part_of_an_embedding_changes_its_key():
    others = ("minilm@2", "DOCUMENT", 192, True, "fast json parsers")
    variations = [EMBEDDING, *(_with(EMBEDDING, i, other) for i, other in enumerate(others))]
    assert len({embedding_key(*parts) for parts in variations}) == len(variations)


def test_each_part_of_an_answer_changes_its_key():
    others = (8, "other", 4, 2, "blend@2", b"Query", b"Options")
    variations = [ANSWER, *(_with(ANSWER, i, other) for i, other in enumerate(others))]
    assert len({answer_key(*parts) for parts in variations}) == len(variations)


def test_neighbouring_parts_cannot_be_shifted_into_each_other():
    keys = [
        answer_key(7, "acme", 3, 1, "blend@1", b"ab", b"c"),
        answer_key(7, "acme", 3, 1, "blend@1", b"a", b"bc"),
        answer_key(7, "acme", 31, 1, "blend@1", b"ab", b"c"),
        answer_key(7, "acme", 3, 11, "blend@1", b"ab", b"c"),
    ]
    assert all(one != other for one, other in combinations(keys, 2))


def test_keys_of_one_collection_share_a_prefix_that_no_other_has():
    assert answer_key(*ANSWER).startswith(b"rf1:a:7:")
    assert not answer_key(*_with(ANSWER, 0, 77)).startswith(b"rf1:a:7:")
    assert len(embedding_key(*EMBEDDING)) == 22


def _with(parts: tuple, i: int, other: object) -> tuple:
    return (*parts[:i], other, *parts[i + 1 :])
