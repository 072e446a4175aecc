"""Sampling on the ranked layout: what is revealed is read once and remembered, in any order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.race import invert, next_log_shares, row_ranks
from lomdm_jax.orders.schedule import Weights
from lomdm_jax.sampling.contexts import Recall
from lomdm_jax.sampling.driver import (
    Sampler,
    Samples,
    after_end,
    cut,
    folded,
    nothing_yet,
)
from lomdm_jax.sampling.tokens import Filter, draw_tokens, entropy, independent


class State(NamedTuple):
    """rank_BT: int32, T where masked. weights: of the order, as far as it knows the text."""

    samples: Samples
    given_BT: jax.Array
    keys_B: jax.Array
    rank_BT: jax.Array
    weights: Weights
    memory: Any


class InAnyOrder(NamedTuple):
    """Filling with the cost of autoregression, in the order that the model draws.

    A call asks for the next `reveal` positions of the order and reads what was drawn for them.
    With one it is exact. With more, their tokens are drawn independently, and their order without
    reading what came just before.

    model: from parameters to the network.
    given_ranks: (params, keys [B], tokens [B, T], given [B, T]) -> int32 [B, T]; the n given
      positions of a row have ranks 0 to n - 1, the order in which they are read, and all others T.
    reveal: positions per call at most.
    dependence: see `tokens.independent`; the first is always revealed.
    eos_id: sampling of a row stops at this token; None for none.
    """

    model: Callable[[Any], Recall]
    given_ranks: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    filter: Filter
    mask_id: int
    reveal: int = 1
    dependence: float = jnp.inf
    order_temperature: float = 1.0
    eos_id: int | None = None

    def sampler(self) -> Sampler:
        """See `Sampler`."""
        return Sampler(self.start, self.advance, self.unfinished, self.finish)

    def start(
        self, params: Any, keys_B: jax.Array, tokens_BT: jax.Array, given_BT: jax.Array
    ) -> State:
        """The state in which what is given is read, and no call is made."""
        model, keys_B2 = self.model(params), jax.vmap(jax.random.split)(keys_B)
        rank_BT = self.given_ranks(params, keys_B2[:, 1], tokens_BT, given_BT)
        memory, weights = model.start(len(given_BT))
        hidden_BT = jnp.full_like(rank_BT, rank_BT.shape[-1])
        samples = nothing_yet(tokens_BT, given_BT, self.mask_id)
        empty = State(samples, given_BT, keys_B2[:, 0], hidden_BT, weights, memory)
        places_BT = invert(rank_BT)
        slots_BT, ids_BT = (
            jnp.take_along_axis(a, places_BT, axis=-1) for a in (rank_BT, samples.tokens_BT)
        )
        return _read(empty, model, ids_BT, places_BT, slots_BT)

    def unfinished(self, state: State) -> jax.Array:
        return jnp.any(self._open(state))

    def finish(self, state: State) -> Samples:
        return cut(state.samples, state.given_BT, mask_id=self.mask_id, eos_id=self.eos_id)

    def advance(self, params: Any, state: State) -> State:
        """One call: the next positions of each row and their tokens, and both read."""
        model, length = self.model(params), state.rank_BT.shape[-1]
        busy_B, samples = self._open(state).any(-1), state.samples
        keys_B2 = jax.vmap(jax.random.split)(folded(state.keys_B, samples.calls))
        places_BQ, slots_BQ, log_share_BT = self._next(keys_B2[:, 0], state)
        now_BQ = jnp.broadcast_to(slots_BQ[:, :1], slots_BQ.shape)  # none knows of the others
        logits_BQV = model.ask(state.memory, places_BQ, now_BQ)
        allowed_BQV, log_p_BQV = self.filter(logits_BQV), jax.nn.log_softmax(logits_BQV)
        drawn_BQ = draw_tokens(keys_B2[:, 1], allowed_BQV)
        taken_BQ = independent(entropy(jax.nn.log_softmax(allowed_BQV)), self.dependence)
        taken_BQ &= (slots_BQ < length) & busy_B[:, None]
        slots_BQ = jnp.where(taken_BQ, slots_BQ, length)
        state = _read(state, model, drawn_BQ, places_BQ, slots_BQ)
        put = _putter(places_BQ, slots_BQ, length)
        log_p_BQ = jnp.take_along_axis(log_p_BQV, drawn_BQ[..., None], axis=-1)[..., 0]
        share_BQ = jnp.exp(jnp.take_along_axis(log_share_BT, places_BQ, axis=-1))
        calls_B = samples.calls_B + busy_B
        step_BQ = jnp.broadcast_to(calls_B[:, None], slots_BQ.shape)
        samples = Samples(
            tokens_BT=put(samples.tokens_BT, drawn_BQ),
            revealed_BT=put(samples.revealed_BT, step_BQ),
            share_BT=put(samples.share_BT, share_BQ),
            log_p_BT=put(samples.log_p_BT, log_p_BQ),
            calls_B=calls_B,
            calls=samples.calls + 1,
            length_B=samples.length_B,
        )
        return state._replace(samples=samples)

    def _open(self, state: State) -> jax.Array:
        """Positions that are hidden and to be filled, bool [B, T]."""
        tokens_BT, given_BT = state.samples.tokens_BT, state.given_BT
        after_BT = after_end(tokens_BT, given_BT, mask_id=self.mask_id, eos_id=self.eos_id)
        return (state.rank_BT == state.rank_BT.shape[-1]) & ~after_BT

    def _next(self, keys_B: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The next positions in the order of each row, and their ranks, T where there is none; and
        the log-probability [B, T] that each position comes next."""
        rank_BT, length = state.rank_BT, state.rank_BT.shape[-1]
        masked_BT = rank_BT == length
        done_B1 = jnp.sum(~masked_BT, axis=-1, keepdims=True)
        is_last_BT = rank_BT == done_B1 - 1
        last_B = jnp.where(is_last_BT.any(-1), jnp.argmax(is_last_BT, axis=-1), -1)
        last_B = last_B.astype(jnp.int32)
        weights = state.weights.flattened(self.order_temperature)
        drawn_BT = row_ranks(keys_B, weights, masked_BT, self.reveal, last_B)
        order_BT = invert(jnp.where(masked_BT, drawn_BT, -1))
        slots_BQ = done_B1 + jnp.arange(self.reveal)
        places_BQ = jnp.take_along_axis(order_BT, jnp.minimum(slots_BQ, length - 1), axis=-1)
        log_share_BT, _ = next_log_shares(weights, masked_BT, last_B)
        return places_BQ, jnp.minimum(slots_BQ, length).astype(jnp.int32), log_share_BT


def _read(
    state: State, model: Recall, tokens_BQ: jax.Array, places_BQ: jax.Array, slots_BQ: jax.Array
) -> State:
    """The state that knows these tokens, of which those with a slot beyond the end do not count."""
    moves_BQM, memory = model.read(state.memory, tokens_BQ, places_BQ, slots_BQ)
    put = _putter(places_BQ, slots_BQ, state.rank_BT.shape[-1])
    weights = state.weights
    if moves_BQM is not None and weights.moves is not None:
        weights = weights._replace(moves=put(weights.moves, moves_BQM))
    return state._replace(rank_BT=put(state.rank_BT, slots_BQ), weights=weights, memory=memory)


def _putter(
    places_BQ: jax.Array, slots_BQ: jax.Array, length: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Writes values [B, Q, ...] at their places of [B, T, ...], if their slots are not beyond the
    end."""
    rows = jnp.arange(len(places_BQ))[:, None]
    where_BQ = jnp.where(slots_BQ < length, places_BQ, length)  # beyond the end: dropped
    return lambda old, new: old.at[rows, where_BQ].set(new, mode="drop")
