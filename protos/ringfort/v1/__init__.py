"""Every message of ringfort.v1 in one namespace: `from protos.ringfort import v1 as pb`."""

# ruff: noqa: F403
from .cluster_pb2 import *
from .collection_pb2 import *
from .common_pb2 import *
from .document_pb2 import *
from .embedding_pb2 import *
from .index_pb2 import *
from .model_pb2 import *
from .search_pb2 import *
