"""Our side of speed.py: what the jobs run, on the devices that are present."""

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from speed import Case, Work

from lomdm_jax.config import default_config
from lomdm_jax.distributed.costs import matmul_flops
from lomdm_jax.generator import init_params
from lomdm_jax.models.readout import Readout
from lomdm_jax.models.visibility import causal, full, ranked
from lomdm_jax.run import Plan, plan
from lomdm_jax.sampling import make_sampler
from lomdm_jax.sampling.driver import Samples, row_keys
from lomdm_jax.training.compiled import traced_step
from lomdm_jax.training.initial import fresh
from lomdm_jax.training.optimizer import make_optimizer

PRODUCT = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows and columns of the measured matrices


def dtype() -> Any:
    """CPUs have no fast bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def planned(case: Case) -> Plan:
    """The config of a case, and the model."""
    config = default_config()
    config.data.length, config.data.vocab_size = case.length, case.vocab
    config.order.name = case.name
    config.objective.name = "order"
    config.objective.mask_samples = copies(case)
    if case.name == "lomdm-ranked":
        config.objective.mask_samples = 4
    config.model.update({"width": case.width, "layers": case.layers, "heads": case.heads})
    config.model.update({"dtype": jnp.dtype(dtype()).name, "dropout": 0.0})
    config.train.batch_size = config.eval.batch_size = case.batch // copies(case)
    return plan(config)


def copies(case: Case) -> int:
    """Masked sequences that are trained of each text."""
    return 2 if case.name in ("genmd4", "lomdm", "lomdm-order") else 1


def training(case: Case) -> Work:
    made = planned(case)
    optimizer = make_optimizer(made.config.optimizer)
    rows = made.config.train.batch_size
    tokens_BL = jax.random.randint(jax.random.key(1), (rows, case.length), 0, case.vocab)
    batch = {"tokens": tokens_BL, "counted": jnp.ones(tokens_BL.shape, bool)}
    with jax.set_mesh(made.mesh):
        state = fresh(made, optimizer)()
        started = time.perf_counter()
        traced = traced_step(made, made.generator, optimizer, state)
        step = traced.lower().compile()
        seconds, held, key = time.perf_counter() - started, [state], jax.random.key(0)

    def run(calls: int) -> None:
        for _ in range(calls):
            held[0], metrics = step(held[0], batch, key)
        jax.block_until_ready(metrics)

    flops = matmul_flops(traced, recomputed=False)
    return work(run, case.batch * case.length, seconds, flops)


def sampling(case: Case) -> Work:
    made = planned(case)
    made.config.sample.update({"sampler": "ancestral", "steps": case.steps})
    sampler = make_sampler(made.config.sample, made.generator, 0, case.length)
    params = jax.jit(lambda key: init_params(made.config, made.rows, key))(jax.random.key(0))
    nothing = jnp.zeros((case.batch, case.length), jnp.int32)

    @jax.jit
    def sample(params: Any, key: jax.Array) -> Samples:
        keys_B = row_keys(key, jnp.arange(case.batch))
        return sampler(params, keys_B, nothing, nothing > 0)

    work = called(lambda key: sample(params, key), case.batch * case.length)
    found = sample(params, jax.random.key(0))
    return work._replace(calls=f"{jnp.mean(found.calls_B):.1f} a row, {found.calls} in all")


def cross_entropy(case: Case) -> Work:
    shape, rows = (1, case.batch, case.length), case.vocab + 1
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*shape, case.width), dtype())
    kernel, bias = jax.random.normal(keys[1], (case.width, rows)) / 30, jnp.zeros(rows)
    tokens = jax.random.randint(keys[2], shape, 0, rows)
    where = jax.random.bernoulli(keys[3], 0.5, shape)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(Readout(*inputs, 0.5).costs(tokens, where)[0])

    return called(lambda key: gradient(hidden, kernel, bias), where.size)


def attention(case: Case) -> Work:
    views = {"full": full, "causal": causal}
    length = case.length if case.name in views else 2 * case.length
    shape = (case.batch, length, case.heads, case.width // case.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [jax.random.normal(key, shape, dtype()) for key in keys[:3]]
    rank = jax.random.permutation(keys[3], case.length)[None]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(*heads: jax.Array) -> jax.Array:
        view = views[case.name](length) if case.name in views else ranked(rank)
        return jnp.sum(view.attend(*heads, None)[0].astype(jnp.float32) ** 2)

    return called(lambda key: gradient(*heads), case.batch * case.length)


def product(case: Case) -> Work:
    """One large product; its "tokens" are FLOPs."""
    size = PRODUCT[jax.default_backend()]
    a = jax.random.normal(jax.random.key(0), (size, size), dtype())
    multiply = jax.jit(lambda a: a @ a)
    return called(lambda key: multiply(a), 2 * size**3)


def called(function: Callable[[jax.Array], Any], tokens: int) -> Work:
    """Calls one after the other, each with a key of its own."""
    started = time.perf_counter()
    jax.block_until_ready(function(jax.random.key(0)))
    seconds, number = time.perf_counter() - started, [0]

    def run(calls: int) -> None:
        for _ in range(calls):
            number[0] += 1
            last = function(jax.random.key(number[0]))
        jax.block_until_ready(last)

    return work(run, tokens, seconds, 0)


def work(run: Any, tokens: int, seconds: float, flops: int) -> Work:
    device = jax.devices()[0]
    return Work(run, tokens, seconds, flops, device.device_kind, f"jax {jax.__version__}", memory)


def memory() -> int:
    """The most bytes that were held."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(0).ru_maxrss


def make(case: Case) -> Work:
    whats = {"cross-entropy": cross_entropy, "product": product, "attention": attention}
    return {"training": training, "sampling": sampling, **whats}[case.what](case)
