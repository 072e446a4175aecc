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

from lomdm_jax.models.readout import Logits
from lomdm_jax.objectives.nelbo import Terms
from lomdm_jax.orders.schedule import Power
from lomdm_jax.sampling.blocks import InBlocks
from lomdm_jax.sampling.contexts import Whole
from lomdm_jax.sampling.tokens import Filter


class TableModel(NamedTuple):
    """A generator without a network: a free parameter for every state.

    params: `logits` [states, L, V + 1], `reverse` [states, L] and `forward` [states, L], the two
    latter log exponents. It answers as `lomdm_jax.generator.Generator` does.
    """

    length: int
    vocab: int
    order: Any = None  # a fixed `lomdm_jax.orders.Order` instead of the table's exponents

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
        return self.schedule(params["forward"][self.code(x_BL)])

    def schedule(self, scores):
        return self.order.schedule(scores) if self.order else Power(scores)

    def reverse(self, params, dropout_keys_B=None):
        def call(z_KBL, log_t_B, context_BL=None):
            code = self.code(z_KBL)
            logits = params["logits"][code].at[..., self.mask_id].set(-jnp.inf)
            return Logits(logits), self.schedule(params["reverse"][code])

        return call


def sampler(model: TableModel, chooser: Any, *, length: int = 0, size: int = 0, **options: Any):
    """A sampler of a table model, which sees all of its length at once; see `InBlocks`."""
    length = length or model.length

    def context(params: Any) -> Whole:
        return Whole(model, params, length, min(length, model.length), size or length)

    options = {"filter": Filter(), "mask_id": model.mask_id} | options
    return InBlocks(context, chooser, **options).sampler()


def sequences(length: int, vocab: int) -> np.ndarray:
    """All vocab^length sequences, int32 [N, L]."""
    return np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)


def masks(length: int) -> np.ndarray:
    """All 2^length subsets of positions, bool [S, L]; row number = sum of 2^i over the subset."""
    return (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1


class States(NamedTuple):
    """The model on every masked version of one sequence, indexed by the subset that is masked.

    nll [S, L]; share and reverse_share [S, L], the probability that a position comes next, and
    log_ratio [S], the log of the forward over the reverse sum of rates; the schedules, with
    parameters [S, L].
    """

    mask: np.ndarray
    nll: jax.Array
    share: jax.Array
    reverse_share: jax.Array
    log_ratio: jax.Array
    forward: Any
    reverse: Any


def states_of(generator: Any, params: Any, x: np.ndarray) -> States:
    mask = masks(len(x))
    z = jnp.where(mask, generator.mask_id, x)
    tokens, reverse = generator.reverse(params)(z[None], None)
    reverse = jax.tree.map(lambda a: a[0], reverse.at(jnp.asarray(mask)[None]))
    logp = jax.nn.log_softmax(tokens.logits[0])
    nll = -jnp.take_along_axis(logp, jnp.broadcast_to(x, z.shape)[..., None], -1)[..., 0]
    forward = generator.forward(params, jnp.broadcast_to(x, z.shape)).at(jnp.asarray(mask))
    share, total = next_shares(forward.weights(), mask)
    reverse_share, reverse_total = next_shares(reverse.weights(), mask)
    log_ratio = jnp.log(total / reverse_total)
    return States(mask, nll, share, reverse_share, log_ratio, forward, reverse)


def next_shares(weights: Any, mask: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Probability [S, L] that a position comes next, and the sum of the weights [S] (or 1)."""
    first = jnp.min(jnp.where(mask, weights.group, 10**6), -1, keepdims=True)
    w = jnp.where(mask & (weights.group == first), jnp.exp(weights.log_w), 0.0)
    total = jnp.where(mask.any(-1), w.sum(-1), 1.0)
    return w / total[:, None], total


def log_p(generator: Any, params: Any, x: np.ndarray, start: int = -1) -> jax.Array:
    """log p(x) by dynamic programming over subsets: from the all-masked state to the clean one;
    or log p of what the subset `start` masks, given the rest."""
    states = states_of(generator, params, x)
    value = [jnp.ones(())]  # probability of completing x from the subset that is still masked
    step = states.reverse_share * jnp.exp(-states.nll)
    for subset in range(1, 2 ** len(x)):
        members = np.flatnonzero(states.mask[subset])
        value.append(sum(step[subset, i] * value[subset - 2**i] for i in members))
    return jnp.log(value[start])


def state_rates(states: States) -> Terms:
    """main, order and clock of every subset per unit of log-time, [S], for power schedules;
    reconstruction is the cross-entropy of revealing all that is masked at once."""
    mask = states.mask
    e, reverse = (jnp.exp(s.log_exponents) for s in (states.forward, states.reverse))
    ratio = log_excess(states, mask)
    return Terms(
        main=jnp.sum(jnp.where(mask, e * states.nll, 0), -1),
        order=jnp.sum(jnp.where(mask, e * ratio, 0), -1),
        clock=jnp.sum(jnp.where(mask, e * states.log_ratio[:, None] - e + reverse, 0), -1),
        reconstruction=jnp.sum(jnp.where(mask, states.nll, 0), -1),
    )


def log_excess(states: States, where: np.ndarray | jax.Array) -> jax.Array:
    """log of share over reverse share [S, L], 0 elsewhere; both operands are made safe, because
    a gradient also passes through what `where` leaves out."""
    ours, theirs = (jnp.where(where, a, 1.0) for a in (states.share, states.reverse_share))
    return jnp.log(ours) - jnp.log(theirs)


def visits_of(states: States, start: int = -1) -> jax.Array:
    """The probability that the race passes each subset, [S], when it begins with the subset
    `start` masked; 0 for the empty one, the end."""
    visit = [jnp.zeros(())] * len(states.mask)
    visit[start] = jnp.ones(())
    for subset in range(len(states.mask) - 1, 0, -1):
        for i in np.flatnonzero(states.mask[subset]):
            visit[subset - 2**i] += visit[subset] * states.share[subset, i]
    return jnp.stack([jnp.zeros(()), *visit[1:]])


def closed_form(states: States, start: int = -1) -> Terms:
    """The untruncated terms, of a race that begins with the subset `start` masked."""
    visit = visits_of(states, start)
    excess = log_excess(states, states.share > 0)
    return Terms(
        main=visit @ jnp.sum(states.share * states.nll, -1),
        order=visit @ jnp.sum(states.share * excess, -1),
        clock=visit @ (states.log_ratio - 1 + jnp.exp(-states.log_ratio)),
        reconstruction=jnp.zeros(()),
    )


def mask_probability(states: States, log_time: jax.Array) -> jax.Array:
    """q(subset masked | x) at -log t = log_time, [..., S]."""
    kept = jnp.exp(-jnp.exp(states.forward.log_exponents[0]) * log_time[..., None])[..., None, :]
    return jnp.prod(jnp.where(states.mask, kept, 1 - kept), -1)


def quadrature(states: States, eps: float, nodes: int = 200) -> Terms:
    """The integral over t in [eps, 1] by Gauss-Legendre in log-time, and what is left at eps."""
    node, weight = np.polynomial.legendre.leggauss(nodes)
    end = -np.log(eps)
    visits = end / 2 * weight @ mask_probability(states, jnp.asarray((node + 1) * end / 2))
    rates = state_rates(states)
    left = mask_probability(states, jnp.asarray(end))
    return Terms(*(visits @ rate for rate in rates[:3]), left @ rates.reconstruction)
