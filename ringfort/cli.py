"""The command line: `ringfort COMMAND`. Exits 0, 1 (failed), 2 (usage) or 130 (interrupted)."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from ringfort.commands import (
    cache,
    cluster,
    collections,
    documents,
    generations,
    jobs,
    load,
    models,
    observe,
    queries,
    service,
)
from ringfort.version import __version__

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="ringfort",
    help="Embeddings and vector search: from text to ranked answers.",
    epilog="Start with `ringfort demo`, or run a service of your own with `ringfort up`.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cluster_app = typer.Typer(help="Look at the service itself, and change its shards.", no_args_is_help=True)

_PANELS: Mapping[str, Sequence[Callable[..., None]]] = {
    "Run": (service.up, service.demo, observe.top, observe.profile),
    "Search": (queries.search, queries.recommend, queries.embed),
    "Collections": (
        collections.collections,
        collections.create,
        generations.reindex,
        generations.activate,
        generations.rollback,
    ),
    "Documents": (load.load, documents.count, documents.get, documents.scan, documents.delete),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
for _command in (
    cluster.describe,
    cluster.cache,
    cluster.add_shard,
    cluster.drain_shard,
    cluster.set_replicas,
):
    cluster_app.command()(_command)
cluster_app.command(name="hot-keys")(cluster.hot_keys)
app.add_typer(cluster_app, name="cluster", rich_help_panel="Run")
cache_app = typer.Typer(help="Fill the cache.", no_args_is_help=True)
cache_app.command()(cache.warm)
app.add_typer(cache_app, name="cache", rich_help_panel="Run")
jobs_app = typer.Typer(help="Long operations.", no_args_is_help=True)
jobs_app.command(name="list")(jobs.show)
for _command in (jobs.watch, jobs.cancel):
    jobs_app.command()(_command)
app.add_typer(jobs_app, name="jobs", rich_help_panel="Run")
models_app = typer.Typer(help="Build, register and promote models, and rankers.", no_args_is_help=True)
# Its options are those of the builder, which prints its own help.
models_app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)(models.build)
models_app.command(name="list")(models.show)
for _command in (models.register, models.traffic, models.promote, models.rollback):
    models_app.command()(_command)
app.add_typer(models_app, name="models", rich_help_panel="Models")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The service to talk to.", hidden=True)
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the release.")] = False,
) -> None:
    if version:
        typer.echo(f"ringfort {__version__}")
        raise typer.Exit
    if server:
        # Every command has the option too; said before the command it is taken up there.
        os.environ["RINGFORT_SERVER"] = server
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; its exit code. An error is one sentence on stderr, or JSON with --json."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args[: args.index("--") if "--" in args else None]
    try:
        code = typer.main.get_command(app).main(args, prog_name="ringfort", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return _tell(_usage(error), as_json, exit_code=error.exit_code)
    except typer.Abort:
        return _tell({"message": "not confirmed, nothing was done"}, as_json)
    except KeyboardInterrupt:
        return _tell({"message": "interrupted"}, as_json, exit_code=INTERRUPTED)
    except BrokenPipeError:
        # The reader has left; nothing more can be told it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        facts = _facts(error)
        return _tell(facts, as_json, INTERRUPTED if facts["code"] == "CANCELLED" else FAILED)
    if code == INTERRUPTED:
        # Typer has taken the KeyboardInterrupt already.
        return _tell({"message": "interrupted"}, as_json, exit_code=INTERRUPTED)
    return code if isinstance(code, int) else 0


def _usage(error: typer.TyperException) -> dict[str, str]:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "ringfort"
    message = error.format_message().rstrip(".")
    return {"code": "INVALID_ARGUMENT", "message": f"{message} (see {command} --help)", "reason": "USAGE"}


def _facts(error: Exception) -> dict[str, str]:
    """What an error says of itself: code, message, field, reason."""
    from ringfort.errors import RingfortError

    match error:
        case RingfortError():
            # No reason: the error was made on this side, so there was nobody to give one.
            away = error.code.name == "UNAVAILABLE" and not error.reason
            message = f"{error}; `ringfort up` starts a service" if away else str(error)
            facts = {"code": error.code.name, "message": message, "field": error.field}
            return {**facts, "reason": error.reason}
        case OSError() if error.strerror:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            return {"code": "FAILED_PRECONDITION", "message": what, "reason": type(error).__name__}
        case _:
            at = traceback.extract_tb(error.__traceback__)[-1]
            message = f"unexpected {type(error).__name__} at {at.filename}:{at.lineno}: {error}"
            return {"code": "INTERNAL", "message": message}


def _tell(facts: Mapping[str, str], as_json: bool, exit_code: int = FAILED) -> int:
    if as_json:
        error: dict[str, Any] = {"code": "", "message": "", "field": "", "reason": "", **facts}
        sys.stderr.write(json.dumps({"error": error}, ensure_ascii=False) + "\n")
    else:
        sys.stderr.write(f"ringfort: {facts['message']}\n")
    return exit_code
