"""The negative ELBO of an order-expressive masked diffusion model, as named terms.

Written for any schedule (arXiv 2602.02112): at a masked position the rate of the bound is
A CE + A log(A / Â) - A + Â, with A the forward and Â the reverse velocity. The part in A and Â
splits exactly into the order (which position next) and the clock (when). Text has no clock, so
main + order (+ reconstruction) is a bound as well, and a tighter one; all four are reported.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.objectives.corruption import (
    corrupt_at,
    corrupt_each,
    corrupt_groups,
    corrupt_race,
    group_uniforms,
)
from lomdm_jax.objectives.leave_one_out import groups
from lomdm_jax.orders.race import invert, next_log_shares, reveal_log_probabilities, row_ranks
from lomdm_jax.orders.race import log_shares as log_shares_of
from lomdm_jax.orders.schedule import Schedule, Weights

Array = TypeVar("Array", jax.Array, np.ndarray)
FULL_RANGE = np.array([[0.0, 1.0]], np.float32)


class Tokens(Protocol):
    """What the model says of the tokens at positions [..., B, L]; see `models.readout`."""

    @property
    def logits(self) -> jax.Array:
        """float32 [..., B, L, V + mask], -inf at the mask token."""
        ...

    def costs(self, tokens_BL: jax.Array, where_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy (nats) and confidence, float32 [..., B, L], 0 where not asked for."""
        ...


class Reverse(Protocol):
    """The model: from masked sequences to their tokens and the reverse schedule."""

    def __call__(
        self,
        z_KBL: jax.Array,
        log_t_B: jax.Array | None,
        context_BL: jax.Array | None = None,
        rank_KBL: jax.Array | None = None,
    ) -> tuple[Tokens, Schedule]:
        """What is said of the tokens at [K, B, L], and the schedule with parameters [K, B, L].

        log_t_B: None where the estimate has no time.
        context_BL: the clean text, for models whose attention follows an order: each position
            sees it up to its own group or rank. None for z itself.
        rank_KBL: on the ranked layout, when each position is revealed, int32.
        """
        ...


class Terms(NamedTuple):
    """The terms of the bound, float32 [K, B], in nats per sequence."""

    main: jax.Array
    order: jax.Array
    clock: jax.Array
    reconstruction: jax.Array


class Batch(NamedTuple):
    """What is scored: rows of a global batch.

    tokens_BL: int32 token ids.
    targets_BL: bool; the positions that are generated. The others are given: never masked, visible
      throughout, and absent from every sum.
    keys_B: one PRNG key per row.
    uniform_B: float32 in [0, 1), places each row's draw in time; see `stratified_uniforms`.
    noise_range_B2: float32, or [1, 2] for all rows; where in [0, 1) `all_groups` draws the masked
      share of every group. The estimate is that of the bound with the full range only.
    padding_BL: bool; the pads, generated like tokens, but at no cost: their cross-entropies count
      zero. None for none. With pads an estimate is that of the bound less the pads' cost: the
      number that MDLM reports of LM1B, and no bound of the block, as pads also tell how long the
      text is, which a learned order may ask for first.
    """

    tokens_BL: jax.Array
    targets_BL: jax.Array
    keys_B: jax.Array
    uniform_B: jax.Array
    noise_range_B2: jax.Array | np.ndarray = FULL_RANGE
    padding_BL: jax.Array | None = None


def batch_of(arrays: Mapping[str, jax.Array], keys_B: jax.Array, uniform_B: jax.Array) -> Batch:
    """The rows of a batch of the pipeline: `tokens`, `counted` and, if it has any, `padding`, bool
    [B, L]. What is generated is what is counted and the pads."""
    counted_BL, padding_BL = arrays["counted"], arrays.get("padding")
    targets_BL = counted_BL if padding_BL is None else counted_BL | padding_BL
    return Batch(arrays["tokens"], targets_BL, keys_B, uniform_B, padding_BL=padding_BL)


def targets_of(generated_BL: Array, ignore_first: bool) -> Array:
    """These positions without position 0, if that is to be given; bool [B, L]."""
    return generated_BL & (np.arange(generated_BL.shape[-1]) >= int(ignore_first))


class Credit(NamedTuple):
    """Choices and what they cost, nats, float32 [K, G, N] for G groups of K draws of the same text:
    log-probability of each choice, and the cost from there on; what came before is no credit."""

    log_q_KGN: jax.Array
    later_KGN: jax.Array


