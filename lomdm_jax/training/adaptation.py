"""What an evaluation changes in a run before it scores: the noise range that blocks are trained
on, or the walk of an order."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from lomdm_jax.data import pipeline
from lomdm_jax.evaluation import likelihood, noise_range, walk_choice
from lomdm_jax.orders.learned import TRIALS
from lomdm_jax.run import Run, objective_for, valid_batches
from lomdm_jax.training.state import TrainState


def make_adapter(run: Run) -> Callable[[TrainState], TrainState]:
    """What an evaluation changes in the state before it scores: the noise range that blocks are
    trained on, or the walk of an order, once, after `train.random_steps`."""
    if run.config.objective.clip_noise:
        return _range_search(run)
    if run.generator.order.walks:
        return _trials_end(run) if run.generator.one_pass == "order" else _walk_choice(run)
    return lambda state: state


def _range_search(run: Run) -> Callable[[TrainState], TrainState]:
    """Reads validation sequences; see `evaluation.noise_range`."""
    config = run.config.eval
    spread = run.jit(noise_range.make_spread(run.generator))
    key = run.key(config.seed)
    limit = min(config.sequences or noise_range.SEQUENCES, noise_range.SEQUENCES)

    def adapt(state: TrainState) -> TrainState:
        batches = valid_batches(run, limit)
        found = noise_range.search(spread, state.ema, batches, key=key, place=run.place)
        print("noise range  {:.2f} to {:.2f}, of the least variance".format(*found), flush=True)
        return state.replace(noise_range=run.replicate(found), **_anew(run))

    return adapt


def _walk_choice(run: Run) -> Callable[[TrainState], TrainState]:
    """Reads training sequences; see `evaluation.walk_choice`."""
    config, length = run.config, run.config.data.length
    objective = objective_for(run, "order", samples=1)
    # As many draws as positions: stratified, so that every number of masks comes once.
    scorer = run.jit(likelihood.make_scorer(run.generator, objective, draws=length))
    key = run.key(config.eval.seed)

    def nats(params: Any, table: np.ndarray) -> np.ndarray:
        rows = pipeline.train_batches(run.prepared, config.eval.batch_size, config.eval.seed)
        batches = itertools.islice(rows, -(-walk_choice.SEQUENCES // config.eval.batch_size))
        params = _with_table(run, params, table)
        found = likelihood.over_batches(scorer, params, batches, key=key, place=run.place)
        return np.concatenate([terms.main + terms.order for _, terms in found])

    def adapt(state: TrainState) -> TrainState:
        walks_already = np.any(state.ema["walk_head"]["table"])
        if walks_already or int(state.step) < config.train.random_steps:
            return state
        choice = walk_choice.choose(lambda table: nats(state.ema, table))
        print(walk_choice.report(choice, length), flush=True)
        return set_walk(run, state, choice.table)

    return adapt


def _trials_end(run: Run) -> Callable[[TrainState], TrainState]:
    """Takes the walk under which the training text has cost least so far.

    The network has seen all of TRIALS alike, and what the text cost while it learned is its
    description length under each (prequential coding), which tells apart what is learned sooner.
    """

    def adapt(state: TrainState) -> TrainState:
        until = run.config.train.random_steps
        if not until or int(state.step) != until:
            return state
        nats = np.asarray(state.trials) / int(state.step)
        best = list(TRIALS)[int(np.argmin(nats))]
        scored = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(TRIALS, nats, strict=True))
        print(f"walk  {scored} nats/token so far: the order now grows {best}", flush=True)
        return set_walk(run, state, TRIALS[best])

    return adapt


def set_walk(run: Run, state: TrainState, table: np.ndarray) -> TrainState:
    """The state with this table, float32 [2, 2]; see `orders.schedule.Weights`."""
    params, ema = (_with_table(run, tree, table) for tree in (state.params, state.ema))
    return state.replace(params=params, ema=ema, **_anew(run))


def _anew(run: Run) -> dict[str, Any]:
    """The loss of what follows is another than that of what was before: see `guard.judge`."""
    return {"running_loss": run.replicate(np.zeros(3, np.float32))}


def _with_table(run: Run, params: Any, table: np.ndarray) -> Any:
    """In an array of its own, because the state is donated."""
    return params | {"walk_head": {"table": run.replicate(table)}}
