"""The training step, compiled ahead for the mesh, the state and the batch of a run."""

import time
from collections.abc import Callable
from typing import Any

import jax
from optax import GradientTransformation as Optimizer

from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import partition
from lomdm_jax.distributed.costs import matmul_flops
from lomdm_jax.generator import Generator
from lomdm_jax.run import Plan, Run, objective_for
from lomdm_jax.training.state import TrainState
from lomdm_jax.training.step import make_train_step

Step = Callable[..., tuple[TrainState, Any]]


def steps(run: Run, optimizer: Optimizer, state: TrainState) -> tuple[Step, int]:
    """The step as the loop calls it, up to `train.random_steps` that of random order; and the
    FLOPs of its products without what is recomputed, those of the learned order."""
    until, first = run.config.train.random_steps, int(state.step)
    traced = traced_step(run, run.generator, optimizer, state)
    flops, learned = matmul_flops(traced, recomputed=False), compiled(traced)
    if first >= until:
        return lambda number, *inputs: learned(*inputs), flops
    random = compiled(traced_step(run, run.generator.at_random(), optimizer, state))
    return lambda number, *inputs: (random if number <= until else learned)(*inputs), flops


def compiled(traced: jax.stages.Traced) -> jax.stages.Compiled:
    """The step, compiled; it takes no other shapes than it was traced with."""
    started = time.perf_counter()
    step = traced.lower().compile()
    print(f"compiled the training step in {time.perf_counter() - started:.1f} s", flush=True)
    return step


def traced_step(
    run: Run | Plan, generator: Generator, optimizer: Optimizer, state: TrainState
) -> jax.stages.Traced:
    """The training step for the run's mesh and batch; of the state only shapes matter."""
    config = run.config
    objective = objective_for(
        run,
        config.objective.name,
        config.objective.mask_samples,
        temperature=config.objective.temperature,
        uniform_share=config.objective.uniform_share,
        blank_share=config.objective.blank_share,
        order_share=config.objective.order_share,
    )
    copies, split = meshes.replicated(run.mesh), partition.shardings(run.mesh, state)
    step = jax.jit(
        make_train_step(generator, objective, optimizer, config),
        in_shardings=(split, meshes.over_batch(run.mesh), copies),
        out_shardings=(split, copies),
        donate_argnums=0 if config.train.donate else (),
    )
    return step.trace(state, run.batch, jax.eval_shape(lambda: jax.random.key(0)))
