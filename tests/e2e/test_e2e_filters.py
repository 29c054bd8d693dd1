"""Filters: text and message mean the same, and a filtered search is the right answer, however few match."""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import brute_force
import numpy as np
import pytest

from protos.ringfort import v1 as pb
from ringfort import Client

ROWS, DIM, K = 2_000, 32, 20
IDS = [f"d{i:04}" for i in range(ROWS)]
RNG = np.random.default_rng(5)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
ASKED = RNG.normal(size=(8, DIM)).astype(np.float32)
START = datetime(2026, 1, 1, tzinfo=UTC)

Attributes = Mapping[str, Any]


def attributes(i: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "rank": i,
        "name": f"name {i % 7}",
        "released": START + timedelta(hours=i),
        "tags": [f"t{i % 3}", f"u{i % 100}"],
    }
    if i % 4:
        told["share"] = i / ROWS
    if i % 2:
        told["free"] = i % 3 == 0
    return told


ATTRIBUTES = [attributes(i) for i in range(ROWS)]


@pytest.fixture(scope="module")
def documents(client: Client) -> Iterator[str]:
    """The documents above, three quarters of them in segments, some of them rewritten and some deleted."""
    name = f"f-{uuid4().hex[:12]}"
    client.create_collection(
        name,
        dim=DIM,
        attributes={
            "rank": "int", "name": "keyword", "released": "timestamp", "tags": "keywords", "share": "float",
            "free": "bool",
        },
    )  # fmt: skip
    rows = [
        {"id": id, "vector": vector, "attributes": told}
        for id, vector, told in zip(IDS, VECTORS, ATTRIBUTES, strict=True)
    ]
    wrong = [{**row, "vector": -row["vector"], "attributes": {"rank": -1}} for row in rows[::5]]
    client.upsert(name, [{"id": f"gone {i}", "vector": VECTORS[i]} for i in range(200)])
    client.upsert(name, wrong)
    client.upsert(name, rows)
    client.delete(name, ids=[f"gone {i}" for i in range(200)])
    yield name
    client.delete_collection(name)


def keyword(value: str) -> pb.Value:
    return pb.Value(keyword=value)


def number(value: int) -> pb.Value:
    return pb.Value(int=value)


def compare(attribute: str, op: "pb.Compare.Op.ValueType", value: pb.Value) -> pb.Filter:
    return pb.Filter(compare=pb.Compare(attribute=attribute, op=op, value=value))


def both(*filters: pb.Filter) -> pb.Filter:
    return pb.Filter(all=pb.FilterList(filters=filters))


def either(*filters: pb.Filter) -> pb.Filter:
    return pb.Filter(any=pb.FilterList(filters=filters))


def negated(filter: pb.Filter) -> pb.Filter:
    message = pb.Filter()
    getattr(message, "not").CopyFrom(filter)
    return message


def within(attribute: str, *values: pb.Value) -> pb.Filter:
    message = pb.Filter()
    getattr(message, "in").attribute = attribute
    getattr(message, "in").values.extend(values)
    return message


def moment(hours: int) -> pb.Value:
    value = pb.Value()
    value.timestamp.FromDatetime(START + timedelta(hours=hours))
    return value


def exists(attribute: str) -> pb.Filter:
    return pb.Filter(exists=pb.Exists(attribute=attribute))


