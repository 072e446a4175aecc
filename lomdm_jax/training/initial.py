"""Where a run begins: fresh, from the parameters of another run, or where it was."""

import pathlib
import sys
from collections.abc import Callable

import jax
import optax

from lomdm_jax.data import pipeline
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import multihost, partition
from lomdm_jax.errors import UserError
from lomdm_jax.generator import init_params
from lomdm_jax.run import Plan, Run
from lomdm_jax.training.checkpoint import (
    Checkpoints,
    Damaged,
    Restored,
    by_name,
    check_facts,
    facts,
)
from lomdm_jax.training.loop import Batches
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import TrainState, init_state


def initial(
    run: Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, resume: str
) -> tuple[TrainState, Batches]:
    """The state and the data iterator.

    resume: "auto", from the newest checkpoint that can be read, if there is any; "never"; or a
      step, whose checkpoint becomes the newest: later ones are set aside.

    Raises:
      UserError: the checkpoint is of another run or damaged, there is none of this step, or there
        are some and `resume` is "never"; the processes disagree.
    """
    config = run.config
    rows = meshes.own_rows(run.mesh, config.train.batch_size)
    batches = pipeline.train_batches(
        run.prepared, config.train.batch_size, config.train.seed, rows, run.mixture
    )
    state = jax.eval_shape(fresh(run, optimizer))
    print(partition.report(run.mesh, state), flush=True)
    asked = {"resume": resume, "jax": jax.__version__}
    multihost.agree(facts(config, run.prepared, run.mixture) | asked)
    multihost.agree({"checkpoints": checkpoints.steps()})
    restored = _restored(run, optimizer, checkpoints, resume)
    if restored is None:
        state = fresh(run, optimizer)()
        return _from_another(run, state) if config.train.start_from else state, batches
    batches.set_state(restored.data)
    print(f"continuing from step {int(restored.state.step)} of {checkpoints.folder}", flush=True)
    return restored.state, batches


def fresh(run: Run | Plan, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """A jitted function that makes the state before the first step, where it is to be."""

    def make() -> TrainState:
        key = jax.random.key(run.config.train.seed)
        return init_state(init_params(run.config, run.rows, key), optimizer)

    return jax.jit(make, out_shardings=partition.shardings(run.mesh, jax.eval_shape(make)))


def saved_state(run: Run) -> TrainState:
    """The state of the checkpoint that `checkpoint.restore` names."""
    checkpoints = Checkpoints(run.workdir / "checkpoints", run.config.checkpoint.keep, create=False)
    step = checkpoints.find(str(run.config.checkpoint.restore))
    optimizer = make_optimizer(run.config.optimizer)
    try:
        restored = _restore(run, optimizer, checkpoints, step, resume=False)
    except Damaged as error:
        raise UserError(
            f"The checkpoint of step {step} in {checkpoints.folder} is damaged ({error}). There: "
            f"{checkpoints.steps()}; choose another with config.checkpoint.restore."
        ) from error
    checkpoints.close()
    print(f"parameters: EMA at step {step} of {checkpoints.folder}", flush=True)
    return restored.state


def _restored(
    run: Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, resume: str
) -> Restored | None:
    steps = checkpoints.steps()
    if resume == "auto":
        return _newest(run, optimizer, checkpoints)
    if resume == "never":
        if steps:
            raise UserError(
                f"--resume is never, but {checkpoints.folder} has checkpoints of the steps {steps}"
                ": choose another --workdir, or move that one away."
            )
        return None
    step = checkpoints.find(resume)
    try:
        restored = _restore(run, optimizer, checkpoints, step, resume=True)
    except Damaged as error:
        remedy = f"use --resume=auto, which goes back to one that can be read; there: {steps}."
        raise UserError(f"The checkpoint of step {step} is damaged ({error}): {remedy}") from error
    for later in (other for other in steps if other > step):
        print(f"set aside: {checkpoints.set_aside(later, 'superseded_checkpoints')}", flush=True)
    return restored


def _newest(
    run: Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> Restored | None:
    """The newest checkpoint that can be read, None if there is none; damaged ones are set aside.

    Raises:
      UserError: it is of another run, or all are damaged.
    """
    damaged: list[pathlib.Path] = []
    while (step := checkpoints.latest()) is not None:
        try:
            return _restore(run, optimizer, checkpoints, step, resume=True)
        except Damaged as error:
            damaged.append(checkpoints.set_aside(step, "damaged_checkpoints"))
            print(f"the checkpoint of step {step} is damaged ({error})", file=sys.stderr)
            print(f"it is set aside in {damaged[-1]}", file=sys.stderr, flush=True)
    if damaged:
        raise UserError(
            f"All {len(damaged)} checkpoints of {checkpoints.folder} are damaged and set aside in "
            f"{damaged[-1].parent}. Mend one and move it back, or run the same command again to "
            "train anew."
        )
    return None


def _restore(
    run: Run,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    step: int,
    *,
    resume: bool,
) -> Restored:
    """The checkpoint of `step`, after making sure that it belongs to this config and data."""
    current = facts(run.config, run.prepared, run.mixture)
    check_facts(checkpoints.facts(step), current, resume=resume)
    return checkpoints.restore(step, target(run, optimizer))


def target(run: Run | Plan, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and types of the state, with the shardings it has on this mesh."""
    state = jax.eval_shape(fresh(run, optimizer))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        state,
        partition.shardings(run.mesh, state),
    )


def _from_another(run: Run, state: TrainState) -> TrainState:
    """The state with the EMA parameters of the run that `train.start_from` names; of the heads,
    those that it has in the same shape.

    Raises:
      UserError: that run has no checkpoint, or another backbone.
    """
    folder = pathlib.Path(run.config.train.start_from)
    checkpoints = Checkpoints(folder / "checkpoints", run.config.checkpoint.keep, create=False)
    step = checkpoints.find("latest")
    found = checkpoints.parameters(step, meshes.replicated(run.mesh))
    checkpoints.close()
    names, fresh_names = by_name(state.params), []
    for name, a in names.items():
        same = name in found and found[name].shape == a.shape
        if not same and name.startswith("backbone/"):
            other = f"the shape {found[name].shape}" if name in found else "none"
            raise UserError(
                f"config.train.start_from is {str(folder)!r}, which has {other} for {name}, but "
                f"this run needs {a.shape}: use the same model and tokenizer."
            )
        if not same:
            fresh_names.append(name)
    taken = [
        a if name in fresh_names else jax.device_put(found[name], a.sharding)
        for name, a in names.items()
    ]
    shown = ", ".join(fresh_names) or "nothing"
    print(f"starting from step {step} of {folder}; fresh: {shown}", flush=True)
    params = jax.tree.unflatten(jax.tree.structure(state.params), taken)
    return state.replace(params=params, ema=jax.tree.map(jax.numpy.copy, params))
