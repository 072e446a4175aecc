"""Both bounds of a checkpoint on the validation set, and what its order is."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import multihost
from lomdm_jax.evaluation import likelihood, order_statistics
from lomdm_jax.run import Run, objective_for, valid_batches
from lomdm_jax.training.initial import fresh, saved_state
from lomdm_jax.training.optimizer import make_optimizer


def evaluate(run: Run) -> None:
    """Score the validation set with the EMA parameters of a checkpoint, and describe the order."""
    params = saved_state(run).ema
    run = run._replace(workdir=_report_folder(run))
    make_evaluator(run)(params)
    describe_order(run, params)


def _report_folder(run: Run) -> pathlib.Path:
    """The run's folder; for other text than it was evaluated on before, one of that text in it."""
    file, sha256 = run.workdir / "evaluation.json", run.prepared.passport("valid")["sha256"]
    report = json.loads(file.read_text()) if file.exists() else {}
    known = report.get("data", {}).get("sha256", sha256)  # an older report has none
    folder = run.workdir if known == sha256 else run.workdir / run.prepared.folder.name
    folder.mkdir(exist_ok=True)
    return folder


def make_evaluator(run: Run) -> Callable[[Any], likelihood.Evaluation]:
    """A function of the parameters that scores the validation set, prints and saves the report."""
    config = run.config.eval
    objective = objective_for(run, config.estimator, samples=1)
    scorer = run.jit(likelihood.make_scorer(run.generator, objective, config.draws))
    passport = run.prepared.passport("valid")
    baseline = run.prepared.split("valid")["unigram_entropy"]
    key = run.key(config.seed)

    def evaluator(params: Any) -> likelihood.Evaluation:
        uncounted = {"padding": 0, "given": 0}
        evaluation = likelihood.evaluate(
            scorer,
            params,
            _watched(valid_batches(run, config.sequences), uncounted),
            key=key,
            draws=config.draws,
            byte_lengths=run.prepared.tokenizer.byte_lengths,
            place=run.place,
            progress=_scored_so_far(),
        )
        print(likelihood.report(evaluation, baseline), flush=True)
        print(_describe(passport, uncounted), flush=True)
        facts = {"estimator": config.estimator, "unigram_entropy": baseline, **flat(evaluation)}
        facts["data"] = passport | {"uncounted_tokens": uncounted}
        if multihost.leads():
            file = run.workdir / "evaluation.json"
            file.write_text(json.dumps(facts, indent=2) + "\n")
            print(f"wrote {file}", flush=True)
        return evaluation

    return evaluator


def _watched(batches: Iterator[Batch], uncounted: dict[str, int]) -> Iterator[Batch]:
    """The batches; of what they hold, what is not scored is counted by kind as they pass."""
    for batch in batches:
        padding_BL = batch.get("padding", np.zeros_like(batch["counted"]))
        real_B = (batch["counted"] | padding_BL).any(-1)  # a last batch is filled up
        uncounted["padding"] += int(padding_BL.sum())
        uncounted["given"] += int((~batch["counted"] & ~padding_BL)[real_B].sum())
        yield batch


def _describe(passport: dict[str, Any], uncounted: dict[str, int]) -> str:
    """A line on what was scored."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in uncounted.items())
    return (
        f"data: {passport['source']}, {passport['split']}: {passport['blocks']:,} blocks of "
        f"{passport['length']}, SHA-256 {passport['sha256'][:12]}; not counted: {kinds} tokens"
    )


def describe_order(run: Run, params: Any) -> None:
    """Print the order's statistics on validation text, before training and with `params`; write
    order_statistics.json and order_statistics.png."""
    config = run.config
    objective = objective_for(run, config.eval.estimator, samples=1)
    draw = run.jit(order_statistics.make_draw(run.generator, objective))
    limit = config.eval.sequences or order_statistics.SEQUENCES

    def measure(params: Any) -> order_statistics.Statistics:
        return order_statistics.measure(
            draw,
            params,
            valid_batches(run, min(limit, order_statistics.SEQUENCES)),
            key=run.key(config.eval.seed),
            pieces=run.prepared.tokenizer.pieces,
            place=run.place,
        )

    before = measure(fresh(run, make_optimizer(config.optimizer))().params)
    after = measure(params)
    print(order_statistics.report(before, after), flush=True)
    if not multihost.leads():
        return
    for path in order_statistics.write(run.workdir, before, after, config.order.name):
        print(f"wrote {path}", flush=True)


def _scored_so_far() -> Callable[[int], None]:
    """Prints the number of sequences scored, at most every ten seconds."""
    shown = time.perf_counter()

    def show(sequences: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown >= 10:
            shown = time.perf_counter()
            print(f"scored {sequences:,} sequences", flush=True)

    return show


def flat(evaluation: likelihood.Evaluation) -> dict[str, float]:
    """One level of names, for tables."""
    row: dict[str, float] = {}
    for name in likelihood.BOUNDS:
        row |= {f"{name}_{k}": v for k, v in getattr(evaluation, name)._asdict().items()}
    counts = ("sequences", "tokens", "bytes", "draws")
    return row | evaluation.terms | {name: getattr(evaluation, name) for name in counts}
