"""k-means of numbers."""

import numpy as np


def kmeans(values: np.ndarray, count: int, rounds: int = 100) -> np.ndarray:
    """The ``count`` centres of ``values`` (n,), ascending: Lloyd's algorithm from the quantiles, so the same each time.

    With fewer different values than ``count``, some centres are equal.

    Raises:
        ValueError: no value, or ``count`` below 1.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    if not len(values) or count < 1:
        raise ValueError(f"{len(values)} values and {count} centres; expected at least one of each.")
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    total = np.concatenate([[0], values.cumsum()])
    for _ in range(rounds):
        # The values nearest to a centre lie between the midpoints to its neighbours.
        edges = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        low, high = np.concatenate([[0], edges]), np.concatenate([edges, [len(values)]])
        sizes = high - low
        new = np.where(sizes > 0, (total[high] - total[low]) / np.maximum(sizes, 1), centres)
        if np.array_equal(new, centres):
            break
        centres = new
    return centres
