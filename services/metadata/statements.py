"""The named SQL of queries.sql, made for the tables of one collection."""

import re
from functools import lru_cache
from importlib import resources

#: Hash partitions of a documents table.
PARTITIONS = 8


def _read() -> dict[str, str]:
    text = resources.files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- (\w+): .*\n", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


_TEXTS = _read()


@lru_cache(maxsize=4096)
def statement(name: str, uid: int = 0, generation: int = 0, part: int = 0) -> bytes:
    """The statement of that name, over the tables of collection `uid` and its `generation`."""
    return (
        _TEXTS[name]
        .format(
            documents=f"documents_{uid}", vectors=f"vectors_{uid}_{generation}", part=part, parts=PARTITIONS
        )
        .encode()
    )


def bare_statement(name: str) -> bytes:
    """The statement of that name, which speaks of no collection's tables."""
    return _TEXTS[name].encode()
