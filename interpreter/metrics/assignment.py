"""The Hungarian match that links segments or slots over time."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def partners(similarity: np.ndarray) -> np.ndarray:
    """The partner of each row in the one-to-one assignment of the largest summed similarity (Kuhn 1955).

    >>> partners(np.array([[0.9, 0.8], [1.0, 0.1], [0.2, 0.3]])).tolist()
    [1, 0, -1]

    Args:
        similarity: [n, m] finite numbers.

    Returns:
        int64 [n]: the column of each row. If there are fewer columns than rows, n - m rows have -1.
    """
    assigned = np.full(len(similarity), -1, np.int64)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    assigned[rows] = columns
    return assigned
