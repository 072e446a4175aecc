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


def steps(
    run: Run, optimizer: Optimizer, state: TrainState
) -> Callable[..., tuple[TrainState, Any]]:
    """The step as the loop calls it: up to `train.random_steps` that of random order."""
    until, first = run.config.train.random_steps, int(state.step)
    learned = compiled_step(run, run.generator, optimizer, state)
    if first >= until:
        return lambda number, *inputs: learned(*inputs)
    random = compiled_step(run, run.generator.at_random(), optimizer, state)
    return lambda number, *inputs: (random if number <= until else learned)(*inputs)


def compiled_step(
    run: Run | Plan, generator: Generator, optimizer: Optimizer, state: TrainState
) -> jax.stages.Compiled:
    """The training step, compiled for this state and the config's batch; takes no other shape."""
    started = time.perf_counter()
    compiled = jitted_step(run, generator, optimizer, state).lower(*shapes(run, state)).compile()
    print(f"compiled the training step in {time.perf_counter() - started:.1f} s", flush=True)
    return compiled


def model_flops(run: Run | Plan, optimizer: Optimizer, state: TrainState) -> int:
    """Floating-point operations of a step's matrix products over all devices, without what
    `model.remat` computes again; see `costs.matmul_flops`."""
    config = run.config
    if config.model.remat != "none":
        config = config.copy_and_resolve_references()
        config.model.remat = "none"
    generator = make_generator(config, run.rows, run.generator.mask_id)
    return matmul_flops(jitted_step(run, generator, optimizer, state), *shapes(run, state))


def jitted_step(
    run: Run | Plan, generator: Generator, optimizer: Optimizer, state: TrainState
) -> jax.stages.Wrapped:
    """The training step, to be compiled for the run's mesh; of the state only shapes matter."""
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
    return jax.jit(
        make_train_step(generator, objective, optimizer, config),
        in_shardings=(split, meshes.over_batch(run.mesh), copies),
        out_shardings=(split, copies),
        donate_argnums=0 if config.train.donate else (),
    )


def shapes(run: Run | Plan, state: TrainState) -> tuple[Any, ...]:
    """What the step takes: state, batch and key."""
    return state, run.batch, jax.eval_shape(lambda: jax.random.key(0))
