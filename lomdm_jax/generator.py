"""A denoiser with an order: the generative model that is trained, scored and sampled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.order_head import Pointed
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives.nelbo import Reverse, Tokens
from lomdm_jax.orders import Order, make_order
from lomdm_jax.orders.learned import TRIALS, trial_of
from lomdm_jax.orders.schedule import Schedule, Walk

# MDLM's log-linear noise: sigma(t) = -log(1 - (1 - 1e-3) t), finite at t = 1.
SIGMA_EPS = 1e-3


class Generator(NamedTuple):
    """Pure functions of the parameters (a plain dict of arrays).

    graphdef: structure of a `models.denoiser.Denoiser`.
    order: from scores to schedules.
    mask_id: id of the mask token.
    time_conditioning: whether the network is told the noise level at t.
    one_pass: what a pass of the network scores: one "state", all "groups" of an order, or a whole
      "order" on the ranked layout; see `make_objective`.
    random: whether what is learned of the order is left out; see `at_random`.
    segments_BL: which document of its row each position belongs to; see `apart`.
    """

    graphdef: Any
    order: Order
    mask_id: int
    time_conditioning: bool = False
    one_pass: str = "state"
    random: bool = False
    segments_BL: jax.Array | None = None

    def at_random(self) -> "Generator":
        """The same network under the order that a learned one starts from: the heads have no part
        in it, and under jit they cost nothing.

        It is uniformly random; on the ranked layout, if the order has a walk, the walks that it
        may have take turns from row to row (`orders.learned.TRIALS`).
        """
        return self._replace(random=True)

    @property
    def compares(self) -> bool:
        """Whether orders of the same text are compared from row to row of a batch."""
        return self.order.walks and self.one_pass == "order"

    @property
    def on_trial(self) -> bool:
        """Whether several walks take turns."""
        return self.random and self.compares

    def forward(self, params: Any, x_BL: jax.Array) -> Schedule:
        """The forward schedule of the clean tokens x, parameters [B, L]."""
        module = self.module(params)
        if self.random:
            return self.schedule(module, jnp.zeros(x_BL.shape))
        return self.schedule(module, module.forward_scores(x_BL, self.segments_BL))

    def reverse(self, params: Any, dropout_keys_B: jax.Array | None = None) -> Reverse:
        """The reverse model as objectives call it: from z [K, B, L] and log t [B] (or None) to
        what is said of the tokens at [K, B, L] and the reverse schedule, parameters [K, B, L]."""

        def call(
            z_KBL: jax.Array,
            log_t_B: jax.Array | None,
            context_BL: jax.Array | None = None,
            rank_KBL: jax.Array | None = None,
        ) -> tuple[Tokens, Schedule]:
            count, length = z_KBL.shape[0], z_KBL.shape[-1]
            context_NL, segments_NL = (
                None if a_BL is None else jnp.repeat(a_BL, count, axis=0)
                for a_BL in (context_BL, self.segments_BL)
            )
            module = self.module(params)
            tokens_N, scores_N = module.denoise(
                _rows(z_KBL),
                self._sigma(log_t_B, count),
                _split_keys(dropout_keys_B, count),
                context_NL,
                None if rank_KBL is None else _rows(rank_KBL),
                segments_NL,
            )

            def of_draws(a_N: jax.Array) -> jax.Array:
                return jnp.reshape(a_N, (-1, count, *a_N.shape[1:])).swapaxes(0, 1)

            tokens = tokens_N.arranged(of_draws, self.order.masked_share(length, self.one_pass))
            return tokens, self.schedule(module, jax.tree.map(of_draws, scores_N))

        return call

    def module(self, params: Any) -> Denoiser:
        """The network with these parameters; for `at_random` the heads' are zero."""
        if self.random:  # rates per token also tilt the logits
            heads = {name: params[name] for name in params if name.endswith("_head")}
            params = params | jax.tree.map(jnp.zeros_like, heads)
        return nnx.merge(self.graphdef, params)

    def schedule(self, module: Denoiser, scores: jax.Array | Pointed) -> Schedule:
        """From what a pass of the network scores to the schedule of the order."""
        log_w = scores.log_w if isinstance(scores, Pointed) else scores
        schedule = self.order.schedule(jnp.zeros_like(log_w) if self.random else log_w)
        if not self.order.walks or (self.random and not self.on_trial):
            return schedule
        log_w = schedule.weights().log_w
        if self.on_trial:
            tables = jnp.asarray(np.stack(list(TRIALS.values())))
            return Walk(log_w, tables[trial_of(log_w.shape[-2])])
        table = jax.lax.stop_gradient(module.walk_head.table[...])
        if not isinstance(scores, Pointed):
            return Walk(log_w, table)
        return Walk(log_w, table + scores.neighbours, scores.moves)

    def _sigma(self, log_t_B: jax.Array | None, count: int) -> jax.Array | None:
        if not self.time_conditioning or log_t_B is None:
            return None
        return jnp.repeat(-jnp.log1p(-(1 - SIGMA_EPS) * jnp.exp(log_t_B)), count)


