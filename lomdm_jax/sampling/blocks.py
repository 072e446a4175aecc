"""Block after block: call the network, draw a token for each position, choose which to reveal.

With one block of the whole length this is every sampler of masked diffusion; with blocks of one
position it is autoregression.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.race import next_log_shares
from lomdm_jax.orders.schedule import Schedule
from lomdm_jax.sampling.choice import Chooser, Now
from lomdm_jax.sampling.contexts import Context
from lomdm_jax.sampling.driver import (
    Sampler,
    Samples,
    after_end,
    cut,
    folded,
    nothing_yet,
)
from lomdm_jax.sampling.tokens import Filter, draw_tokens, entropy


class Look(NamedTuple):
    """What a call of the network has told of the K positions of a block.

    drawn_BK, log_p_BK: a token for each position, in case it is revealed, and its log-probability.
    A step that reveals nothing leaves the state as it was, so it needs no other draw.
    """

    drawn_BK: jax.Array
    log_p_BK: jax.Array
    score_BK: jax.Array
    entropy_BK: jax.Array
    log_share_BK: jax.Array
    schedule: Schedule


class State(NamedTuple):
    """keys_B: one key per row; the draws of a row depend on nothing else.

    block, step: scalars, the block and the steps made in it.
    steps_B: steps in which a row had something to do.
    stale_B: rows that have changed since the network saw them.
    """

    samples: Samples
    given_BT: jax.Array
    keys_B: jax.Array
    memory: Any
    look: Look
    block: jax.Array
    step: jax.Array
    steps_B: jax.Array
    log_t_B: jax.Array
    stale_B: jax.Array


class InBlocks(NamedTuple):
    """How sequences are filled block after block.

    context: from parameters to the model.
    sees_time: whether the network is told the time, and so must be called at every step.
    eos_id: sampling of a row stops at this token; None for none.
    """

    context: Callable[[Any], Context]
    chooser: Chooser
    filter: Filter
    mask_id: int
    order_temperature: float = 1.0
    sees_time: bool = False
    eos_id: int | None = None

    def sampler(self) -> Sampler:
        """See `Sampler`."""
        return Sampler(self.start, self.advance, self.unfinished, self.finish)

    def start(
        self, params: Any, keys_B: jax.Array, tokens_BT: jax.Array, given_BT: jax.Array
    ) -> State:
        context, rows = self.context(params), len(given_BT)
        samples = nothing_yet(tokens_BT, given_BT, self.mask_id)
        memory, block = context.begin(samples.tokens_BT, given_BT)
        nothing_B = jnp.zeros(rows)
        known = (memory, samples.tokens_BT, block, nothing_B)
        like = jax.eval_shape(lambda: self._seen(context, keys_B, *known))
        return State(
            samples=samples,
            given_BT=given_BT,
            keys_B=keys_B,
            memory=memory,
            look=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like),
            block=block,
            step=jnp.zeros((), jnp.int32),
            steps_B=nothing_B.astype(jnp.int32),
            log_t_B=nothing_B,
            stale_B=nothing_B == 0,
        )

    def unfinished(self, state: State) -> jax.Array:
        return jnp.any(self._open(state)) | (state.step > 0)

    def finish(self, state: State) -> Samples:
        return cut(state.samples, state.given_BT, mask_id=self.mask_id, eos_id=self.eos_id)

    def advance(self, params: Any, state: State) -> State:
        """One step in the block, and on to the next one if it is complete."""
        context = self.context(params)
        state = jax.lax.cond(self._busy(context, state).any(), self._step(context), _same, state)
        busy = self._busy(context, state).any()
        return jax.lax.cond(busy, _same, self._next_block(context), state)

    def _open(self, state: State) -> jax.Array:
        """Positions that are hidden and to be filled, bool [B, T]."""
        tokens_BT, given_BT = state.samples.tokens_BT, state.given_BT
        after_BT = after_end(tokens_BT, given_BT, mask_id=self.mask_id, eos_id=self.eos_id)
        return (tokens_BT == self.mask_id) & ~after_BT

    def _busy(self, context: Context, state: State) -> jax.Array:
        """Rows to which the block has something to do, bool [B]."""
        to_do_BT = self._open(state)
        if self.chooser.least_steps:
            to_do_BT |= self._shown(state) & (state.step < self.chooser.least_steps)
        return to_do_BT[:, context.places(state.block)].any(-1)

    def _shown(self, state: State) -> jax.Array:
        """Positions that were revealed, bool [B, T]."""
        return (state.samples.tokens_BT != self.mask_id) & ~state.given_BT

    def _seen(
        self,
        context: Context,
        keys_B: jax.Array,
        memory: Any,
        tokens_BT: jax.Array,
        block: jax.Array,
        log_t_B: jax.Array,
    ) -> Look:
        """One call of the network."""
        logits_BKV, schedule = context.look(memory, tokens_BT, block, log_t_B)
        log_p_BKV, allowed_BKV = jax.nn.log_softmax(logits_BKV), self.filter(logits_BKV)
        drawn_BK = draw_tokens(keys_B, allowed_BKV)
        log_p_BK = jnp.take_along_axis(log_p_BKV, drawn_BK[..., None], axis=-1)[..., 0]
        schedule = schedule.flattened(self.order_temperature)
        hidden_BK = tokens_BT[:, context.places(block)] == self.mask_id
        log_share_BK, _ = next_log_shares(schedule.weights(), hidden_BK)
        return Look(
            drawn_BK,
            log_p_BK,
            self.chooser.score(log_p_BKV, log_share_BK),
            entropy(jax.nn.log_softmax(allowed_BKV)),
            log_share_BK,
            schedule,
        )

    def _step(self, context: Context) -> Callable[[State], State]:
        def step(state: State) -> State:
            samples, places_K = state.samples, context.places(state.block)
            keys_B2 = jax.vmap(jax.random.split)(folded(state.keys_B, state.block, state.step))
            state, samples = self._looked(context, state, samples, keys_B2[:, 1])
            look, open_BK = state.look, self._open(state)[:, places_K]
            choice = self.chooser(
                Now(
                    keys_B2[:, 0],
                    open_BK,
                    self._shown(state)[:, places_K],
                    look.schedule,
                    look.log_share_BK,
                    look.score_BK,
                    look.entropy_BK,
                    state.log_t_B,
                    state.step,
                )
            )
            steps_B = state.steps_B + self._busy(context, state)
            samples = _reveal(samples, places_K, choice.reveal_BK, look, steps_B)
            changed_B = choice.reveal_BK.any(-1)
            if choice.hide_BK is not None:
                samples = _hide(samples, places_K, choice.hide_BK, self.mask_id)
                changed_B |= choice.hide_BK.any(-1)
            return state._replace(
                samples=samples,
                step=state.step + 1,
                steps_B=steps_B,
                log_t_B=choice.log_t_B,
                stale_B=changed_B | self.sees_time,
            )

        return step

    def _looked(
        self, context: Context, state: State, samples: Samples, keys_B: jax.Array
    ) -> tuple[State, Samples]:
        """The network called for the rows that are stale and busy, if there are any."""
        stale_B = state.stale_B & self._busy(context, state)
        known = (keys_B, state.memory, samples.tokens_BT, state.block, state.log_t_B)

        def merge(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(stale_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        def call() -> Look:
            return jax.tree.map(merge, self._seen(context, *known), state.look)

        look = jax.lax.cond(stale_B.any(), call, lambda: state.look)
        calls_B, calls = samples.calls_B + stale_B, samples.calls + stale_B.any()
        samples = samples._replace(calls_B=calls_B, calls=calls)
        stale_B = state.stale_B & ~stale_B
        return state._replace(look=look, stale_B=stale_B, samples=samples), samples

    def _next_block(self, context: Context) -> Callable[[State], State]:
        def move_on(state: State) -> State:
            return state._replace(
                memory=context.finish(state.memory, state.samples.tokens_BT, state.block),
                block=state.block + 1,
                step=jnp.zeros_like(state.step),
                log_t_B=jnp.zeros_like(state.log_t_B),
                stale_B=jnp.ones_like(state.stale_B),
            )

        return move_on


def _same(state: State) -> State:
    return state


def _reveal(
    samples: Samples,
    places_K: jax.Array,
    reveal_BK: jax.Array,
    look: Look,
    steps_B: jax.Array,
) -> Samples:
    def put(old_BT: jax.Array, new_BK: jax.Array) -> jax.Array:
        new_BK = jnp.where(reveal_BK, new_BK, old_BT[:, places_K])
        return old_BT.at[:, places_K].set(new_BK)

    return samples._replace(
        tokens_BT=put(samples.tokens_BT, look.drawn_BK),
        revealed_BT=put(samples.revealed_BT, steps_B[:, None]),
        share_BT=put(samples.share_BT, jnp.exp(look.log_share_BK)),
        log_p_BT=put(samples.log_p_BT, look.log_p_BK),
    )


def _hide(samples: Samples, places_K: jax.Array, hide_BK: jax.Array, mask_id: int) -> Samples:
    def put(old_BT: jax.Array, value: int) -> jax.Array:
        return old_BT.at[:, places_K].set(jnp.where(hide_BK, value, old_BT[:, places_K]))

    return samples._replace(
        tokens_BT=put(samples.tokens_BT, mask_id),
        revealed_BT=put(samples.revealed_BT, 0),
        share_BT=put(samples.share_BT, 0),
        log_p_BT=put(samples.log_p_BT, 0),
    )
