"""Whole trajectories: an order of a text from its first reveal to its last, and what each cost.

With the order drawn from q, which knows the text, the sum of nll + log q - log p over the targets
has the bound of main + order as its mean, and exp of minus that sum has p(text) as its mean. So
the mean over trajectories is the bound, and the log of the mean of the weights a tighter one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.generator import Generator, apart
from lomdm_jax.models.readout import Logits
from lomdm_jax.objectives.nelbo import Batch, Tokens, batch_of
from lomdm_jax.orders.race import group_places, invert, next_log_shares, row_ranks
from lomdm_jax.orders.schedule import Weights
from lomdm_jax.sampling.tokens import entropy


class Trajectory(NamedTuple):
    """One reveal order of each row in full, [B, L] by position; what is no target holds 0.

    rank_BL: int32, 0 is revealed first; what is given comes before all targets.
    targets_BL: bool, the positions that are generated, pads that cost nothing included.
    log_q_BL: float32, nats; log-probability that the position came when it did by the forward
      order, which knows the text.
    log_p_BL: the same by the model's own, the reverse order.
    nll_BL: nats; -log probability of the token when it was revealed.
    entropy_BL: nats, of the token's distribution there.
    confidence_BL: the largest token probability there.
    order_entropy_BL: nats, of the model's choice of a position that this one came out of.
    clock_BL: nats, of the time until this reveal, which the paper's bound has and `nelbo_order`
      leaves out; 0 where an order has no clock.
    """

    rank_BL: Any
    targets_BL: Any
    log_q_BL: Any
    log_p_BL: Any
    nll_BL: Any
    entropy_BL: Any
    confidence_BL: Any
    order_entropy_BL: Any
    clock_BL: Any

    @property
    def cost_BL(self) -> Any:
        """Nats that each position adds to the bound; minus the sum is the log of the weight."""
        return self.nll_BL + self.log_q_BL - self.log_p_BL


# What states say of each position, by the fields of `Trajectory`.
Facts = dict[str, jax.Array]
Maker = Callable[[Any, dict[str, jax.Array], jax.Array, jax.Array], Trajectory]


def make_trajectories(generator: Generator) -> Maker:
    """(params, batch, index [B], key) -> Trajectory, to be jitted; as `likelihood.make_scorer`.

    Draws depend on (key, index) only. A pass of the network that scores a "state" is made for
    every reveal, see `calls`; one that scores all "groups" for every reveal inside the largest;
    one that scores an "order" once. The network is not told a time.

    A batch may hold `absent`, bool [B, L]: pads that only fill up a row, in a segment of their
    own. They are no targets, and no order goes on from them.
    """
    make = {"state": _by_state, "groups": _by_group, "order": _by_order}[generator.one_pass]

    def draw(
        params: Any, batch: dict[str, jax.Array], index_B: jax.Array, key: jax.Array
    ) -> Trajectory:
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
        rows = batch_of(batch, keys_B, jnp.zeros(len(keys_B)))
        absent_BL = batch.get("absent", jnp.zeros_like(rows.targets_BL))
        model = apart(generator, batch.get("segments"))
        rank_BL, facts = make(model, params, rows, absent_BL)
        return Trajectory(rank_BL, rows.targets_BL, **_where(rows.targets_BL, facts, 0.0))

    return draw


def calls(generator: Generator, length: int, targets: int) -> int:
    """How often the network runs for a trajectory of `length` positions, `targets` of them to be
    generated; at most."""
    if generator.one_pass == "order":
        return 1
    groups = generator.order.groups if generator.one_pass == "groups" else None
    return targets if groups is None else min(targets, int(np.bincount(groups(length)).max()))


def importance_bound(log_w_KB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-log of the mean weight of K trajectories of each row (arXiv 1509.00519), and its error.

    Its mean is an upper bound on -log p(row), which falls with K and tends to it.

    Args:
      log_w_KB: log-weights, nats: minus the sum of `Trajectory.cost_BL`.

    Returns:
      nats, float64 [B]; and the standard error of its draws to first order, float64 [B], nan for
      one trajectory.
    """
    log_w_KB = np.asarray(log_w_KB, np.float64)
    count, top_B = len(log_w_KB), log_w_KB.max(axis=0)
    w_KB = np.exp(log_w_KB - top_B)
    mean_B = w_KB.mean(axis=0)
    spread_B = w_KB.std(axis=0, ddof=1) if count > 1 else np.full_like(mean_B, np.nan)
    return -(top_B + np.log(mean_B)), spread_B / mean_B / np.sqrt(count)


