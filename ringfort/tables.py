"""Answers as people see them: one quiet table each, and one line on where it came from."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.documents import AttributeValue
from ringfort.operators import Operator

#: Narrower terminals show texts, not attributes.
_WIDE = 100

_SERVED_STYLES = {"INDEX": "default", "L1": "green", "REDIS": "yellow"}
_STATE_STYLES = {"up": "green", "running": "green", "serving": "green", "off": "dim"}


def _table(*, expand: bool = False) -> Table:
    return Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False, expand=expand)


def attribute_text(value: AttributeValue) -> str:
    """An attribute's value for people."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        case tuple() | list():
            return ", ".join(value)
        case _:
            return str(value)


def attributes_text(attributes: Mapping[str, pb.Value], *, but: str, only: Sequence[str] = ()) -> Text:
    """Attributes (`only` these, where given) in one line, without those that merely repeat `but`."""
    pairs = (
        (name, attribute_text(wire.from_value(attributes[name])))
        for name in (only or sorted(attributes))
        if name in attributes
    )
    return Text(" · ".join(f"{name} {value}" for name, value in pairs if value != but), style="dim")


def hits(found: Sequence[pb.Hit], *, width: int, attributes: Sequence[str] = ()) -> RenderableType:
    """The hits of one answer, best first, with these attributes (by default all)."""
    if not found:
        return Text("no hits", style="dim")
    with_text = any(hit.HasField("text") for hit in found)
    with_attributes = any(hit.attributes for hit in found) and (width >= _WIDE or not with_text)
    table = _table(expand=with_text)
    table.add_column("#", justify="right", style="dim", width=max(2, len(str(len(found)))))
    _add_id_column(table, [hit.id for hit in found], width)
    table.add_column("score", justify="right", width=9)
    if with_text:
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=3)
    if with_attributes:
        few = with_text and len(attributes) == 1
        table.add_column("attributes", no_wrap=True, overflow="ellipsis", ratio=None if few else 2)
    for rank, hit in enumerate(found, 1):
        row: list[RenderableType] = [str(rank), Text(hit.id), f"{hit.score:.4f}"]
        if with_text:
            row.append(one_line(hit.text))
        if with_attributes:
            row.append(attributes_text(hit.attributes, but=hit.id, only=attributes))
        table.add_row(*row)
    return table


