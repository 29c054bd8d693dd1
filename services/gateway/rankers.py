"""The rankers by name: the one that comes with the release, and versions of weights that were registered."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.traffic import Canary
from services.metadata.models import ModelKind, ModelState, ModelVersion
from services.ranker.manifest import RankerManifest, RankerRefused
from services.ranker.ranker import Ranker
from shard_router.errors import NotFound, PreconditionFailed

log = logging.getLogger(__name__)

#: Names that no registered ranker may have: what the release brings for Recommend and for Rerank.
RESERVED = (Ranker.name, "similarity")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What ranks one request: NAME@VERSION, what an answer's cache key says of it, and its weights."""

    model: str = Ranker.version
    version: str = Ranker.version
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RegisteredRanker:
    """A registered version and its manifest."""

    version: ModelVersion
    manifest: RankerManifest

    @property
    def chosen(self) -> Chosen:
        """This one, to rank a request."""
        model = self.manifest.model
        return Chosen(model, f"{Ranker.version}/{model}/{self.manifest.variant}", self.manifest.features)


class Rankers:
    """Registered rankers as of the latest `know`."""

    def __init__(self) -> None:
        #: By NAME@VERSION.
        self._registered: dict[str, RegisteredRanker] = {}
        #: By name.
        self._live: dict[str, RegisteredRanker] = {}
        self._canaries: dict[str, tuple[Canary, RegisteredRanker]] = {}
        #: Requests by NAME@VERSION.
        self._chosen: Counter[str] = Counter()

    def registered(self) -> list[RegisteredRanker]:
        """Every registered version, by name and version."""
        return [self._registered[model] for model in sorted(self._registered)]

    def know(self, versions: Sequence[ModelVersion]) -> None:
        """These are the versions there are now."""
        known: dict[str, RegisteredRanker] = {}
        for version in versions:
            if version.kind is ModelKind.RANKER:
                try:
                    ranker = RegisteredRanker(version, RankerManifest.of(version.manifest.encode()))
                except RankerRefused as error:
                    # As a newer release may have written it; the others can do without.
                    log.error("ranker cannot be used ranker=%s@%s: %s", version.name, version.version, error)
                    continue
                known[ranker.manifest.model] = ranker
        self._registered = known
        self._live, self._canaries = {}, {}
        for model, ranker in known.items():
            if ranker.version.state is ModelState.LIVE:
                self._live[ranker.version.name] = ranker
            elif ranker.version.state is ModelState.CANARY:
                canary = Canary(model, ranker.version.traffic_percent)
                self._canaries[ranker.version.name] = canary, ranker

    def resolve(self, name: str, tenant: str, key: bytes, field: str = "rank.ranker") -> Chosen:
        """The ranker of NAME@VERSION; of NAME the live version or, for its share of the keys, the canary.

        No name is the release's own. NotFound; PreconditionFailed for a name of which no version is live.
        """
        chosen = self._resolved(name, tenant, key, field)
        self._chosen[chosen.model] += 1
        return chosen

    def require_live(self, name: str) -> None:
        """PreconditionFailed where no version of a name is live."""
        if name not in self._live:
            raise _none_live(name)

    def stats_of_each(self) -> dict[str, Mapping[str, float]]:
        """How many requests every ranker got, those answered from a cache among them, by NAME@VERSION."""
        return {model: {"requests_total": requests} for model, requests in self._chosen.items()}

    def _resolved(self, name: str, tenant: str, key: bytes, field: str) -> Chosen:
        if name in ("", Ranker.name, Ranker.version):
            return Chosen()
        if (exact := self._registered.get(name)) is not None:
            return exact.chosen
        if name in self._canaries and self._canaries[name][0].takes(tenant, key):
            return self._canaries[name][1].chosen
        if name in self._live:
            return self._live[name].chosen
        if all(ranker.version.name != name for ranker in self._registered.values()):
            raise NotFound("ranker", name, field)
        raise _none_live(name)


def _none_live(name: str) -> PreconditionFailed:
    return PreconditionFailed(f"no version of ranker {name!r} is live: promote or name one in full")
