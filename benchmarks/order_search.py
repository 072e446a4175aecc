"""What makes a learned order pay: many ways to go on from one network, compared in pairs.

python benchmarks/order_search.py [--seeds 0,1] [--steps N] [--fork-steps M]
                                  [other options of orders.py]

Trains masked diffusion for N steps, then goes on from that very state in every way of FORKS, for M
steps more. Two runs from scratch differ by chance by as much as most of what is compared here;
forks of one state differ far less. Writes order_search.md and order_search.csv into the folder: for
each way the passes of its step over those of masked diffusion, and its held-out bound (nelbo_order,
nats per token) less that of masked diffusion that went on as well: at once (where the order has
changed but no parameter has), after as many passes, and after as many steps.
"""

import csv
import json
import pathlib
from typing import Any

import numpy as np
import orders
from orders_table import as_markdown, workdir_of

# As in orders.py: an order, and changes to its config. "walk=" names the walk to take instead of
# the one that would be chosen, "none" for no walk at all.
FORKS = (
    "mdm",
    *(f"walk@walk=to {name}" for name in ("the right", "the left", "both sides")),
    "walk@objective.temperature=1.0@objective.uniform_share=0.0",
    "walk@objective.temperature=1.0",
    "walk@objective.uniform_share=0.0",
    "walk@objective.uniform_share=0.9",
    "walk@objective.temperature=4.0",
    "genmd4",
    "lomdm",
    "lomdm@objective.name=order",
    "lomdm-order@walk=none@optimizer.head_multiplier=10.0",
    "lomdm-order",
    "lomdm-order@model.head_layers=1",
    "lomdm-order@objective.mask_samples=4@train.batch_size=8",
)
BASE = "mdm"
WHEN = ("at once", "equal passes", "equal steps")


def base_of(options: Any, seed: int) -> pathlib.Path:
    return options.folder / f"base-{seed}"


def train_base(options: Any, seed: int) -> None:
    from lomdm_jax.jobs.train import train
    from lomdm_jax.run import start

    config = orders.make_config(options, BASE, options.steps)
    config.train.seed = seed
    train(start(config, base_of(options, seed)))


def flops(run: Any, optimizer: Any, state: Any) -> tuple[Any, float]:
    """The compiled step and the compiler's count of its work."""
    from lomdm_jax.training.compiled import compiled, traced_step

    step = compiled(traced_step(run, run.generator, optimizer, state))
    return step, step.cost_analysis()["flops"]


def started(options: Any, run: Any, optimizer: Any, seed: int) -> tuple[Any, float]:
    """The base's state with what this run has besides, fresh; and the flops of a base's step."""
    import jax

    from lomdm_jax.run import start
    from lomdm_jax.training.checkpoint import Checkpoints
    from lomdm_jax.training.initial import fresh, target

    base = start(orders.make_config(options, BASE, options.steps), base_of(options, seed))
    checkpoints = Checkpoints(base.workdir / "checkpoints", 1, create=False)
    saved = checkpoints.restore(checkpoints.find("latest"), target(base, optimizer)).state
    work = flops(base, optimizer, saved)[1]
    known = dict(jax.tree.leaves_with_path(saved))
    state = fresh(run, optimizer)()
    return jax.tree.map_with_path(lambda path, leaf: known.get(path, leaf), state), work


def with_walk(run: Any, state: Any, name: str) -> Any:
    from lomdm_jax.evaluation.walk_choice import WALKS
    from lomdm_jax.training.adaptation import make_adapter, set_walk

    if not name:
        return make_adapter(run)(state)
    return set_walk(run, state, WALKS.get(name, np.zeros((2, 2), np.float32)))


def fork(options: Any, variant: str, seed: int) -> dict[str, float]:
    """Passes of a step relative to masked diffusion's, and the bound at each of WHEN."""

    from lomdm_jax.data import pipeline
    from lomdm_jax.jobs.evaluate import make_evaluator
    from lomdm_jax.run import start
    from lomdm_jax.training.optimizer import make_optimizer

    parts = variant.split("@")
    walk = "".join(part.removeprefix("walk=") for part in parts if part.startswith("walk="))
    variant = "@".join(part for part in parts if not part.startswith("walk="))
    config = orders.make_config(options, variant, options.steps)
    config.train.random_steps, config.train.seed = 0, seed
    workdir = workdir_of(options, "-".join(parts), seed)
    workdir.mkdir(parents=True, exist_ok=True)
    run = start(config, workdir)
    optimizer = make_optimizer(config.optimizer)
    state, unit = started(options, run, optimizer, seed)
    state = with_walk(run, state, walk)
    step, work = flops(run, optimizer, state)
    score = make_evaluator(run)
    batches = pipeline.train_batches(run.prepared, config.train.batch_size, seed + 1000)
    key, bounds = run.key(seed), {}
    when = [0, round(options.fork_steps * unit / work), options.fork_steps]
    for number in range(max(when) + 1):
        if number in when:
            bounds[number] = score(state.ema).nelbo_order.nats_per_token
        if number < max(when):
            state, _ = step(state, run.place(next(batches)), key)
    found = (bounds[number] for number in when)
    return {"passes": work / unit, **dict(zip(WHEN, found, strict=True))}


def write(options: Any, found: dict[str, list[dict[str, float]]]) -> None:
    names = [f"{name}, seed {seed}" for name in WHEN for seed in options.seeds]
    rows = [["way to go on", "passes", *names]]
    for variant, runs in found.items():
        cells = [
            f"{run[name] - base[name]:+.4f}"
            for name in WHEN
            for run, base in zip(runs, found[BASE], strict=True)
        ]
        rows.append([f"`{variant}`", f"{runs[0]['passes']:.2f}", *cells])
    with (options.folder / "order_search.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    text = as_markdown(rows)
    (options.folder / "order_search.md").write_text(text)
    print(text)


def main() -> None:
    parser = orders.make_parser(__doc__)
    parser.set_defaults(seeds="0,1", steps=2500, folder=orders.ROOT / "runs" / "order_search")
    parser.add_argument("--fork-steps", type=int, default=0, help="half of --steps")
    options = orders.finish(parser.parse_args())
    options.fork_steps = options.fork_steps or options.steps // 2
    if options.run:
        variant, seed = json.loads(options.run)
        print(json.dumps(fork(options, variant, seed) if variant else train_base(options, seed)))
        return

    orders.prepare(options)

    def child(variant: str, seed: int) -> Any:
        return json.loads(orders.child(options, "--run", json.dumps([variant, seed])))

    with orders.pool(options) as workers:
        list(workers.map(lambda seed: child("", seed), options.seeds))
        jobs = {v: [workers.submit(child, v, s) for s in options.seeds] for v in FORKS}
        found = {}
        for number, (variant, futures) in enumerate(jobs.items(), start=1):
            found[variant] = [future.result() for future in futures]
            print(f"{number}/{len(jobs)} {variant}", flush=True)
    write(options, found)


if __name__ == "__main__":
    main()
