"""Filling the middle of held-out sequences: the bound on what is hidden, and exact matches.

python benchmarks/infilling.py [--spans 1,2,4,8] [--limit N] [options of orders.py]

Takes the runs of orders.py in the folder, trains those that are missing, and hides the middle of
every held-out sequence. Scored is the bound (nelbo_order, the order's own estimator) on the hidden
tokens given all others, in nats per hidden token: with one hidden token every bound but that of a
learned order is exact. A causal order ("ar") cannot see what stands to the right of the middle, and
on the ranked layout the surroundings are read first, in the order's own way. Then the middle is
sampled once per sequence, one token per network call ("race", which is exact), and matches if it is
the text's own.

All orders have the same sequences, so they are compared with masked diffusion ("mdm") sequence by
sequence: first the mean over the seeds, then the mean over the sequences and its standard error.
That of the seeds' own means is in the table of values besides. Writes infilling.md and
infilling.csv into the folder.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orders
from orders_table import as_markdown, mean_error, workdir_of

VARIANTS = (
    "mdm",
    "ar",
    "mdm@model.layout=ranked",
    "lomdm-ranked",
    "lomdm-ranked@objective.blank_share=0.125",
)
BASE = "mdm"
RESULTS = "infilling.npz"  # in the folder of a run


def middle(length: int, size: int) -> np.ndarray:
    """Where the middle `size` of `length` positions stand, bool [L]."""
    start, where = (length - size) // 2, np.arange(length)
    return (where >= start) & (where < start + size)


def trained(options: argparse.Namespace, variant: str, seed: int) -> tuple[Any, Any]:
    """A run of orders.py, made first if it is not there, and its EMA parameters."""
    from lomdm_jax.run import start
    from lomdm_jax.training.initial import saved_state

    workdir = workdir_of(options, variant, seed)
    if not (workdir / "seconds.json").exists():
        orders.train(options, variant, seed, [options.steps])
    config = orders.make_config(options, variant, options.steps)
    config.train.seed = seed
    run = start(config, workdir)
    return run, saved_state(run).ema


def hidden(run: Any, limit: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Held-out batches of which only the middle `size` tokens are counted: the rest is given."""
    from lomdm_jax.run import valid_batches

    span_L = middle(run.config.data.length, size)
    for batch in valid_batches(run, limit):
        yield batch | {"counted": batch["counted"] & span_L}


def make_bound(run: Any) -> Callable[..., Any]:
    """(params, batch, index [B], key) -> nats of what is hidden in each row, [B]."""
    import jax

    from lomdm_jax.evaluation import likelihood
    from lomdm_jax.run import objective_for

    objective = objective_for(run, run.config.eval.estimator, samples=1)
    scorer = likelihood.make_scorer(run.generator, objective, run.config.eval.draws)

    @jax.jit
    def bound(*inputs: Any) -> jax.Array:
        terms = scorer(*inputs)
        return terms.main + terms.order + terms.reconstruction

    return bound


def make_match(run: Any) -> Callable[..., Any]:
    """(params, batch, index [B], key) -> whether a sample of what is hidden is the text, [B]."""
    import jax
    import jax.numpy as jnp

    from lomdm_jax.sampling import make_sampler
    from lomdm_jax.sampling.driver import row_keys

    eos_id, window = run.prepared.tokenizer.eos_id, run.config.data.length
    sampler = make_sampler(run.config.sample, run.generator, eos_id, window)

    @jax.jit
    def match(params: Any, batch: Any, index_B: jax.Array, key: jax.Array) -> jax.Array:
        keys_B = row_keys(key, index_B)
        samples = sampler(params, keys_B, batch["tokens"], ~batch["counted"])
        return jnp.all(samples.tokens_BT == batch["tokens"], axis=-1)

    return match


def measure(options: argparse.Namespace, variant: str, seed: int) -> None:
    """Nats per hidden token and matches, float [spans, sequences], saved in the run's folder."""

    from lomdm_jax.evaluation.likelihood import over_batches

    run, params = trained(options, variant, seed)
    functions = {"nats": (make_bound(run), "eval"), "match": (make_match(run), "sample")}
    found = {}
    for name, (function, section) in functions.items():
        key = run.key(run.config[section].seed + seed)
        rows = []
        for size in options.spans:
            batches = hidden(run, options.limit, size)
            scored = over_batches(function, params, batches, key=key, place=run.place)
            rows.append(np.concatenate([found_B for _, found_B in scored]))
        found[f"{name}_SN"] = np.stack(rows).astype(np.float64)
    found["nats_SN"] /= np.array(options.spans)[:, None]
    np.savez(run.workdir / RESULTS, **found)


