"""A denoiser with an order: the generative model that is trained, scored and sampled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives.nelbo import Reverse
from lomdm_jax.orders import Order, make_order
from lomdm_jax.orders.schedule import Schedule, Walk

# MDLM's log-linear noise: sigma(t) = -log(1 - (1 - 1e-3) t), finite at t = 1.
SIGMA_EPS = 1e-3


class Generator(NamedTuple):
    """Pure functions of the parameters (a plain dict of arrays).

    graphdef: structure of a `models.denoiser.Denoiser`.
    order: from scores to schedules.
    mask_id: id of the mask token.
    time_conditioning: whether the network is told the noise level at t.
    random: whether what is learned of the order is left out; see `at_random`.
    """

    graphdef: Any
    order: Order
    mask_id: int
    time_conditioning: bool = False
    random: bool = False

    def at_random(self) -> "Generator":
        """The same network under the order that a learned one starts from, which is uniformly
        random: the heads have no part in it, and under jit they cost nothing."""
        return self._replace(random=True)

    def forward(self, params: Any, x_BL: jax.Array) -> Schedule:
        """The forward schedule of the clean tokens x, parameters [B, L]."""
        module = self._module(params)
        if self.random:
            return self._schedule(module, jnp.zeros(x_BL.shape))
        return self._schedule(module, module.forward_scores(x_BL))

    def reverse(self, params: Any, dropout_keys_B: jax.Array | None = None) -> Reverse:
        """The reverse model as objectives call it: from z [K, B, L] and log t [B] (or None) to
        logits [K, B, L, V] and the reverse schedule, parameters [K, B, L]."""

        def call(
            z_KBL: jax.Array, log_t_B: jax.Array | None, context_BL: jax.Array | None = None
        ) -> tuple[jax.Array, Schedule]:
            count = z_KBL.shape[0]
            context_NL = None if context_BL is None else jnp.repeat(context_BL, count, axis=0)
            # Rows of one example stay neighbours, so that a batch split over devices stays split.
            z_NL = z_KBL.swapaxes(0, 1).reshape(-1, z_KBL.shape[-1])
            module = self._module(params)
            logits_NLV, scores_NL = module.denoise(
                z_NL, self._sigma(log_t_B, count), _split_keys(dropout_keys_B, count), context_NL
            )
            logits, scores = (
                jnp.reshape(a, (-1, count, *a.shape[1:])).swapaxes(0, 1)
                for a in (logits_NLV, scores_NL)
            )
            return logits, self._schedule(module, scores)

        return call

    def _module(self, params: Any) -> Denoiser:
        if self.random:  # rates per token also tilt the logits
            heads = {name: params[name] for name in params if name.endswith("_head")}
            params = params | jax.tree.map(jnp.zeros_like, heads)
        return nnx.merge(self.graphdef, params)

    def _schedule(self, module: Denoiser, scores: jax.Array) -> Schedule:
        schedule = self.order.schedule(jnp.zeros_like(scores) if self.random else scores)
        if self.random or not self.order.walks:
            return schedule
        return Walk(schedule.weights().log_w, jax.lax.stop_gradient(module.walk_head.table[...]))

    def _sigma(self, log_t_B: jax.Array | None, count: int) -> jax.Array | None:
        if not self.time_conditioning or log_t_B is None:
            return None
        return jnp.repeat(-jnp.log1p(-(1 - SIGMA_EPS) * jnp.exp(log_t_B)), count)


def make_generator(config: ConfigDict, vocab_size: int, mask_id: int) -> Generator:
    """The generator of the config sections `model`, `order` and `data.length`, without parameters.

    vocab_size: rows of the token table, the mask token included.
    """
    module = nnx.eval_shape(lambda: _denoiser(config, vocab_size, mask_id, nnx.Rngs(0)))
    graphdef, _, *rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "the model must hold parameters and nothing else"
    return Generator(graphdef, make_order(**config.order), mask_id, config.model.time_conditioning)


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
    )
    order = make_order(**config.order)
    groups = tuple(order.groups(config.data.length).tolist()) if order.groups else None
    return Denoiser(
        sizes,
        mask_id=mask_id,
        scores=order.scores,
        head_layers=model.head_layers,
        walks=order.walks,
        groups=groups,
        rngs=rngs,
    )


def _split_keys(keys_B: jax.Array | None, count: int) -> jax.Array | None:
    """One key for each of `count` rows per example, [B * count]."""
    if keys_B is None:
        return None
    return jax.vmap(lambda key: jax.random.split(key, count))(keys_B).reshape(-1)
