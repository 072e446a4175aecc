"""The training step, compiled ahead for the mesh, the state and the batch of a run."""

import time
from collections.abc import Callable
from typing import Any

import jax
from optax import GradientTransformation as Optimizer

from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import partition
from lomdm_jax.distributed.costs import matmul_flops
from lomdm_jax.generator import Generator, make_generator
from lomdm_jax.run import Plan, Run, objective_for
from lomdm_jax.training.state import TrainState
from lomdm_jax.training.step import make_train_step

Step = Callable[..., tuple[TrainState, Any]]


def steps(run: Run, optimizer: Optimizer, state: TrainState) -> tuple[Step, int]:
    """The step as the loop calls it, up to `train.random_steps` that of random order; and its
    `model_flops`, those of the learned order."""
    until, first = run.config.train.random_steps, int(state.step)
    traced = traced_step(run, run.generator, optimizer, state)
    flops, learned = model_flops(run, optimizer, state, traced), compiled(traced)
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


def model_flops(
    run: Run | Plan, optimizer: Optimizer, state: TrainState, traced: jax.stages.Traced
) -> int:
    """Floating-point operations of a step's matrix products over all devices, without what
    `model.remat` computes again; see `costs.matmul_flops`.

    traced: the step as it is.
    """
    if run.config.model.remat != "none":
        config = run.config.copy_and_resolve_references()
        config.model.remat = "none"
        generator = make_generator(config, run.rows, run.generator.mask_id)
        traced = traced_step(run, generator, optimizer, state)
    return matmul_flops(traced)


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
