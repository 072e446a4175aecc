"""Whether a training step fits a machine, and how fast it should be there."""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from lomdm_jax.distributed import compile_ahead, partition, topologies
from lomdm_jax.run import plan
from lomdm_jax.training.compiled import traced_step
from lomdm_jax.training.initial import target
from lomdm_jax.training.optimizer import make_optimizer


def compile(config: ConfigDict, workdir: pathlib.Path, slice_name: str) -> compile_ahead.Report:
    """Compile the training step and print what it takes; write it to compile.json.

    slice_name: of a TPU slice that need not be here; "" for the devices that are.

    Raises:
      UserError: it does not fit; says what to change.
    """
    if slice_name:
        jax.config.update("jax_platforms", "cpu")  # for all but the compiler
        jax.config.update("jax_enable_compilation_cache", False)  # no chip, no reading it back
    planned = plan(config, topologies.topology(slice_name) if slice_name else None)
    optimizer = make_optimizer(config.optimizer)
    state = target(planned, optimizer)
    print(partition.report(planned.mesh, state), flush=True)
    with jax.set_mesh(planned.mesh):
        step = traced_step(planned, planned.generator, optimizer, state)
        report = compile_ahead.compiled_report(step, state, config, planned.mesh)
    print(compile_ahead.text(report, config))
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / f"compile{slice_name and '-'}{slice_name.replace(':', '-')}.json"
    file.write_text(json.dumps(compile_ahead.to_dict(report), indent=2) + "\n")
    print(f"wrote {file}", flush=True)
    return report
