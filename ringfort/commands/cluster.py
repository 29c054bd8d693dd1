"""`cluster describe` and `cluster cache`."""

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
