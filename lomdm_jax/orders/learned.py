"""Orders learned together with the model: from a network's scores to exponents."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.errors import UserError
from lomdm_jax.orders.fixed import polynomial
from lomdm_jax.orders.schedule import Power

# Nats that a revealed neighbour adds: e^8 is 3,000 to 1, so a text is written from its start on,
# from its end back, or from both ends and anything given; the table is indexed [left][right].
WALKS = {
    "to the right": np.array([[0, 0], [8, 8]], np.float32),
    "to the left": np.array([[0, 8], [0, 8]], np.float32),
    "to both sides": np.array([[0, 8], [8, 8]], np.float32),
}
# What a network on the ranked layout tries side by side before one of them is chosen.
TRIALS = {
    name: WALKS.get(name, np.zeros((2, 2), np.float32))
    for name in ("to the right", "to both sides", "to the left", "at random")
}


def norm_sig(scores_BL: jax.Array) -> jax.Array:
    """sigmoid(v_i) minus its mean over the sequence, float32 [..., L], inside (-1, 1).

    The scores v are centred first. This reaches the very same vectors as the paper's formula,
    which has one degree of freedom too many: what it makes of scores v it also makes of some
    scores of mean zero. But it takes away a trap: nothing pulls back the mean of uncentred
    scores, it drifts, the sigmoids saturate, and the order silently becomes random for good.
    """
    scores_BL = scores_BL.astype(jnp.float32)
    squashed = jax.nn.sigmoid(scores_BL - jnp.mean(scores_BL, axis=-1, keepdims=True))
    return squashed - jnp.mean(squashed, axis=-1, keepdims=True)


def lomdm(scores_BL: jax.Array, c1: float, c2: float) -> Power:
    """LoMDM's exponents e_i = c1 + c2 * NormSig(scores)_i (arXiv 2602.02112).

    c1 is the mean exponent, c2 how far priorities spread; (1, 0) is masked diffusion.

    Args:
      scores_BL: one score per position, [..., L].
      c1, c2: c1 > c2 >= 0 keeps every exponent positive, since NormSig is above -1.

    Raises:
      UserError: if c1 <= c2 or c2 < 0.
    """
    if not c1 > c2 >= 0:
        raise UserError(
            f"order.c1 is {c1} and order.c2 is {c2}, but exponents c1 + c2 * NormSig stay positive "
            "only for c1 > c2 >= 0: raise c1 or lower c2 (the paper's best is c1 = 0.7, c2 = 0.65)."
        )
    if c2 == 0:  # nothing depends on the scores: the program is that of a fixed order, bit by bit
        return polynomial(scores_BL, c1)
    return Power(jnp.log(c1 + c2 * norm_sig(scores_BL)))


def by_token(scores_BL: jax.Array) -> Power:
    """GenMD4's exponents, from log-rates [..., L] (Shi et al., arXiv 2406.04329)."""
    return Power(scores_BL)


def trial_of(rows: int) -> np.ndarray:
    """The index in TRIALS of each row, int [B]: a quarter of the rows each, so that rows that lie
    a half or a quarter of the batch apart, as those of a group do, differ."""
    return np.arange(rows) * len(TRIALS) // rows


def log_weights(scores_BL: jax.Array) -> Power:
    """Scores as log-exponents, with a mean exponent of 1.

    For the time-free objective, to which only ratios matter: no bound on how sharp an order may
    be, while NormSig's ratio of 27 at most cannot express left to right.
    """
    length = scores_BL.shape[-1]
    return Power(scores_BL - jax.nn.logsumexp(scores_BL, -1, keepdims=True) + math.log(length))
