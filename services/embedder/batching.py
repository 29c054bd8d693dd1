"""What is done next, and for whom: the decisions, without clock, threads or model.

Fairness is start-time fair queueing: a call's tag is the work it has had, counted from the virtual time at
which it came, and the call with the least tag leads. Virtual time advances by work done, divided by the
calls that wait and one to come: so a newcomer goes before the rest of a bulk call, but not for ever.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Bytes of text tokenized in one go, about 5 ms: a newcomer waits for no more than that.
TOKENIZE_BYTES = 16_384
#: Work of tokenizing, in tokens of inference.
WORK_PER_BYTE = 1 / 200
#: A batch reaches from its longest text down to half of that less this: shorter ones would pay for attention
#: over padding.
SLACK_TOKENS = 8


class Row(NamedTuple):
    """One text of one call."""

    call: int
    row: int


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Some texts to be tokenized, of as many calls as it takes; `tokenized` must be told."""

    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Infer:
    """One batch: tokenized texts of any calls, of similar length."""

    rows: Sequence[Row]


class Taken(NamedTuple):
    """The next piece of work, if any, and the calls that were dropped because their deadline had passed."""

    work: Tokenize | Infer | None
    late: Sequence[int]
    #: Whether another worker would find work now, too.
    more: bool


@dataclass(slots=True)
class _Call:
    """A call with texts that no batch has taken yet."""

    text_bytes: Sequence[int]
    deadline_s: float
    #: Work had so far, in tokens, on top of the virtual time of its arrival.
    tag: float
    #: Rows that no batch has taken.
    left: int
    #: Rows from this one on have not been given out to be tokenized.
    next_row: int = 0
    #: Rows that are tokenized and wait for a batch.
    ready: int = 0
    #: (tokens, row) of tokenized rows, rising; those at the end may have gone with another call's batch.
    by_length: list[tuple[int, int]] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Whether everything that can be done for it now is under way."""
        return not self.ready and self.next_row == len(self.text_bytes)


class WaitingTexts:
    """The texts of all calls that wait to be embedded; `take` says what to do next.

    `batch_tokens` bounds a batch's rows times its longest row, except that one row always fits.
    """

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._calls: dict[int, _Call] = {}
        #: Tokenized rows that wait, by tokens, each bucket in order of arrival.
        self._buckets: list[dict[Row, None]] = []
        #: (tag, call): every call that is not idle has an entry no greater than its tag.
        self._line: list[tuple[float, int]] = []
        self._virtual_time = 0.0
        #: Rows that no batch has taken.
        self.rows = 0

    def calls(self) -> list[int]:
        """Calls that have rows waiting, oldest first."""
        return list(self._calls)

    def add(self, call: int, text_bytes: Sequence[int], *, deadline_s: float) -> None:
        """A new call with texts of so many bytes each (one at least), wanted before `deadline_s`."""
        self._calls[call] = _Call(text_bytes, deadline_s, self._virtual_time, len(text_bytes))
        heapq.heappush(self._line, (self._virtual_time, call))
        self.rows += len(text_bytes)

    def tokenized(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Rows have so many tokens each, and can be batched now, unless their call was dropped."""
        while len(self._buckets) <= max(lengths, default=0):
            self._buckets.append({})
        for row, length in zip(rows, lengths, strict=True):
            if (call := self._calls.get(row.call)) is not None:
                self._buckets[length][row] = None
                call.by_length.append((length, row.row))
                call.ready += 1
        for number in {row.call for row in rows} & self._calls.keys():
            self._calls[number].by_length.sort()
            heapq.heappush(self._line, (self._calls[number].tag, number))

    def drop(self, call: int) -> None:
        """Forget what still waits of a call; an unknown call changes nothing."""
        dropped = self._calls.pop(call, None)
        if dropped is None:
            return
        self.rows -= dropped.left
        for length, row in dropped.by_length:
            self._buckets[length].pop(Row(call, row), None)

    def take(self, now_s: float) -> Taken:
        """The next work for the call that has had least: texts to tokenize, or a batch with its longest.

        `work` is None where there is nothing to do now.
        """
        late: list[int] = []
        rows: list[Row] = []
        size = 0
        while size < TOKENIZE_BYTES and (lead := self._lead(now_s, late)) is not None:
            if self._calls[lead].next_row < len(self._calls[lead].text_bytes):
                size += self._tokenize(lead, TOKENIZE_BYTES - size, rows)
            elif rows:
                break
            else:
                batch = self._batch(lead, now_s, late)
                return Taken(batch, late, self._lead(now_s, late) is not None)
        return Taken(Tokenize(rows) if rows else None, late, self._lead(now_s, late) is not None)

    def _lead(self, now_s: float, late: list[int]) -> int | None:
        """The call with the least tag of those that are neither idle nor late; late ones before it go."""
        while self._line:
            tag, number = self._line[0]
            call = self._calls.get(number)
            if call is not None and call.deadline_s <= now_s:
                late.append(number)
                self.drop(number)
            elif call is not None and not call.idle and call.tag == tag:
                return number
            heapq.heappop(self._line)
            if number in self._calls and call is not None and not call.idle:
                heapq.heappush(self._line, (call.tag, number))
        return None

    def _tokenize(self, number: int, room_bytes: int, rows: list[Row]) -> int:
        """Add the next rows of a call that nobody tokenizes yet, about `room_bytes` of them; their bytes."""
        call = self._calls[number]
        size = 0
        while call.next_row < len(call.text_bytes) and size < room_bytes:
            rows.append(Row(number, call.next_row))
            size += call.text_bytes[call.next_row]
            call.next_row += 1
        call.tag += size * WORK_PER_BYTE
        self._advance(size * WORK_PER_BYTE)
        return size

    def _batch(self, lead: int, now_s: float, late: list[int]) -> Infer:
        """The longest ready row of a call and rows of similar length, of any call, up to a batch."""
        length, first = self._longest(lead)
        limit = min(max(length + SLACK_TOKENS, length * 5 // 4), len(self._buckets) - 1)
        widest = next(size for size in range(limit, 0, -1) if self._buckets[size])
        room = max(1, self._batch_tokens // widest)
        taken = [(first, length)]
        for size in range(widest, max(widest // 2 - SLACK_TOKENS, 0), -1):
            for row in self._buckets[size]:
                if len(taken) >= room:
                    break
                if self._calls[row.call].deadline_s <= now_s:
                    if row.call not in late:
                        late.append(row.call)
                elif row != first:
                    taken.append((row, size))
        for number in late:
            self.drop(number)
        self._charge(taken)
        return Infer([row for row, _ in taken])

    def _longest(self, number: int) -> tuple[int, Row]:
        """Tokens of the longest ready row of a call, and the row."""
        by_length = self._calls[number].by_length
        while True:
            length, row = by_length[-1]
            if Row(number, row) in self._buckets[length]:
                return length, Row(number, row)
            by_length.pop()

    def _charge(self, taken: Sequence[tuple[Row, int]]) -> None:
        """Take rows out of what waits, as work had by their calls."""
        self._advance(sum(length for _, length in taken))
        for row, length in taken:
            call = self._calls[row.call]
            del self._buckets[length][row]
            call.tag += length
            call.left -= 1
            call.ready -= 1
            if not call.left:
                del self._calls[row.call]
        self.rows -= len(taken)

    def _advance(self, work: float) -> None:
        """Let virtual time pass while `work` is done."""
        self._virtual_time += work / (len(self._calls) + 1)

    def validate_state(self) -> None:
        """Raise AssertionError where the parts disagree; for tests."""
        waiting = {row for bucket in self._buckets for row in bucket}
        assert self.rows == sum(call.left for call in self._calls.values())
        for number, call in self._calls.items():
            assert call.left > 0
            assert call.ready == sum(row.call == number for row in waiting)
            assert call.idle or any(n == number and tag <= call.tag for tag, n in self._line)
        assert len(waiting) == sum(call.ready for call in self._calls.values())
