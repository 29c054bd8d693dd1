"""Options that several commands take."""

from enum import StrEnum
from typing import Annotated

import typer

Server = Annotated[
    str | None,
    typer.Option(
        envvar="RINGFORT_SERVER",
        metavar="HOST:PORT",
        help="The service to talk to.",
        show_default="127.0.0.1:7700",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one message a line.")]
Collection = Annotated[str, typer.Argument(metavar="COLLECTION", help="A collection's name or alias.")]
Filter = Annotated[
    str | None,
    typer.Option(
        metavar="EXPR",
        help="""Only documents like this: 'downloads_rank < 500 and name in ("ray", "faiss")'.""",
    ),
]
K = Annotated[int, typer.Option("-k", min=1, metavar="N", help="How many hits.")]
Attributes = Annotated[
    list[str] | None,
    typer.Option(
        "--attr",
        metavar="NAME:TYPE",
        help="An attribute and its type: keyword, int, float, bool, timestamp or keywords. Repeatable.",
    ),
]


class AttributeType(StrEnum):
    """What an attribute holds."""

    KEYWORD = "keyword"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    TIMESTAMP = "timestamp"
    KEYWORDS = "keywords"


class Metric(StrEnum):
    """How vectors are compared."""

    COSINE = "cosine"
    INNER_PRODUCT = "inner_product"
    L2 = "l2"


class Mode(StrEnum):
    """How a search looks for its text."""

    DENSE = "dense"
    LEXICAL = "lexical"
    HYBRID = "hybrid"


def attribute_types(pairs: list[str] | None) -> dict[str, str]:
    """NAME:TYPE pairs as a mapping; a usage error for one that is none."""
    types: dict[str, str] = {}
    for pair in pairs or []:
        name, colon, type_ = pair.rpartition(":")
        if not (name and colon and type_ in set(AttributeType)):
            raise typer.BadParameter(
                f"{pair!r} is not NAME:TYPE with one of {', '.join(AttributeType)}", param_hint="--attr"
            )
        types[name] = type_
    return types


def weights(pairs: list[str] | None) -> dict[str, float]:
    """NAME=NUMBER pairs as a mapping; a usage error for one that is none."""
    named: dict[str, float] = {}
    for pair in pairs or []:
        name, _, number = pair.rpartition("=")
        try:
            named[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise typer.BadParameter(f"{pair!r} is not NAME=WEIGHT", param_hint="--weight")
    return named
