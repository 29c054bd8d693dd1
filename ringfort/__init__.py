"""Ringfort's public face: the client library and, behind `ringfort`, the command line.

Names load on first use, so that the command line starts without gRPC and numpy.
"""

from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .async_client import AsyncClient
    from .client import Client
    from .documents import ABSENT, Document, Patch, Version, WriteToken
    from .errors import (
        Aborted,
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        RingfortError,
        Unauthenticated,
        Unavailable,
        Unimplemented,
    )
    from .results import (
        BatchSearchResult,
        Collection,
        Coverage,
        DeleteResult,
        Failure,
        Hit,
        RerankHit,
        SearchResult,
        Stage,
        Timings,
        WriteResult,
    )

_HOMES = {
    "async_client": ("AsyncClient",),
    "client": ("Client",),
    "documents": ("ABSENT", "Document", "Patch", "Version", "WriteToken"),
    "errors": (
        "Aborted",
        "AlreadyExists",
        "Cancelled",
        "DataLoss",
        "DeadlineExceeded",
        "FailedPrecondition",
        "Internal",
        "InvalidArgument",
        "NotFound",
        "PermissionDenied",
        "ResourceExhausted",
        "RingfortError",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
    ),
    "results": (
        "BatchSearchResult",
        "Collection",
        "Coverage",
        "DeleteResult",
        "Failure",
        "Hit",
        "RerankHit",
        "SearchResult",
        "Stage",
        "Timings",
        "WriteResult",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ABSENT",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "BatchSearchResult",
    "Cancelled",
    "Client",
    "Collection",
    "Coverage",
    "DataLoss",
    "DeadlineExceeded",
    "DeleteResult",
    "Document",
    "FailedPrecondition",
    "Failure",
    "Hit",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "Patch",
    "PermissionDenied",
    "RerankHit",
    "ResourceExhausted",
    "RingfortError",
    "SearchResult",
    "Stage",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Version",
    "WriteResult",
    "WriteToken",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
