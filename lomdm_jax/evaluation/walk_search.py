"""The neighbour table of an order, by direct search on the bound.

A table has three free numbers, and one evaluation of the bound with the same draws for every
candidate tells them apart far better than score-function gradients do: on single states these are
so noisy that a direction is settled by chance long before it is known (benchmarks/README.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Growing to the right, to the left, and into gaps: what they add to table[left][right].
DIRECTIONS = np.array([[[0, 0], [1, 1]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]], np.float32)
# Nats; the bold ones look past what is near, to directions that pay only when they are sharp.
MOVES = (-2.0, 2.0, 6.0)
# A move must be better by this many standard errors of the paired difference.
CERTAINTY = 2.0


class Found(NamedTuple):
    """table: float32 [2, 2]. gain: nats per sequence below the table that the search began with,
    and its standard error; zeros if nothing better was found. calls: candidates scored."""

    table: np.ndarray
    gain: float
    gain_error: float
    calls: int


def search(nats: Callable[[np.ndarray], np.ndarray], table: np.ndarray) -> Found:
    """One round of moves from `table`: the best that is better beyond doubt.

    Args:
      nats: from a table, float32 [2, 2], to the bound of each of N sequences, float [N], with the
        same draws for every table.
      table: where to begin.
    """
    best, start_N, count = Found(table, 0.0, 0.0, 1), nats(table), 1
    for direction in DIRECTIONS:
        for move in MOVES:
            moved = table + np.float32(move) * direction
            gain_N, count = start_N - nats(moved), count + 1
            gain, error = gain_N.mean(), gain_N.std(ddof=1) / np.sqrt(len(gain_N))
            if gain > max(CERTAINTY * error, best.gain):
                best = Found(moved, float(gain), float(error), count)
    return best._replace(calls=count)
