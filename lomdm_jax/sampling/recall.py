"""Sampling on the ranked layout: what is revealed is read once and remembered, in any order."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lomdm_jax.objectives.nelbo import remove_mask
from lomdm_jax.orders.race import invert, row_ranks
from lomdm_jax.orders.schedule import Weights
from lomdm_jax.sampling.driver import Samples, draw_tokens


class Recaller(Protocol):
    """The model as this sampler calls it. A memory is a pytree of arrays; slots are ranks."""

    def start(self, rows: int) -> tuple[Any, Weights]:
        """An empty memory, and the weights before anything is read."""
        ...

    def read(
        self, memory: Any, tokens_BQ: jax.Array, positions_BQ: jax.Array, slots_BQ: jax.Array
    ) -> tuple[jax.Array | None, Any]:
        """Moves from each of these tokens, see `Weights`, and the memory with them in their slots;
        a slot beyond the end is not written."""
        ...

    def ask(self, memory: Any, positions_BQ: jax.Array, slots_BQ: jax.Array) -> jax.Array:
        """Logits [B, Q, V] of positions, each as if it alone came next, at its slot."""
        ...


class _Carry(NamedTuple):
    tokens_BL: jax.Array
    rank_BL: jax.Array  # L where masked
    revealed_BL: jax.Array
    weights: Weights
    memory: Any
    call: jax.Array


def generate(
    key: jax.Array,
    model: Recaller,
    tokens_BL: jax.Array,
    given_rank_BL: jax.Array,
    *,
    mask_id: int,
    reveal: int = 1,
    dependence: float = jnp.inf,
) -> Samples:
    """Fill every position that is not given, with the cost of autoregression.

    A call asks for the next `reveal` positions of the order and reads what was drawn for them.
    With one it is exact. With more, their tokens are drawn independently, and their order without
    reading what came just before. Each row draws from keys of its own.

    Args:
      key: one PRNG key.
      model: see `Recaller`.
      tokens_BL: ids of the given positions (prompt, infill), int32; others are ignored.
      given_rank_BL: int32; the n given positions of a row have ranks 0 to n - 1, the order in
        which they are read, and all others rank L.
      mask_id: id of the mask token.
      reveal: positions per call at most.
      dependence: a call reveals only as many of its positions, one at least, as keep the sum of
        their entropies without the largest within this many nats. That sum bounds what drawing
        them independently loses, their total correlation.
    """
    rows, length = tokens_BL.shape
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))

    def unfinished(carry: _Carry) -> jax.Array:
        return jnp.any(carry.rank_BL == length) & (carry.call < length)

    def step(carry: _Carry) -> _Carry:
        call_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, carry.call)
        keys_B2 = jax.vmap(jax.random.split)(call_keys_B)
        places_BQ, slots_BQ = _next(keys_B2[:, 0], carry, reveal)
        now_BQ = jnp.broadcast_to(slots_BQ[:, :1], slots_BQ.shape)  # none knows of the others
        logits_BQV = remove_mask(model.ask(carry.memory, places_BQ, now_BQ), mask_id)
        drawn_BQ = draw_tokens(keys_B2[:, 1], logits_BQV)
        taken_BQ = _independent(logits_BQV, dependence) & (slots_BQ < length)
        slots_BQ = jnp.where(taken_BQ, slots_BQ, length)
        return _reveal(carry, model, drawn_BQ, places_BQ, slots_BQ)

    start = _begin(model, jnp.where(given_rank_BL < length, tokens_BL, mask_id), given_rank_BL)
    end = jax.lax.while_loop(unfinished, step, start)
    return Samples(end.tokens_BL, end.revealed_BL, end.call)


def _begin(model: Recaller, tokens_BL: jax.Array, given_rank_BL: jax.Array) -> _Carry:
    """The state in which what is given is read, and no call is made."""
    nothing, none = jnp.zeros_like(given_rank_BL), jnp.zeros((), jnp.int32)
    masked_BL = jnp.full_like(given_rank_BL, given_rank_BL.shape[-1])
    memory, weights = model.start(len(tokens_BL))
    empty = _Carry(tokens_BL.astype(jnp.int32), masked_BL, nothing, weights, memory, none)
    places_BL = invert(given_rank_BL)
    slots_BL, given_BL = (
        jnp.take_along_axis(a, places_BL, axis=-1) for a in (given_rank_BL, empty.tokens_BL)
    )
    read = _reveal(empty, model, given_BL, places_BL, slots_BL)
    return read._replace(revealed_BL=nothing, call=none)


def _next(keys_B: jax.Array, carry: _Carry, reveal: int) -> tuple[jax.Array, jax.Array]:
    """The next positions in the order of each row, and their ranks, L where there is none."""
    length = carry.rank_BL.shape[-1]
    masked_BL = carry.rank_BL == length
    done_B1 = jnp.sum(~masked_BL, axis=-1, keepdims=True)
    is_last_BL = carry.rank_BL == done_B1 - 1
    last_B = jnp.where(is_last_BL.any(-1), jnp.argmax(is_last_BL, axis=-1), -1)
    rank_BL = row_ranks(keys_B, carry.weights, masked_BL, reveal, last_B.astype(jnp.int32))
    order_BL = invert(jnp.where(masked_BL, rank_BL, -1))
    slots_BQ = done_B1 + jnp.arange(reveal)
    places_BQ = jnp.take_along_axis(order_BL, jnp.minimum(slots_BQ, length - 1), axis=-1)
    return places_BQ, jnp.minimum(slots_BQ, length).astype(jnp.int32)


def _independent(logits_BQV: jax.Array, dependence: float) -> jax.Array:
    """Which of the first tokens may be drawn independently, bool [B, Q], the first always."""
    log_p_BQV = jax.nn.log_softmax(logits_BQV)
    entropy_BQ = -jnp.sum(jnp.exp(log_p_BQV) * log_p_BQV, axis=-1, where=log_p_BQV > -jnp.inf)
    largest_BQ = jax.lax.cummax(entropy_BQ, axis=1)
    # The first adds exactly nothing: no rounding may keep it from being taken.
    lost_BQ = (jnp.cumsum(entropy_BQ, axis=-1) - largest_BQ).at[:, 0].set(0.0)
    return lost_BQ <= dependence


def _reveal(
    carry: _Carry,
    model: Recaller,
    tokens_BQ: jax.Array,
    places_BQ: jax.Array,
    slots_BQ: jax.Array,
) -> _Carry:
    """The state after these tokens, of which those with a slot beyond the end do not count."""
    length, weights = carry.rank_BL.shape[-1], carry.weights
    moves_BQM, memory = model.read(carry.memory, tokens_BQ, places_BQ, slots_BQ)
    rows = jnp.arange(len(tokens_BQ))[:, None]
    where_BQ = jnp.where(slots_BQ < length, places_BQ, length)  # beyond the end: dropped

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, where_BQ].set(new, mode="drop")

    if moves_BQM is not None and weights.moves is not None:
        weights = weights._replace(moves=put(weights.moves, moves_BQM))
    return _Carry(
        tokens_BL=put(carry.tokens_BL, tokens_BQ),
        rank_BL=put(carry.rank_BL, slots_BQ),
        revealed_BL=put(carry.revealed_BL, jnp.broadcast_to(carry.call + 1, places_BQ.shape)),
        weights=weights,
        memory=memory,
        call=carry.call + 1,
    )
