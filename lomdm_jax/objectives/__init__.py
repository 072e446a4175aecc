"""What is minimised, by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.errors import UserError
from lomdm_jax.objectives import nelbo
from lomdm_jax.objectives.leave_one_out import surrogate
from lomdm_jax.objectives.nelbo import Batch, Credit, Estimate, Reverse
from lomdm_jax.orders.schedule import Schedule

NAMES = ("continuous", "order")


class Objective(NamedTuple):
    """An estimator of the bound and the names of the terms that training minimises."""

    estimate: Callable[[Batch, Schedule, Reverse], Estimate]
    terms: tuple[str, ...]


def make_objective(
    name: str,
    *,
    mask_id: int,
    samples: int,
    eps: float,
    reconstruction_share: float,
    temperature: float = 1.0,
    uniform_share: float = 0.0,
    order_share: float = 1.0,
    blank_share: float = 0.0,
    one_pass: str = "state",
) -> Objective:
    """The objective called `name`.

    "continuous" is the paper's bound with its reconstruction term; "order" is the time-free
    bound, which leaves the clock out. `eps` and `reconstruction_share` matter to the first only,
    `temperature` and `uniform_share` to the second; see `nelbo`.
    `one_pass` says what a pass of the model scores: one "state"; all "groups" of an order that
    attention follows; or a whole "order" on the ranked layout, which has no time: there both names
    mean `nelbo.all_ranks`, and `order_share` and `blank_share` matter.

    Raises:
      UserError: for an unknown name.
    """
    if one_pass == "order" and name in NAMES:
        estimate = functools.partial(
            nelbo.all_ranks,
            mask_id=mask_id,
            samples=samples,
            order_share=order_share,
            blank_share=blank_share,
        )
        return Objective(estimate, ("main", "order"))
    if name == "continuous":
        estimate = functools.partial(
            nelbo.continuous_groups if one_pass == "groups" else nelbo.continuous,
            mask_id=mask_id,
            samples=samples,
            eps=eps,
            reconstruction_share=reconstruction_share,
        )
        return Objective(estimate, ("main", "order", "clock", "reconstruction"))
    if name == "order":
        estimate = functools.partial(
            nelbo.time_free,
            mask_id=mask_id,
            samples=samples,
            temperature=temperature,
            uniform_share=uniform_share,
        )
        if one_pass == "groups":
            estimate = functools.partial(nelbo.all_groups, mask_id=mask_id, samples=samples)
        return Objective(estimate, ("main", "order"))
    raise UserError(f"The objective {name!r} is not known: use one of {', '.join(NAMES)}.")


def loss(
    objective: Objective, batch: Batch, forward: Schedule, reverse: Reverse
) -> tuple[jax.Array, Estimate]:
    """Training loss per sequence, float32 [B], and the estimate it was made from.

    The loss has the gradient of the bound for every parameter. Its value is that of the bound
    plus the score-function surrogate, so report the estimate's terms instead.
    """
    estimate = objective.estimate(batch, forward, reverse)
    total_KB = jnp.sum(jnp.stack([getattr(estimate.terms, name) for name in objective.terms]), 0)
    credit = estimate.credit or Credit(estimate.log_q_KB[..., None], total_KB[..., None])
    extra_G, total_B = surrogate(*credit), jnp.mean(total_KB, axis=0)
    if estimate.credit is None:
        return total_B + extra_G, estimate
    total_KG = total_B.reshape(len(credit.log_q_KGN), -1)  # a row of each group in each
    return total_KG.at[:, : len(extra_G)].add(extra_G).reshape(-1), estimate
