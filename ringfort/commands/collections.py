"""`collections` and `create`."""

from typing import Annotated

import typer

from ringfort.commands.options import Attributes, Json, Metric, Server, attribute_types


def collections(server: Server = None, json: Json = False) -> None:
    """List the collections."""
    from ringfort import tables, terminal
    from ringfort.calls.collections import collections

    answer = terminal.ask(server, collections())
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.collections(answer))


def create(
    name: Annotated[str, typer.Argument(help="The collection's name.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME@VERSION", help="What embeds its texts.", show_default="the default model"),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents bring their own vectors, this long.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="How vectors are compared.")] = Metric.COSINE,
    attr: Attributes = None,
    shards: Annotated[int, typer.Option(metavar="N", help="0: as the service is set.")] = 0,
    replicas: Annotated[int, typer.Option(metavar="N", help="0: as the service is set.")] = 0,
    index: Annotated[str, typer.Option(metavar="KIND", help="auto, flat, hnsw or ivf.")] = "auto",
    max_staleness_ms: Annotated[int, typer.Option(metavar="MS", help="How old a cached answer may be.")] = 0,
    server: Server = None,
    json: Json = False,
) -> None:
    """Create a collection."""
    types = attribute_types(attr)
    from ringfort import tables, terminal
    from ringfort.calls.collections import create_collection

    call = create_collection(
        name,
        model=model,
        dim=dim,
        metric=metric,
        attributes=types,
        shards=shards,
        replicas=replicas,
        index=index,
        max_staleness_ms=max_staleness_ms,
    )
    answer = terminal.ask(server, call)
    if json:
        terminal.print_json(answer)
    else:
        typer.echo(f"created {tables.collection_line(answer)}")
