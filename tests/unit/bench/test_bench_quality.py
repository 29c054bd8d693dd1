"""nDCG and rank agreement by hand-made cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from loadtests.quality import Judged, ndcg, spearman


def test_ndcg_is_one_for_the_ideal_order_and_discounts_what_comes_late() -> None:
    grades = {0: {1: 3.0, 2: 1.0}}
    assert ndcg(np.array([[0.1, 0.9, 0.5]]), grades) == pytest.approx(1.0)
    ideal = 3 + 1 / math.log2(3)
    assert ndcg(np.array([[0.1, 0.5, 0.9]]), grades) == pytest.approx((1 + 3 / math.log2(3)) / ideal)
    assert ndcg(np.array([np.arange(20.0)]), {0: {0: 1.0}}) == 0


def test_spearman_sees_order_and_nothing_else() -> None:
    a = np.array([0.1, 0.5, 0.3, 0.9])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)


def test_a_judged_collection_is_read_by_row(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    documents = [
        {"_id": "b", "title": "A wing", "text": "A wing in a stream"},
        {"_id": "a", "title": "Heat", "text": "flows"},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "queries.jsonl").write_text('{"_id": "7", "text": "what flows"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\ta\t2\n7\tb\t0\n9\ta\t1\n")
    judged = Judged.read(tmp_path)
    assert judged.documents == ["A wing in a stream", "Heat flows"]
    assert judged.queries == ["what flows"]
    assert judged.grades == {0: {1: 2.0}}