class Estimate(NamedTuple):
    """One Monte Carlo estimate: K draws for each of B sequences.

    log_q_KB: log-probability of the draw, nats, float32.
    confidence_KBL: the largest token probability, float32.
    forward_KBL, reverse_KBL: d log m / d log t at the drawn states (the exponents of a power
      schedule), float32; of pointers, the probability that a position came when it did.
    credit: of the choices that made the draw, for a gradient with less noise; None if it has no
      steps: then the whole draw is one choice.
    """

    terms: Terms
    log_q_KB: jax.Array
    mask_KBL: jax.Array
    confidence_KBL: jax.Array
    forward_KBL: jax.Array
    reverse_KBL: jax.Array
    credit: Credit | None = None


def continuous(
    batch: Batch,
    forward: Schedule,
    reverse: Reverse,
    *,
    mask_id: int,
    samples: int,
    eps: float,
    reconstruction_share: float,
) -> Estimate:
    """The continuous-time estimate, with the end of the integral.

    t is uniform on [eps, 1]. What is still masked at eps is revealed at once, which costs its
    cross-entropy: the reconstruction term. Without it a position's cross-entropy counts with
    weight 1 - eps^e_i only, which is no bound. A share of the rows is drawn at t = eps to
    estimate it, so that it costs no extra pass; all terms are unbiased.

    Args:
      batch: rows to score.
      forward: schedule with parameters [B, L].
      reverse: the model; see `Reverse`.
      mask_id: id of the mask token.
      samples: K, masked versions of each row, which share its t.
      eps: the time at which the integral ends, in (0, 1).
      reconstruction_share: probability that a row is drawn at eps, in (0, 1).
    """
    log_t_B, weight_B, at_end_B = _times(batch.uniform_B, eps, reconstruction_share)
    corruption = corrupt_at(batch.keys_B, forward, log_t_B, batch.targets_BL, samples)
    mask_KBL = corruption.mask_KBL
    nll_KBL, confidence_KBL, backward = _evaluate(batch, reverse, mask_KBL, log_t_B, mask_id)
    log_rates = [
        jnp.broadcast_to(schedule.log_velocity(log_t_B), nll_KBL.shape)
        for schedule in (forward, backward)
    ]
    log_shares, log_sums = zip(
        *(log_shares_of(rate, mask_KBL & ~jnp.isneginf(rate)) for rate in log_rates), strict=True
    )
    active_KBL = mask_KBL & ~jnp.isneginf(log_rates[0])
    reveal = _per_reveal(nll_KBL, active_KBL, log_shares, log_sums)
    rate_KB = weight_B * jnp.where(active_KBL.any(-1), jnp.exp(log_sums[0]), 0.0)
    main, order, clock = (jnp.where(at_end_B, 0.0, rate_KB * term_KB) for term_KB in reveal)
    reconstruction = jnp.where(at_end_B, weight_B * jnp.sum(nll_KBL, axis=-1, where=mask_KBL), 0.0)
    terms = Terms(main, order, clock, reconstruction)
    ours, theirs = (jnp.exp(log_rate + log_t_B[:, None]) for log_rate in log_rates)
    return Estimate(terms, corruption.log_q_KB, mask_KBL, confidence_KBL, ours, theirs)


def time_free(
    batch: Batch,
    forward: Schedule,
    reverse: Reverse,
    *,
    mask_id: int,
    samples: int,
    temperature: float = 1.0,
    uniform_share: float = 0.0,
) -> Estimate:
    """The time-free estimate: a race instead of a clock.

    Draw the order, draw how many of the T targets are still masked uniformly from 1..T, and
    weigh by T. A state lasts 1 / S on average, S being the sum of the rates of its masked
    positions, so dividing the rates by S counts every state of a trajectory once: the same
    integral as in `continuous`, without an end to drop and with less variance. The clock term is
    exact for schedules with constant rates in log-time, and zero for those that are not learned.

    Args:
      batch: rows to score.
      forward: schedule with parameters [B, L].
      reverse: the model, called without a time; see `Reverse`.
      mask_id: id of the mask token.
      samples: K, orders drawn for each row, which share its number of masked positions.
      temperature: of both orders; log-weights are divided by it. The bound is that of the
        flattened orders.
      uniform_share: in the gradient of the network, how much of the weights w of the
        cross-entropies is replaced by equal weights over the masked positions. No value changes,
        nor any other gradient: the best prediction at a position does not depend on its weight,
        but under a sharp order a pass would teach few positions.
    """
    count_B = jnp.sum(batch.targets_BL, axis=-1)
    masked_B = jnp.minimum(jnp.floor(batch.uniform_B * count_B) + 1, count_B).astype(jnp.int32)
    weights = forward.weights().flattened(temperature)
    corruption = corrupt_race(batch.keys_B, weights, masked_B, batch.targets_BL, samples)
    mask_KBL = corruption.mask_KBL
    nll_KBL, confidence_KBL, backward = _evaluate(batch, reverse, mask_KBL, None, mask_id)
    both = [
        Weights(*(jnp.broadcast_to(a, mask_KBL.shape) for a in w.at(mask_KBL)[:2]))
        for w in (weights, backward.weights().flattened(temperature))
    ]
    log_shares, log_sums = zip(*(next_log_shares(w, mask_KBL) for w in both), strict=True)
    active_KBL = mask_KBL & ~jnp.isneginf(log_shares[0])
    main, order, clock = _per_reveal(nll_KBL, active_KBL, log_shares, log_sums)
    main += _towards_equal_weights(nll_KBL, mask_KBL, log_shares[0], uniform_share)
    main, order, clock = (count_B * term_KB for term_KB in (main, order, clock))
    terms = Terms(main, order, clock, jnp.zeros_like(main))
    ours, theirs = (jnp.exp(w.log_w) for w in both)
    return Estimate(terms, corruption.log_q_KB, mask_KBL, confidence_KBL, ours, theirs)


