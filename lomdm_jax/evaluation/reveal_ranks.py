"""When each token of a text is revealed: by the order that knows the text, and by the model's own.

The orders are drawn from the first, q. Those of the second, p, are what the model chooses while the
text's own tokens appear at the positions that it chooses; means over them are means over the draws
with the weights p / q, divided by their sum (self-normalised importance sampling).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.evaluation.order_means import relative_rank
from lomdm_jax.evaluation.trajectories import Trajectory


class Rank(NamedTuple):
    """When a token is revealed by one of the two orders; means over the orders that were drawn.

    mean: reveal rank among the tokens of the text, 0 for the first and 1 for the last.
    error: standard error of that from the draws; nan for a single order.
    share: probability, by that order, that the token came next when it came.
    """

    mean: float
    error: float
    share: float


class TokenOrder(NamedTuple):
    """A token of the text; forward: by the order that knows the text; reverse: by the model's."""

    piece: str
    forward: Rank
    reverse: Rank


class TextOrder(NamedTuple):
    """tokens: in the order of the text. orders: how many were drawn.

    effective: how many equally weighted orders the reverse ranks are worth: all that were drawn
      where the two orders agree. Where it is a few, draw more.
    """

    tokens: list[TokenOrder]
    orders: int
    effective: float


def summarise(
    found: Trajectory, rows: Batch, pieces: Callable[[list[int]], list[str]]
) -> TextOrder:
    """The ranks of the scored tokens of one row.

    Args:
      found: K trajectories of it, arrays [1, K, L].
      rows: see `text_score.laid`; arrays [1, L].
      pieces: from token ids to their texts.
    """
    (counted_L,) = rows["counted"]
    found = jax.tree.map(lambda a: a[0][:, counted_L], found)  # T of L are left
    rank_KT = relative_rank(found.rank_BL, np.ones_like(found.rank_BL, bool))
    log_w_K = (found.log_p_BL - found.log_q_BL).sum(axis=-1, dtype=np.float64)
    weight_K = np.exp(log_w_K - log_w_K.max())
    forward = _ranks(rank_KT, found.log_q_BL, np.ones_like(weight_K))
    reverse = _ranks(rank_KT, found.log_p_BL, weight_K)
    texts = pieces(rows["tokens"][0][counted_L].tolist())
    tokens = [TokenOrder(*each) for each in zip(texts, forward, reverse, strict=True)]
    return TextOrder(tokens, len(weight_K), _effective(weight_K))


def _ranks(rank_KT: np.ndarray, log_share_KT: np.ndarray, weight_K: np.ndarray) -> list[Rank]:
    """Weighted means over the orders; the error is that of a ratio, to first order."""
    effective, weight_K = _effective(weight_K), weight_K / weight_K.sum()
    mean_T = weight_K @ rank_KT
    variance_T = weight_K**2 @ (rank_KT - mean_T) ** 2
    unbiased = effective / (effective - 1) if effective > 1 else np.nan
    columns = (mean_T, np.sqrt(variance_T * unbiased), weight_K @ np.exp(log_share_KT))
    return [Rank(*map(float, values)) for values in zip(*columns, strict=True)]


def _effective(weight_K: np.ndarray) -> float:
    """How many equal weights these are worth (Kish)."""
    return float(weight_K.sum() ** 2 / (weight_K**2).sum())
