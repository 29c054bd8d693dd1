"""Callers get their own vectors or an error, in time, whatever happens to the others."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from index_builder.models.manifest import Agreement, ModelManifest
from index_builder.models.tokenizer import Tokens
from services.deadline import Deadline
from services.embedder.embedder import Embedded, Embedder, InputType
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable, InvalidField, Overloaded

SOON_S = 20.0


class WordTokenizer:
    """A token is a word's length; at most 50 of them."""

    def encode(self, texts: Sequence[str]) -> Tokens:
        words = [text.split() for text in texts]
        if any("untokenizable" in text for text in words):
            raise RuntimeError("tokenizer failed")
        ids = [np.array([1, *map(len, text[:48]), 2], np.int32) for text in words]
        return Tokens(ids, [len(text) > 48 for text in words])


class SumModel:
    """The sum of a text's ids, as a vector; it can be held, and told to fail."""

    tokenizer = WordTokenizer()

    def __init__(self, prompts: dict[str, str] | None = None) -> None:
        self.manifest = ModelManifest(
            name="sum",
            version="1",
            precision="fp32",
            space="space",
            variant="variant",
            dim=2,
            max_tokens=50,
            prompts=prompts or {},
            files={},
            agreement=Agreement(1, 1, 1),
            recipe=1,
            directory=Path("nowhere"),
        )
        self.may_run = threading.Event()
        self.may_run.set()
        #: Texts of each batch, in the order they were begun.
        self.batches: list[list[list[int]]] = []
        #: Which of them may have all threads.
        self.alone: list[bool] = []
        self.failure: Exception | None = None
        self.running = 0

    def encode(self, ids: np.ndarray, mask: np.ndarray, *, alone: bool = False) -> np.ndarray:
        self.batches.append([row[real > 0].tolist() for row, real in zip(ids, mask, strict=True)])
        self.alone.append(alone)
        self.running += 1
        assert self.may_run.wait(SOON_S)
        self.running -= 1
        if self.failure is not None:
            raise self.failure
        return np.stack([ids.sum(1), mask.sum(1)], axis=1).astype(np.float32)


MakeEmbedder = Callable[..., Embedder]


@pytest.fixture
def model() -> SumModel:
    return SumModel()


@pytest.fixture
async def make() -> AsyncIterator[MakeEmbedder]:
    made: list[tuple[SumModel, Embedder]] = []

    def make(model: SumModel, *, workers: int = 1, **options: object) -> Embedder:
        embedder = Embedder(model, workers=workers, **options)
        made.append((model, embedder))
        return embedder

    yield make
    for model, embedder in made:
        model.may_run.set()
        await embedder.close()


def embed(embedder: Embedder, *texts: str, within_s: float = SOON_S) -> "asyncio.Task[Embedded]":
    work = embedder.embed(texts, InputType.DOCUMENT, Deadline.after(within_s))
    return asyncio.ensure_future(work)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - what it waits for is on other threads
            await asyncio.sleep(0.001)


async def held(model: SumModel, embedder: Embedder) -> "asyncio.Task[Embedded]":
    """A call that occupies the one worker until `may_run` is set."""
    model.may_run.clear()
    task = embed(embedder, "hold")
    await until(lambda: model.running == 1)
    return task


async def test_vectors_come_in_the_order_of_the_texts(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, workers=3)
    texts = ["a " * n for n in (7, 1, 48, 3, 49, 20, 0, 5)]
    answer = await embed(embedder, *texts)
    assert answer.vectors[:, 1].tolist() == answer.tokens.tolist() == [9, 3, 50, 5, 50, 22, 2, 7]
    assert answer.vectors[:, 0].tolist() == [10, 4, 51, 6, 51, 23, 3, 8]
    assert answer.truncated.tolist() == [False] * 4 + [True] + [False] * 3
    assert (answer.vectors.dtype, answer.tokens.dtype) == (np.float32, np.int32)
    assert min(answer.queue_ms, answer.tokenize_ms, answer.inference_ms) >= 0
    assert answer.inference_ms > 0


