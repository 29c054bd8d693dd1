"""`cluster …`: what runs, what it is asked for most, and how many shards and replicas."""

from typing import Annotated

import typer

from ringfort.commands.jobs import Detach, follow
from ringfort.commands.options import Collection, Json, Server


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


def add_shard(
    collection: Collection, detach: Detach = False, server: Server = None, json: Json = False
) -> None:
    """Add a shard, which takes its even share of slots from the others, while everything is served."""
    from ringfort.calls import operations

    follow(server, operations.add_shard(collection), detach=detach, json=json)


def drain_shard(
    collection: Collection,
    shard: Annotated[int, typer.Argument(min=0, metavar="SHARD", help="The shard to do without.")],
    detach: Detach = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Move a shard's slots to the others and close it, while everything is served."""
    from ringfort.calls import operations

    follow(server, operations.drain_shard(collection, shard), detach=detach, json=json)


def set_replicas(
    collection: Collection,
    replicas: Annotated[int, typer.Argument(min=1, metavar="N", help="Copies of every shard.")],
    detach: Detach = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Give every shard so many copies, while everything is served."""
    from ringfort.calls import operations

    follow(server, operations.set_replicas(collection, replicas), detach=detach, json=json)
