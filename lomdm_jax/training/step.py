"""One optimizer step: corrupt, score, differentiate, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives import Objective, loss
from lomdm_jax.objectives.corruption import scattered, stratified_uniforms
from lomdm_jax.objectives.leave_one_out import groups, leaders
from lomdm_jax.objectives.nelbo import Batch, Estimate, Terms, batch_of, targets_of
from lomdm_jax.orders.learned import TRIALS, trial_of
from lomdm_jax.training import guard
from lomdm_jax.training.optimizer import ema_decay, learning_rate, update_ema
from lomdm_jax.training.state import TrainState

Arrays = dict[str, jax.Array]
Rows = tuple[Batch, jax.Array, jax.Array | None]
QUANTILES = (0.05, 0.5, 0.95)


def make_train_step(
    generator: Generator,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> Callable[[TrainState, Arrays, jax.Array], tuple[TrainState, Arrays]]:
    """The step (state, batch, key) -> (state, metrics), to be jitted.

    batch holds `tokens` int32 [B, L] and `counted` bool [B, L]; perhaps `padding` bool [B, L], see
    `nelbo.batch_of`, and `segments` int32 [B, L], see `generator.apart`. The loss is the mean over
    the counted tokens of the whole global batch, also when it is cut into `train.micro_batches`;
    with `objective.ignore_first` position 0 costs nothing but is counted, as in MDLM and BD3-LM.
    Every draw derives from (key, state.step, index in the global batch) and nothing else.
    Metrics are float32 scalars; bounds in nats per counted token; `bad_steps` is 1 if this one is
    bad, see `guard.judge`, `loss_mean` and `loss_deviation` are the running ones before it.
    """

    def sums(params: Any, rows: Rows) -> tuple[jax.Array, Arrays]:
        batch, dropout_keys_B, segments_BL = rows
        model = apart(generator, segments_BL)
        forward = model.forward(params, batch.tokens_BL)
        reverse = model.reverse(params, dropout_keys_B)
        loss_B, estimate = loss(objective, batch, forward, reverse)
        stats = _statistics(batch, estimate)
        if generator.on_trial:
            stats["trials"] = _of_trials(estimate.terms.main[0], config)
        return jnp.sum(loss_B), stats

    def train_step(state: TrainState, batch: Arrays, key: jax.Array) -> tuple[TrainState, Arrays]:
        batch = _grouped(batch, config) if generator.compares else batch
        key = jax.random.fold_in(key, state.step)
        rows = _rows(batch, config.objective.ignore_first, state.noise_range, key)
        grads, stats = _accumulate(sums, state.params, rows, config.train.micro_batches)
        stats["tokens"] = jnp.sum(batch["counted"]).astype(jnp.float32)
        trials = state.trials + stats.pop("trials", 0.0) / stats["tokens"]
        grads = jax.tree.map(lambda g: g / stats["tokens"], grads)
        metrics = _metrics(stats, objective.terms) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(learning_rate(config.optimizer)(state.step)),
        }
        verdict = guard.judge(state.running_loss, metrics, config.train.spike)
        keep = guard.keeper(verdict.bad, config.train.on_bad_step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = keep(state.params, optax.apply_updates(state.params, updates))
        ema = update_ema(state.ema, params, ema_decay(config.optimizer.ema_decay, state.step))
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema=keep(state.ema, ema),
            opt_state=keep(state.opt_state, opt_state),
            trials=keep(state.trials, trials),
            running_loss=verdict.running,
        )
        return state, metrics | verdict.metrics

    return train_step


def _rows(batch: Arrays, ignore_first: bool, noise_range: jax.Array, key: jax.Array) -> Rows:
    """The global batch with its randomness, the dropout keys [B], and the segments, if any."""
    time_key, row_key = jax.random.split(key)
    total = len(batch["tokens"])
    index_B = jnp.arange(total)
    keys_B = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(row_key, i)))(index_B)
    uniform_B = stratified_uniforms(time_key, scattered(total), total)
    range_B2 = jnp.broadcast_to(noise_range, (total, 2))  # per row, to be cut as rows are
    rows = batch_of(batch, keys_B[:, 0], uniform_B)._replace(noise_range_B2=range_B2)
    rows = rows._replace(targets_BL=targets_of(rows.targets_BL, ignore_first))
    return rows, keys_B[:, 1], batch.get("segments")


def _accumulate(
    sums: Callable[[Any, Any], tuple[jax.Array, Arrays]], params: Any, rows: Any, parts: int
) -> tuple[Any, Arrays]:
    """Gradient and statistics of the sum over all rows, `parts` micro-batches at a time."""
    gradient = jax.grad(sums, has_aux=True)
    if parts == 1:
        return gradient(params, rows)
    # Every part takes rows from every device's share, so that no rows have to move.
    rows = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), rows)
    first = jax.tree.map(lambda a: a[0], rows)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, params, first)
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    return jax.lax.scan(add, zeros, rows)[0]


def _statistics(batch: Batch, estimate: Estimate) -> Arrays:
    """Sums over rows, so that micro-batches add up; quantiles are summed with their count."""
    stats = {name: jnp.sum(jnp.mean(term, 0)) for name, term in estimate.terms._asdict().items()}
    # Mean exponents over the K draws: the forward ones are the same in each.
    exponents = jnp.where(batch.targets_BL, estimate.forward_KBL[0], jnp.nan)
    stats["exponents"] = jnp.nanquantile(exponents, jnp.asarray(QUANTILES))
    stats["parts"] = jnp.ones(())
    velocity = jnp.where(estimate.mask_KBL, estimate.reverse_KBL, 0.0)
    confidence = jnp.where(estimate.mask_KBL, estimate.confidence_KBL, 0.0)
    pairs = (velocity, confidence, velocity**2, confidence**2, velocity * confidence)
    stats["moments"] = jnp.stack([jnp.sum(estimate.mask_KBL * 1.0), *map(jnp.sum, pairs)])
    return stats


def _grouped(batch: Arrays, config: ConfigDict) -> Arrays:
    """With rows of the same text, to compare orders on; see `leave_one_out.leaders`."""
    size, share = config.objective.mask_samples, config.objective.order_share
    row_B = leaders(len(batch["tokens"]), size, share, config.train.micro_batches)
    return {name: a[row_B] for name, a in batch.items()}


def _of_trials(main_B: jax.Array, config: ConfigDict) -> jax.Array:
    """Nats of all rows under each of TRIALS, [4], as far as the rows in groups tell."""
    rows, size = len(main_B), config.objective.mask_samples
    count = groups(rows, size, config.objective.order_share)
    trial_N = trial_of(rows).reshape(size, -1)[:, :count].reshape(-1)
    nats_N = main_B.reshape(size, -1)[:, :count].reshape(-1)
    met = np.maximum(np.bincount(trial_N, minlength=len(TRIALS)), 1)
    return jax.ops.segment_sum(nats_N, trial_N, len(TRIALS)) / met * rows


def _metrics(stats: Arrays, minimised: tuple[str, ...]) -> Arrays:
    metrics = {name: stats[name] / stats["tokens"] for name in Terms._fields}
    metrics["loss"] = jnp.sum(jnp.stack([metrics[name] for name in minimised]))
    for share, value in zip(QUANTILES, stats["exponents"] / stats["parts"], strict=True):
        metrics[f"exponent_q{round(100 * share):02d}"] = value
    metrics["velocity_confidence_correlation"] = _correlation(*stats["moments"])
    metrics["tokens"] = stats["tokens"]
    return metrics


def _correlation(n: jax.Array, x: jax.Array, y: jax.Array, *second: jax.Array) -> jax.Array:
    """Pearson's correlation from the sums of 1, x, y, x^2, y^2 and xy; 0 if either is constant."""
    xx, yy, xy = (moment / jnp.maximum(n, 1.0) for moment in second)
    x, y = x / jnp.maximum(n, 1.0), y / jnp.maximum(n, 1.0)
    # float32 moments of a constant cancel only to rounding: call that constant.
    varies = (xx - x * x > 1e-6 * xx) & (yy - y * y > 1e-6 * yy)
    spread = jnp.sqrt(jnp.where(varies, (xx - x * x) * (yy - y * y), 1.0))
    return jnp.where(varies, (xy - x * y) / spread, 0.0)
