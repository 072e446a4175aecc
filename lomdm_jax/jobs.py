"""The jobs of the command line: train, evaluate, sample, compile."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import compile_ahead, multihost, partition
from lomdm_jax.distributed.chips import peak
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import likelihood, order_statistics
from lomdm_jax.evaluation.order_report import SampleTrace, trace_rank, write_order_report
from lomdm_jax.run import Run, objective_for, plan, valid_batches
from lomdm_jax.sampling import make_sampler
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.training.adaptation import make_adapter
from lomdm_jax.training.checkpoint import Checkpoints, facts
from lomdm_jax.training.compiled import model_flops, steps, traced_step
from lomdm_jax.training.initial import fresh, initial, saved_state, target
from lomdm_jax.training.loop import Loop
from lomdm_jax.training.metrics import Cost, MetricWriter
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import TrainState

# Samples printed and replayed; all of them count in the statistics of order.
SHOWN = 3


def train(run: Run, resume: str = "auto") -> Any:
    """Train to the last step; the EMA parameters. resume: see `initial`."""
    config = run.config
    optimizer = make_optimizer(config.optimizer)
    with contextlib.ExitStack() as stack:  # all is written out, however the run ends
        checkpoints = Checkpoints(run.workdir / "checkpoints", config.checkpoint.keep, create=True)
        stack.callback(checkpoints.close)
        state, batches = initial(run, optimizer, checkpoints, resume)
        save_config(run)
        first = int(state.step)
        writers = {name: MetricWriter(run.workdir, name, first) for name in ("train", "eval")}
        for writer in writers.values():
            stack.callback(writer.close)
        evaluator, adapt = make_evaluator(run), make_adapter(run)

        def evaluate_now(state: TrainState) -> tuple[TrainState, float]:
            state = adapt(state)
            evaluation = evaluator(state.ema)
            low, high = (float(end) for end in state.noise_range)
            row = _flat(evaluation) | {"noise_low": low, "noise_high": high}
            writers["eval"].write(int(state.step), row)
            return state, evaluation.nelbo_order.nats_per_token

        step, flops = steps(run, optimizer, state)
        loop = Loop(
            config,
            step=step,
            place=run.place_rows,
            key=run.key(config.train.seed),
            evaluate=evaluate_now,
            checkpoints=checkpoints,
            facts=facts(config, run.prepared, run.mixture),
            writer=writers["train"],
            cost=Cost(flops, peak(run.mesh)),
        )
        try:
            state = loop.run(state, batches)
        except jax.errors.JaxRuntimeError as error:
            # At once: to close would be to wait for a save that a lost process has a part in.
            multihost.abandon(error)
            raise
    if first >= config.train.steps:
        print(f"already trained to step {first}; config.train.steps asks for no more", flush=True)
        evaluator(state.ema)
    return state.ema


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


def sample(run: Run) -> None:
    """Generate with the EMA parameters of a checkpoint, and draw the order."""
    write_samples(run, saved_state(run).ema)


def compile(config: ConfigDict, workdir: pathlib.Path, slice_name: str) -> compile_ahead.Report:
    """Compile the training step and print what it takes; write it to compile.json.

    slice_name: of a TPU slice that need not be here; "" for the devices that are.

    Raises:
      UserError: it does not fit; says what to change.
    """
    if slice_name:
        jax.config.update("jax_platforms", "cpu")  # for all but the compiler
        jax.config.update("jax_enable_compilation_cache", False)  # no chip, no reading it back
    planned = plan(config, compile_ahead.topology(slice_name) if slice_name else None)
    optimizer = make_optimizer(config.optimizer)
    state = target(planned, optimizer)
    print(partition.report(planned.mesh, state), flush=True)
    with jax.set_mesh(planned.mesh):
        step = traced_step(planned, planned.generator, optimizer, state)
        flops = model_flops(planned, optimizer, state, step)
        report = compile_ahead.compiled_report(step, state, config, planned.mesh, flops)
    print(compile_ahead.text(report, config))
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / f"compile{slice_name and '-'}{slice_name.replace(':', '-')}.json"
    file.write_text(json.dumps(compile_ahead.to_dict(report), indent=2) + "\n")
    print(f"wrote {file}", flush=True)
    return report


def save_config(run: Run) -> None:
    """Write the resolved config to `config.json`, and the tokenizer into `tokenizer`."""
    if not multihost.leads():
        return
    (run.workdir / "config.json").write_text(run.config.to_json(indent=2) + "\n")
    folder = run.workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    run.prepared.tokenizer.save(folder)


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
        facts = {"estimator": config.estimator, "unigram_entropy": baseline, **_flat(evaluation)}
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


def write_samples(run: Run, params: Any) -> None:
    """Generate `sample.count` sequences; write samples.jsonl, order.html and order.png."""
    samples = _generate(run, params)
    if not multihost.leads():
        return
    tokenizer = run.prepared.tokenizer
    texts = [tokenizer.decode(row.tolist()) for row in samples.tokens_BL]
    with open(run.workdir / "samples.jsonl", "w", encoding="utf-8") as file:
        for text, tokens_L, steps_L in zip(
            texts, samples.tokens_BL, samples.revealed_BL, strict=True
        ):
            record = {
                "text": text,
                "tokens": tokens_L.tolist(),
                "revealed": steps_L.tolist(),
                "calls": int(samples.calls),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for number, text in enumerate(texts[:SHOWN], start=1):
        print(f"--- sample {number} ({int(samples.calls)} network calls)\n{text}", flush=True)
    for path in _draw_order(run, samples):
        print(f"wrote {path}", flush=True)


def _generate(run: Run, params: Any) -> Samples:
    """`sample.count` sequences around the prompt and the suffix, on the host."""
    tokens_BL, given_BL = _given(run)
    key = run.key(run.config.sample.seed)
    sampler = run.jit(make_sampler(run.config.sample, run.generator))
    return jax.device_get(sampler(params, key, run.place(tokens_BL), run.place(given_BL)))


def _given(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The given tokens int32 [B, L] and where they stand, bool [B, L]."""
    config, length = run.config.sample, run.config.data.length
    tokenizer = run.prepared.tokenizer
    prompt, suffix = tokenizer.encode(config.prompt), tokenizer.encode(config.suffix)
    if run.config.objective.ignore_first and not prompt:
        prompt = [tokenizer.eos_id]  # the first position is never generated; eos precedes a text
    if len(prompt) + len(suffix) > length:
        raise UserError(
            f"config.sample.prompt ({len(prompt)} tokens) and config.sample.suffix ({len(suffix)} "
            f"tokens) do not fit in config.data.length = {length}: shorten them."
        )
    row = prompt + [0] * (length - len(prompt) - len(suffix)) + suffix
    given = np.ones(length, bool)
    given[len(prompt) : length - len(suffix)] = False
    return np.tile(np.asarray(row, np.int32), (config.count, 1)), np.tile(given, (config.count, 1))


def _draw_order(run: Run, samples: Samples) -> tuple[pathlib.Path, pathlib.Path]:
    config = run.config.sample
    pieces = run.prepared.tokenizer.pieces
    traces = [
        SampleTrace(pieces(tokens_L.tolist()), steps_L)
        for tokens_L, steps_L in zip(
            samples.tokens_BL[:SHOWN], samples.revealed_BL[:SHOWN], strict=True
        )
    ]
    notes = {
        "order": run.config.order.name,
        "sampler": config.sampler,
        "samples": str(config.count),
        "network calls": str(int(samples.calls)),
    }
    return write_order_report(
        run.workdir,
        traces,
        np.stack([trace_rank(steps_L) for steps_L in samples.revealed_BL]),
        title="The order in which the text was generated",
        notes=notes,
    )


def _flat(evaluation: likelihood.Evaluation) -> dict[str, float]:
    """One level of names, for tables."""
    row: dict[str, float] = {}
    for name in likelihood.BOUNDS:
        row |= {f"{name}_{k}": v for k, v in getattr(evaluation, name)._asdict().items()}
    counts = ("sequences", "tokens", "bytes", "draws")
    return row | evaluation.terms | {name: getattr(evaluation, name) for name in counts}
