"""The blocks of a network as a loop in Python or as a scan, and what they keep for the gradient.

python benchmarks/layers.py [--topology v5e:1x1] [--layers 12,24] [--width 768] [--heads 12]
                            [--length 1024] [--batch 8] [--calls 10] [--out benchmarks]

The gradient of a stack of blocks, in bfloat16 (float32 on CPUs): seconds to compile it from
nothing, milliseconds to run it, bytes of temporaries and of memory that is read and written. With
--topology for a TPU slice that is not here, which needs libtpu, takes a minute or more per row and
leaves the run time out. All layers with model.remat=none, and the first number of them with "dots"
and "full". The table is written to layers-DEVICE.md.
"""

import argparse
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from orders_table import as_markdown

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lomdm_jax.distributed import costs, remedies, topologies
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.models.transformer import REMAT, Block, Sizes
from lomdm_jax.models.visibility import full


class Case(NamedTuple):
    """way: "loop" or "scan"; batch: sequences of `length` tokens."""

    way: str
    sizes: Sizes
    batch: int
    length: int


def program(case: Case) -> tuple[Any, Any]:
    """The gradient as a function of all blocks' parameters and of hidden states, and its inputs as
    functions of nothing."""
    sizes = case.sizes
    block = nnx.eval_shape(lambda: Block(sizes, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(block)
    cond_BD = jnp.zeros((case.batch, sizes.cond_dim))

    def through(x_BLD: jax.Array, params: Any) -> tuple[jax.Array, None]:
        block = nnx.merge(graphdef, params)
        return block(x_BLD, cond_BD, full(case.length))[0], None

    def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
        if case.way == "scan":
            return jnp.mean(jax.lax.scan(through, x_BLD, params)[0] ** 2)
        for layer in params:
            x_BLD, _ = through(x_BLD, layer)
        return jnp.mean(x_BLD**2)

    def layer(key: jax.Array) -> Any:
        return nnx.split(Block(sizes, rngs=nnx.Rngs(params=key)))[1]

    def inputs() -> tuple[Any, jax.Array]:
        keys = jax.random.split(jax.random.key(0), sizes.layers)
        params = jax.vmap(layer)(keys) if case.way == "scan" else [layer(key) for key in keys]
        return params, jnp.ones((case.batch, case.length, sizes.width))

    return jax.grad(loss, argnums=(0, 1)), inputs


def measured(case: Case, mesh: jax.sharding.Mesh, calls: int) -> list[str]:
    """A row of the table."""
    head = [str(case.sizes.layers), case.way, case.sizes.remat]
    try:
        return head + _measured(case, mesh, calls)
    except jax.errors.JaxRuntimeError as error:
        amounts = remedies.lack_of_memory(error)
        if amounts is None:
            raise
        return [*head, "", "", f"does not fit: {amounts}", ""]


def _measured(case: Case, mesh: jax.sharding.Mesh, calls: int) -> list[str]:
    gradient, inputs = program(case)
    copies = meshes.replicated(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(gradient, in_shardings=copies, out_shardings=copies)
        started = time.perf_counter()
        compiled = step.lower(*jax.eval_shape(inputs)).compile()
        seconds = time.perf_counter() - started
        run = f"{1e3 * _seconds(compiled, jax.jit(inputs)(), calls):,.1f}" if calls else ""
    memory: Any = compiled.memory_analysis()
    moved = costs.bytes_accessed(costs.parse(compiled.as_text() or ""))
    held = f"{memory.temp_size_in_bytes / 2**20:,.0f}"
    return [f"{seconds:.1f}", run, held, f"{moved / 1e9:.2f}"]


def _seconds(compiled: Any, given: Any, calls: int) -> float:
    """The median of a call; what comes first is slower."""
    took = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


def cases(options: argparse.Namespace, dtype: Any) -> list[Case]:
    depths = [int(each) for each in options.layers.split(",")]
    wanted = [(depth, "none") for depth in depths]
    wanted += [(depths[0], level) for level in REMAT if level != "none"]
    return [
        Case(
            way,
            Sizes(1, options.width, depth, options.heads, 128, 0.0, dtype, level),
            options.batch,
            options.length,
        )
        for depth, level in wanted
        for way in ("loop", "scan")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="", help="as v5e:1x1; else what is here")
    parser.add_argument("--layers", default="12,24")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topologies.topology(options.topology) if options.topology else jax.devices()[:1]
    mesh, device = meshes.make_mesh(1, devices=devices), devices[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    columns = "layers | blocks as | remat | compiled in, s | ms | MiB of temporaries | GB"
    rows = [columns.split(" | ")]
    for case in cases(options, dtype):
        rows.append(measured(case, mesh, 0 if options.topology else options.calls))
        print(*rows[-1], sep="  ", flush=True)
    shape = f"width {options.width}, {options.batch} sequences of {options.length} tokens"
    title = f"{device.device_kind}, jax {jax.__version__}, {jnp.dtype(dtype).name}, {shape}."
    name = options.topology.partition(":")[0] or device.platform
    (options.out / f"layers-{name}.md").write_text(f"{title}\n\n{as_markdown(rows)}\n")


if __name__ == "__main__":
    main()
