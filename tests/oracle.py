"""Exact enumeration for tiny models: what every estimator and sampler is held against.

A model over L positions and V tokens has (V + 1)^L states z. The network is run once on all of
them; all else is sums over states, in float32 JAX so that it can be differentiated.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.objectives.nelbo import Terms, remove_mask
from lomdm_jax.orders.schedule import Power


class TableModel(NamedTuple):
    """A generator without a network: a free parameter for every state.

    params: `logits` [states, L, V + 1], `reverse` [states, L] and `forward` [states, L], the two
    latter log exponents. It answers as `lomdm_jax.generator.Generator` does.
    """

    length: int
    vocab: int

    @property
    def mask_id(self):
        return self.vocab

    def init(self, key, low=0.05, high=0.3):
        states = (self.vocab + 1) ** self.length
        k1, k2, k3 = jax.random.split(key, 3)
        draw = functools.partial(jax.random.uniform, shape=(states, self.length))
        bounds = dict(minval=np.log(low), maxval=np.log(high))
        return {
            "logits": 1.5 * jax.random.normal(k1, (states, self.length, self.vocab + 1)),
            "reverse": draw(k2, **bounds),
            "forward": draw(k3, **bounds),
        }

    def code(self, z):
        return jnp.sum(z * (self.vocab + 1) ** jnp.arange(self.length), axis=-1)

    def forward(self, params, x_BL):
        return Power(jnp.exp(params["forward"][self.code(x_BL)]))

    def reverse(self, params, dropout_keys_B=None):
        def call(z_KBL, log_t_B):
            code = self.code(z_KBL)
            return params["logits"][code], Power(jnp.exp(params["reverse"][code]))

        return call


def sequences(length: int, vocab: int) -> np.ndarray:
    """All vocab^length sequences, int32 [N, L]."""
    return np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)


def masks(length: int) -> np.ndarray:
    """All 2^length subsets of positions, bool [S, L]; row number = sum of 2^i over the subset."""
    return (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1


class States(NamedTuple):
    """The model on every masked version of one sequence, indexed by the subset that is masked.

    nll [S, L], reverse [S, L] reverse exponents, forward [L] forward exponents.
    """

    mask: np.ndarray
    nll: jax.Array
    reverse: jax.Array
    forward: jax.Array


def states_of(generator: Any, params: Any, x: np.ndarray) -> States:
    mask = masks(len(x))
    z = jnp.where(mask, generator.mask_id, x)
    logits, schedule = generator.reverse(params)(z[None], None)
    logp = jax.nn.log_softmax(remove_mask(logits[0], generator.mask_id))
    nll = -jnp.take_along_axis(logp, jnp.broadcast_to(x, z.shape)[..., None], -1)[..., 0]
    forward = generator.forward(params, jnp.asarray(x)[None]).exponents[0]
    return States(mask, nll, schedule.exponents[0], forward)


def log_p(generator: Any, params: Any, x: np.ndarray) -> jax.Array:
    """log p(x) by dynamic programming over subsets: from the all-masked state to the clean one."""
    states = states_of(generator, params, x)
    value = [jnp.ones(())]  # probability of completing x from the subset that is still masked
    for subset in range(1, 2 ** len(x)):
        total = jnp.sum(states.reverse[subset], where=states.mask[subset])
        value.append(
            sum(
                states.reverse[subset, i]
                / total
                * jnp.exp(-states.nll[subset, i])
                * value[subset - 2**i]
                for i in np.flatnonzero(states.mask[subset])
            )
        )
    return jnp.log(value[-1])


def state_rates(states: States) -> Terms:
    """main, order and clock of every subset per unit of log-time, [S]; reconstruction is the
    cross-entropy of revealing all that is masked at once."""
    mask, e, reverse = states.mask, states.forward, states.reverse
    some = mask.any(-1)
    total = jnp.where(some, jnp.sum(jnp.where(mask, e, 0), -1), 1)
    total_r = jnp.where(some, jnp.sum(jnp.where(mask, reverse, 0), -1), 1)
    ratio = jnp.log(e / total[:, None]) - jnp.log(reverse / total_r[:, None])
    return Terms(
        main=jnp.sum(jnp.where(mask, e * states.nll, 0), -1),
        order=jnp.sum(jnp.where(mask, e * ratio, 0), -1),
        clock=jnp.where(some, total * jnp.log(total / total_r) - total + total_r, 0),
        reconstruction=jnp.sum(jnp.where(mask, states.nll, 0), -1),
    )


def closed_form(states: States) -> Terms:
    """The untruncated terms. A subset is visited with the probability of the race, and a visit
    lasts 1 / S of log-time."""
    length, rates = states.mask.shape[1], state_rates(states)
    visit = [jnp.zeros(())] * 2**length
    visit[-1] = jnp.ones(())
    sums = [jnp.zeros(())] * 3
    for subset in range(2**length - 1, 0, -1):
        total = jnp.sum(states.forward, where=states.mask[subset])
        sums = [s + visit[subset] / total * r[subset] for s, r in zip(sums, rates, strict=False)]
        for i in np.flatnonzero(states.mask[subset]):
            visit[subset - 2**i] += visit[subset] * states.forward[i] / total
    return Terms(*sums, jnp.zeros(()))


def mask_probability(states: States, log_time: jax.Array) -> jax.Array:
    """q(subset masked | x) at -log t = log_time, [..., S]."""
    kept = jnp.exp(-states.forward * log_time[..., None])[..., None, :]
    return jnp.prod(jnp.where(states.mask, kept, 1 - kept), -1)


def quadrature(states: States, eps: float, nodes: int = 200) -> Terms:
    """The integral over t in [eps, 1] by Gauss-Legendre in log-time, and what is left at eps."""
    node, weight = np.polynomial.legendre.leggauss(nodes)
    end = -np.log(eps)
    visits = end / 2 * weight @ mask_probability(states, jnp.asarray((node + 1) * end / 2))
    rates = state_rates(states)
    left = mask_probability(states, jnp.asarray(end))
    return Terms(*(visits @ rate for rate in rates[:3]), left @ rates.reconstruction)
