"""`models …`: embedding models, built here and registered with a service, and rankers."""

import os
import sys
from typing import Annotated

import typer

from ringfort.commands.options import Json, Server

Version = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="A registered version.")]


def build(context: typer.Context) -> None:
    """Build a model from a sentence-transformers directory, measure every way to run it, keep the best."""
    # -P: an `index_builder` in the user's working directory is not ours.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "index_builder.models", "build", *context.args])


def register(
    artifact: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="A built model, where the service can read it.")
    ],
    ranker: Annotated[
        bool, typer.Option("--ranker", help="A ranker: its JSON file in place of a model's directory.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="NAME@VERSION", help="Refuse the model unless it is this one.")
    ] = None,
    server: Server = None,
    json: Json = False,
) -> None:
    """Give a built model to the service; it is staged until it is promoted."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import register_model

    address = artifact if "://" in artifact else os.path.abspath(artifact)
    model, version = _named(name) if name else ("", "")
    kind = "RANKER" if ranker else "EMBEDDING"
    answer = terminal.ask(server, register_model(address, name=model, version=version, kind=kind))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.models([answer]))


def show(server: Server = None, json: Json = False) -> None:
    """List every version of every model."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import models

    answer = terminal.ask(server, models())
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.models(answer.models))


def traffic(
    version: Version,
    percent: Annotated[
        int, typer.Argument(min=0, max=100, metavar="PERCENT", help="Its share of the traffic; 0 ends it.")
    ],
    server: Server = None,
    json: Json = False,
) -> None:
    """Try a version out beside the live one, on the same share of the keys every time."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import set_traffic

    answer = terminal.ask(server, set_traffic(*_named(version), percent))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.models([answer]))


def promote(version: Version, server: Server = None, json: Json = False) -> None:
    """Make a version the one that its name alone means."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import promote_model

    answer = terminal.ask(server, promote_model(*_named(version)))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.models([answer]))


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name.")],
    server: Server = None,
    json: Json = False,
) -> None:
    """End the canary of a name or, without one, return to the version that was live before."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import rollback_model

    answer = terminal.ask(server, rollback_model(name))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.models([answer]))


def _named(model: str) -> tuple[str, str]:
    """The name and the version of NAME@VERSION; a usage error for what is none."""
    name, _, version = model.partition("@")
    if not (name and version):
        raise typer.BadParameter(f"{model!r} is not NAME@VERSION")
    return name, version
