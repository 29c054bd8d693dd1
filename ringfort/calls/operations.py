"""Calls of the IndexService, the ModelService and the ClusterService; they answer the messages themselves."""

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.calls.call import Call, whole
from ringfort.errors import InvalidArgument


def reindex(
    collection: str, *, model: str = "", index: str = "", source_collection: str = ""
) -> Call[pb.Job, pb.Job]:
    """Starts building a new generation beside the live one: another model, index or source."""
    request = pb.ReindexRequest(
        collection=collection,
        model=model,
        index=pb.IndexSpec(kind=index),
        source_collection=source_collection,
    )
    return Call("IndexService/Reindex", request, pb.Job, whole, repeatable=False)


def job(id: str) -> Call[pb.Job, pb.Job]:
    """Where a long operation stands."""
    return Call("IndexService/GetJob", pb.GetJobRequest(id=id), pb.Job, whole)


def jobs(collection: str = "") -> Call[pb.ListJobsResponse, pb.ListJobsResponse]:
    """The long operations of a collection, or of all, the latest first."""
    return Call(
        "IndexService/ListJobs", pb.ListJobsRequest(collection=collection), pb.ListJobsResponse, whole
    )


def cancel_job(id: str) -> Call[pb.Job, pb.Job]:
    """Undoes a long operation that is under way; answers when that is done."""
    return Call("IndexService/CancelJob", pb.CancelJobRequest(id=id), pb.Job, whole, repeatable=False)


def activate(collection: str, generation: int) -> Call[pb.ActivateResponse, pb.ActivateResponse]:
    """Makes a built generation the live one."""
    request = pb.ActivateRequest(collection=collection, generation=generation)
    return Call("IndexService/Activate", request, pb.ActivateResponse, whole, repeatable=False)


def rollback(collection: str) -> Call[pb.ActivateResponse, pb.ActivateResponse]:
    """Returns to the generation that was live before."""
    request = pb.RollbackRequest(collection=collection)
    return Call("IndexService/Rollback", request, pb.ActivateResponse, whole, repeatable=False)


def models() -> Call[pb.ListModelsResponse, pb.ListModelsResponse]:
    """Every version of every embedding model and ranker."""
    return Call("ModelService/List", pb.ListModelsRequest(), pb.ListModelsResponse, whole)


def register_model(
    artifact: str, *, name: str = "", version: str = "", kind: str = "EMBEDDING"
) -> Call[pb.Model, pb.Model]:
    """Fetches, checks and registers a model; it is staged, for requests that name its version.

    `artifact` is a directory of the service's host or a URL that it can read, with a built model; for
    `kind` RANKER a JSON file with its name, version and features' weights. `name` and `version`, where
    they are given, have to be those of the model itself.
    """
    request = pb.RegisterModelRequest(
        name=name, version=version, kind=wire.enum_value(pb.Model.Kind, kind, "kind"), artifact=artifact
    )
    return Call("ModelService/Register", request, pb.Model, whole, repeatable=False)


def set_traffic(name: str, version: str, percent: int) -> Call[pb.Model, pb.Model]:
    """Sends a share of its name's traffic to a version, always the same keys; 0 ends that."""
    if percent < 0:
        raise InvalidArgument(f"percent: {percent} is less than 0", field="percent")
    request = pb.SetTrafficRequest(name=name, version=version, percent=percent)
    return Call("ModelService/SetTraffic", request, pb.Model, whole, repeatable=False)


def promote_model(name: str, version: str) -> Call[pb.Model, pb.Model]:
    """Makes a version the one that its name alone means."""
    request = pb.PromoteModelRequest(name=name, version=version)
    return Call("ModelService/Promote", request, pb.Model, whole, repeatable=False)


def rollback_model(name: str) -> Call[pb.Model, pb.Model]:
    """Ends the canary of a name or, without one, makes the version live again that was so before."""
    request = pb.RollbackModelRequest(name=name)
    return Call("ModelService/Rollback", request, pb.Model, whole, repeatable=False)


def profile_model(model: str, seconds: int) -> Call[pb.ProfileModelResponse, pb.ProfileModelResponse]:
    """Times the operators of a model over what others ask of it, for so many seconds at most."""
    request = pb.ProfileModelRequest(model=model, seconds=seconds)
    return Call("ModelService/Profile", request, pb.ProfileModelResponse, whole, repeatable=False)


def cluster() -> Call[pb.DescribeResponse, pb.DescribeResponse]:
    """The service's release, limits, parts, and the state of every replica."""
    return Call("ClusterService/Describe", pb.DescribeRequest(), pb.DescribeResponse, whole)


def add_shard(collection: str) -> Call[pb.Job, pb.Job]:
    """Starts giving a collection one shard more, which takes its slots from the others."""
    return Call(
        "ClusterService/AddShard", pb.AddShardRequest(collection=collection), pb.Job, whole, repeatable=False
    )


def drain_shard(collection: str, shard: int) -> Call[pb.Job, pb.Job]:
    """Starts moving a shard's slots to the others; in the end the shard is gone."""
    request = pb.DrainShardRequest(collection=collection, shard=shard)
    return Call("ClusterService/DrainShard", request, pb.Job, whole, repeatable=False)


def set_replicas(collection: str, replicas: int) -> Call[pb.Job, pb.Job]:
    """Starts giving every shard of a collection so many copies."""
    request = pb.SetReplicasRequest(collection=collection, replicas=replicas)
    return Call("ClusterService/SetReplicas", request, pb.Job, whole, repeatable=False)


def cache_stats() -> Call[pb.CacheStatsResponse, pb.CacheStatsResponse]:
    """What each tier of the cache holds and how often it was hit."""
    return Call("ClusterService/CacheStats", pb.CacheStatsRequest(), pb.CacheStatsResponse, whole)


def hot_keys(*, limit: int = 0) -> Call[pb.HotKeysResponse, pb.HotKeysResponse]:
    """What the cache is asked for most, by digest; 20 unless `limit` says otherwise."""
    request = pb.HotKeysRequest(limit=limit)
    return Call("ClusterService/HotKeys", request, pb.HotKeysResponse, whole)


def warm_cache(
    collection: str, *, limit: int = 0, rate: float = 0.0
) -> Call[pb.WarmCacheResponse, pb.WarmCacheResponse]:
    """Computes a collection's hot answers that are not in the cache: `limit` at most, `rate` a second."""
    request = pb.WarmCacheRequest(collection=collection, limit=limit, rate=rate)
    return Call("ClusterService/WarmCache", request, pb.WarmCacheResponse, whole, repeatable=False)
