"""The figures of a service: of all its gateways, each asked where it alone answers."""

from collections import defaultdict
from collections.abc import Mapping

import httpx
from up import Up

from ringfort import Client


class Scrape:
    """What /metrics tells, added up over the gateways."""

    def __init__(self, service: Up, client: Client) -> None:
        own = [
            each.detail.partition("http://")[2]
            for each in client.cluster().components
            if each.name.startswith("gateway ")
        ]
        #: HOST:PORT of each gateway.
        self.gateways = own or [service.http]

    def samples(self) -> Mapping[str, float]:
        """By name with labels, as they are written there."""
        total: dict[str, float] = defaultdict(float)
        for gateway in self.gateways:
            for line in httpx.get(f"http://{gateway}/metrics", timeout=30).text.splitlines():
                if line[:1] != "#":
                    name, value = line.rsplit(" ", 1)
                    total[name] += float(value)
        return total

    def value(self, name: str, **labels: str) -> float:
        """One of them; 0 where nothing is told."""
        told = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        return self.samples().get(f"{name}{{{told}}}" if labels else name, 0.0)
