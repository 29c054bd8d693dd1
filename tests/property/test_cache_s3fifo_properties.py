"""S3-FIFO against a plain dict: it may forget, but never lies and never holds too much."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.cache.policy import S3Fifo

keys = st.integers(0, 40).map(lambda i: b"%d" % i)


class Against(RuleBasedStateMachine):
    """Every operation on both; the dict forgets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: S3Fifo[int] = S3Fifo(200)
        self.all: dict[bytes, int] = {}

    @rule(key=keys, value=st.integers(), size=st.integers(1, 230))
    def put(self, key: bytes, value: int, size: int) -> None:
        self.cache.put(key, value, size)
        self.all[key] = value

    @rule(key=keys, value=st.integers(), size=st.integers(1, 12))
    def put_small(self, key: bytes, value: int, size: int) -> None:
        self.put(key, value, size)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        held = key in self.cache
        value = self.cache.get(key)
        assert value == (self.all[key] if held else None)

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        assert self.cache.delete(key) <= (self.all.pop(key, None) is not None)
        assert key not in self.cache

    @invariant()
    def state_is_valid(self) -> None:
        self.cache.validate_state()


TestS3FifoAgainstDict = Against.TestCase
TestS3FifoAgainstDict.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
