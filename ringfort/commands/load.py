"""`load`: a file into a collection."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfort.commands.options import Attributes, Collection, Json, Server, attribute_types

if TYPE_CHECKING:
    from ringfort.client import Client
    from ringfort.load.checkpoint import Checkpoint
    from ringfort.load.load import Load
    from ringfort.results import Collection as CollectionInfo

#: How long a service that does not answer is tried.
PATIENCE_S = 30.0


def load(
    collection: Collection,
    file: Annotated[Path, typer.Argument(help="TSV (no quoting), CSV, JSON Lines or Parquet.")],
    id: Annotated[str, typer.Option("--id", metavar="COL", help="The column that holds the id.")],
    text: Annotated[
        str | None, typer.Option("--text", metavar="COL", help="The column whose text is embedded.")
    ] = None,
    attr: Attributes = None,
    vector: Annotated[
        str | None, typer.Option(metavar="COL", help="The column that holds ready vectors.")
    ] = None,
    create: Annotated[
        bool, typer.Option("--create", help="Create the collection if it does not exist.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Documents a request.")] = 256,
    format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="tsv, csv, jsonl or parquet.", show_default="by the file's name"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over where an earlier load was interrupted.")
    ] = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Load a file, and go on from where an interrupted load of it stopped.

    With --json a line a second says how far it is. When the service is away it is tried for 30 s.
    """
    types = attribute_types(attr)
    from ringfort.client import Client
    from ringfort.errors import InvalidArgument, NotFound
    from ringfort.load.checkpoint import Checkpoint, file_identity, state_directory
    from ringfort.load.columns import Columns, first_dim
    from ringfort.load.load import Load
    from ringfort.load.sources import open_source

    source = open_source(file, format)
    columns = Columns(id, text, types, vector)
    with Client(server) as client:
        target = _find(client, collection, json=json) or (
            client.create_collection(collection, attributes=types, dim=first_dim(source.rows(), columns))
            if create
            else None
        )
        if target is None:
            raise NotFound(f"no collection named {collection!r}; --create makes it", field="collection")
        for name, type_ in types.items():
            declared = target.attributes.get(name, "undeclared")
            if declared != type_ and (type_, declared) != ("int", "float"):
                raise InvalidArgument(f"{name} is {declared} in {target.name}, not {type_}", field="attr")
        identity = (
            client.server,
            target.name,
            target.created_at.isoformat(),
            str(file.resolve()),
            file_identity(file),
            repr(columns),
        )
        checkpoint = _usable(Checkpoint(state_directory(), identity), restart=restart)
        load = Load(client, collection, source, columns, checkpoint=checkpoint, batch=batch)
        _run(load, collection, json=json)


def _find(client: "Client", name: str, *, json: bool) -> "CollectionInfo | None":
    """The collection, None if there is none; a service that is away is tried for PATIENCE_S."""
    from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

    from ringfort.calls.collections import collection
    from ringfort.errors import NotFound, Unavailable
    from ringfort.terminal import print_json

    def say(state: RetryCallState) -> None:
        if json:
            print_json({"acknowledged": 0, "failed": 0, "rate": 0.0, "total": None})
        elif state.attempt_number == 1:
            typer.echo(f"no service answers at {client.server} yet, trying for {PATIENCE_S:.0f} s", err=True)

    patiently = Retrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_fixed(0.5),
        before_sleep=say,
        reraise=True,
    )
    # Not repeatable: here the pauses are ours, so that each can be told.
    call = collection(name)._replace(repeatable=False)
    try:
        return call.read(patiently(client.send, call))
    except NotFound:
        return None


def _usable(checkpoint: "Checkpoint", *, restart: bool) -> "Checkpoint | None":
    """The checkpoint, emptied for a restart; None where the disk refuses it, which is no reason to stop."""
    try:
        if restart:
            checkpoint.remove()
        checkpoint.write(checkpoint.read())
    except OSError as error:
        typer.echo(f"ringfort: an interrupted load will start over: {error}", err=True)
        return None
    return checkpoint


def _run(load: "Load", collection: str, *, json: bool) -> None:
    """Runs a load to its end or its interruption, telling how far it is."""
    from ringfort.errors import Cancelled, InvalidArgument, Unavailable
    from ringfort.load.progress import run_with_bar, run_with_json
    from ringfort.terminal import console

    if load.start.rows and not json:
        typer.echo(f"going on after row {load.start.rows:,}", err=True)
    try:
        if json:
            run_with_json(load)
        else:
            run_with_bar(load, collection, console(stderr=True))
    except KeyboardInterrupt:
        raise Cancelled(f"interrupted; {_how_far(load)}") from None
    except Unavailable as error:
        raise Unavailable(f"{error}; {_how_far(load)}", reason=error.reason) from error
    done = load.progress
    if not json:
        typer.echo(
            f"{done.acknowledged:,} documents loaded into {collection}, {done.rate:,.0f} rows a second"
        )
    if done.failed:
        if not json:
            typer.echo("".join(f"  {problem}\n" for problem in load.problems[1:]), err=True, nl=False)
        rows = "row was" if done.failed == 1 else "rows were"
        raise InvalidArgument(f"{done.failed:,} {rows} refused, the first: {load.problems[0]}")


def _how_far(load: "Load") -> str:
    done = load.progress
    total = "" if done.total is None else f" of {done.total:,}"
    return (
        f"{done.acknowledged + done.failed:,}{total} rows are done, and the same command goes on from there"
    )
