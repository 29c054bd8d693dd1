"""Numbers as signed bytes, and what to multiply these by to have them back."""

import numpy as np

#: The largest code of a byte.
BYTE = 127


def to_codes(rows: np.ndarray, largest: int = BYTE) -> tuple[np.ndarray, np.ndarray]:
    """Each row along the last axis as int8 codes in [-largest, largest], and its float32 scale."""
    peaks = np.maximum(np.abs(rows).max(axis=-1), np.finfo(np.float32).tiny)
    scales = (peaks / np.float32(largest)).astype(np.float32)
    return np.rint(rows / scales[..., None]).astype(np.int8), scales
