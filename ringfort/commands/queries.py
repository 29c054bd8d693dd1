"""`search`, `recommend` and `embed`."""

from typing import Annotated

import typer

from ringfort.commands.options import Collection, Filter, Json, K, Mode, Server, weights

Explain = Annotated[
    bool, typer.Option("--explain", help="Also show where the time went and what the answer speaks for.")
]


def search(
    collection: Collection,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: K = 10,
    mode: Annotated[Mode, typer.Option(case_sensitive=False, help="How to look for it.")] = Mode.DENSE,
    filter: Filter = None,
    recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="The share of the true nearest to expect."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every document.")] = False,
    max_staleness_ms: Annotated[
        int | None, typer.Option(metavar="MS", help="Accept a cached answer this old.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Answer from the cache.")] = True,
    explain: Explain = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Find the documents that come nearest to a text."""
    from ringfort import tables, terminal
    from ringfort.calls.search import search

    call = search(
        collection,
        text=text,
        k=k,
        mode=mode,
        filter=filter,
        recall=recall,
        exact=exact,
        max_staleness_ms=max_staleness_ms,
        cache=cache,
    )
    answer = terminal.ask(server, call)
    if json:
        terminal.print_json(answer)
        return
    out = terminal.console()
    out.print(tables.hits(answer.hits, width=out.width), tables.provenance(answer), sep="\n")
    if explain:
        out.print(tables.explanation(answer))


def recommend(
    collection: Collection,
    like: Annotated[list[str], typer.Option(metavar="ID", help="More like this document. Repeatable.")],
    unlike: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Less like this one. Repeatable.")
    ] = None,
    k: K = 10,
    rank: Annotated[str, typer.Option(metavar="NAME", help="The ranker.", show_default="blend")] = "",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT", help="How much a feature counts: similarity, or an attribute. Repeatable."
        ),
    ] = None,
    filter: Filter = None,
    mmr: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="LAMBDA", help="Diversify: 1 is relevance alone, 0 diversity alone."
        ),
    ] = None,
    group_by: Annotated[
        str, typer.Option(metavar="NAME", help="Bound the hits that share this attribute.")
    ] = "",
    per_group: Annotated[int, typer.Option(min=1, metavar="N", help="How many may share it.")] = 1,
    explain: Explain = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Find more like some documents and less like others, ranked."""
    features = weights(weight)
    from ringfort import tables, terminal
    from ringfort.calls.search import recommend

    call = recommend(
        collection,
        like=like,
        unlike=unlike or (),
        k=k,
        ranker=rank,
        rank=features,
        filter=filter,
        mmr_lambda=mmr,
        group_by=group_by,
        per_group=per_group if group_by else 0,
    )
    answer = terminal.ask(server, call)
    if json:
        terminal.print_json(answer)
        return
    out = terminal.console()
    out.print(tables.hits(answer.hits, width=out.width), tables.stages(answer), sep="\n")
    out.print(tables.provenance(answer))
    if explain:
        out.print(tables.features(answer), tables.explanation(answer), sep="")


def embed(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="Texts to embed.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME@VERSION", help="What embeds.", show_default="the default model"),
    ] = None,
    document: Annotated[
        bool, typer.Option("--document", help="Embed as documents are, not as queries are.")
    ] = False,
    server: Server = None,
    json: Json = False,
) -> None:
    """Turn texts into vectors."""
    from ringfort import tables, terminal
    from ringfort.calls.embedding import embed

    call = embed(texts, model=model, input_type="DOCUMENT" if document else "QUERY")
    answer = terminal.ask(server, call)
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.embeddings(texts, answer))
