"""The model as samplers call it: what it is told of the text so far, and what it remembers.

A block is the positions that are filled before all others. `Whole` sees a window of the text anew
at every call; `Causal` and `Blocks` follow the order that the network was trained in, and remember
what they have read; `Recall` does so in any order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.generator import Generator
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.visibility import Cached, Memory
from lomdm_jax.orders.schedule import Power, Schedule, Weights


class Context(Protocol):
    """The model, block after block, for sequences of T tokens.

    size: K, positions of a block.
    """

    @property
    def size(self) -> int: ...

    def places(self, block: jax.Array) -> jax.Array:
        """Where the positions of a block stand in the text, int32 [K]."""
        ...

    def begin(self, tokens_BT: jax.Array, given_BT: jax.Array) -> tuple[Any, jax.Array]:
        """What is remembered after reading the blocks that are given from the start in every row,
        and the number of the next block, int32 scalar."""
        ...

    def look(
        self, memory: Any, tokens_BT: jax.Array, block: jax.Array, log_t_B: jax.Array
    ) -> tuple[jax.Array, Schedule]:
        """Logits [B, K, V] of the block, and its schedule in this state, parameters [B, K]."""
        ...

    def finish(self, memory: Any, tokens_BT: jax.Array, block: jax.Array) -> Any:
        """What is remembered once the block is complete."""
        ...


class Whole(NamedTuple):
    """A model that reads the state anew at every call, in a window that ends with the block, or
    holds the whole text if that is shorter.

    window: tokens that the network sees; size: of a block, which divides `length`.
    """

    generator: Generator
    params: Any
    length: int
    window: int
    size: int

    def places(self, block: jax.Array) -> jax.Array:
        return block * self.size + jnp.arange(self.size)

    def begin(self, tokens_BT: jax.Array, given_BT: jax.Array) -> tuple[Any, jax.Array]:
        return None, _leading(given_BT) // self.size

    def look(
        self, memory: Any, tokens_BT: jax.Array, block: jax.Array, log_t_B: jax.Array
    ) -> tuple[jax.Array, Schedule]:
        first = jnp.maximum(0, (block + 1) * self.size - self.window)
        z_BW = jax.lax.dynamic_slice_in_dim(tokens_BT, first, self.window, axis=1)
        tokens, schedule = self.generator.reverse(self.params)(z_BW[None], log_t_B)
        schedule = schedule.at((z_BW == self.generator.mask_id)[None])
        block_of = functools.partial(self._block, start=block * self.size - first)
        return block_of(tokens.logits[0]), jax.tree.map(lambda a: block_of(a[0]), schedule)

    def _block(self, a_BW: jax.Array, start: jax.Array) -> jax.Array:
        if a_BW.shape[1] != self.window:  # one value for all positions
            return a_BW
        return jax.lax.dynamic_slice_in_dim(a_BW, start, self.size, axis=1)

    def finish(self, memory: Any, tokens_BT: jax.Array, block: jax.Array) -> Any:
        return None


class Causal(NamedTuple):
    """A causal model with a key-value cache, one position after another.

    Each slot of the cache holds the token before the one that it predicts. Beyond the training
    length the oldest slots are written over, and the network sees as many as it has.

    order: int [T], the position that comes n-th.
    window: slots, the length that the network was trained on.
    """

    module: Denoiser
    order: np.ndarray
    window: int

    @property
    def size(self) -> int:
        return 1

    def places(self, block: jax.Array) -> jax.Array:
        return jnp.asarray(self.order)[block][None]

    def begin(self, tokens_BT: jax.Array, given_BT: jax.Array) -> tuple[Any, jax.Array]:
        memory = self.module.backbone.memories(len(tokens_BT), self.window)
        slots_Q = jnp.arange(min(self.window, len(self.order)))
        shown_BT = given_BT[:, self.order]
        first = jnp.minimum(_leading(shown_BT), len(slots_Q) - 1)
        before_BQ = tokens_BT[:, self.order[: len(slots_Q) - 1]]
        start_B1 = jnp.full_like(tokens_BT[:, :1], self.module.mask_id)
        tokens_BQ = jnp.concatenate([start_B1, before_BQ], axis=1)
        hidden_BQD, memory = self._read(memory, tokens_BQ, slots_Q, slots_Q[-1])
        hidden_B1D = jax.lax.dynamic_slice_in_dim(hidden_BQD, first, 1, axis=1)
        return (memory, self.module.predict(hidden_B1D)), first

    def look(
        self, memory: Any, tokens_BT: jax.Array, block: jax.Array, log_t_B: jax.Array
    ) -> tuple[jax.Array, Schedule]:
        return memory[1], Power(jnp.zeros((len(tokens_BT), 1)))

    def finish(self, memory: Any, tokens_BT: jax.Array, block: jax.Array) -> Any:
        token_B1 = tokens_BT[:, self.places(block)]
        hidden_B1D, slots = self._read(memory[0], token_B1, block[None] + 1, block + 1)
        return slots, self.module.predict(hidden_B1D)

    def _read(
        self, memory: Any, tokens_BQ: jax.Array, ranks_Q: jax.Array, newest: jax.Array
    ) -> tuple[jax.Array, Any]:
        view = _reading(tokens_BQ, ranks_Q, ranks_Q + 1, newest, self.window)
        return self.module.recall(tokens_BQ, view, memory)


class Blocks(NamedTuple):
    """A model of blocks (BD3-LM, arXiv 2503.09573) with a key-value cache of complete blocks.

    A call asks for the tokens of one block, of which each sees the others; what came before is
    remembered. Beyond the training length the oldest blocks are written over.

    size: of a block, which divides `length` and `window`.
    window: slots, the length that the network was trained on.
    """

    module: Denoiser
    length: int
    window: int
    size: int

    def places(self, block: jax.Array) -> jax.Array:
        return block * self.size + jnp.arange(self.size)

    def begin(self, tokens_BT: jax.Array, given_BT: jax.Array) -> tuple[Any, jax.Array]:
        memory = self.module.backbone.memories(len(tokens_BT), self.window)
        ranks_Q = jnp.arange(min(self.window, self.length))
        memory = self._read(memory, tokens_BT[:, : len(ranks_Q)], ranks_Q, ranks_Q[-1])
        return memory, jnp.minimum(_leading(given_BT), len(ranks_Q)) // self.size

    def look(
        self, memory: Any, tokens_BT: jax.Array, block: jax.Array, log_t_B: jax.Array
    ) -> tuple[jax.Array, Schedule]:
        places_BK = jnp.broadcast_to(self.places(block), (len(tokens_BT), self.size))
        z_BK, end = tokens_BT[:, self.places(block)], (block + 1) * self.size
        low, high = (jnp.full_like(places_BK, a) for a in (self._low(end), block * self.size))
        held = _held(jnp.maximum(block * self.size - 1, 0), self.window)
        view = Cached(places_BK, low, high, held, together=True)
        logits_BKV = self.module.predict(self.module.recall(z_BK, view, memory)[0])
        return logits_BKV, Power(jnp.zeros(z_BK.shape))

    def finish(self, memory: Any, tokens_BT: jax.Array, block: jax.Array) -> Any:
        places_K = self.places(block)
        return self._read(memory, tokens_BT[:, places_K], places_K, places_K[-1])

    def _low(self, end: jax.Array) -> jax.Array:
        """The first rank that a block which ends there sees."""
        return jnp.maximum(0, end - self.window)

    def _read(
        self, memory: Any, tokens_BQ: jax.Array, ranks_Q: jax.Array, newest: jax.Array
    ) -> Any:
        ends_Q = (ranks_Q // self.size + 1) * self.size
        view = _reading(tokens_BQ, ranks_Q, ends_Q, newest, self.window)
        return self.module.recall(tokens_BQ, view, memory)[1]


def _leading(given_BT: jax.Array) -> jax.Array:
    """Positions that are given from the start in every row, int32 scalar."""
    return jnp.min(jnp.sum(jnp.cumprod(given_BT.astype(jnp.int32), axis=-1), axis=-1))


def _held(newest: jax.Array, slots: int) -> jax.Array:
    """The rank that each slot holds when ranks up to `newest` were written in turn, int32 [S];
    below 0 for none."""
    return newest - jnp.mod(newest - jnp.arange(slots), slots)


def _reading(
    tokens_BQ: jax.Array, ranks_Q: jax.Array, ends_Q: jax.Array, newest: jax.Array, slots: int
) -> Cached:
    """Contents of these ranks, of which each sees those below its end, as many as there are."""
    ranks, ends = (jnp.broadcast_to(a, tokens_BQ.shape) for a in (ranks_Q, ends_Q))
    low, held = jnp.maximum(0, ends - slots), _held(newest, slots)
    return Cached(ranks, low, ends, held, slots=jnp.mod(ranks, slots))


class Recall(NamedTuple):
    """The ranked layout: slots are ranks, and what is revealed is read once, in any order."""

    schedule: Callable[[Denoiser, Any], Schedule]
    module: Denoiser
    length: int

    def start(self, rows: int) -> tuple[list[Memory], Weights]:
        """An empty memory, and the weights before anything is read."""
        pointer = self.module.scores == "pointer"
        shape = (rows, self.length)
        scores = self.module.prior_head.tables(rows) if pointer else jnp.zeros(shape)
        return self.module.backbone.memories(*shape), self.schedule(self.module, scores).weights()

    def read(
        self, memory: Any, tokens_BQ: jax.Array, positions_BQ: jax.Array, slots_BQ: jax.Array
    ) -> tuple[jax.Array | None, Any]:
        """Moves from each of these tokens, see `Weights`, and the memory with them in their slots;
        a slot beyond the end is not written."""
        view = self._view(positions_BQ, slots_BQ + 1)._replace(slots=slots_BQ)
        hidden_BQD, memory = self.module.recall(tokens_BQ, view, memory)
        return self.module.moves(hidden_BQD), memory

    def ask(self, memory: Any, positions_BQ: jax.Array, slots_BQ: jax.Array) -> jax.Array:
        """Logits [B, Q, V] of positions, each as if it alone came next, at its slot."""
        masks_BQ = jnp.full_like(positions_BQ, self.module.mask_id)
        view = self._view(positions_BQ, slots_BQ)
        return self.module.predict(self.module.recall(masks_BQ, view, memory)[0])

    def _view(self, positions_BQ: jax.Array, high_BQ: jax.Array) -> Cached:
        low_BQ = jnp.zeros_like(high_BQ)
        return Cached(positions_BQ, low_BQ, high_BQ, jnp.arange(self.length))
