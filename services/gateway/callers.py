"""Who calls: the API keys there are, whose they are, and what only an operator's may do."""

from collections.abc import Mapping
from typing import NamedTuple

from shard_router.errors import Unauthenticated

DEFAULT_TENANT = "default"
#: By service, the methods that read or change what belongs to the host or to all tenants.
OPERATORS_ONLY: Mapping[str, frozenset[str]] = {
    "ModelService": frozenset(("Register", "SetTraffic", "Promote", "Rollback", "Profile")),
    "ClusterService": frozenset(("AddShard", "DrainShard", "SetReplicas", "Backup", "Restore")),
}


class Caller(NamedTuple):
    """The key that a call came with, its tenant, and whether it is an operator's."""

    key: str
    tenant: str
    operator: bool


#: Where no keys are asked for.
ANYBODY = Caller("", DEFAULT_TENANT, True)


class Callers:
    """Callers by the keys they send; without API keys everybody may do everything."""

    def __init__(self, api_keys: Mapping[str, str], operator_keys: Mapping[str, str]) -> None:
        """Both: key -> tenant."""
        self.open = not api_keys
        self._by_key = {key: Caller(key, tenant, False) for key, tenant in api_keys.items()}
        self._by_key |= {key: Caller(key, tenant, True) for key, tenant in operator_keys.items()}

    def of(self, given: str) -> Caller:
        """Whose a key is; Unauthenticated for an unknown one."""
        caller = self._by_key.get(given)
        if caller is None:
            raise Unauthenticated("an API key is needed: send it as x-api-key or as a bearer token")
        return caller
