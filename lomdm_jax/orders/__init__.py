"""Generation orders, by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.errors import UserError
from lomdm_jax.orders import fixed, learned
from lomdm_jax.orders.schedule import Schedule


class Order(NamedTuple):
    """An order as the rest of the library sees it.

    scores: what the schedule is learned from: "position" (the order heads), "token" (a rate per
      vocabulary entry), "pointer" (which position follows which, on the ranked layout) or "none"
      for a fixed order.
    walks: whether a table over the neighbours joins the scores; see `schedule.Walk`.
    schedule: from scores [..., L] (zeros where the order is fixed) to a schedule.
    groups: from the length to the group of each position, int [L], 0 revealed first; None for
      orders that have none. Attention can follow an order that has them.
    """

    scores: str
    schedule: Callable[[jax.Array], Schedule]
    groups: Callable[[int], np.ndarray] | None = None
    walks: bool = False

    @property
    def learned(self) -> bool:
        """Whether there is an order to learn."""
        return self.scores != "none"

    def one_pass(self, layout: str) -> str:
        """What a pass of the network scores: one "state", all "groups", or a whole "order".

        layout: "own", or "ranked" for that in which any order can be given as ranks.
        """
        if layout == "ranked" or self.scores == "pointer":
            return "order"
        return "state" if self.groups is None else "groups"

    def masked_share(self, length: int, one_pass: str) -> float:
        """How many of the positions are masked, and scored, in a pass over a training batch: the
        mean where the number of masked positions is uniform, of all or of each group."""
        if one_pass == "order":
            return 1.0
        single = np.zeros(length, int)
        groups = single if self.groups is None or one_pass == "state" else self.groups(length)
        return float(np.sum(np.unique(groups, return_counts=True)[1] + 1) / (2 * length))

    def check(self, length: int) -> None:
        """Raise the UserError of bad settings for sequences of `length` tokens, before tracing."""
        jax.eval_shape(self.schedule, jax.ShapeDtypeStruct((1, length), jnp.float32))


NAMES = (
    "mdm",
    "cosine",
    "ar",
    "r2l",
    "block:<size>",
    "permutation:<seed>",
    "genmd4",
    "lomdm",
    "walk",
    "lomdm-order",
    "lomdm-ranked",
)


def make_order(name: str, *, c1: float, c2: float, exponent: float) -> Order:
    """The order called `name`, one of NAMES.

    "mdm" and "cosine" reveal at random, "ar" left to right, "r2l" right to left, "block:<size>"
    blocks of that many tokens, "permutation:<seed>" in one fixed order. "walk" grows from what is
    revealed, in the direction that its training text favours. Four are learned by gradients:
    "genmd4" from a rate per vocabulary entry, "lomdm" from the context, and "lomdm-order" from the
    context on top of a walk, with log-weights, for the time-free objective; "lomdm-ranked" from
    what was revealed last, on top of a walk, on the ranked layout.

    Args:
      name: see above.
      c1, c2: of "lomdm"; see `learned.lomdm`.
      exponent: of "mdm"; 1 is linear.

    Raises:
      UserError: for an unknown name.
    """
    kind, _, number = name.partition(":")
    if kind == "block" and number.isdigit():
        return _in_groups(functools.partial(fixed.blocks, size=int(number)))
    if kind == "permutation" and number.isdigit():
        return _in_groups(functools.partial(fixed.permutation, seed=int(number)))
    plain = {
        "mdm": Order("none", functools.partial(fixed.polynomial, exponent=exponent)),
        "cosine": Order("none", fixed.cosine),
        "ar": _in_groups(fixed.left_to_right),
        "r2l": _in_groups(fixed.right_to_left),
        "genmd4": Order("token", learned.by_token),
        "lomdm": Order("position", functools.partial(learned.lomdm, c1=c1, c2=c2)),
        "walk": Order("none", learned.log_weights, walks=True),
        "lomdm-order": Order("position", learned.log_weights, walks=True),
        "lomdm-ranked": Order("pointer", learned.log_weights, walks=True),
    }
    if name not in plain:
        raise UserError(f"order.name is {name!r}, which is no order: use {', '.join(NAMES)}.")
    return plain[name]


def _in_groups(groups: Callable[[int], np.ndarray]) -> Order:
    return Order("none", functools.partial(fixed.windows, groups=groups), groups)