def _by_state(
    model: Any, params: Any, rows: Batch, absent_BL: jax.Array
) -> tuple[jax.Array, Facts]:
    """One pass per reveal: the network sees every state by itself."""
    forward, reverse = model.forward(params, rows.tokens_BL).weights(), model.reverse(params)
    rank_BL = row_ranks(rows.keys_B, forward, rows.targets_BL)

    def look(mask_BL: jax.Array) -> Facts:
        z_BL = jnp.where(mask_BL, model.mask_id, rows.tokens_BL)
        tokens, backward = reverse(z_BL[None], None)
        log_q_BL, log_sum_B = next_log_shares(forward, mask_BL)
        log_p_1BL, log_sum_1B = next_log_shares(backward.weights(), mask_BL[None])
        log_ratio_B = log_sum_B - log_sum_1B[0]
        facts = _of_tokens(rows, tokens)
        facts |= {"log_q_BL": log_q_BL, "log_p_BL": log_p_1BL[0]}
        of_rows = {
            "order_entropy_BL": entropy(log_p_1BL[0]),
            "clock_BL": jnp.expm1(-log_ratio_B) + log_ratio_B,
        }
        shape = mask_BL.shape
        return facts | {name: jnp.broadcast_to(a[:, None], shape) for name, a in of_rows.items()}

    return rank_BL, _through(rank_BL, rows.targets_BL, look)


def _by_group(
    model: Any, params: Any, rows: Batch, absent_BL: jax.Array
) -> tuple[jax.Array, Facts]:
    """One pass per reveal inside the largest group, all groups at once beside the clean text."""
    forward, reverse = model.forward(params, rows.tokens_BL).weights(), model.reverse(params)
    targets_BL = rows.targets_BL
    place_BL, size_BL = jax.vmap(group_places)(rows.keys_B, forward.group, targets_BL)
    place_BL = jnp.where(targets_BL, place_BL, 0)
    group_BL = jnp.where(targets_BL, forward.group, -1)
    rank_BL = invert(jnp.lexsort((place_BL, group_BL), axis=-1))

    def look(mask_BL: jax.Array) -> Facts:
        z_BL = jnp.where(mask_BL, model.mask_id, rows.tokens_BL)
        return _of_tokens(rows, reverse(z_BL[None], None, rows.tokens_BL)[0])

    left_BL = jnp.log(jnp.maximum(size_BL - place_BL, 1).astype(jnp.float32))
    choice = {"log_q_BL": -left_BL, "log_p_BL": -left_BL, "order_entropy_BL": left_BL}
    clock = {"clock_BL": jnp.zeros_like(left_BL)}
    return rank_BL, _through(place_BL, targets_BL, look) | choice | clock


def _by_order(
    model: Any, params: Any, rows: Batch, absent_BL: jax.Array
) -> tuple[jax.Array, Facts]:
    """One pass for all, on the ranked layout; see `nelbo.all_ranks`.

    The order of what is given does not know the targets, unlike there: then the text is scored
    under a distribution that sums to one over all that could stand in its place.
    """
    weights = model.forward(params, rows.tokens_BL).weights()
    rank_BL = _ranks(model, params, rows, weights, absent_BL)
    z_BL = jnp.full_like(rows.tokens_BL, model.mask_id)
    tokens, backward = model.reverse(params)(z_BL[None], None, rows.tokens_BL, rank_BL[None])
    prior = weights  # without moves a schedule is the same for both
    if weights.moves is not None:
        prior = jax.tree.map(lambda a: a[0], backward.weights())
    log_q_BL, _ = _choices(weights, rank_BL, absent_BL)
    log_p_BL, choice_BL = _choices(prior, rank_BL, absent_BL)
    facts = _of_tokens(rows, tokens)
    facts |= {"log_q_BL": log_q_BL, "log_p_BL": log_p_BL, "order_entropy_BL": choice_BL}
    return rank_BL, facts | {"clock_BL": jnp.zeros_like(log_q_BL)}


