"""Identity of embedding spaces and of the ways to run them, computed from bytes alone."""

import hashlib
import json
from collections.abc import Mapping

#: Hex characters of an identity: 64 bits tell any two models of one service apart.
IDENTITY_CHARS = 16


def space_id(
    *,
    weights_sha256: str,
    architecture: Mapping[str, object],
    tokenizer_sha256: str,
    max_tokens: int,
    pooling: str,
    prompts: Mapping[str, str],
    dim: int,
    normalized: bool,
) -> str:
    """The same 16 hex characters for models whose vectors may be compared, others for any two that may not.

    `architecture` is what the weights alone do not say (heads, activation, norm epsilon).
    """
    return _identity(
        "space",
        {
            "weights": weights_sha256,
            "architecture": dict(architecture),
            "tokenizer": tokenizer_sha256,
            "max_tokens": max_tokens,
            "pooling": pooling,
            "prompts": dict(prompts),
            "dim": dim,
            "normalized": normalized,
        },
    )


def reduced_space_id(*, space: str, kind: str, dim: int, matrix_sha256: str) -> str:
    """16 hex characters of a space whose vectors were reduced; see reduction.py."""
    return _identity("space", {"of": space, "reduction": kind, "dim": dim, "matrix": matrix_sha256})


def image_space_id(*, graph_sha256: str, output: str, preparation: Mapping[str, object]) -> str:
    """16 hex characters of a space of pictures: the graph as published, and all that comes before it."""
    return _identity("space", {"graph": graph_sha256, "output": output, "image": dict(preparation)})


def variant_id(*, space: str, precision: str, engine: str, artifact_sha256: str) -> str:
    """16 hex characters of one way to run a space; equal variants give equal vectors for equal texts."""
    return _identity(
        "variant", {"space": space, "precision": precision, "engine": engine, "artifact": artifact_sha256}
    )


def _identity(kind: str, facts: Mapping[str, object]) -> str:
    canonical = json.dumps([kind, facts], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:IDENTITY_CHARS]
