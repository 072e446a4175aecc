"""Both bounds of a checkpoint on the validation set, and what its order is."""

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import multihost
from lomdm_jax.evaluation import likelihood, order_statistics
from lomdm_jax.evaluation.trajectories import Maker, calls, make_trajectories
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
    passport = run.prepared.passport("valid")
    scored = make_scored(run)

    def evaluator(params: Any) -> likelihood.Evaluation:
        evaluation, uncounted = scored(run, params)
        baseline = run.prepared.split("valid")["unigram_entropy"]
        facts = {"estimator": run.config.eval.estimator, "unigram_entropy": baseline}
        facts |= {k: None if math.isnan(v) else v for k, v in flat(evaluation).items()}
        facts["data"] = passport | {"uncounted_tokens": uncounted}
        if multihost.leads():
            file = run.workdir / "evaluation.json"
            file.write_text(json.dumps(facts, indent=2) + "\n")
            print(f"wrote {file}", flush=True)
        return evaluation

    return evaluator


def make_scored(first: Run) -> Callable[[Run, Any], tuple[likelihood.Evaluation, dict[str, int]]]:
    """A function of a run and parameters that scores the run's validation set and prints a report:
    the evaluation, and what was not counted, by kind. It is compiled once for all runs that have
    the model and the settings of the first, and the shapes of its batches."""
    config = first.config.eval
    objective = objective_for(first, config.estimator, samples=1)
    scorer = first.jit(likelihood.make_scorer(first.generator, objective, config.draws))
    maker = first.jit(make_trajectories(first.generator)) if config.trajectories else None
    key = first.key(config.seed)

    def scored(run: Run, params: Any) -> tuple[likelihood.Evaluation, dict[str, int]]:
        watched = _Watched(lambda: valid_batches(run, config.sequences))
        evaluation = likelihood.evaluate(
            scorer,
            params,
            watched,
            key=key,
            draws=config.draws,
            byte_lengths=run.prepared.tokenizer.byte_lengths,
            draw_error=config.draw_error,
            place=run.place,
            progress=_scored_so_far(),
            after_round=_round_of(config.draw_error),
        )
        if maker is not None:
            evaluation = _with_trajectories(run, maker, params, watched, evaluation)
        baseline = run.prepared.split("valid")["unigram_entropy"]
        print(likelihood.report(evaluation, baseline), flush=True)
        print(_describe(run.prepared.passport("valid"), watched.uncounted), flush=True)
        return evaluation, watched.uncounted

    return scored


def _with_trajectories(
    run: Run, maker: Maker, params: Any, batches: Iterable[Batch], evaluation: likelihood.Evaluation
) -> likelihood.Evaluation:
    """The evaluation with the bound of whole trajectories."""
    count, length = run.config.eval.trajectories, run.prepared.length
    passes = calls(run.generator, length, length)
    print(
        f"{count} whole trajectories of each of {evaluation.sequences:,} sequences: {passes} "
        f"network call(s) each, {count * passes * evaluation.sequences:,} passes in all",
        flush=True,
    )
    together = likelihood.importance(
        maker,
        params,
        batches,
        key=jax.random.fold_in(run.key(run.config.eval.seed), 2**31),  # no row's nor round's
        count=count,
        total_bytes=evaluation.bytes,
        place=run.place,
        progress=_scored_so_far(),
    )
    return evaluation._replace(importance=together, trajectories=count)


class _Watched:
    """Batches, from the first one in every pass; `uncounted`: of what the last pass held, what is
    not scored, by kind."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]):
        self._batches = batches
        self.uncounted = {"padding": 0, "given": 0}

    def __iter__(self) -> Iterator[Batch]:
        self.uncounted = uncounted = {"padding": 0, "given": 0}
        for batch in self._batches():
            padding_BL = batch.get("padding", np.zeros_like(batch["counted"]))
            real_B = (batch["counted"] | padding_BL).any(-1)  # a last batch is filled up
            uncounted["padding"] += int(padding_BL.sum())
            uncounted["given"] += int((~batch["counted"] & ~padding_BL)[real_B].sum())
            yield batch


def _round_of(asked: float) -> Callable[[int, float], None]:
    """Prints a line on each round of draws."""

    def show(rounds: int, error: float) -> None:
        known = "not known from one" if math.isnan(error) else f"± {error:.5f}"
        print(f"round {rounds}: draws {known}, asked ± {asked:g} nats/token", flush=True)
        if rounds == likelihood.ROUNDS and error > asked:
            print(
                f"no more rounds than {rounds}: the draws' error is above config.eval.draw_error; "
                "more config.eval.draws per round would bring it down",
                flush=True,
            )

    return show


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
    """One level of names, for tables; nan for what is not known."""
    row: dict[str, float] = {}
    unknown = likelihood.Bound(*[math.nan] * len(likelihood.Bound._fields))  # the same columns
    for name in (*likelihood.BOUNDS, "importance"):
        bound = getattr(evaluation, name) or unknown
        row |= {f"{name}_{k}": v for k, v in bound._asdict().items()}
    counts = ("sequences", "tokens", "bytes", "draws", "trajectories")
    return row | evaluation.terms | {name: getattr(evaluation, name) for name in counts}
