"""Random draft trees, and what attention over one gives."""

import numpy as np


def random_tree(rows: int, rng: np.random.Generator) -> np.ndarray:
    """The ancestor mask of a random tree whose parents precede their children."""
    mask = np.eye(rows, dtype=bool)
    for node in range(1, rows):
        mask[node] |= mask[rng.integers(0, node)]
    return mask


def dense(q, k, v, length: int, mask: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention in f64 over every live key at once; q [T, Hq, d], k and v [length + T, Hkv, d]."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    seen = np.concatenate([np.ones((rows, length), bool), mask], axis=1)
    out = np.empty(q.shape)
    for head in range(heads):
        keys, values = (cache[:, head // group].astype(np.float64) for cache in (k, v))
        scores = np.where(seen, q[:, head].astype(np.float64) @ keys.T * scale, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = weights / weights.sum(1, keepdims=True) @ values
    return out
