"""The service's face: gRPC and HTTP in front, retrieval, recommendation and ingest behind."""