def _ranks(
    model: Any, params: Any, rows: Batch, weights: Weights, absent_BL: jax.Array
) -> jax.Array:
    """What is absent, what is given, then the targets, the two latter in the order's own way."""
    keys_B2 = jax.vmap(jax.random.split)(rows.keys_B)
    nowhere_B = jnp.full(len(keys_B2), -1, jnp.int32)
    blind_BL = jnp.where(rows.targets_BL, model.mask_id, rows.tokens_BL)
    given = model.forward(params, blind_BL).weights().after(~rows.targets_BL)
    given_BL = row_ranks(keys_B2[:, 0], given, ~absent_BL, None, nowhere_B)
    before_B1 = jnp.sum(~rows.targets_BL, axis=-1, keepdims=True)
    is_last_BL = (given_BL == before_B1 - 1) & ~absent_BL
    last_B = jnp.where(is_last_BL.any(-1), jnp.argmax(is_last_BL, axis=-1), -1)
    rank_BL = row_ranks(keys_B2[:, 1], weights, rows.targets_BL, None, last_B.astype(jnp.int32))
    return jnp.where(rows.targets_BL, rank_BL, given_BL)


def _choices(
    weights: Weights, rank_BL: jax.Array, absent_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log-probability of each reveal given those before it, and the entropy of the choice that it
    came out of, both nats, float32 [B, L] by position."""
    order_BL = invert(rank_BL)
    moved_BL = jnp.where(jnp.take_along_axis(absent_BL, order_BL, axis=-1), -1, order_BL)
    last_BL = jnp.pad(moved_BL, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    def choose(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        share_BL, _ = next_log_shares(weights, rank_BL >= step, last_BL[:, step])
        made_B = jnp.take_along_axis(share_BL, order_BL[:, step, None], axis=-1)[:, 0]
        return made_B, entropy(share_BL)

    each = jax.lax.map(choose, jnp.arange(rank_BL.shape[-1]))
    log_p_BL, entropy_BL = (jnp.take_along_axis(a_LB.T, rank_BL, axis=-1) for a_LB in each)
    return log_p_BL, entropy_BL


def _of_tokens(rows: Batch, tokens: Tokens) -> Facts:
    """What a pass over one draw says of the tokens; pads cost nothing."""
    known = Logits(tokens.logits[0])  # which the entropy needs as well: so they are computed once
    nll_BL, confidence_BL = known.costs(rows.tokens_BL, jnp.ones_like(rows.tokens_BL, bool))
    if rows.padding_BL is not None:
        nll_BL = jnp.where(rows.padding_BL, 0.0, nll_BL)
    entropy_BL = entropy(jax.nn.log_softmax(known.logits))
    return {"nll_BL": nll_BL, "entropy_BL": entropy_BL, "confidence_BL": confidence_BL}


def _through(
    step_BL: jax.Array, targets_BL: jax.Array, look: Callable[[jax.Array], Facts]
) -> Facts:
    """Of each target what `look` says in the state in which all targets of lower steps are
    revealed, and no others."""
    steps_BL = jnp.where(targets_BL, step_BL, step_BL.shape[-1])
    first, end = jnp.min(steps_BL), jnp.max(jnp.where(targets_BL, step_BL + 1, 0))

    def reveal(step: jax.Array, facts: Facts) -> Facts:
        return _where(steps_BL == step, look(targets_BL & (steps_BL >= step)), facts)

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(look, targets_BL))
    return jax.lax.fori_loop(first, end, reveal, nothing)


def _where(where_BL: jax.Array, ours: Facts, theirs: Any) -> Facts:
    theirs = theirs if isinstance(theirs, dict) else dict.fromkeys(ours, theirs)
    return {name: jnp.where(where_BL, a, theirs[name]) for name, a in ours.items()}
