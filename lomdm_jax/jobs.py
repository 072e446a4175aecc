"""The jobs of the command line: train, evaluate, sample."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from lomdm_jax.data import pipeline
from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import likelihood, order_statistics
from lomdm_jax.evaluation.order_report import SampleTrace, trace_rank, write_order_report
from lomdm_jax.generator import Generator, init_params
from lomdm_jax.run import Run, objective_for, valid_batches
from lomdm_jax.sampling import make_sampler
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.training.adaptation import make_adapter
from lomdm_jax.training.checkpoint import Checkpoints, Restored, by_name, check_facts, facts
from lomdm_jax.training.loop import Batches, Loop
from lomdm_jax.training.metrics import MetricWriter
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import TrainState, init_state
from lomdm_jax.training.step import make_train_step

# Samples printed and replayed; all of them count in the statistics of order.
SHOWN = 3


def train(run: Run) -> Any:
    """Train to the last step, from the newest checkpoint if there is one; the EMA parameters."""
    config = run.config
    optimizer = make_optimizer(config.optimizer)
    with contextlib.ExitStack() as stack:  # all is written out, however the run ends
        checkpoints = Checkpoints(run.workdir / "checkpoints", config.checkpoint.keep, create=True)
        stack.callback(checkpoints.close)
        state, batches = _initial(run, optimizer, checkpoints)
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

        loop = Loop(
            config,
            step=_steps(run, optimizer, state),
            place=run.place,
            replicate=run.replicate,
            evaluate=evaluate_now,
            checkpoints=checkpoints,
            facts=facts(config, run.prepared, run.mixture),
            writer=writers["train"],
        )
        state = loop.run(state, batches)
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


def save_config(run: Run) -> None:
    """Write the resolved config to `config.json`, and the tokenizer into `tokenizer`."""
    (run.workdir / "config.json").write_text(run.config.to_json(indent=2) + "\n")
    folder = run.workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    run.prepared.tokenizer.save(folder)


def make_evaluator(run: Run) -> Callable[[Any], likelihood.Evaluation]:
    """A function of the parameters that scores the validation set, prints and saves the report."""
    config = run.config.eval
    objective = objective_for(run, config.estimator, samples=1)
    scorer = jax.jit(likelihood.make_scorer(run.generator, objective, config.draws))
    passport = run.prepared.passport("valid")
    baseline = run.prepared.split("valid")["unigram_entropy"]
    key = run.replicate(jax.random.key(config.seed))

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
    draw = jax.jit(order_statistics.make_draw(run.generator, objective))
    limit = config.eval.sequences or order_statistics.SEQUENCES

    def measure(params: Any) -> order_statistics.Statistics:
        return order_statistics.measure(
            draw,
            params,
            valid_batches(run, min(limit, order_statistics.SEQUENCES)),
            key=run.replicate(jax.random.key(config.eval.seed)),
            pieces=run.prepared.tokenizer.pieces,
            place=run.place,
        )

    start = jax.jit(_parameters(run), out_shardings=meshes.replicated(run.mesh))
    before = measure(start(jax.random.key(config.train.seed)))
    after = measure(params)
    print(order_statistics.report(before, after), flush=True)
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


def _steps(
    run: Run, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[..., tuple[TrainState, Any]]:
    """The step as the loop calls it: up to `train.random_steps` that of random order."""
    until, first = run.config.train.random_steps, int(state.step)
    learned = compiled_step(run, run.generator, optimizer, state)
    if first >= until:
        return lambda number, *inputs: learned(*inputs)
    random = compiled_step(run, run.generator.at_random(), optimizer, state)
    return lambda number, *inputs: (random if number <= until else learned)(*inputs)


def compiled_step(
    run: Run, generator: Generator, optimizer: optax.GradientTransformation, state: TrainState
) -> jax.stages.Compiled:
    """The training step, compiled for this state and the config's batch; takes no other shape."""
    config, started = run.config, time.perf_counter()
    objective = objective_for(
        run,
        config.objective.name,
        config.objective.mask_samples,
        temperature=config.objective.temperature,
        uniform_share=config.objective.uniform_share,
        blank_share=config.objective.blank_share,
        order_share=config.objective.order_share,
    )
    copies = meshes.replicated(run.mesh)
    step = jax.jit(
        make_train_step(generator, objective, optimizer, config),
        in_shardings=(copies, meshes.over_batch(run.mesh), copies),
        out_shardings=copies,
        donate_argnums=0,
    )
    rows = np.zeros((config.train.batch_size, config.data.length), np.int32)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), pipeline.as_batch(run.prepared, rows)
    )
    compiled = step.lower(state, batch, jax.random.key(0)).compile()
    print(f"compiled the training step in {time.perf_counter() - started:.1f} s", flush=True)
    return compiled


