"""The methods of ClusterService: what runs, what the caches hold, how many shards and replicas there are."""

import time
from collections.abc import Awaitable, Callable, Mapping

from google.protobuf import json_format

from protos.ringfort import v1 as pb
from services.cache import keys
from services.cache.tier import CacheTier
from services.config import Config
from services.gateway.answers import Answers
from services.gateway.directory import Directory
from services.gateway.resharder import Resharder
from services.gateway.served import Served
from services.gateway.servicers import MAX_REPLICAS, MAX_SHARDS, Call, job_message
from services.gateway.warming import Warming
from shard_router.errors import InvalidField, NotFound, PreconditionFailed
from shard_router.shard_map import Steady

DEFAULT_HOT_KEYS, MAX_HOT_KEYS = 20, 1_024
#: Answers to warm, in all and a second.
DEFAULT_WARMED, MAX_WARM_RATE = 20, 1_000


class ClusterReads:
    """What runs, how it is, and what is asked for most."""

    def __init__(
        self,
        catalog: Directory,
        cache: CacheTier,
        config: Config,
        *,
        release: str,
        composition: str,
        components: Callable[[], Awaitable[Mapping[str, tuple[str, str]]]],
    ) -> None:
        self._catalog = catalog
        self._cache = cache
        self._config = config
        self._release, self._composition = release, composition
        self._components = components
        self._began = time.monotonic()

    async def Describe(self, request: pb.DescribeRequest, call: Call) -> pb.DescribeResponse:
        limits = self._config.gateway.limits
        return pb.DescribeResponse(
            version=self._release,
            composition=self._composition,
            uptime_s=time.monotonic() - self._began,
            limits=pb.Limits(
                max_k=limits.max_k,
                max_batch_rows=limits.max_batch_rows,
                max_text_bytes=limits.max_text_bytes,
                max_attributes_bytes=limits.max_attributes_bytes,
                max_request_bytes=limits.max_request_bytes,
                max_id_bytes=limits.max_id_bytes,
                max_in_flight=self._config.gateway.max_in_flight,
            ),
            collections=[
                self._status(served, self._catalog.beside(served.collection.uid))
                for served in self._catalog.of_tenant(call.tenant)
            ],
            components=[
                pb.Component(name=name, state=state, detail=detail)
                for name, (state, detail) in (await self._components()).items()
            ],
        )

    async def HotKeys(self, request: pb.HotKeysRequest, call: Call) -> pb.HotKeysResponse:
        """Digests of what is the caller's; an embedding's tells its text to who guesses it."""
        mine = {s.collection.uid: s.collection.name for s in self._catalog.of_tenant(call.tenant)}
        gateway = self._config.gateway
        alone = len({*gateway.api_keys.values(), *gateway.operator_keys.values()}) <= 1
        limit = min(request.limit or DEFAULT_HOT_KEYS, MAX_HOT_KEYS)
        hot = []
        for each in self._cache.hot_keys(MAX_HOT_KEYS):
            name = keys.named(each.key)
            if name is None or not (alone if name.collection_uid is None else name.collection_uid in mine):
                continue
            collection = mine[name.collection_uid] if name.collection_uid is not None else ""
            hot.append(
                pb.HotKey(
                    key=name.digest, kind=name.kind, share=each.share, count=each.count, collection=collection
                )
            )
        return pb.HotKeysResponse(keys=hot[:limit])

    @staticmethod
    def _status(served: Served, beside: Served | None) -> pb.CollectionStatus:
        here, map_state = dict(served.copies()), served.state
        replicas = [
            pb.Replica(
                shard=copy.shard,
                replica=copy.replica,
                database=copy.database,
                state="opening",
                slots=len(served.slots_of(copy)),
            )
            for copy in served.wanted() - here.keys()
        ]
        for copy, replica in here.items():
            told, (state, detail) = replica.describe(), replica.condition()
            replicas.append(
                pb.Replica(
                    shard=copy.shard,
                    replica=copy.replica,
                    database=copy.database,
                    slots=len(served.slots_of(copy)),
                    endpoint=replica.endpoint,
                    state=state,
                    detail=detail,
                    position=int(told["position"]),
                    documents=int(told["documents"]),
                    segments=int(told["segments"]),
                    memtable_rows=int(told["memtable_rows"]),
                    pending_rows=int(told["pending_rows"]),
                    segment_status=[
                        pb.SegmentStatus(
                            name=each.name,
                            kind=each.kind,
                            rows=each.rows,
                            live=each.live,
                            bytes=each.size_bytes,
                        )
                        for each in replica.segments()
                    ],
                )
            )
        status = pb.CollectionStatus(
            name=served.collection.name,
            generation=served.collection.generation,
            epoch=served.state.epoch,
            watermark=sum(served.positions.values()),
            replicas=sorted(replicas, key=lambda each: (each.shard, each.replica, each.database)),
            logs=[
                pb.LogStatus(
                    database=log.database,
                    log_id=log.log_id,
                    watermark=log.position,
                    slots=len(log.own(range(served.collection.slots))),
                )
                for log in served.logs.values()
            ],
            shard_map=type(map_state).__name__.lower(),
            moving_slots=0 if isinstance(map_state, Steady) else sum(map(len, map_state.gains.values())),
        )
        if beside is not None:
            status.beside.CopyFrom(_generation_status(beside, served))
        return status


