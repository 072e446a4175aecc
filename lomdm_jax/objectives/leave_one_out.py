"""The score-function gradient with a leave-one-out baseline (Kool et al., 2019)."""

import jax
import jax.numpy as jnp


def surrogate(log_q_KB: jax.Array, loss_KB: jax.Array) -> jax.Array:
    """A term [B] whose gradient is that of the sampling; with K = 2 it is
    0.5 * (log q_1 - log q_2) * stop_gradient(l_1 - l_2) (arXiv 2602.02112).

    Args:
      log_q_KB: log-probability of each of K >= 2 draws for the same example, float32, nats.
        With K = 1 there is no baseline and the term is zero.
      loss_KB: the loss of each draw, float32, nats.
    """
    count = loss_KB.shape[0]
    if count == 1:
        return jnp.zeros_like(loss_KB[0])
    others_KB = (jnp.sum(loss_KB, axis=0) - loss_KB) / (count - 1)
    return jnp.mean(log_q_KB * jax.lax.stop_gradient(loss_KB - others_KB), axis=0)