def apart(generator: Generator, segments_BL: jax.Array | None) -> Generator:
    """The same model for rows that hold several documents, each of which is seen from within only.

    The order remains one of the whole row. Samplers generate one document and know no segments.

    segments_BL: which document each position belongs to, int32; None for the model as it is.
    """
    return generator if segments_BL is None else generator._replace(segments_BL=segments_BL)


def make_generator(config: ConfigDict, vocab_size: int, mask_id: int) -> Generator:
    """The generator of the config sections `model`, `order` and `data.length`, without parameters.

    vocab_size: rows of the token table, the mask token included.
    """
    module = nnx.eval_shape(lambda: _denoiser(config, vocab_size, mask_id, nnx.Rngs(0)))
    graphdef, _, *rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "the model must hold parameters and nothing else"
    order = make_order(**config.order)
    one_pass = order.one_pass(config.model.layout)
    return Generator(graphdef, order, mask_id, config.model.time_conditioning, one_pass)


def init_params(config: ConfigDict, vocab_size: int, key: jax.Array) -> Any:
    """Fresh parameters, float32 arrays in a plain dict; run it under jit."""
    module = _denoiser(config, vocab_size, 0, nnx.Rngs(params=key))  # no parameter knows the mask
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _denoiser(config: ConfigDict, vocab_size: int, mask_id: int, rngs: nnx.Rngs) -> Denoiser:
    model = config.model
    sizes = Sizes(
        vocab_size=vocab_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        cond_dim=model.cond_dim,
        dropout=model.dropout,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
    )
    return Denoiser(sizes, mask_id=mask_id, rngs=rngs, **architecture(config))


def architecture(config: ConfigDict) -> dict[str, Any]:
    """What a `Denoiser` is made with besides its sizes and the mask token, by the names of its
    arguments; plain values."""
    order, length = make_order(**config.order), config.data.length
    groups = tuple(order.groups(length).tolist()) if order.groups else None
    return {
        "length": length,
        "scores": order.scores,
        "head_layers": config.model.head_layers,
        "walks": order.walks,
        "layout": _layout(order.one_pass(config.model.layout), groups),
        "groups": groups,
    }


def _layout(one_pass: str, groups: tuple[int, ...] | None) -> str:
    """The layout of attention; see `Denoiser`."""
    if one_pass == "state" or groups is None:
        return "full" if one_pass == "state" else "ranked"
    return "causal" if one_pass == "groups" and len(set(groups)) == len(groups) else "ranked"


def _rows(a_KBL: jax.Array) -> jax.Array:
    """[B K, L]: rows of one example stay neighbours, so that a batch split over devices stays
    split."""
    return a_KBL.swapaxes(0, 1).reshape(-1, a_KBL.shape[-1])


def _split_keys(keys_B: jax.Array | None, count: int) -> jax.Array | None:
    """One key for each of `count` rows per example, [B * count]."""
    if keys_B is None:
        return None
    return jax.vmap(lambda key: jax.random.split(key, count))(keys_B).reshape(-1)
