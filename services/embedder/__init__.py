"""The embedder: texts in, unit vectors out, batched across callers."""
