"""Filling blanks of held-out sequences: the bound on what is hidden, and exact matches.

python benchmarks/infilling.py [--tasks 1,2,4,8,"middle word","last word"] [--limit N]
                               [options of orders.py]

Takes the runs of orders.py in the folder, trains those that are missing, and hides something of
every held-out sequence: the middle N tokens, the word in the middle, or, like LAMBADA, the last
word (of the sequences that end with a whole word). Scored is the bound (nelbo_order, the order's
own estimator) on the hidden tokens given all others, in nats per sequence: with one hidden token
every bound but that of a learned order is exact. A causal order ("ar") cannot see what stands to
the right of a blank, and on the ranked layout the surroundings are read first, in the order's own
way. Then the blank is filled with the likeliest tokens, one per network call in the order's own
way, and matches if it is the text's own.

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
    "lomdm",
    "walk",
    "lomdm-order",
    "block:4",
    "ar",
    "mdm@model.layout=ranked",
    "lomdm-ranked",
    "lomdm-ranked@objective.blank_share=0.125",
)
BASE = "mdm"
NAMES = ("nats", "match")
TASKS = "1,2,4,8,middle word,last word"
RESULTS = "infilling.npz"  # in the folder of a run


def middle(length: int, size: int) -> np.ndarray:
    """Where the middle `size` of `length` positions stand, bool [L]."""
    start, where = (length - size) // 2, np.arange(length)
    return (where >= start) & (where < start + size)


def word(first_L: np.ndarray, letter_L: np.ndarray, place: int) -> np.ndarray:
    """The word that holds the position `place`, bool [L]; nothing where it is none, or not whole.

    first_L: where words or other things start, and whether one starts behind the sequence, [L + 1];
    letter_L: where they start with a letter.
    """
    hidden_L = np.zeros(len(letter_L), bool)
    starts, ends = np.flatnonzero(first_L[: place + 1]), np.flatnonzero(first_L[place + 1 :])
    if len(starts) and len(ends) and letter_L[starts[-1]]:
        hidden_L[starts[-1] : place + 1 + ends[0]] = True
    return hidden_L


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


def hidden(run: Any, limit: int, task: str) -> Iterator[dict[str, np.ndarray]]:
    """Held-out batches of which only what the task hides is counted: the rest is given."""
    from lomdm_jax.run import valid_batches

    tokenizer, length = run.prepared.tokenizer, run.config.data.length
    pieces = tokenizer.pieces(range(tokenizer.rows))
    first_V = np.array([not piece[:1].isalnum() for piece in pieces])
    word_V = np.array([piece[:1] == " " and piece[1:2].isalpha() for piece in pieces])
    blank_V = np.array([piece == " " for piece in pieces])
    alpha_V = np.array([piece[:1].isalpha() for piece in pieces])
    batches = list(valid_batches(run, limit))
    after = [*(batch["tokens"][0, 0] for batch in batches[1:]), tokenizer.mask_id]
    for batch, behind in zip(batches, after, strict=True):
        tokens_BL = batch["tokens"]
        next_B = np.append(tokens_BL[1:, 0], behind)  # sequences follow one another in the text
        next_BL = np.column_stack([tokens_BL[:, 1:], next_B])
        first_BQ = np.column_stack([first_V[tokens_BL], first_V[next_B]])
        letter_BL = word_V[tokens_BL] | (blank_V[tokens_BL] & alpha_V[next_BL])
        if task.isdigit():
            hidden_BL = np.tile(middle(length, int(task)), (len(tokens_BL), 1))
        else:
            place = length - 1 if task == "last word" else length // 2
            pairs = zip(first_BQ, letter_BL, strict=True)
            hidden_BL = np.stack([word(first, letter, place) for first, letter in pairs])
        yield batch | {"counted": batch["counted"] & hidden_BL}


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
    """(params, batch, index [B], key) -> whether what is hidden is filled with the text, [B]."""
    import jax
    import jax.numpy as jnp

    from lomdm_jax.sampling import make_sampler
    from lomdm_jax.sampling.driver import row_keys

    eos_id, window = run.prepared.tokenizer.eos_id, run.config.data.length
    likeliest = run.config.sample.copy_and_resolve_references()
    likeliest.temperature = 0.0
    sampler = make_sampler(likeliest, run.generator, eos_id, window)

    @jax.jit
    def match(params: Any, batch: Any, index_B: jax.Array, key: jax.Array) -> jax.Array:
        keys_B = row_keys(key, index_B)
        samples = sampler(params, keys_B, batch["tokens"], ~batch["counted"])
        return jnp.all(samples.tokens_BT == batch["tokens"], axis=-1)

    return match


def measure(options: argparse.Namespace, variant: str, seed: int) -> None:
    """Nats and matches by task, float [sequences], saved in the run's folder."""
    from lomdm_jax.evaluation.likelihood import over_batches

    run, params = trained(options, variant, seed)
    functions = {"nats": (make_bound(run), "eval"), "match": (make_match(run), "sample")}
    found = {}
    for name, (function, section) in functions.items():
        key = run.key(run.config[section].seed + seed)
        for task in options.tasks:
            batches = hidden(run, options.limit, task)
            scored = over_batches(function, params, batches, key=key, place=run.place)
            found[f"{name} {task}"] = np.concatenate([b for _, b in scored]).astype(np.float64)
    np.savez(run.workdir / RESULTS, **found)