def _add_id_column(table: Table, ids: Sequence[str], width: int) -> None:
    """A column as wide as its ids need, from 16 columns to a quarter of the width."""
    needed = max((cell_len(id) for id in ids), default=0)
    table.add_column(
        "id", style="bold", no_wrap=True, overflow="ellipsis", width=max(16, min(needed, width // 4))
    )


def one_line(text: str) -> Text:
    """A text without its line breaks, as it is: brackets are no markup."""
    return Text(" ".join(text.split()))


def provenance(answer: pb.SearchResponse | pb.RecommendResponse) -> Text:
    """Where an answer came from, in a line."""
    served = pb.ServedFrom.Name(answer.served_from)
    line = Text(style="dim")
    line.append(f"{answer.timings.total_ms:.1f} ms · served from ")
    line.append(served, style=_SERVED_STYLES[served])
    if answer.coverage.shards_answered < answer.coverage.shards_asked:
        answered, asked = answer.coverage.shards_answered, answer.coverage.shards_asked
        line.append(f" · partial: {answered} of {asked} shards answered", style="bold yellow")
    return line


def explanation(answer: pb.SearchResponse | pb.RecommendResponse) -> RenderableType:
    """Where the time went, and which index, space, ranker and shards the answer speaks for."""
    facts = _facts(
        ("generation", str(answer.generation)),
        ("space", answer.space),
        ("variant", answer.variant),
        *([("ranker", answer.ranker)] if isinstance(answer, pb.RecommendResponse) else []),
        ("epoch", str(answer.epoch)),
        ("coverage", f"{answer.coverage.shards_answered} of {answer.coverage.shards_asked} shards"),
        *(
            (descriptor.name.removesuffix("_ms"), f"{value:.2f} ms")
            for descriptor, value in answer.timings.ListFields()
        ),
    )
    return Padding(facts, (1, 0, 0, 0), expand=False)


def features(answer: pb.RecommendResponse) -> RenderableType:
    """What the ranker saw of each hit."""
    names = sorted({name for hit in answer.hits for name in hit.features})
    table = _table()
    table.add_column("id", style="bold", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for hit in answer.hits:
        table.add_row(
            Text(hit.id), *(f"{hit.features[name]:.3f}" if name in hit.features else "" for name in names)
        )
    return Padding(table, (1, 0, 0, 0), expand=False)


def stages(answer: pb.RecommendResponse) -> Text:
    """What the stages of a recommendation did, in a line."""
    parts = [
        f"{stage.name} skipped ({stage.skipped})"
        if stage.skipped
        else f"{stage.name} {stage.candidates} in {stage.took_ms:.1f} ms"
        for stage in answer.stages
    ]
    return Text(" → ".join(parts), style="dim")


def _facts(*pairs: tuple[str, RenderableType]) -> Table:
    table = _table()
    table.show_header = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    return table


def collections(answer: pb.ListCollectionsResponse) -> RenderableType:
    """Every collection, one a line."""
    if not answer.collections:
        return Text("no collections yet; `ringfort create` makes one", style="dim")
    table = _table()
    table.add_column("collection", style="bold", no_wrap=True)
    table.add_column("model")
    table.add_column("dim", justify="right")
    table.add_column("metric")
    table.add_column("shards", justify="right")
    table.add_column("replicas", justify="right")
    table.add_column("attributes", overflow="fold")
    table.add_column("created")
    for each in sorted(answer.collections, key=lambda each: each.name):
        name = Text(each.name)
        if each.aliases:
            name.append(f" ({', '.join(each.aliases)})", style="dim")
        table.add_row(
            name,
            each.model or Text("own vectors", style="dim"),
            str(each.dim),
            pb.Metric.Name(each.metric).lower(),
            str(each.shards),
            str(each.replicas),
            _schema(each.attributes),
            each.created_at.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M"),
        )
    return table


def _schema(attributes: Mapping[str, pb.AttributeType.ValueType]) -> Text:
    text = Text()
    for name, type_ in sorted(attributes.items()):
        text.append(" " if text else "").append(name).append(
            f":{pb.AttributeType.Name(type_).lower()}", "dim"
        )
    return text


def collection_line(each: pb.Collection) -> str:
    """One collection in a sentence."""
    source = f"model {each.model}" if each.model else "own vectors"
    return (
        f"{each.name}: {each.dim} dimensions, {pb.Metric.Name(each.metric).lower()}, {source}, "
        f"{_number(each.shards, 'shard')} with {_number(each.replicas, 'replica')}"
    )


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def document(message: pb.Document) -> RenderableType:
    """One document, all of it."""
    head = Text(message.id, style="bold")
    head.append(f"  version {message.version.term}.{message.version.seq}", style="not bold dim")
    pairs: list[tuple[str, RenderableType]] = []
    if message.HasField("text"):
        pairs.append(("text", Text(message.text)))
    pairs += [
        (name, Text(attribute_text(wire.from_value(value))))
        for name, value in sorted(message.attributes.items())
    ]
    if message.HasField("vector"):
        pairs.append(("vector", vector_text(message.vector)))
    return Group(head, Padding(_facts(*pairs), (0, 0, 0, 2), expand=False))


def vector_text(matrix: pb.Matrix, row: int = 0) -> str:
    """The first numbers of one vector."""
    numbers = wire.from_matrix(matrix)[row]
    start = ", ".join(f"{number:+.4f}" for number in numbers[:4])
    return f"[{start}, … {numbers.size} in all]" if numbers.size > 4 else f"[{start}]"


def documents(page: Sequence[pb.Document], *, width: int, header: bool) -> RenderableType:
    """A page of a scan; pages line up under each other."""
    table = _table(expand=True)
    table.show_header = header
    table.add_column("id", style="bold", no_wrap=True, overflow="ellipsis", width=max(16, width // 4))
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=3)
    if width >= _WIDE:
        table.add_column("attributes", no_wrap=True, overflow="ellipsis", ratio=2)
    for message in page:
        row = [Text(message.id), one_line(message.text)]
        if width >= _WIDE:
            row.append(attributes_text(message.attributes, but=message.id))
        table.add_row(*row)
    return table


def embeddings(texts: Sequence[str], answer: pb.EmbedResponse) -> RenderableType:
    """The texts with their vectors; from two texts on, with each one's similarity to the first."""
    vectors = wire.from_matrix(answer.vectors)
    table = _table()
    table.add_column("text", style="bold", no_wrap=True, overflow="ellipsis")
    table.add_column("tokens", justify="right")
    if len(texts) > 1:
        table.add_column("to the first", justify="right")
    table.add_column("vector", no_wrap=True)
    for row, text in enumerate(texts):
        tokens = f"{answer.rows[row].tokens}{' (cut)' if answer.rows[row].truncated else ''}"
        cells: list[RenderableType] = [one_line(text), tokens]
        if len(texts) > 1:
            cells.append(f"{float(vectors[0] @ vectors[row]):.4f}")
        table.add_row(*cells, vector_text(answer.vectors, row))
    timings = answer.timings
    line = Text(f"{timings.total_ms:.1f} ms · {answer.model} · space {answer.space}", style="dim")
    return Group(table, line)


def state(name: str) -> Text:
    """A state, in its colour."""
    return Text(name, style=_STATE_STYLES.get(name.lower(), "yellow"))


def _explained(name: str, detail: str) -> Text:
    """A state, and below it what it means here."""
    return Text.assemble(state(name), (f"\n{detail}", "dim")) if detail else state(name)


def describe(answer: pb.DescribeResponse) -> RenderableType:
    """The release, the parts and every replica."""
    head = Text(f"ringfort {answer.version}", style="bold")
    head.append(f"  {answer.composition} · up {duration(answer.uptime_s)}", style="not bold dim")
    parts = _table()
    for column in ("component", "state", "detail"):
        parts.add_column(column)
    for component in answer.components:
        parts.add_row(component.name, state(component.state), Text(component.detail, style="dim"))
    replicas = _table()
    replicas.add_column("collection", style="bold", no_wrap=True)
    for column in ("shard", "replica"):
        replicas.add_column(column, justify="right")
    spread = any(len(each.logs) > 1 for each in answer.collections)
    if spread:
        replicas.add_column("database")
    replicas.add_column("state")
    for column in ("slots", "documents", "segments", "memtable", "pending", "position", "behind"):
        replicas.add_column(column, justify="right")
    kept = [
        Text(
            f"generation {each.beside.number} beside {each.name}: "
            f"{each.beside.model or each.beside.index.kind}, {each.beside.behind:,} behind",
            style="dim",
        )
        for each in answer.collections
        if each.HasField("beside")
    ]
    for each in answer.collections:
        watermarks = {log.database: log.watermark for log in each.logs}
        for replica in each.replicas:
            replicas.add_row(
                Text(each.name),
                str(replica.shard),
                str(replica.replica),
                *([replica.database] if spread else []),
                _explained(replica.state, replica.detail),
                f"{replica.slots:,}",
                f"{replica.documents:,}",
                f"{replica.segments:,}",
                f"{replica.memtable_rows:,}",
                f"{replica.pending_rows:,}",
                f"{replica.position:,}",
                f"{max(0, watermarks.get(replica.database, each.watermark) - replica.position):,}",
            )
    limits = Text(
        " · ".join(
            f"{descriptor.name.removeprefix('max_').replace('_', ' ')} ≤ {value:,}"
            for descriptor, value in answer.limits.ListFields()
        ),
        style="dim",
    )
    shown: list[RenderableType] = [head]
    shown += [Padding(table, (1, 0, 0, 0), expand=False) for table in (parts, replicas) if table.row_count]
    shown += kept
    return Group(*shown, Padding(limits, (1, 0, 0, 0), expand=False))


def jobs(answer: Sequence[pb.Job]) -> RenderableType:
    """Long operations, one a row."""
    table = _table()
    table.add_column("job", no_wrap=True)
    table.add_column("what", style="bold")
    table.add_column("collection")
    table.add_column("state")
    table.add_column("done", justify="right")
    table.add_column("took", justify="right")
    for each in answer:
        took = ""
        if each.HasField("ended_at"):
            took = duration(each.ended_at.ToMicroseconds() / 1e6 - each.started_at.ToMicroseconds() / 1e6)
        name = pb.Job.State.Name(each.state).lower()
        table.add_row(
            each.id, each.kind, Text(each.collection), _explained(name, each.message),
            f"{each.done}/{each.total}", took,
        )  # fmt: skip
    return Group(table, *(_figures(each) for each in answer if each.figures))


def _figures(job: pb.Job) -> Text:
    """What a job has found out."""
    told = " · ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in sorted(job.figures.items()))
    return Text(f"generation {job.generation}: {told}", style="dim")


def cache(answer: pb.CacheStatsResponse) -> RenderableType:
    """The tiers of the cache, nearest first."""
    table = _table()
    table.add_column("tier", style="bold")
    table.add_column("state")
    for column in ("hit ratio", "hits", "misses", "entries", "size", "evictions", "errors"):
        table.add_column(column, justify="right")
    for tier in answer.tiers:
        asked = tier.hits + tier.misses
        table.add_row(
            tier.name,
            state(tier.state),
            f"{tier.hits / asked:.1%}" if asked else "–",
            *(f"{count:,}" for count in (tier.hits, tier.misses, tier.entries)),
            size(tier.bytes),
            *(f"{count:,}" for count in (tier.evictions, tier.errors)),
        )
    told = [
        f"{answer.superseded:,} superseded by writes",
        f"{answer.stampedes_avoided:,} stampedes avoided",
        f"{answer.refreshed_early:,} refreshed early",
    ]
    lines = [Text(" · ".join(told), style="dim")]
    for tier in answer.tiers:
        if tier.eviction_storms or tier.removed:
            lost = f"{tier.name}: {tier.eviction_storms:,} eviction storms, {tier.removed:,} keys removed"
            lines.append(Text(f"{lost} ({tier.purges:,} purges)", style="yellow"))
    return Group(table, *lines)


def hot_keys(answer: pb.HotKeysResponse) -> RenderableType:
    """Hot keys, most asked for first."""
    if not answer.keys:
        return Text("nothing is asked for often", style="dim")
    table = _table()
    table.add_column("key", style="bold")
    for column in ("kind", "collection"):
        table.add_column(column)
    for column in ("share", "reads"):
        table.add_column(column, justify="right")
    for key in answer.keys:
        table.add_row(key.key, key.kind, key.collection or "–", f"{key.share:.1%}", f"{key.count:,}")
    return table


def operators(told: Iterable[Operator]) -> RenderableType:
    """Operators of a model and their times, a row each."""
    table = _table()
    table.add_column("operator", style="bold")
    for column in ("calls", "total ms", "mean µs", "share"):
        table.add_column(column, justify="right")
    for each in told:
        mean_us = each.total_ms / each.calls * 1e3
        table.add_row(
            each.name, f"{each.calls:,}", f"{each.total_ms:,.1f}", f"{mean_us:,.1f}", f"{each.share:.1%}"
        )
    return table


def models(versions: Iterable[pb.Model]) -> RenderableType:
    """Versions of models and what they are, a row each."""
    table = _table()
    table.add_column("model", style="bold")
    table.add_column("state")
    table.add_column("traffic", justify="right")
    table.add_column("precision")
    for column in ("dimension", "tokens"):
        table.add_column(column, justify="right")
    for column in ("space", "variant", "registered"):
        table.add_column(column)
    for model in versions:
        table.add_row(
            f"{model.name}@{model.version}",
            state(pb.Model.State.Name(model.state).lower()),
            f"{model.traffic_percent}%" if model.traffic_percent else "–",
            model.precision or pb.Model.Kind.Name(model.kind).lower(),
            str(model.dim or "–"),
            str(model.max_tokens or "–"),
            model.space or "–",
            model.variant,
            model.registered_at.ToDatetime().strftime("%Y-%m-%d %H:%M")
            if model.HasField("registered_at")
            else "–",
        )
    return table


def size(count_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"


def duration(seconds: float) -> str:
    """A span of time for people, to two units."""
    whole = int(seconds)
    for unit_s, unit, smaller_s, smaller in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // smaller_s} {smaller}"
    return f"{seconds:.1f} s"
