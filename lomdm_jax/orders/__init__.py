"""Generation orders, by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.errors import UserError
from lomdm_jax.orders import fixed, learned
from lomdm_jax.orders.schedule import Power


class Order(NamedTuple):
    """An order as the rest of the library sees it.

    learned: whether the schedule depends on the scores of the order heads.
    schedule: from scores [..., L] (zeros where the order is fixed) to a schedule.
    """

    learned: bool
    schedule: Callable[[jax.Array], Power]

    def check(self) -> None:
        """Raise the UserError of bad settings now, before anything is traced."""
        jax.eval_shape(self.schedule, jax.ShapeDtypeStruct((1, 1), jnp.float32))


NAMES = ("mdm", "lomdm")


def make_order(name: str, *, c1: float, c2: float, exponent: float) -> Order:
    """The order called `name`: "mdm" (every exponent equal) or "lomdm" (learned exponents).

    Raises:
      UserError: for an unknown name.
    """
    if name == "mdm":
        return Order(False, functools.partial(fixed.polynomial, exponent=exponent))
    if name == "lomdm":
        return Order(True, functools.partial(learned.lomdm, c1=c1, c2=c2))
    raise UserError(f"order.name is {name!r}, which is no order: use one of {', '.join(NAMES)}.")
