"""Every generation order on the same data: perplexity at equal steps and at equal passes.

python benchmarks/orders.py [--size cpu|gpu] [--orders mdm,ar] [--seeds 0,1,2] [--steps N]
                            [--train FILE --valid FILE] [--folder DIR]

Trains each order with each seed, one process per core (one in all on an accelerator), scores all of
them with the same code, and writes orders.md, orders.csv and orders.png into the folder. An order
may carry changes to its config: "lomdm-order@objective.temperature=4@train.random_steps=100".

A pass is one forward pass of the network over a batch of masked sequences; an order's passes per
step are the flops of its compiled step over the flops of that pass, both from XLA's cost analysis.
Steps in random order, before an order is learned, have a program and a cost of their own. At equal
passes every order has what masked diffusion ("mdm") uses in N steps. Runs that are complete in the
folder are not made again. Without files it takes the novels that lie beside the project, if they
do, and the docstrings of Python's standard library if not.
"""

import argparse
import concurrent.futures
import csv
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np

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
    from lomdm_jax.config import validate
    from lomdm_jax.main import load_config, override

    order, *changes = variant.split("@")
    config = load_config(str(ROOT / "configs" / "quickstart.py"), order)
    for key, value in SIZES[options.size].items():
        section, name = key.split(".")
        config[section][name] = value
    config.data.source, config.data.valid_source = options.train, options.valid
    config.data.directory = str(options.folder / "data")
    if order in ("genmd4", "lomdm", "lomdm-order"):  # two masked versions: half as many sequences
        config.train.batch_size //= 2
    else:
        config.objective.mask_samples = 1
    if order in ("lomdm", "cosine"):  # as in the papers
        config.objective.name = "continuous"
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


class Cost(NamedTuple):
    """random, learned: passes per step before and after step `until`."""

    until: int
    random: float
    learned: float

    def passes(self, steps: float | np.ndarray) -> Any:
        early = np.minimum(steps, self.until)
        return early * self.random + (steps - early) * self.learned

    def steps(self, passes: float) -> int:
        """The inverse of `passes`, to the nearest step."""
        early = min(passes / self.random, self.until)
        return round(early + (passes - self.passes(early)) / self.learned)


def cost_of(options: argparse.Namespace, variant: str) -> Cost:
    """What a step of this order costs; see above."""
    import jax

    from lomdm_jax import jobs
    from lomdm_jax.generator import init_params, make_generator
    from lomdm_jax.run import start
    from lomdm_jax.training.optimizer import make_optimizer

    config = make_config(options, variant, options.steps)
    run = start(config, options.folder)
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(jobs.fresh(run, optimizer), jax.random.key(0))
    random, learned = (
        jobs.compiled_step(run, generator, optimizer, state).cost_analysis()["flops"]
        for generator in (run.generator.at_random(), run.generator)
    )
    config.order.name, rows = "mdm", SIZES[options.size]["train.batch_size"]
    vocabulary = run.prepared.tokenizer.vocab_size + 1
    network = make_generator(config, vocabulary, vocabulary - 1)
    params = jax.eval_shape(lambda key: init_params(config, vocabulary, key), jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, rows, config.data.length), np.int32)
    forward = jax.jit(lambda params, z: network.reverse(params)(z, None)[0]).lower(params, z)
    unit = forward.compile().cost_analysis()["flops"]
    return Cost(config.train.random_steps, random / unit, learned / unit)


def workdir_of(options: argparse.Namespace, variant: str, seed: int) -> pathlib.Path:
    return options.folder / f"{re.sub('[^a-z0-9.]+', '-', variant)}-{seed}"


