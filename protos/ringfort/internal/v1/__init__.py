"""Every message between processes in one namespace: `from protos.ringfort.internal import v1 as internal`."""

# ruff: noqa: F403
from .embedder_node_pb2 import *
from .head_pb2 import *
from .shard_node_pb2 import *
from .siblings_pb2 import *