C = pb.Compare
FILTERS: list[tuple[str, pb.Filter, Callable[[Attributes], bool]]] = [
    ("rank < 0", compare("rank", C.LT, number(0)), lambda a: a["rank"] < 0),
    ("rank = 1234", compare("rank", C.EQ, number(1234)), lambda a: a["rank"] == 1234),
    ("rank >= 1995", compare("rank", C.GE, number(1995)), lambda a: a["rank"] >= 1995),
    ('tags = "u42"', compare("tags", C.EQ, keyword("u42")), lambda a: "u42" in a["tags"]),
    (
        'name in ("name 2", "name 5") and rank <= 350',
        both(within("name", keyword("name 2"), keyword("name 5")), compare("rank", C.LE, number(350))),
        lambda a: a["name"] in ("name 2", "name 5") and a["rank"] <= 350,
    ),
    ('name = "name 3"', compare("name", C.EQ, keyword("name 3")), lambda a: a["name"] == "name 3"),
    ("free = true", compare("free", C.EQ, pb.Value(bool=True)), lambda a: a.get("free") is True),
    ("not free = true", negated(compare("free", C.EQ, pb.Value(bool=True))), lambda a: not a.get("free")),
    ("free != true", compare("free", C.NE, pb.Value(bool=True)), lambda a: a.get("free") is False),
    ("exists(share)", exists("share"), lambda a: "share" in a),
    ("share > 0.75", compare("share", C.GT, pb.Value(float=0.75)), lambda a: a.get("share", 0) > 0.75),
    ("share < 1", compare("share", C.LT, number(1)), lambda a: "share" in a),
    (
        "range(rank, >= 100, < 200) or range(rank, > 1900)",
        either(
            pb.Filter(range=pb.Range(attribute="rank", gte=number(100), lt=number(200))),
            pb.Filter(range=pb.Range(attribute="rank", gt=number(1900))),
        ),
        lambda a: 100 <= a["rank"] < 200 or a["rank"] > 1900,
    ),
    (
        'released >= "2026-03-01T00:00:00Z"',
        compare("released", C.GE, moment(59 * 24)),
        lambda a: a["released"] >= datetime(2026, 3, 1, tzinfo=UTC),
    ),
    ('tags != "t1"', compare("tags", C.NE, keyword("t1")), lambda a: "t1" not in a["tags"]),
    (
        'not (tags = "t0" or tags in ("t1", "u5")) and (rank < 1500 or name = "name 0")',
        both(
            negated(
                either(compare("tags", C.EQ, keyword("t0")), within("tags", keyword("t1"), keyword("u5")))
            ),
            either(compare("rank", C.LT, number(1500)), compare("name", C.EQ, keyword("name 0"))),
        ),
        lambda a: not {"t0", "t1", "u5"} & set(a["tags"]) and (a["rank"] < 1500 or a["name"] == "name 0"),
    ),
    ("rank >= 0", compare("rank", C.GE, number(0)), lambda a: True),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("text", "message", "holds"), FILTERS, ids=[text for text, _, _ in FILTERS])


@EVERY
def test_text_and_message_count_what_holds(
    client: Client, documents: str, text: str, message: pb.Filter, holds: Callable[[Attributes], bool]
) -> None:
    wanted = sum(map(holds, ATTRIBUTES))
    assert client.count(documents, filter=text) == wanted
    assert client.count(documents, filter=message) == wanted


@EVERY
def test_a_filtered_search_is_the_right_answer(
    client: Client, documents: str, text: str, message: pb.Filter, holds: Callable[[Attributes], bool]
) -> None:
    allowed = np.array([holds(told) for told in ATTRIBUTES])
    recalls = []
    for query in ASKED:
        scores = brute_force.scores("cosine", query, VECTORS)
        wanted = brute_force.best(scores, IDS, K, allowed)
        exact = client.search(documents, vector=query, k=K, filter=text, exact=True)
        assert [hit.id for hit in exact] == wanted
        assert client.search(documents, vector=query, k=K, filter=message, exact=True).hits == exact.hits
        ordinary = client.search(documents, vector=query, k=K, filter=text)
        assert len(ordinary) == len(wanted)
        assert client.search(documents, vector=query, k=K, filter=message).hits == ordinary.hits
        found = {hit.id for hit in ordinary}
        assert all(holds(hit.attributes) for hit in ordinary)
        recalls.append(len(found & set(wanted)) / len(wanted) if wanted else 1.0)
    assert np.mean(recalls) >= 0.98


def test_a_batch_is_filtered_alike(client: Client, documents: str) -> None:
    batch = client.batch_search(documents, vectors=ASKED, k=K, filter="rank < 40", exact=True)
    for i, query in enumerate(ASKED):
        one = client.search(documents, vector=query, k=K, filter="rank < 40", exact=True)
        assert list(batch.ids[i]) == [hit.id for hit in one]


def test_a_scan_is_filtered_alike(client: Client, documents: str) -> None:
    text, message, holds = FILTERS[15]
    wanted = sorted(id for id, told in zip(IDS, ATTRIBUTES, strict=True) if holds(told))
    for filter in (text, message):
        assert sorted(d.id for d in client.scan(documents, filter=filter, page_size=500)) == wanted


def test_a_filter_sees_a_write_at_once(client: Client, collection: str) -> None:
    for i in range(20):
        client.upsert(collection, [{"id": "a", "text": "a", "attributes": {"rank": i}}])
        assert [hit.id for hit in client.search(collection, text="a", filter=f"rank = {i}")] == ["a"]
        assert len(client.search(collection, text="a", filter=f"rank < {i}")) == 0