def train(options: argparse.Namespace, variant: str, seed: int, budgets: list[int]) -> None:
    """Train to each number of steps in turn, going on from the one before."""
    from lomdm_jax import jobs
    from lomdm_jax.run import start

    workdir = workdir_of(options, variant, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    started, seconds = time.perf_counter(), {}
    for steps in sorted(set(budgets)):
        config = make_config(options, variant, steps)
        config.train.seed = seed
        run = start(config, workdir)
        params = jobs.train(run)
        seconds[steps] = time.perf_counter() - started
    jobs.describe_order(run, params)
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


def evaluations(options: argparse.Namespace, variant: str, seed: int) -> dict[int, dict[str, Any]]:
    """Rows of eval.csv by step."""
    with (workdir_of(options, variant, seed) / "eval.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}


def seconds(options: argparse.Namespace, variant: str, steps: int) -> float:
    """Mean wall time to this step, with compilation and evaluations."""
    files = [workdir_of(options, variant, seed) / "seconds.json" for seed in options.seeds]
    return float(np.mean([json.loads(file.read_text())[str(steps)] for file in files]))


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan for one seed)."""
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(spread / math.sqrt(len(values)))


def score(options: argparse.Namespace, variant: str, steps: int, name: str) -> dict[str, float]:
    """Perplexity at this step and its change from masked diffusion's last one, seed by seed."""
    rows = [evaluations(options, variant, seed)[steps] for seed in options.seeds]
    mdm = [evaluations(options, "mdm", seed)[options.steps] for seed in options.seeds]
    nats, base = ([row["nelbo_order_nats_per_token"] for row in runs] for runs in (rows, mdm))
    mean, error = mean_error(nats)
    change, change_error = mean_error([a - b for a, b in zip(nats, base, strict=True)])
    return {
        f"{name}_perplexity": math.exp(mean),
        f"{name}_error": math.exp(mean) * error,
        f"{name}_change": math.expm1(change),
        f"{name}_change_error": math.exp(change) * change_error,
        f"{name}_bits_per_byte": float(np.mean([r["nelbo_order_bits_per_byte"] for r in rows])),
        f"{name}_seconds": seconds(options, variant, steps),
    }


def compare(options: argparse.Namespace, costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """One row of the table per order."""
    table = []
    for variant, cost in costs.items():
        equal = cost.steps(costs["mdm"].passes(options.steps))
        row = {"order": variant, **cost._asdict(), "equal_passes_steps": equal}
        row |= score(options, variant, options.steps, "steps")
        table.append(row | score(options, variant, equal, "passes"))
    return table


def markdown(options: argparse.Namespace, table: list[dict[str, Any]]) -> str:
    at = f"at {options.steps} steps"
    head = f"order | passes per step | {at} | to mdm | steps at equal passes | at equal passes "
    head += "| to mdm | bits/byte | wall time"
    rows = [head.split("|"), ["---"] * 9]
    for row in table:
        steps, passes = (cells(row, name) for name in ("steps", "passes"))
        first = [f"`{row['order']}`", passes_per_step(row)]
        last = [f"{row['passes_bits_per_byte']:.3f}", f"{row['passes_seconds']:.0f} s"]
        rows.append([*first, *steps, f"{row['equal_passes_steps']}", *passes, *last])
    return "".join(f"| {' | '.join(map(str.strip, row))} |\n" for row in rows)


def passes_per_step(row: dict[str, Any]) -> str:
    early = f"{row['random']:.2f}, from step {row['until']} " if row["until"] else ""
    return early + f"{row['learned']:.2f}"


def cells(row: dict[str, Any], name: str) -> list[str]:
    """Perplexity, and its change where there is one."""
    change, error = (100 * row[f"{name}_{key}"] for key in ("change", "change_error"))
    same = row["order"] == "mdm"
    perplexity = f"{row[f'{name}_perplexity']:.3f} ± {row[f'{name}_error']:.3f}"
    return [perplexity, "" if same else f"{change:+.1f}% ± {error:.1f}"]


def statistics(options: argparse.Namespace, variants: list[str]) -> str:
    """What each order is on held-out text, before and after training, averaged over the seeds."""
    from lomdm_jax.evaluation.order_statistics import CLASSES

    names = ["Kendall's tau", "velocity with confidence", *(f"rank: {name}" for name in CLASSES)]
    rows = [["order", "", *names], ["---"] * (2 + len(names))]
    for variant in variants:
        files = [workdir_of(options, variant, s) / "order_statistics.json" for s in options.seeds]
        for when in ("before", "after"):
            found = [json.loads(file.read_text())[when] for file in files]
            pick = [[f["kendall_tau"], f["velocity_confidence"]] for f in found]
            pick = [
                [*first, *f["rank_by_class"].values()] for first, f in zip(pick, found, strict=True)
            ]
            means = [[cell["mean"] for cell in column] for column in zip(*pick, strict=True)]
            rows.append([f"`{variant}`", when, *map(mean_range, means)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def mean_range(values: list[float | None]) -> str:
    """Mean of the seeds, and their range where they differ by more than rounding."""
    if None in values:
        return ""
    low, high = min(values), max(values)
    mean = f"{np.mean(values):+.2f}"
    return mean if high - low < 0.02 else f"{mean} ({low:+.2f} to {high:+.2f})"


def write(options: argparse.Namespace, costs: dict[str, Cost]) -> None:
    """orders.csv, orders.md and orders.png."""
    table = compare(options, costs)
    with (options.folder / "orders.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    text = markdown(options, table) + "\n" + statistics(options, list(costs))
    (options.folder / "orders.md").write_text(text)
    print(text)
    draw(options, costs)


def draw(options: argparse.Namespace, costs: dict[str, Cost]) -> None:
    """Held-out bound against steps and against passes, a line per order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (variant, cost) in enumerate(costs.items()):
        runs = [evaluations(options, variant, seed) for seed in options.seeds]
        steps = np.array(sorted(runs[0]))
        nats = np.mean([[run[s]["nelbo_order_nats_per_token"] for s in steps] for run in runs], 0)
        label, line = variant.replace("@", "\n  "), "-" if number < 10 else "--"
        style = {"color": f"C{number % 10}", "ls": line, "label": label}
        left.plot(steps, nats, "o", ms=3, **style)
        right.plot(cost.passes(steps) / 1000, nats, "o", ms=3, **style)
    left.set(xlabel="steps", ylabel="nelbo_order, held out (nats per token)")
    right.set(xlabel="thousand forward passes")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.folder / "orders.png", dpi=150)


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
