"""`reindex`, `activate`, `rollback`: another generation of a collection, and in the live one's place."""

from typing import TYPE_CHECKING, Annotated

import typer

from ringfort.commands.jobs import Detach, follow
from ringfort.commands.options import Collection, Json, Server

if TYPE_CHECKING:
    from protos.ringfort import v1 as pb
    from ringfort.calls.call import Call


def reindex(
    collection: Collection,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME@VERSION", help="Embed all texts again, with this model.")
    ] = "",
    index: Annotated[
        str, typer.Option("--index", metavar="KIND", help="Index as auto, flat, hnsw or ivf.")
    ] = "",
    detach: Detach = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Build another generation beside the live one, which goes on as it is."""
    from ringfort.calls import operations

    call = operations.reindex(collection, model=model, index=index)
    follow(server, call, detach=detach, json=json)


def activate(
    collection: Collection,
    generation: Annotated[
        int, typer.Option("--generation", min=0, metavar="N", help="Which; by default the one there is.")
    ] = 0,
    server: Server = None,
    json: Json = False,
) -> None:
    """Make a generation that was built the live one; the one that was is kept, for a rollback."""
    from ringfort.calls import operations

    _exchange(server, collection, operations.activate(collection, generation), json)


def rollback(collection: Collection, server: Server = None, json: Json = False) -> None:
    """Return to the generation that was live before."""
    from ringfort.calls import operations

    _exchange(server, collection, operations.rollback(collection), json)


def _exchange(
    server: str | None,
    collection: str,
    call: "Call[pb.ActivateResponse, pb.ActivateResponse]",
    json: bool,
) -> None:
    from rich.text import Text

    from ringfort import terminal

    answer = terminal.ask(server, call)
    if json:
        terminal.print_json(answer)
    else:
        told = f"generation {answer.generation} of {collection} is live, in space {answer.space}"
        terminal.show(Text(told))
