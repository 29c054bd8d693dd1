"""The generated stubs of all services over one channel."""

from dataclasses import dataclass

import grpc

from protos.ringfort.v1.cluster_pb2_grpc import ClusterServiceStub
from protos.ringfort.v1.collection_pb2_grpc import CollectionServiceStub
from protos.ringfort.v1.document_pb2_grpc import DocumentServiceStub
from protos.ringfort.v1.embedding_pb2_grpc import EmbeddingServiceStub
from protos.ringfort.v1.index_pb2_grpc import IndexServiceStub
from protos.ringfort.v1.model_pb2_grpc import ModelServiceStub
from protos.ringfort.v1.search_pb2_grpc import SearchServiceStub


@dataclass(frozen=True)
class Rpc:
    """Message in, message out, with nothing checked or retried on this side."""

    embedding: EmbeddingServiceStub
    document: DocumentServiceStub
    search: SearchServiceStub
    collection: CollectionServiceStub
    index: IndexServiceStub
    model: ModelServiceStub
    cluster: ClusterServiceStub

    @classmethod
    def on(cls, channel: grpc.Channel) -> "Rpc":
        """The stubs of a channel."""
        return cls(
            EmbeddingServiceStub(channel),
            DocumentServiceStub(channel),
            SearchServiceStub(channel),
            CollectionServiceStub(channel),
            IndexServiceStub(channel),
            ModelServiceStub(channel),
            ClusterServiceStub(channel),
        )