def load(options: argparse.Namespace, variant: str) -> dict[str, np.ndarray]:
    """What `measure` saved, with an axis of seeds in front, [seeds, spans, sequences]."""
    files = [np.load(workdir_of(options, variant, s) / RESULTS) for s in options.seeds]
    return {name: np.stack([file[f"{name}_SN"] for file in files]) for name in ("nats", "match")}


def compare(found: dict[str, np.ndarray], base: dict[str, np.ndarray], span: int) -> dict[str, Any]:
    """Means over sequences and their errors, of one span by its index, also of what changes from
    masked diffusion; `seeds_error` is the error of the change over the seeds."""
    row: dict[str, Any] = {}
    for name, values in found.items():
        value_EN, base_EN = values[:, span], base[name][:, span]
        row[name], row[f"{name}_error"] = mean_error(value_EN.mean(0))
        change_EN = value_EN - base_EN
        row[f"{name}_change"], row[f"{name}_change_error"] = mean_error(change_EN.mean(0))
        row[f"{name}_change_seeds_error"] = mean_error(change_EN.mean(1))[1]
    return row


def table_of(options: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    """A row for every order and span."""
    base = load(options, BASE)
    count = base["nats"].shape[-1]
    return [
        {"order": variant, "hidden": size, "sequences": count, **compare(found, base, number)}
        for variant in variants
        for found in [load(options, variant)]
        for number, size in enumerate(options.spans)
    ]


def markdown(options: argparse.Namespace, table: list[dict[str, Any]], name: str, form: str) -> str:
    """The values called `name`, two columns per span."""
    heads = [(f"{size} hidden", "to mdm") for size in options.spans]
    rows = {row["order"]: [f"`{row['order']}`"] for row in table}
    for row in table:
        change = f"{row[f'{name}_change']:+{form}} ± {row[f'{name}_change_error']:{form}}"
        value = f"{row[name]:{form}} ± {row[f'{name}_error']:{form}}"
        rows[row["order"]] += [value, "" if row["order"] == BASE else change]
    return as_markdown([["order", *(cell for pair in heads for cell in pair)], *rows.values()])


def write(options: argparse.Namespace, variants: list[str]) -> None:
    """infilling.csv and infilling.md."""
    table = table_of(options, variants)
    with (options.folder / "infilling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    about = f"{table[0]['sequences']} held-out sequences, seeds {options.seeds}"
    text = f"Nats per hidden token, {about}:\n\n{markdown(options, table, 'nats', '.4f')}"
    text += "\nShare of sampled middles that are the text's own:\n\n"
    text += markdown(options, table, "match", ".4f")
    (options.folder / "infilling.md").write_text(text)
    print(text)


def main() -> None:
    parser = orders.make_parser(__doc__)
    parser.set_defaults(orders=",".join(VARIANTS))
    parser.add_argument("--spans", default="1,2,4,8", help="hidden tokens")
    parser.add_argument("--limit", type=int, default=0, help="sequences; 0 for orders.py's number")
    options = orders.finish(parser.parse_args())
    options.spans = [int(size) for size in options.spans.split(",")]
    options.limit = options.limit or orders.SIZES[options.size]["eval.sequences"]
    if options.run:
        measure(options, *json.loads(options.run))
        return

    def child(variant: str, seed: int) -> str:
        orders.child(options, "--run", json.dumps([variant, seed]))
        return f"{variant}, seed {seed}"

    orders.prepare(options)
    variants = list(dict.fromkeys([BASE, *options.orders.split(",")]))
    with orders.pool(options) as workers:
        jobs = [workers.submit(child, v, seed) for seed in options.seeds for v in variants]
        for number, job in enumerate(jobs, start=1):
            print(f"{number}/{len(jobs)} {job.result()}", flush=True)
    write(options, variants)


if __name__ == "__main__":
    main()