async def test_a_caller_without_company_gets_all_threads_until_another_comes(
    model: SumModel, make: MakeEmbedder
) -> None:
    embedder = make(model, workers=2)
    async with asyncio.timeout(SOON_S):
        while not any(model.alone):
            await embed(embedder, "one at a time")
    assert len(model.alone) > 1, "nobody could have come yet"
    first = await held(model, embedder)
    second = embed(embedder, "beside it")
    await until(lambda: model.running == 2)
    model.may_run.set()
    await asyncio.gather(first, second)
    await embed(embedder, "so soon after")
    assert model.alone[-2:] == [False, False]


async def test_texts_that_make_several_batches_are_no_lone_text(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, workers=2, batch_tokens=4)
    for _ in range(20):
        await embed(embedder, "a b", "c d")
    assert not any(model.alone[::2]), "all threads were given to a batch while another waited"


async def test_no_texts_are_no_work(model: SumModel, make: MakeEmbedder) -> None:
    answer = await embed(make(model))
    assert answer.vectors.shape == (0, 2)
    assert model.batches == []


async def test_a_prompt_stands_before_the_text_of_its_kind(make: MakeEmbedder) -> None:
    model = SumModel(prompts={"query": "look for: "})
    embedder = make(model)
    query = await embedder.embed(["abc"], InputType.QUERY, Deadline.after(SOON_S))
    document = await embedder.embed(["abc"], InputType.DOCUMENT, Deadline.after(SOON_S))
    assert (query.tokens.tolist(), document.tokens.tolist()) == ([5], [3])