def _generation_status(beside: Served, live: Served) -> pb.GenerationStatus:
    collection = beside.collection
    applied: dict[str, list[int]] = {}
    for copy, replica in beside.copies():
        applied.setdefault(copy.database, []).append(replica.position)
    return pb.GenerationStatus(
        number=collection.generation,
        model=collection.model or "",
        space=collection.space,
        index=pb.IndexSpec(kind=collection.index),
        behind=sum(max(0, log.position - min(applied.get(log.database, [0]))) for log in live.logs.values()),
    )


class CacheReads:
    """What this gateway's cache holds and has done, and what it computes before somebody waits for it."""

    def __init__(self, catalog: Directory, cache: CacheTier, answers: Answers, warming: Warming) -> None:
        self._catalog = catalog
        self._cache = cache
        self._answers = answers
        self._warming = warming

    async def WarmCache(self, request: pb.WarmCacheRequest, call: Call) -> pb.WarmCacheResponse:
        served = self._catalog.resolve(call.tenant, request.collection)
        limit, rate = request.limit or DEFAULT_WARMED, request.rate or DEFAULT_WARMED
        if not 0 < rate <= MAX_WARM_RATE:
            raise InvalidField("rate", f"{rate} is not between 0 and {MAX_WARM_RATE}")
        if request.generation not in (0, served.collection.generation):
            beside = self._catalog.beside(served.collection.uid)
            if beside is None or beside.collection.generation != request.generation:
                raise NotFound("generation", str(request.generation))
            served = beside
        warmed = await self._warming.warm(served, limit=limit, rate=rate, deadline=call.deadline)
        return pb.WarmCacheResponse(
            known=warmed.known, computed=warmed.computed, failed=warmed.failed, left=warmed.left
        )

    async def CacheStats(self, request: pb.CacheStatsRequest, call: Call) -> pb.CacheStatsResponse:
        answers, cache = self._answers.stats(), self._cache.stats()
        avoided = answers["recomputes_avoided_total"] + cache["lease_recomputes_avoided_total"]
        return pb.CacheStatsResponse(
            tiers=[json_format.ParseDict(tier, pb.TierStats()) for tier in self._cache.tiers()],
            superseded=int(answers["superseded_total"]),
            stampedes_avoided=int(avoided),
            refreshed_early=int(answers["refreshed_total"]),
            gateways=1 + int(cache["other_gateways"]),
        )


class ShardChanges:
    """How many shards and replicas a collection has."""

    def __init__(self, catalog: Directory, resharder: Resharder) -> None:
        self._catalog = catalog
        self._resharder = resharder

    async def AddShard(self, request: pb.AddShardRequest, call: Call) -> pb.Job:
        served = self._catalog.resolve(call.tenant, request.collection)
        if len(served.state.shards) >= MAX_SHARDS:
            raise PreconditionFailed(f"the collection has {MAX_SHARDS} shards, and no more are allowed")
        return job_message(await self._resharder.add_shard(served))

    async def DrainShard(self, request: pb.DrainShardRequest, call: Call) -> pb.Job:
        served = self._catalog.resolve(call.tenant, request.collection)
        return job_message(await self._resharder.drain_shard(served, request.shard))

    async def SetReplicas(self, request: pb.SetReplicasRequest, call: Call) -> pb.Job:
        served = self._catalog.resolve(call.tenant, request.collection)
        if not 1 <= request.replicas <= MAX_REPLICAS:
            raise InvalidField("replicas", f"{request.replicas} is not between 1 and {MAX_REPLICAS}")
        return job_message(await self._resharder.set_replicas(served, request.replicas))
