"""Orders that are given, not learned."""

import jax
import jax.numpy as jnp

from lomdm_jax.errors import UserError
from lomdm_jax.orders.schedule import Power


def polynomial(scores_BL: jax.Array, exponent: float) -> Power:
    """m(t) = t^exponent at every position; exponent 1 is the linear schedule of MDLM.

    The order is uniformly random for every exponent. `scores_BL` gives only the shape.
    """
    if exponent <= 0:
        raise UserError(
            f"order.exponent is {exponent}, but m(t) = t^exponent is a schedule only for a "
            "positive exponent: use 1.0 for the linear schedule."
        )
    return Power(jnp.full(scores_BL.shape, exponent, jnp.float32))