async def test_callers_that_wait_are_run_together(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    first = await held(model, embedder)
    others = [embed(embedder, "word " * n) for n in (1, 2, 3, 4, 5)]
    await until(lambda: embedder.stats()["queue_texts"] == 5)
    model.may_run.set()
    answers = await asyncio.gather(first, *others)
    assert [answer.tokens.tolist() for answer in answers[1:]] == [[3], [4], [5], [6], [7]]
    assert len(model.batches) == 2


async def test_a_large_call_uses_every_worker(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, workers=3, batch_tokens=30)
    model.may_run.clear()
    task = embed(embedder, *["a a a"] * 60)
    await until(lambda: model.running == 3)
    model.may_run.set()
    await task


async def test_a_single_query_does_not_wait_for_a_bulk_call(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, batch_tokens=30)
    first = await held(model, embedder)
    bulk = embed(embedder, *["a a a"] * 600)
    await until(lambda: embedder.stats()["queue_texts"] == 600)
    query = embed(embedder, "query")
    await until(lambda: embedder.stats()["queue_texts"] == 601)
    model.may_run.set()
    await asyncio.gather(first, bulk, query)
    assert [1, 5, 2] in [text for batch in model.batches[:4] for text in batch]


async def test_a_full_queue_refuses_at_once(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, queue_texts=4)
    first = await held(model, embedder)
    waiting = embed(embedder, "a", "b", "c")
    await until(lambda: embedder.stats()["queue_texts"] == 3)
    with pytest.raises(Overloaded) as refused:
        await embed(embedder, "d", "e")
    assert (refused.value.what, refused.value.limit) == ("embedder queue", 4)
    model.may_run.set()
    await asyncio.gather(first, waiting, embed(embedder, "d"))
    assert embedder.stats()["rejected_texts_total"] == 2


async def test_a_deadline_that_has_passed_is_not_begun(model: SumModel, make: MakeEmbedder) -> None:
    with pytest.raises(DeadlineExceeded):
        await embed(make(model), "late", within_s=-1)
    assert model.batches == []


async def test_a_deadline_ends_the_wait_and_the_text_is_not_run(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    first = await held(model, embedder)
    with pytest.raises(DeadlineExceeded):
        await embed(embedder, "impatient", within_s=0.02)
    assert embedder.stats()["queue_texts"] == 0
    model.may_run.set()
    await first
    await embed(embedder, "after")
    assert [1, 9, 2] not in [text for batch in model.batches for text in batch]
    assert embedder.stats()["abandoned_texts_total"] == 1


async def test_the_worker_drops_late_texts_where_the_event_loop_was_too_busy(
    model: SumModel, make: MakeEmbedder
) -> None:
    now_s = [0.0]
    embedder = make(model, clock=lambda: now_s[0])
    first = await held(model, embedder)
    late = embed(embedder, "late")
    await until(lambda: embedder.stats()["queue_texts"] == 1)
    now_s[0] = SOON_S + 1
    model.may_run.set()
    with pytest.raises(DeadlineExceeded, match="embedder queue"):
        await late
    await first


async def test_a_cancelled_call_leaves_the_queue(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    first = await held(model, embedder)
    gone = embed(embedder, "gone", "gone", "gone")
    await until(lambda: embedder.stats()["queue_texts"] == 3)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    assert embedder.stats()["queue_texts"] == 0
    model.may_run.set()
    await first
    await embed(embedder, "after")
    assert [1, 4, 2] in model.batches[0]
    assert len(model.batches) == 2


async def test_a_call_cancelled_while_it_runs_harms_nobody(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    first = await held(model, embedder)
    first.cancel()
    await asyncio.wait([first])
    model.may_run.set()
    assert (await embed(embedder, "after")).tokens.tolist() == [3]


async def test_a_failed_batch_fails_its_callers_and_no_other(
    model: SumModel, make: MakeEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = make(model)
    model.failure = MemoryError("no room")
    with pytest.raises(EmbedderUnavailable, match="sum@1 can answer: no room"):
        await embed(embedder, *["unlucky"] * 100)
    assert "embedding failed" in caplog.text
    assert embedder.stats()["queue_texts"] == 0
    model.failure = None
    assert (await embed(embedder, "lucky")).tokens.tolist() == [3]
    assert embedder.stats()["failed_batches_total"] == 1


async def test_a_text_that_cannot_be_tokenized_fails_its_call(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    with pytest.raises(EmbedderUnavailable, match="tokenizer failed"):
        await embed(embedder, "untokenizable")
    assert (await embed(embedder, "fine")).tokens.tolist() == [3]


async def test_a_lone_surrogate_is_refused_by_its_index(model: SumModel, make: MakeEmbedder) -> None:
    with pytest.raises(InvalidField) as refused:
        await embed(make(model), "fine", "\ud800")
    assert refused.value.field == "texts[1]"


async def test_closing_fails_what_waits_and_finishes_what_runs(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    running = await held(model, embedder)
    waiting = embed(embedder, "waiting")
    await until(lambda: embedder.stats()["queue_texts"] == 1)
    closing = asyncio.ensure_future(embedder.close())
    with pytest.raises(EmbedderUnavailable, match="closing"):
        await waiting
    model.may_run.set()
    assert (await running).tokens.tolist() == [3]
    await closing
    with pytest.raises(EmbedderUnavailable, match="closing"):
        await embed(embedder, "afterwards")


async def test_a_defect_of_the_queue_is_said_and_leaves_nobody_waiting(
    model: SumModel, make: MakeEmbedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = make(model)
    first = await held(model, embedder)
    waiting = embed(embedder, "waiting")
    await until(lambda: embedder.stats()["queue_texts"] == 1)
    monkeypatch.setattr(embedder._waiting, "take", None)
    model.may_run.set()
    with pytest.raises(EmbedderUnavailable, match="its queue failed"):
        await waiting
    await first
    assert "embedder is down" in caplog.text
    with pytest.raises(EmbedderUnavailable, match="its queue failed"):
        await embed(embedder, "afterwards")


async def test_callers_of_several_event_loops_are_served(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model, workers=2)

    async def elsewhere() -> list[int]:
        return (await embed(embedder, "one two")).tokens.tolist()

    answers = await asyncio.gather(
        *(asyncio.to_thread(asyncio.run, elsewhere()) for _ in range(3)), embed(embedder, "here")
    )
    assert answers[:3] == [[4]] * 3


async def test_what_was_done_is_counted(model: SumModel, make: MakeEmbedder) -> None:
    embedder = make(model)
    await embed(embedder, "a a", "a a a a")
    stats = embedder.stats()
    assert (stats["texts_total"], stats["tokens_total"], stats["padded_tokens_total"]) == (2, 10, 12)
    assert (stats["batches_total"], stats["queue_texts"], stats["workers"]) == (1, 0, 1)
