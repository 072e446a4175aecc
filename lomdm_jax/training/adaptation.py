"""What an evaluation changes in a run before it scores: the noise range that blocks are trained
on, or the walk of an order."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lomdm_jax.data import pipeline
from lomdm_jax.evaluation import likelihood, noise_range, walk_choice
from lomdm_jax.run import Run, objective_for, valid_batches
from lomdm_jax.training.state import TrainState


def make_adapter(run: Run) -> Callable[[TrainState], TrainState]:
    """What an evaluation changes in the state before it scores: the noise range that blocks are
    trained on, or the walk of an order, once, after `train.random_steps`."""
    if run.config.objective.clip_noise:
        return _range_search(run)
    if run.generator.order.walks:
        return _walk_choice(run)
    return lambda state: state


def _range_search(run: Run) -> Callable[[TrainState], TrainState]:
    """Reads validation sequences; see `evaluation.noise_range`."""
    config = run.config.eval
    spread = jax.jit(noise_range.make_spread(run.generator))
    key = run.replicate(jax.random.key(config.seed))
    limit = min(config.sequences or noise_range.SEQUENCES, noise_range.SEQUENCES)

    def adapt(state: TrainState) -> TrainState:
        batches = valid_batches(run, limit)
        found = noise_range.search(spread, state.ema, batches, key=key, place=run.place)
        print("noise range  {:.2f} to {:.2f}, of the least variance".format(*found), flush=True)
        return state.replace(noise_range=run.replicate(found))

    return adapt


def _walk_choice(run: Run) -> Callable[[TrainState], TrainState]:
    """Reads training sequences; see `evaluation.walk_choice`."""
    config, length = run.config, run.config.data.length
    objective = objective_for(run, "order", samples=1)
    # As many draws as positions: stratified, so that every number of masks comes once.
    scorer = jax.jit(likelihood.make_scorer(run.generator, objective, draws=length))
    key = run.replicate(jax.random.key(config.eval.seed))

    def nats(params: Any, table: np.ndarray) -> np.ndarray:
        params = params | {"walk_head": {"table": run.replicate(table)}}
        rows = pipeline.train_batches(run.prepared, config.eval.batch_size, config.eval.seed)
        found = []
        for number in range(-(-walk_choice.SEQUENCES // config.eval.batch_size)):
            index_B = np.arange(config.eval.batch_size) + number * config.eval.batch_size
            terms = scorer(params, run.place(next(rows)), run.place(index_B), key)
            found.append(jax.device_get(terms.main + terms.order))
        return np.concatenate(found)

    def adapt(state: TrainState) -> TrainState:
        walks_already = np.any(state.ema["walk_head"]["table"])
        if walks_already or int(state.step) < config.train.random_steps:
            return state
        choice = walk_choice.choose(lambda table: nats(state.ema, table))
        print(walk_choice.report(choice, length), flush=True)
        params, ema = (
            tree | {"walk_head": {"table": run.replicate(choice.table)}}
            for tree in (state.params, state.ema)
        )
        return state.replace(params=params, ema=ema)

    return adapt
