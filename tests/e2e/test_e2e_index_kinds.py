"""Collections that ask for a kind of index, and searches that ask for a recall."""

from collections.abc import Callable

import numpy as np
import pytest

from ringfort import Client

DIM, ROWS = 8, 300
VECTORS = np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32)


@pytest.mark.parametrize("kind", ["auto", "flat", "hnsw", "ivf"])
def test_a_collection_keeps_the_kind_it_was_made_with_and_is_searched(
    client: Client, make_collection: Callable[..., str], kind: str
) -> None:
    name = make_collection(dim=DIM, index=kind)
    assert client.collection(name).index == kind
    client.upsert(name, [{"id": f"d{i}", "vector": vector} for i, vector in enumerate(VECTORS)])
    wanted = [hit.id for hit in client.search(name, vector=VECTORS[7], exact=True)]
    assert wanted[0] == "d7"
    for recall in (0.0, 0.9, 1.0):
        assert [hit.id for hit in client.search(name, vector=VECTORS[7], recall=recall)] == wanted
        assert client.batch_search(name, vectors=VECTORS[7:8], recall=recall).ids[0] == tuple(wanted)
    liked = client.recommend(name, like=["d7"], recall=1.0)
    assert [hit.id for hit in liked][:5] == wanted[1:6]
