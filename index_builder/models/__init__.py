"""Embedding models: from published weights to a verified artifact that ONNX Runtime runs."""
