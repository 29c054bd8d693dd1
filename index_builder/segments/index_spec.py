"""How a segment is searched, and how hard: the words that every part of the read path shares."""

from dataclasses import dataclass
from enum import StrEnum

#: `auto` builds no graph for fewer rows: a scan of their codes is as quick, and takes any filter.
GRAPH_ROWS = 50_000
#: Nor does a collection that asks for one by name: building it would cost more than it could ever save.
LEAST_GRAPH_ROWS = 4_096


class IndexKind(StrEnum):
    """What finds a segment's candidates; their scores are exact whatever it is."""

    #: Every row's codes, one after another.
    FLAT = "flat"
    #: A graph of neighbours: the quickest answer to one query.
    HNSW = "hnsw"
    #: Rows by cluster: quick to build, small, and what a GPU can search.
    IVF = "ivf"


def kind_for(wanted: str, rows: int, device: str, graph_rows: int = GRAPH_ROWS) -> IndexKind:
    """The kind of index for a segment of so many rows.

    wanted: a collection's `auto`, `flat`, `hnsw` or `ivf`; device: `cpu` or `cuda:N`. `auto` stays flat
    below `graph_rows`, a kind asked for by name below LEAST_GRAPH_ROWS (or `graph_rows` where that is
    less). ValueError for another word.
    """
    if wanted == "auto":
        if rows < graph_rows:
            return IndexKind.FLAT
        return IndexKind.HNSW if device == "cpu" else IndexKind.IVF
    kind = IndexKind(wanted)
    return kind if rows >= min(graph_rows, LEAST_GRAPH_ROWS) else IndexKind.FLAT


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look: a share of what is possible, or the recall to reach; with neither, the default.

    share: 0 (fastest) to 1; recall: 0 to 1, the expected share of the true ten nearest. Never both.
    """

    share: float | None = None
    recall: float | None = None


DEFAULT_EFFORT = Effort()