def all_groups(
    batch: Batch,
    forward: Schedule,
    reverse: Reverse,
    *,
    mask_id: int,
    samples: int,
) -> Estimate:
    """The time-free estimate of a fixed order with groups, all groups in one pass.

    For a model whose attention follows the order, so that a group sees the clean text of the
    groups before it: BD3-LM's estimate, with the number of masks per block instead of a time.
    With one position per group it is the exact negative log-likelihood, without any noise.

    Args:
      batch: rows to score.
      forward: schedule with parameters [B, L]; only its groups matter.
      reverse: the model; called with the clean text as context.
      mask_id: id of the mask token.
      samples: K, masked versions of each row.
    """
    cost_KBL, mask_KBL, confidence_KBL = group_costs(
        batch, forward.weights().group, reverse, mask_id=mask_id, samples=samples
    )
    main = jnp.sum(cost_KBL, axis=-1)
    return _without_order(main, jnp.zeros_like(main), mask_KBL, confidence_KBL)


def all_ranks(
    batch: Batch,
    forward: Schedule,
    reverse: Reverse,
    *,
    mask_id: int,
    samples: int,
    order_share: float = 1.0,
    blank_share: float = 0.0,
) -> Estimate:
    """The bound of the ranked layout: one pass scores all reveals of a whole order, one per row.

    The model is autoregressive over (position, token) pairs, p(x, order). With orders from q, the
    forward schedule given x,  -log p(x) <= E_q [sum CE + log q(order | x) - log p(order | x)],
    where log p(order | x) sums over the prior's choices of position. A schedule without `moves` is
    the same for both, so its order costs nothing.

    Args:
      batch: rows to score, of which some come in groups of the same text.
      forward: schedule with parameters [B, L].
      reverse: the model; called with the clean text as context, and with ranks.
      mask_id: id of the mask token.
      samples, order_share: size of a group, and share of the rows that come in groups; see
        `leave_one_out.leaders`. What q is learned from; a fixed order has no groups.
      blank_share: share of the rows in which a random span is revealed last, so that the network
        also learns to fill a blank from what surrounds it; groups have none. Those rows teach the
        network only, and the estimate is that of the bound with 0 only.
    """
    rows, weights = len(batch.keys_B), forward.weights()
    count = groups(rows, samples, order_share) if weights.stepwise else 0
    grouped_B = np.arange(rows) % max(rows // samples, 1) < count
    blank_B = (batch.uniform_B < blank_share) & ~grouped_B
    # What is given comes first, in the order's own way, and counts nothing.
    weights = weights.after(_outside_blanks(batch, blank_B)) if blank_share else weights
    weights = weights.after(~batch.targets_BL)
    everyone_BL = jnp.ones_like(batch.targets_BL)
    rank_BL = row_ranks(batch.keys_B, jax.lax.stop_gradient(weights), everyone_BL)
    z_BL = jnp.full_like(batch.tokens_BL, mask_id)
    tokens, backward = reverse(z_BL[None], None, batch.tokens_BL, rank_BL[None])
    nll_BL, confidence_BL = (a[0] for a in _costs(batch, tokens, batch.targets_BL[None]))
    main = jnp.sum(nll_BL, axis=-1)[None]
    nothing, drawn = jnp.zeros_like(main), (batch.targets_BL[None], confidence_BL[None])
    if weights.moves is None:
        return _without_order(main, nothing, *drawn)
    prior = jax.tree.map(lambda a: a[0], backward.weights())._replace(group=weights.group)
    order_BL = invert(rank_BL)
    counts_BL = jnp.take_along_axis(batch.targets_BL, order_BL, -1) & ~blank_B[:, None]
    log_q_BL, log_p_BL = (
        jnp.where(counts_BL, reveal_log_probabilities(w, rank_BL, everyone_BL), 0.0)
        for w in (weights, prior)
    )
    # The mean of a score is zero: only `credit` carries the gradient of q, without that noise.
    excess_BL = jax.lax.stop_gradient(log_q_BL) - log_p_BL
    cost_BL = jnp.take_along_axis(nll_BL, order_BL, axis=-1) + excess_BL
    terms = Terms(main, jnp.sum(excess_BL, axis=-1)[None], nothing, nothing)
    q, p = (jnp.exp(jnp.take_along_axis(a, rank_BL, -1))[None] for a in (log_q_BL, log_p_BL))
    credit = _credit(log_q_BL, cost_BL, samples, count)
    return Estimate(terms, jnp.sum(log_q_BL, -1)[None], *drawn, q, p, credit)


def _credit(log_q_BL: jax.Array, cost_BL: jax.Array, samples: int, count: int) -> Credit:
    """Of the reveals, in their order, of the rows in the first `count` groups of `samples`."""
    later_BL = jnp.flip(jnp.cumsum(jnp.flip(cost_BL, -1), -1), -1)
    both = (a.reshape(samples, -1, a.shape[-1])[:, :count] for a in (log_q_BL, later_BL))
    return Credit(*both)


def _outside_blanks(batch: Batch, blank_B: jax.Array) -> jax.Array:
    """All but a random span in the rows that have a blank, bool [B, L]."""
    length = batch.tokens_BL.shape[-1]
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch.keys_B, 1)
    ends_B2 = jax.vmap(lambda key: jnp.sort(jax.random.randint(key, (2,), 0, length + 1)))(keys_B)
    where, (start_B1, end_B1) = jnp.arange(length), jnp.split(ends_B2, 2, axis=-1)
    return ~(blank_B[:, None] & (where >= start_B1) & (where < end_B1))


