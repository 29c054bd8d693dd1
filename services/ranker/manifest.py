"""A ranker as it is registered: a name, a version, and how much each feature counts."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from services.ranker.features import fault_of
from shard_router.hashing import digest

#: More would be a mistake, and every one is a pass over the candidates.
MAX_FEATURES = 64


class RankerRefused(ValueError):
    """These bytes are not a ranker's manifest; the message says why."""


class RankerManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ranker, `{"name": "shop", "version": "3", "features": {"similarity": 1, "sales": 0.4}}` as JSON.

    `features`: the weight of `similarity` (1 where it is not named) and of attributes with an order, each
    taken as its percentile among the candidates. What a request weighs itself goes before.
    """

    name: str
    version: str
    features: Mapping[str, float]
    kind: Literal["blend"] = "blend"

    @classmethod
    def of(cls, data: bytes) -> "RankerManifest":
        """The manifest in these bytes; RankerRefused names the part that is wrong."""
        try:
            manifest = msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:  # a ValidationError, which names the part, is one
            raise RankerRefused(str(error)) from None
        if not 0 < len(manifest.features) <= MAX_FEATURES:
            raise RankerRefused(f"features: {len(manifest.features)}, where 1 to {MAX_FEATURES} are meant")
        for name, weight in manifest.features.items():
            if (fault := fault_of(weight)) is not None:
                raise RankerRefused(f"features.{name}: {fault}")
        return manifest

    @property
    def model(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def variant(self) -> str:
        """What it does, as a digest: equal for two that rank alike, whatever they are called."""
        return digest(msgspec.json.encode((self.kind, dict(self.features)), order="sorted"))[:8].hex()

    def encode(self) -> bytes:
        """The manifest as JSON."""
        return msgspec.json.encode(self)