def load(options: argparse.Namespace, variant: str, task: str) -> dict[str, np.ndarray]:
    """What `measure` saved of a task, with an axis of seeds in front, [seeds, sequences]."""
    files = [np.load(workdir_of(options, variant, s) / RESULTS) for s in options.seeds]
    return {name: np.stack([file[f"{name} {task}"] for file in files]) for name in NAMES}


def compare(found: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over sequences and their errors, also of what changes from masked diffusion;
    `seeds_error` is the error of the change over the seeds."""
    row: dict[str, Any] = {}
    for name, value_EN in found.items():
        row[name], row[f"{name}_error"] = mean_error(value_EN.mean(0))
        change_EN = value_EN - base[name]
        row[f"{name}_change"], row[f"{name}_change_error"] = mean_error(change_EN.mean(0))
        row[f"{name}_change_seeds_error"] = mean_error(change_EN.mean(1))[1]
    return row


def table_of(options: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    """A row for every order and task."""
    table = []
    for variant in variants:
        for task in options.tasks:
            base, found = (load(options, name, task) for name in (BASE, variant))
            count = base["nats"].shape[-1]
            row = {"order": variant, "hidden": task, "sequences": count}
            table.append(row | compare(found, base))
    return table


def markdown(options: argparse.Namespace, table: list[dict[str, Any]], name: str, form: str) -> str:
    """The values called `name`, two columns per span."""
    counts = {row["hidden"]: row["sequences"] for row in table}
    heads = [(f"{task} ({counts[task]})", "to mdm") for task in options.tasks]
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
    about = f"held-out sequences (their number in brackets), seeds {options.seeds}"
    text = f"Nats of what is hidden, {about}:\n\n{markdown(options, table, 'nats', '.3f')}"
    text += "\nShare of blanks that are filled with the text's own words:\n\n"
    text += markdown(options, table, "match", ".3f")
    (options.folder / "infilling.md").write_text(text)
    print(text)


def main() -> None:
    parser = orders.make_parser(__doc__)
    parser.set_defaults(orders=",".join(VARIANTS))
    parser.add_argument("--tasks", default=TASKS, help="what is hidden, with commas")
    parser.add_argument("--limit", type=int, default=0, help="sequences; 0 for orders.py's number")
    options = orders.finish(parser.parse_args())
    options.tasks = options.tasks.split(",")
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
