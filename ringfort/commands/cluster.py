"""`cluster describe`, `cluster cache` and `cluster hot-keys`."""

from typing import Annotated

import typer

from ringfort.commands.options import Json, Server


def describe(server: Server = None, json: Json = False) -> None:
    """Show the service's parts, shards, replicas and limits."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import cluster

    answer = terminal.ask(server, cluster())
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.describe(answer))


def cache(server: Server = None, json: Json = False) -> None:
    """Show what the cache holds and how often it was hit."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import cache_stats

    answer = terminal.ask(server, cache_stats())
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.cache(answer))


def hot_keys(
    limit: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many keys at most.")] = 20,
    server: Server = None,
    json: Json = False,
) -> None:
    """Show what the cache is asked for most, by digest: the questions themselves do not show."""
    from ringfort import tables, terminal
    from ringfort.calls.operations import hot_keys

    answer = terminal.ask(server, hot_keys(limit=limit))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.hot_keys(answer))
