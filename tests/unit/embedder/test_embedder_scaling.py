"""A model has as many processes as its waiting texts are worth."""

from types import SimpleNamespace

import pytest

from services.embedder.scaling import TARGET_TEXTS, policy, wanted


@pytest.mark.parametrize(
    ("queued", "running", "expected"),
    [(0, 0, 1), (0, 1, 1), (10, 1, 1), (11, 1, 2), (95, 2, 10), (5, 2, 2), (2, 2, 1), (0, 5, 4), (20, 5, 5)],
)
def test_more_where_texts_wait_and_fewer_one_by_one(queued: float, running: int, expected: int) -> None:
    assert wanted(queued, running, target_texts=10) == expected


def test_the_policy_adds_up_what_replicas_record() -> None:
    queues = {"r1": 2 * TARGET_TEXTS, "r2": TARGET_TEXTS}
    context = SimpleNamespace(aggregated_metrics={"queue_texts": queues}, current_num_replicas=2)
    assert policy(context) == (3, {})
    assert policy(SimpleNamespace(aggregated_metrics=None, current_num_replicas=1)) == (1, {})
