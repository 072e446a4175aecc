"""Which way an order walks: the walk on which a network trained on random orders does best.

A network that has seen all orders alike is a fair judge, but a lenient one: whatever the order,
the chain rule adds its conditionals up to about the same bound. What a walk gains, it gains
because the network then specialises in the contexts it meets (benchmarks/README.md). So the choice
is between walks that are equally sharp, and falls once.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lomdm_jax.orders.learned import WALKS

# Training sequences that a choice reads.
SEQUENCES = 256


class Choice(NamedTuple):
    """name: of WALKS. nats: mean bound of each walk in nats per sequence, and its standard error
    less what the sequences themselves differ by."""

    name: str
    nats: dict[str, tuple[float, float]]

    @property
    def table(self) -> np.ndarray:
        """float32 [2, 2]; see `orders.schedule.Weights`."""
        return WALKS[self.name]


def choose(nats: Callable[[np.ndarray], np.ndarray]) -> Choice:
    """The walk with the lowest bound.

    Args:
      nats: from a table, float32 [2, 2], to the bound of each of N sequences, float [N], with the
        same draws for every table.
    """
    found_WN = np.stack([nats(table) for table in WALKS.values()])
    excess_WN = found_WN - found_WN.mean(axis=0)
    error_W = excess_WN.std(axis=1, ddof=1) / np.sqrt(found_WN.shape[1])
    pairs = zip(WALKS, found_WN.mean(axis=1).tolist(), error_W.tolist(), strict=True)
    scored = {name: (mean, error) for name, mean, error in pairs}
    return Choice(min(scored, key=lambda name: scored[name][0]), scored)


def report(choice: Choice, length: int) -> str:
    """A line for people: the walks and their bounds in nats per token."""
    scored = ", ".join(
        f"{name} {mean / length:.4f} ± {error / length:.4f}"
        for name, (mean, error) in choice.nats.items()
    )
    return f"walk  {scored} nats/token: the order now grows {choice.name}"
