"""Every setting in one frozen tree: defaults, then a YAML file, then RINGFORT_GATEWAY__PORT-like variables.

Only the composition roots read it; parts get plain values. An unknown key fails.
"""

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from index_builder.segments.index_spec import GRAPH_ROWS
from shard_router.model import HOME

DATABASE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


class Section(BaseModel):
    """One room's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Section):
    """What a request may ask for; answered by ClusterService.Describe."""

    max_k: int = Field(1_000, ge=1)
    max_batch_rows: int = Field(2_048, ge=1)
    max_text_bytes: int = Field(32 * 1024, ge=1)
    max_attributes_bytes: int = Field(16 * 1024, ge=1)
    max_request_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    max_id_bytes: int = Field(256, ge=1)


class GatewaySettings(Section):
    """The two listening ports and what is let through them."""

    grpc: str = "127.0.0.1:7700"
    http: str = "127.0.0.1:7780"
    #: What speaks gRPC: grpc.aio, or pygrpc-native (extra `native`): less processor time a call, but no TLS,
    #: and a message is read to its end before it is refused for its size, so callers have to be trusted.
    server: str = Field("aio", pattern="^(aio|native)$")
    #: Listen beyond loopback although neither TLS nor keys are configured.
    insecure: bool = False
    #: Requests under way at once; more are refused with RESOURCE_EXHAUSTED.
    max_in_flight: int = Field(1_024, ge=1)
    #: The deadline of a call that brings none.
    default_timeout_s: float = Field(30.0, gt=0)
    #: How long a stop waits for the calls under way.
    drain_s: float = Field(5.0, ge=0)
    #: PEM files; both or neither.
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    #: API key -> tenant. Empty: no keys asked for, the tenant is `default`, and everybody is an operator.
    api_keys: dict[str, str] = Field(default_factory=dict)
    #: Such keys that may also register, promote and try models, change shards and replicas.
    operator_keys: dict[str, str] = Field(default_factory=dict)
    #: Requests a second and key; 0 is unlimited.
    rate_per_key: float = Field(0.0, ge=0)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _keys_are_told_apart(self) -> "GatewaySettings":
        if self.operator_keys and not self.api_keys:
            raise ValueError("operator_keys mean nothing without api_keys: everybody is an operator then")
        if self.operator_keys.keys() & self.api_keys.keys():
            raise ValueError("a key is among both api_keys and operator_keys")
        return self


class EmbedderSettings(Section):
    """The default model and how it is run."""

    precision: str = Field("int8", pattern="^(int8|fp32)$")
    #: Inference threads; 0 means the CPUs this process really has.
    workers: int = Field(0, ge=0)
    queue_texts: int = Field(8_192, ge=1)
    #: Pictures that may wait or run, of one image model.
    queue_images: int = Field(512, ge=1)
    #: A sentence-transformers directory in place of the packaged model.
    source: Path | None = None
    #: Where models run; auto takes a GPU where there is one and the model's precision is made for it.
    device: str = Field("cpu", pattern="^(auto|cpu|cuda)$")
    #: Graphs of models loaded beside the default one, in bytes; idle ones make room.
    models_bytes: int = Field(2 * 1024**3, ge=0)


class RankerSettings(Section):
    """The second stage."""

    default_candidates: int = Field(100, ge=1)


class ShardSettings(Section):
    """How documents become searchable."""

    #: A memtable is sealed into a segment at this many rows.
    memtable_rows: int = Field(8_192, ge=16)
    #: `auto` builds a graph of so many rows, once nothing is written for a while.
    graph_rows: int = Field(GRAPH_ROWS, ge=32)
    #: Merges of so many rows run in a process of their own.
    child_rows: int = Field(16_384, ge=1)
    #: How often a replica looks at the log when nobody told it to.
    poll_ms: int = Field(500, ge=10)
    #: Search threads; 0 means the CPUs this process really has.
    threads: int = Field(0, ge=0)
    device: str = Field("cpu", pattern="^(auto|cpu|cuda:[0-9]+)$")


class CacheSettings(Section):
    """The two tiers."""

    #: An existing server, or redis+cluster://HOST:PORT,HOST:PORT; otherwise one is started from its wheel.
    redis_url: str | None = None
    l1_bytes: int = Field(64 * 1024 * 1024, ge=0)
    redis_max_bytes: int = Field(256 * 1024 * 1024, ge=1024 * 1024)
    op_timeout_ms: int = Field(50, ge=1)
    embedding_ttl_s: float = Field(7 * 24 * 3600.0, gt=0)
    answer_ttl_s: float = Field(3600.0, gt=0)


class MetadataSettings(Section):
    """Postgres, the truth and the log."""

    #: The home database, on an existing server; otherwise one is started from its wheel.
    postgres_url: str | None = None
    #: By a name that stays, URLs of further databases that documents of new collections are spread over.
    partitions: dict[str, str] = Field(default_factory=dict)
    pool_size: int = Field(8, ge=2)
    statement_timeout_ms: int = Field(10_000, ge=100)
    #: Deletes are remembered so long; a replica or backup that lagged behind by more is built anew.
    tombstone_ttl_s: float = Field(7 * 24 * 3600.0, gt=0)

    @field_validator("partitions")
    @classmethod
    def _named(cls, partitions: dict[str, str]) -> dict[str, str]:
        for name in partitions:
            if name == HOME or not DATABASE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not 1 to 63 of a-z, 0-9, _ and -, a letter first, or it is {HOME!r}"
                )
        return partitions


class IndexSettings(Section):
    """What a collection gets that does not say otherwise."""

    slots: int = Field(128, ge=1, le=65_536)
    shards: int = Field(1, ge=1)
    replicas: int = Field(1, ge=1)


class TelemetrySettings(Section):
    """What the service tells of itself."""

    #: Counts and times of calls and stages in /metrics.
    metrics: bool = True
    #: At most so often an answered vector query is repeated exactly and the recall exported; 0 is never.
    recall_audit_s: float = Field(0.0, ge=0)
    #: Where traces go, by OTLP over gRPC, such as http://127.0.0.1:4317; needs the extra `otel`.
    otlp: str | None = None
    #: Share of the calls traced that do not come with a decision of their caller's.
    trace_share: float = Field(1.0, ge=0, le=1)


class ClusterSettings(Section):
    """How the parts are spread over processes and machines (`up --cluster`)."""

    #: Who starts the processes: Ray, or the head itself as its children.
    launcher: str = Field("ray", pattern="^(ray|processes)$")
    #: Nodes that hold shards; the same number whenever the service starts on the same data.
    nodes: int = Field(2, ge=1, le=1_000)
    #: Gateways, the head's own among them, all behind the same two ports; `gateway`'s limits are each one's.
    gateways: int = Field(1, ge=1, le=64)
    #: An existing Ray cluster; otherwise one is started here, on loopback.
    ray_address: str | None = None
    #: Where internal servers listen; `auto` is each machine's own address, which the others reach. They ask
    #: for a token, but speak in the clear: the network between the machines has to be private.
    host: str = "127.0.0.1"
    #: Processes of one model: at first, and at most as its queues grow (on Ray).
    embedders: int = Field(1, ge=1)
    embedders_most: int = Field(4, ge=1)
    #: CPUs that Ray sets aside for a node, for a further gateway, and for a process of a model.
    node_cpus: float = Field(1.0, gt=0)
    gateway_cpus: float = Field(1.0, ge=0)
    embedder_cpus: float = Field(1.0, gt=0)
    #: A resource of Ray's of which each further gateway takes one, so that they run where there is some.
    gateway_resource: str | None = None
    #: How long all of them have to come up.
    start_s: float = Field(180.0, gt=0)


class Config(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="RINGFORT_", env_nested_delimiter="__"
    )

    gateway: GatewaySettings = GatewaySettings()
    embedder: EmbedderSettings = EmbedderSettings()
    ranker: RankerSettings = RankerSettings()
    shard: ShardSettings = ShardSettings()
    cache: CacheSettings = CacheSettings()
    metadata: MetadataSettings = MetadataSettings()
    index: IndexSettings = IndexSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    cluster: ClusterSettings = ClusterSettings()


class ConfigError(ValueError):
    """A setting is unknown or out of range; one sentence."""


def load(file: Path | None, **overrides: dict[str, Any]) -> Config:
    """The tree from defaults, `file`, the environment and `overrides`, in rising strength.

    ConfigError names the key that is unknown or out of range.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"no configuration file at {file}")

    class Sources(Config):
        """The tree, with this call's file among its sources."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=file)

    try:
        config = Sources(**overrides)  # type: ignore[arg-type]  # sections arrive as mappings
    except ValidationError as error:
        first = error.errors()[0]
        problem = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(f"setting {'.'.join(map(str, first['loc']))}: {problem}") from None
    except Exception as error:  # a YAML file that does not parse has no error class of its own here
        raise ConfigError(f"configuration file {file}: {' '.join(str(error).split())}") from error
    unknown = [
        name for name in os.environ
        if name.startswith("RINGFORT_") and "__" in name
        and name.removeprefix("RINGFORT_").split("__")[0].lower() not in Config.model_fields
    ]  # fmt: skip
    if unknown:
        raise ConfigError(f"setting {unknown[0]}: there is no such section")
    return config
