"""Train, from the newest checkpoint or fresh parameters."""

import contextlib
from typing import Any

import jax

from lomdm_jax.distributed import multihost
from lomdm_jax.distributed.chips import peak
from lomdm_jax.jobs.evaluate import flat, make_evaluator
from lomdm_jax.run import Run
from lomdm_jax.trained import save
from lomdm_jax.training.adaptation import make_adapter
from lomdm_jax.training.checkpoint import Checkpoints, facts
from lomdm_jax.training.compiled import steps
from lomdm_jax.training.initial import initial
from lomdm_jax.training.loop import Loop
from lomdm_jax.training.metrics import Cost, MetricWriter
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import TrainState


def train(run: Run, resume: str = "auto") -> Any:
    """Train to the last step; the EMA parameters. resume: see `initial`."""
    config = run.config
    optimizer = make_optimizer(config.optimizer)
    with contextlib.ExitStack() as stack:  # all is written out, however the run ends
        checkpoints = Checkpoints(run.workdir / "checkpoints", config.checkpoint.keep, create=True)
        stack.callback(checkpoints.close)
        state, batches = initial(run, optimizer, checkpoints, resume)
        save_config(run)
        first = int(state.step)
        writers = {name: MetricWriter(run.workdir, name, first) for name in ("train", "eval")}
        for writer in writers.values():
            stack.callback(writer.close)
        evaluator, adapt = make_evaluator(run), make_adapter(run)

        def evaluate_now(state: TrainState) -> tuple[TrainState, float]:
            state = adapt(state)
            evaluation = evaluator(state.ema)
            low, high = (float(end) for end in state.noise_range)
            row = flat(evaluation) | {"noise_low": low, "noise_high": high}
            writers["eval"].write(int(state.step), row)
            return state, evaluation.nelbo_order.nats_per_token

        step, flops = steps(run, optimizer, state)
        loop = Loop(
            config,
            step=step,
            place=run.place_rows,
            key=run.key(config.train.seed),
            evaluate=evaluate_now,
            checkpoints=checkpoints,
            facts=facts(config, run.prepared, run.mixture),
            writer=writers["train"],
            cost=Cost(flops, peak(run.mesh)),
        )
        try:
            state = loop.run(state, batches)
        except jax.errors.JaxRuntimeError as error:
            # At once: to close would be to wait for a save that a lost process has a part in.
            multihost.abandon(error)
            raise
    if first >= config.train.steps:
        print(f"already trained to step {first}; config.train.steps asks for no more", flush=True)
        evaluator(state.ema)
    return state.ema


def save_config(run: Run) -> None:
    """Write the resolved config to `config.json`, and the tokenizer into `tokenizer`."""
    if multihost.leads():
        save(run.workdir, run.config, run.prepared.tokenizer)