def _initial(
    run: Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, Batches]:
    """The state and the data iterator: fresh, or those of the newest checkpoint."""
    config = run.config
    batches = pipeline.train_batches(
        run.prepared, config.train.batch_size, config.train.seed, mixture=run.mixture
    )
    restored = _newest(run, optimizer, checkpoints)
    if restored is None:
        state = fresh(run, optimizer)(jax.random.key(config.train.seed))
        return _from_another(run, state) if config.train.start_from else state, batches
    batches.set_state(restored.data)
    print(f"continuing from step {int(restored.state.step)} of {checkpoints.folder}", flush=True)
    return restored.state, batches


def _newest(
    run: Run, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> Restored | None:
    """The newest checkpoint that can be read, None if there is none; damaged ones are set aside.

    Raises:
      UserError: it is of another run, or all are damaged.
    """
    damaged: list[pathlib.Path] = []
    while (step := checkpoints.latest()) is not None:
        try:
            return _restore(run, optimizer, checkpoints, step, resume=True)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # nothing is wrong with the files
        except Exception as error:  # what a damaged file gives is as various as the files
            damaged.append(checkpoints.set_aside(step))
            reason = f"{error}".splitlines()[0][:200]
            print(f"the checkpoint of step {step} is damaged ({reason})", file=sys.stderr)
            print(f"it is set aside in {damaged[-1]}", file=sys.stderr, flush=True)
    if damaged:
        raise UserError(
            f"All {len(damaged)} checkpoints of {checkpoints.folder} are damaged and set aside in "
            f"{damaged[-1].parent}. Mend one and move it back, or run the same command again to "
            "train anew."
        )
    return None


def _from_another(run: Run, state: TrainState) -> TrainState:
    """The state with the EMA parameters of the run that `train.start_from` names; of the heads,
    those that it has in the same shape.

    Raises:
      UserError: that run has no checkpoint, or another backbone.
    """
    folder = pathlib.Path(run.config.train.start_from)
    checkpoints = Checkpoints(folder / "checkpoints", run.config.checkpoint.keep, create=False)
    step, everywhere = checkpoints.find("latest"), meshes.replicated(run.mesh)
    found = checkpoints.parameters(step, everywhere)
    checkpoints.close()
    names, fresh_names = by_name(state.params), []
    for name, a in names.items():
        same = name in found and found[name].shape == a.shape
        if not same and name.startswith("backbone/"):
            other = f"the shape {found[name].shape}" if name in found else "none"
            raise UserError(
                f"config.train.start_from is {str(folder)!r}, which has {other} for {name}, but "
                f"this run needs {a.shape}: use the same model and tokenizer."
            )
        if not same:
            fresh_names.append(name)
    taken = [a if name in fresh_names else found[name] for name, a in names.items()]
    fresh = ", ".join(fresh_names) or "nothing"
    print(f"starting from step {step} of {folder}; fresh: {fresh}", flush=True)
    params = jax.tree.unflatten(jax.tree.structure(state.params), taken)
    return state.replace(params=params, ema=jax.tree.map(jax.numpy.copy, params))


def fresh(run: Run, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    """A jitted function from a key to the state before the first step."""
    params = _parameters(run)
    return jax.jit(
        lambda key: init_state(params(key), optimizer), out_shardings=meshes.replicated(run.mesh)
    )


def _parameters(run: Run) -> Callable[[jax.Array], Any]:
    """From a key to parameters before the first step."""
    rows = run.prepared.tokenizer.rows
    return lambda key: init_params(run.config, rows, key)


def _restore(
    run: Run,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    step: int,
    *,
    resume: bool,
) -> Restored:
    """The checkpoint of `step`, after making sure that it belongs to this config and data."""
    current = facts(run.config, run.prepared, run.mixture)
    check_facts(checkpoints.facts(step), current, resume=resume)
    abstract = jax.eval_shape(fresh(run, optimizer), jax.random.key(0))
    return checkpoints.restore(step, abstract, meshes.replicated(run.mesh))


def saved_state(run: Run) -> TrainState:
    """The state of the checkpoint that `checkpoint.restore` names."""
    checkpoints = Checkpoints(run.workdir / "checkpoints", run.config.checkpoint.keep, create=False)
    step = checkpoints.find(str(run.config.checkpoint.restore))
    optimizer = make_optimizer(run.config.optimizer)
    restored = _restore(run, optimizer, checkpoints, step, resume=False)
    checkpoints.close()
    print(f"parameters: EMA at step {step} of {checkpoints.folder}", flush=True)
    return restored.state


def _generate(run: Run, params: Any) -> Samples:
    """`sample.count` sequences around the prompt and the suffix, on the host."""
    tokens_BL, given_BL = _given(run)
    key = run.replicate(jax.random.key(run.config.sample.seed))
    sampler = jax.jit(make_sampler(run.config.sample, run.generator))
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
