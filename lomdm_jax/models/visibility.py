"""Who sees whom in attention, and where each token stands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class View(NamedTuple):
    """positions_Q: int32 rotary positions; mask_QQ: bool, row sees column, or None for all."""

    positions_Q: jax.Array
    mask_QQ: jax.Array | None


def full(length: int) -> View:
    """Everyone sees everyone."""
    return View(jnp.arange(length), None)


def causal(length: int) -> View:
    """Everyone sees itself and what stands before it."""
    return View(jnp.arange(length), jnp.tril(jnp.ones((length, length), bool)))


def doubled(group_L: np.ndarray) -> View:
    """Queries and contents, [2 L]: the training layout of BD3-LM, written for any grouping.

    A query sees the contents of earlier groups and the queries of its own; a content sees the
    contents of its own and of earlier groups. So the queries of all groups learn in one pass,
    each group from the clean text before it.

    group_L: int [L], the group of each position, 0 is revealed first.
    """
    earlier, same = group_L[None] < group_L[:, None], group_L[None] == group_L[:, None]
    queries = np.concatenate([same, earlier], axis=1)
    contents = np.concatenate([np.zeros_like(same), earlier | same], axis=1)
    positions = np.tile(np.arange(len(group_L)), 2)
    return View(jnp.asarray(positions), jnp.asarray(np.concatenate([queries, contents])))
