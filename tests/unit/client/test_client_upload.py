"""What an upsert does next, decided without a network."""

from typing import Any

import pytest
from client_fakes import written

from protos.ringfort import v1 as pb
from ringfort.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from ringfort.upload import (
    PATIENCE_S,
    WINDOW,
    Close,
    Done,
    Fill,
    Open,
    Pause,
    Receive,
    Send,
    Step,
    Upload,
)

LIFETIME_S = 30.0


def _batch(id: str, **fields: Any) -> pb.UpsertRequest:
    return pb.UpsertRequest(documents=[pb.Document(id=id, **fields)])


class Run:
    """Steps an upload over batches named 0, 1, 2 … at a time of our choosing."""

    def __init__(self, batches: int) -> None:
        self.upload = Upload(LIFETIME_S)
        self.now_s = 1000.0
        self._left = [_batch(str(n)) for n in range(batches)]

    def step(self) -> Step:
        step = self.upload.next(self.now_s)
        if isinstance(step, Fill):
            self.upload.filled(self._left.pop(0) if self._left else None)
        return step

    def until(self, kind: type[Step]) -> list[str]:
        """Steps until one of that kind; what was sent on the way."""
        sent = []
        while not isinstance(step := self.step(), kind):
            if isinstance(step, Send):
                sent.append(step.request.documents[0].id)
        return sent

    def acknowledge(self, id: str) -> None:
        self.upload.answered(written(_batch(id)))


def test_nothing_to_write_opens_no_stream() -> None:
    run = Run(0)
    assert [run.step(), run.step()] == [Fill(), Done()]


def test_a_window_of_batches_is_on_its_way_and_no_more() -> None:
    run = Run(10)
    assert run.step() == Fill()
    assert run.step() == Open()
    assert run.until(Receive) == ["0", "1", "2", "3"][:WINDOW]
    run.acknowledge("0")
    assert run.until(Receive) == ["4"]


def test_the_stream_is_closed_after_the_last_acknowledgement() -> None:
    run = Run(1)
    assert run.until(Receive) == ["0"]
    run.acknowledge("0")
    assert [run.step(), run.step()] == [Close(), Done()]


def test_a_broken_stream_takes_up_at_the_first_unacknowledged_batch() -> None:
    run = Run(6)
    run.until(Receive)
    run.acknowledge("0")
    run.until(Receive)
    run.upload.broke(Unavailable("away"), run.now_s)
    assert run.step() == Pause(0.1)
    assert run.step() == Open()
    assert run.until(Receive) == ["1"]
    run.acknowledge("1")
    assert run.until(Receive) == ["2", "3", "4", "5"]


def test_pauses_grow_until_patience_ends() -> None:
    run = Run(1)
    error = Unavailable("away")
    pauses: list[float] = []

    def break_until_it_gives_up() -> None:
        while True:
            run.until(Receive)
            run.upload.broke(error, run.now_s)
            pause = run.step()
            assert isinstance(pause, Pause)
            pauses.append(pause.seconds)
            run.now_s += pause.seconds

    with pytest.raises(Unavailable) as caught:
        break_until_it_gives_up()
    assert caught.value is error
    assert pauses[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert PATIENCE_S - 2.0 < sum(pauses) <= PATIENCE_S


def test_an_acknowledgement_restores_patience() -> None:
    run = Run(3)
    run.until(Receive)
    run.upload.broke(Unavailable("away"), run.now_s)
    run.until(Receive)
    run.acknowledge("0")
    run.now_s += PATIENCE_S
    run.until(Receive)
    run.upload.broke(Unavailable("away"), run.now_s)
    assert run.step() == Pause(0.1)


def test_the_service_says_how_long_to_pause() -> None:
    run = Run(1)
    run.until(Receive)
    run.upload.broke(ResourceExhausted("full", retry_after_ms=700), run.now_s)
    assert run.step() == Pause(0.7)


@pytest.mark.parametrize(
    "error",
    [InvalidArgument("bad"), DeadlineExceeded("late"), ResourceExhausted("larger than 16 MiB")],
    ids=lambda error: type(error).__name__,
)
def test_other_failures_end_the_upsert(error: Any) -> None:
    run = Run(1)
    run.until(Receive)
    with pytest.raises(type(error)):
        run.upload.broke(error, run.now_s)


def test_a_conditional_write_that_may_have_happened_is_not_sent_again() -> None:
    upload = Upload(LIFETIME_S)
    assert upload.next(0.0) == Fill()
    upload.filled(_batch("a", if_version=pb.Version(term=1, seq=1)))
    assert upload.next(0.0) == Open()
    assert isinstance(upload.next(0.0), Send)
    with pytest.raises(Unavailable):
        upload.broke(Unavailable("away"), 0.0)


@pytest.mark.parametrize(("code", "error"), [(14, Unavailable), (8, ResourceExhausted)])
def test_a_batch_the_service_could_not_take_just_now_is_not_acknowledged(
    code: int, error: type[Exception]
) -> None:
    run = Run(2)
    run.until(Receive)
    answer = pb.UpsertResponse(statuses=[pb.WriteStatus(id="0", code=code, message="the database is away")])
    with pytest.raises(error, match="the database is away") as caught:
        run.upload.answered(answer)
    run.upload.broke(caught.value, run.now_s)  # type: ignore[arg-type]
    run.until(Open)
    assert run.until(Receive) == ["0"]
    run.acknowledge("0")
    assert run.until(Receive) == ["1"]


def test_a_stream_is_replaced_at_half_its_deadline() -> None:
    run = Run(6)
    assert run.until(Receive) == ["0", "1", "2", "3"]
    run.acknowledge("0")
    run.now_s += LIFETIME_S / 2
    for id in ("1", "2", "3"):
        assert run.step() == Receive()
        run.acknowledge(id)
    assert run.step() == Close()
    assert run.until(Receive) == ["4", "5"]


def test_a_source_slower_than_the_deadline_breaks_nothing() -> None:
    run = Run(6)
    run.until(Receive)
    run.acknowledge("0")
    assert run.step() == Fill()
    run.now_s += LIFETIME_S + 1
    assert run.step() == Close()
    assert run.until(Receive) == ["1", "2", "3", "4"]
