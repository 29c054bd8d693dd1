"""Calls of the CollectionService."""

from collections.abc import Mapping

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.calls.call import Call, nothing
from ringfort.results import Collection


def create_collection(
    name: str,
    *,
    model: str | None = None,
    dim: int | None = None,
    metric: str = "cosine",
    attributes: Mapping[str, str] | None = None,
    slots: int = 0,
    shards: int = 0,
    replicas: int = 0,
    index: str = "",
    max_staleness_ms: int = 0,
) -> Call[pb.Collection, Collection]:
    """A new, empty collection.

    With `dim` alone, documents bring their own vectors; with neither `dim` nor `model` the default model
    embeds their texts. `attributes` maps each name to keyword, int, float, bool, timestamp or keywords.
    0 leaves `slots`, `shards` and `replicas` to the service. Raises AlreadyExists.
    """
    types = {
        attribute: wire.enum_value(pb.AttributeType, type_, f"attributes.{attribute}")
        for attribute, type_ in (attributes or {}).items()
    }
    request = pb.CreateCollectionRequest(
        name=name,
        model=model or "",
        dim=dim or 0,
        metric=wire.enum_value(pb.Metric, metric, "metric"),
        attributes=types,
        slots=slots,
        shards=shards,
        replicas=replicas,
        index=pb.IndexSpec(kind=index),
        max_staleness_ms=max_staleness_ms,
    )
    return Call("CollectionService/Create", request, pb.Collection, Collection.of, repeatable=False)


def collection(name: str) -> Call[pb.Collection, Collection]:
    """One collection, by its name or an alias. Raises NotFound."""
    return Call("CollectionService/Get", pb.GetCollectionRequest(name=name), pb.Collection, Collection.of)


def _collections(answer: pb.ListCollectionsResponse) -> list[Collection]:
    return [Collection.of(each) for each in answer.collections]


def collections() -> Call[pb.ListCollectionsResponse, list[Collection]]:
    """Every collection."""
    return Call(
        "CollectionService/List", pb.ListCollectionsRequest(), pb.ListCollectionsResponse, _collections
    )


def delete_collection(name: str) -> Call[pb.DeleteCollectionResponse, None]:
    """Removes a collection with all its documents. Raises NotFound."""
    return Call(
        "CollectionService/Delete",
        pb.DeleteCollectionRequest(name=name),
        pb.DeleteCollectionResponse,
        nothing,
        repeatable=False,
    )


def set_alias(alias: str, collection: str | None) -> Call[pb.SetAliasResponse, None]:
    """Points an alias at a collection, atomically; None removes the alias."""
    request = pb.SetAliasRequest(alias=alias, collection=collection or "")
    return Call("CollectionService/SetAlias", request, pb.SetAliasResponse, nothing)
