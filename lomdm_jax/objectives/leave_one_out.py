"""The score-function gradient with a leave-one-out baseline (Kool et al., 2019)."""

import jax
import jax.numpy as jnp
import numpy as np


def surrogate(log_q_KBN: jax.Array, loss_KBN: jax.Array) -> jax.Array:
    """A term [B] whose gradient is that of the sampling; with K = 2 and one choice it is
    0.5 * (log q_1 - log q_2) * stop_gradient(l_1 - l_2) (arXiv 2602.02112).

    Args:
      log_q_KBN: log-probability of each of N choices in each of K >= 2 draws for the same example,
        float32, nats. With K = 1 there is no baseline and the term is zero.
      loss_KBN: what followed a choice, float32, nats. The other draws' is its baseline, of which
        only this matters: it does not depend on the choice.
    """
    count = loss_KBN.shape[0]
    if count == 1:
        return jnp.zeros_like(loss_KBN[0, :, 0])
    others_KBN = (jnp.sum(loss_KBN, axis=0) - loss_KBN) / (count - 1)
    credit_KBN = jax.lax.stop_gradient(loss_KBN - others_KBN)
    return jnp.mean(jnp.sum(log_q_KBN * credit_KBN, axis=-1), axis=0)


def groups(rows: int, size: int, share: float) -> int:
    """How many groups of `size` rows there are if `share` of the rows come in groups.

    The members of group g are the rows g, g + rows / size, and so on: `size` has to divide `rows`.
    """
    return int(share * rows / size)


def leaders(rows: int, size: int, share: float, parts: int = 1) -> np.ndarray:
    """The row whose text each row takes, int [rows]: in groups that of the first, else its own.

    Draws of the same text make the best baseline, but teach the network less than other text
    would. So some rows come in groups, and the order is learned from those.

    parts: of the batch, where part p has the rows p, p + parts, ...; a group stays in its part.
    """
    place, row = np.arange(rows) % (rows // size), np.arange(rows)
    return np.where(place < parts * groups(rows // parts, size, share), place, row)