def group_costs(
    batch: Batch, group_BL: jax.Array, reverse: Reverse, *, mask_id: int, samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every position adds to the estimate of `all_groups`, in nats, and its draw.

    The masked share of a group is drawn from the row's noise range, as in BD3-LM's clipped
    schedules (arXiv 2503.09573; training.resample = True in kuleshov-group/bd3lms), and like
    there the weights stay those of the full range. BD3-LM sets all weights to 1 once the range
    starts above 0.5; this is not followed, because it rescales the loss of some ranges only, and
    the search for the range of the least variance would then compare scales.

    Args: as of `all_groups`; group_BL: int32.

    Returns:
      cost_KBL, float32, 0 where nothing is masked; mask_KBL, bool; confidence_KBL, float32.
    """
    low_B1, high_B1 = jnp.split(jnp.asarray(batch.noise_range_B2), 2, axis=1)
    uniform_BL = low_B1 + (high_B1 - low_B1) * group_uniforms(batch.uniform_B, group_BL)
    mask_KBL, weight_KBL = corrupt_groups(
        batch.keys_B, group_BL, uniform_BL, batch.targets_BL, samples
    )
    nll_KBL, confidence_KBL, _ = _evaluate(batch, reverse, mask_KBL, None, mask_id, batch.tokens_BL)
    return jnp.where(mask_KBL, weight_KBL * nll_KBL, 0.0), mask_KBL, confidence_KBL


def continuous_groups(
    batch: Batch,
    forward: Schedule,
    reverse: Reverse,
    *,
    mask_id: int,
    samples: int,
    eps: float,
    reconstruction_share: float,
) -> Estimate:
    """The continuous-time estimate of a fixed order with groups, all groups in one pass.

    As BD3-LM trains (arXiv 2503.09573, diffusion.py in kuleshov-group/bd3lms): every group has a
    t of its own, its targets are masked independently with probability t, and weigh 1 / t. Unlike
    there, what is left at eps is kept: a share of the (row, group) pairs stands at the end and
    estimates the reconstruction term, so that each group has the bound of `continuous`.

    Args: as of `continuous`; `reverse` is called with the clean text as context, without a time.
    """
    uniform_BL = group_uniforms(batch.uniform_B, forward.weights().group)
    log_t_BL, weight_BL, at_end_BL = _times(uniform_BL, eps, reconstruction_share)
    mask_KBL = corrupt_each(batch.keys_B, log_t_BL, batch.targets_BL, samples)
    nll_KBL, confidence_KBL, _ = _evaluate(batch, reverse, mask_KBL, None, mask_id, batch.tokens_BL)
    rate_BL = weight_BL * jnp.where(at_end_BL, 1.0, jnp.exp(-log_t_BL))
    main, reconstruction = (
        jnp.sum(rate_BL * nll_KBL, axis=-1, where=mask_KBL & pairs_BL)
        for pairs_BL in (~at_end_BL, at_end_BL)
    )
    return _without_order(main, reconstruction, mask_KBL, confidence_KBL)


def _without_order(
    main: jax.Array, reconstruction: jax.Array, mask_KBL: jax.Array, confidence_KBL: jax.Array
) -> Estimate:
    """The estimate of a fixed order: nothing is learned of the order, and all rates are equal."""
    nothing, equal = jnp.zeros_like(main), jnp.ones_like(confidence_KBL)
    terms = Terms(main, nothing, nothing, reconstruction)
    return Estimate(terms, nothing, mask_KBL, confidence_KBL, equal, equal)


def _times(uniform: jax.Array, eps: float, share: float) -> tuple[jax.Array, ...]:
    """log t, the importance weight, and whether the draw stands at the end, t = eps; any shape."""
    at_end = uniform < share
    t = eps + (1 - eps) * jnp.maximum((uniform - share) / (1 - share), 0.0)
    log_t = jnp.log(jnp.where(at_end, eps, t))
    return log_t, jnp.where(at_end, 1 / share, (1 - eps) / (1 - share)), at_end


def _evaluate(
    batch: Batch,
    reverse: Reverse,
    mask_KBL: jax.Array,
    log_t_B: jax.Array | None,
    mask_id: int,
    context_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Schedule]:
    """Cross-entropy and confidence [K, B, L] of what is masked, and the reverse schedule."""
    z_KBL = jnp.where(mask_KBL, mask_id, batch.tokens_BL)
    tokens, backward = reverse(z_KBL, log_t_B, context_BL)
    return *_costs(batch, tokens, mask_KBL), backward


def _costs(batch: Batch, tokens: Tokens, where_KBL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and confidence of the batch's tokens, where pads cost nothing; [K, B, L]."""
    tokens_KBL = jnp.broadcast_to(batch.tokens_BL, where_KBL.shape)
    nll_BL, confidence_BL = tokens.costs(tokens_KBL, where_KBL)
    if batch.padding_BL is not None:
        nll_BL = jnp.where(batch.padding_BL, 0.0, nll_BL)
    return nll_BL, confidence_BL


def _per_reveal(
    nll_KBL: jax.Array,
    active_KBL: jax.Array,
    log_shares: Sequence[jax.Array],
    log_sums: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Main, order and clock of the next reveal, float32 [K, B]: the rates over their sum S.

    With w = A / S: main = sum w CE, order = sum w log(w / ŵ), clock = log(S/Ŝ) - 1 + Ŝ/S, the
    two latter >= 0. Positions that cannot come next count nothing.
    """
    shares_KBL = jnp.exp(log_shares[0])
    excess_KBL = jnp.where(active_KBL, log_shares[0] - log_shares[1], 0.0)
    log_ratio_KB = log_sums[0] - log_sums[1]
    main_KB = jnp.sum(shares_KBL * nll_KBL, axis=-1, where=active_KBL)
    order_KB = jnp.sum(shares_KBL * excess_KBL, axis=-1, where=active_KBL)
    return main_KB, order_KB, jnp.expm1(-log_ratio_KB) + log_ratio_KB


def _towards_equal_weights(
    nll_KBL: jax.Array, mask_KBL: jax.Array, log_shares_KBL: jax.Array, share: float
) -> jax.Array:
    """Zero, with the gradient that moves `share` of the weights to equal ones, float32 [K, B]."""
    equal_KBL = mask_KBL / jnp.maximum(jnp.sum(mask_KBL, axis=-1, keepdims=True), 1)
    change_KBL = jnp.where(mask_KBL, equal_KBL - jnp.exp(log_shares_KBL), 0.0)
    moved_KB = share * jnp.sum(jax.lax.stop_gradient(change_KBL) * nll_KBL, axis=-1)
    return moved_KB - jax.lax.stop_gradient(moved_KB)
