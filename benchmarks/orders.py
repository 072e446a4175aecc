"""Every generation order on the same data: perplexity at equal steps and at equal passes.

python benchmarks/orders.py [--size cpu|gpu] [--orders mdm,ar] [--seeds 0,1,2] [--steps N]
                            [--train FILE --valid FILE] [--folder DIR]

Trains each order with each seed, one process per core (one in all on an accelerator), scores all of
them with the same code, and writes orders.md, orders.csv and orders.png into the folder. An order
may carry changes to its config: "lomdm-order@objective.temperature=4@train.random_steps=100".

A pass is one forward pass of the network over a batch of masked sequences; an order's passes per
step are the flops of the matrix products of its step over those of that pass
(`distributed.costs`); what draws a walk has none, and is in the wall time only. Steps in random
order, before an order is learned, have a program and a cost of their own. At equal passes every
order has what masked diffusion ("mdm") uses in N steps. Runs that are complete in the folder are
not made again. Without files it takes the novels that lie beside the project, if they do, and the
docstrings of Python's standard library if not.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
from orders_table import Cost, workdir_of, write

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NOVELS = ROOT.parent / "shared" / "data" / "novels"
ORDERS = (
    *("ar", "r2l", "permutation:0", "block:4", "block:8", "block:16"),
    *("mdm", "mdm@order.exponent=2.0@objective.name=continuous", "cosine"),
    *("genmd4", "lomdm", "walk", "lomdm-order"),
)
SIZES = {
    # Small against its budget, so that the network is near what it can learn, as in long runs.
    "cpu": {
        "train.steps": 5000,
        "data.vocab_size": 320,
        "data.length": 32,
        "model.width": 32,
        "model.heads": 2,
        "model.layers": 2,
        "train.batch_size": 32,
        "optimizer.learning_rate": 2e-3,  # twice that: worse, and three times the spread of seeds
        "eval.sequences": 512,
        "eval.draws": 16,
    },
    "gpu": {
        "train.steps": 40_000,
        "data.vocab_size": 8192,
        "data.length": 128,
        "model.width": 512,
        "model.heads": 8,
        "model.layers": 8,
        "model.dtype": "bfloat16",
        "train.batch_size": 256,
        "optimizer.learning_rate": 6e-4,
        "optimizer.warmup_steps": 1000,
        "eval.sequences": 2048,
        "eval.draws": 32,
    },
}
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def make_config(options: argparse.Namespace, variant: str, steps: int) -> Any:
    """The config of one run: the same for all orders but for what the order is trained with."""
    from lomdm_jax.config import override, validate
    from lomdm_jax.main import load_config

    order, *changes = variant.split("@")
    config = load_config(str(ROOT / "configs" / "quickstart.py"), order)
    for key, value in SIZES[options.size].items():
        section, name = key.split(".")
        config[section][name] = value
    if options.train == "stdlib":  # has more characters than the novels
        config.data.vocab_size = max(config.data.vocab_size, 512)
    config.data.source, config.data.valid_source = options.train, options.valid
    config.data.directory = str(options.folder / "data")
    if order in ("genmd4", "lomdm", "lomdm-order"):  # two masked versions: half as many sequences
        config.train.batch_size //= 2
    elif order != "lomdm-ranked":
        config.objective.mask_samples = 1
    if order in ("lomdm", "cosine"):  # as in the papers
        config.objective.name = "continuous"
    if order == "lomdm-ranked":
        config.train.random_steps = options.steps // 10
    if order in ("walk", "lomdm-order"):
        config.train.random_steps = options.steps // 2
        config.model.head_layers = 0  # a block would be half as large as the CPU size's network
    config.train.steps, config.train.eval_every = steps, options.steps // 8
    config.train.log_every = config.checkpoint.every = options.steps // 8
    for change in changes:
        key, _, value = change.partition("=")
        override(config, key, value)
    validate(config)
    return config


def prepare(options: argparse.Namespace) -> None:
    """Make the data before several processes ask for it."""
    from lomdm_jax.data.prepare import prepare

    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(make_config(options, "mdm", options.steps).data)


def cost_of(options: argparse.Namespace, variant: str) -> Cost:
    """What a step of this order costs; see above."""
    import jax

    from lomdm_jax.distributed.costs import matmul_flops
    from lomdm_jax.generator import init_params, make_generator
    from lomdm_jax.run import start
    from lomdm_jax.training.compiled import traced_step
    from lomdm_jax.training.initial import target
    from lomdm_jax.training.optimizer import make_optimizer

    config = make_config(options, variant, options.steps)
    run = start(config, options.folder)
    optimizer = make_optimizer(config.optimizer)
    state = target(run, optimizer)
    random, learned = (
        matmul_flops(traced_step(run, generator, optimizer, state))
        for generator in (run.generator.at_random(), run.generator)
    )
    config.order.name, config.model.layout = "mdm", "own"
    rows = SIZES[options.size]["train.batch_size"]
    vocabulary = run.prepared.tokenizer.vocab_size + 1
    network = make_generator(config, vocabulary, vocabulary - 1)
    params = jax.eval_shape(lambda key: init_params(config, vocabulary, key), jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, rows, config.data.length), np.int32)
    forward = jax.jit(lambda params, z: network.reverse(params)(z, None)[0].logits)
    unit = matmul_flops(forward.trace(params, z))
    return Cost(config.train.random_steps, random / unit, learned / unit)


def train(options: argparse.Namespace, variant: str, seed: int, budgets: list[int]) -> None:
    """Train to each number of steps in turn, going on from the one before."""
    from lomdm_jax.jobs.evaluate import describe_order
    from lomdm_jax.jobs.train import train as run_training
    from lomdm_jax.run import start

    workdir = workdir_of(options, variant, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    started, seconds = time.perf_counter(), {}
    for steps in sorted(set(budgets)):
        config = make_config(options, variant, steps)
        config.train.seed = seed
        run = start(config, workdir)
        params = run_training(run)
        seconds[steps] = time.perf_counter() - started
    describe_order(run, params)
    (workdir / "seconds.json").write_text(json.dumps(seconds))


def child(options: argparse.Namespace, *arguments: str) -> str:
    """Run this script with `arguments` in a process of its own; what it printed last."""
    command = [sys.executable, *sys.argv, *arguments]
    environment = os.environ | ({"XLA_FLAGS": ONE_CORE} if options.size == "cpu" else {})
    if "--run" in arguments:  # seeds share their programs
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(options.folder.absolute() / "compiled")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout.splitlines()[-1] if result.stdout else ""


def one(options: argparse.Namespace, variant: str, seed: int, budgets: list[int]) -> str:
    """One run in a process of its own, unless it is complete; its name."""
    if not (workdir_of(options, variant, seed) / "seconds.json").exists():
        child(options, "--run", json.dumps([variant, seed, budgets]))
    return f"{variant}, seed {seed}"


def count_passes(options: argparse.Namespace, variants: list[str]) -> dict[str, Cost]:
    """By variant, in processes of their own."""

    def count(variant: str) -> Cost:
        return Cost(*json.loads(child(options, "--passes", variant)))

    with pool(options) as workers:
        return dict(zip(variants, workers.map(count, variants), strict=True))


def run_all(options: argparse.Namespace, costs: dict[str, Cost]) -> None:
    """Every variant with every seed, as many at a time as there are workers."""
    started = time.perf_counter()
    with pool(options) as workers:
        jobs = [
            workers.submit(one, options, variant, seed, budgets)
            for seed in options.seeds
            for variant, cost in costs.items()
            for budgets in [[options.steps, cost.steps(costs["mdm"].passes(options.steps))]]
        ]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
            passed = (time.perf_counter() - started) / 60
            left = passed * (len(jobs) - number) / number
            print(f"{number}/{len(jobs)} {job.result()}: {left:.0f} min left", flush=True)


def pool(options: argparse.Namespace) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() if options.size == "cpu" else 1)


def make_parser(doc: str) -> argparse.ArgumentParser:
    novels = NOVELS.is_dir()
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=0)
    found = [str(NOVELS / name) for name in ("novels_train.jsonl.xz", "novels_valid.jsonl")]
    parser.add_argument("--train", default=found[0] if novels else "stdlib")
    parser.add_argument("--valid", default=found[1] if novels else "")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "orders")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


def finish(options: argparse.Namespace) -> argparse.Namespace:
    """Options as parsed, with what follows from them."""
    options.steps = options.steps or SIZES[options.size]["train.steps"]
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    return options


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--passes", help=argparse.SUPPRESS)
    options = finish(parser.parse_args())
    if options.passes:
        print(json.dumps(cost_of(options, options.passes)))
    elif options.run:
        train(options, *json.loads(options.run))
    else:
        prepare(options)
        costs = count_passes(options, list(dict.fromkeys(["mdm", *options.orders.split(",")])))
        print("passes per step:", {k: round(c.learned, 2) for k, c in costs.items()}, flush=True)
        run_all(options, costs)
        write(options, costs)


if __name__ == "__main__":
    main()
