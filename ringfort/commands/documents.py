"""`count`, `get`, `scan` and `delete`."""

from typing import Annotated

import typer

from ringfort.commands.options import Collection, Filter, Json, Server

Ids = Annotated[list[str], typer.Argument(metavar="ID…", help="Ids of documents.")]
Vectors = Annotated[bool, typer.Option("--vectors", help="Show the vectors too.")]


def count(collection: Collection, filter: Filter = None, server: Server = None, json: Json = False) -> None:
    """Count the documents of a collection."""
    from ringfort import terminal
    from ringfort.calls.documents import count

    answer = terminal.ask(server, count(collection, filter=filter))
    if json:
        terminal.print_json(answer)
    else:
        typer.echo(answer.count)


def get(
    collection: Collection, ids: Ids, vectors: Vectors = False, server: Server = None, json: Json = False
) -> None:
    """Show documents by their ids."""
    from ringfort import tables, terminal
    from ringfort.calls.documents import get
    from ringfort.errors import NotFound

    answer = terminal.ask(server, get(collection, ids, include=_parts(vectors)))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(*(tables.document(message) for message in answer.documents))
    if answer.missing:
        raise NotFound(
            f"no document named {', '.join(map(repr, answer.missing))} in {collection}", field="ids"
        )


def scan(
    collection: Collection,
    filter: Filter = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N documents.")] = None,
    vectors: Vectors = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """List every document, in a fixed order; with --json one document a line."""
    from ringfort import tables, terminal
    from ringfort.calls.documents import scan_page
    from ringfort.client import Client

    left, page_token, header, console = limit, "", True, terminal.console()
    with Client(server) as client:
        while True:
            size = 0 if left is None else min(left, 256)
            call = scan_page(
                collection, filter=filter, include=_parts(vectors), page_size=size, page_token=page_token
            )
            answer = client.send(call)
            page, page_token = answer.documents[:left], answer.next_page_token
            if json:
                for message in page:
                    terminal.print_json(message)
            elif page:
                console.print(tables.documents(page, width=console.width, header=header))
                header = False
            left = None if left is None else left - len(page)
            if not page_token or left == 0:
                return


def _parts(vectors: bool) -> tuple[str, ...] | None:
    return ("attributes", "text", "vector") if vectors else None


def delete(
    collection: Collection,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID…]", help="Ids of documents.")] = None,
    filter: Filter = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="Delete the collection itself, with everything in it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Delete documents by id or by filter, or with --drop the whole collection."""
    if sum((bool(ids), filter is not None, drop)) != 1:
        raise typer.BadParameter("exactly one of ids, --filter and --drop is needed", param_hint="delete")
    if drop and not yes:
        typer.confirm(f"Delete {collection} with everything in it?", abort=True, err=True)
    from ringfort import terminal
    from ringfort.calls.collections import delete_collection
    from ringfort.calls.documents import delete

    if drop:
        gone = terminal.ask(server, delete_collection(collection))
        if json:
            terminal.print_json(gone)
        else:
            typer.echo(f"deleted {collection}")
        return
    answer = terminal.ask(server, delete(collection, ids=ids or None, filter=filter))
    if json:
        terminal.print_json(answer)
    else:
        typer.echo(f"deleted {answer.deleted:,} {'document' if answer.deleted == 1 else 'documents'}")
