"""The command line: python -m lomdm_jax.main --config configs/x.py --job train"""

import contextlib
import importlib
import keyword
import os
import pathlib
import runpy
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lomdm_jax.config import default_config, override, saved_config, validate
from lomdm_jax.data.prepare import check, describe, prepare
from lomdm_jax.data.presets import PRESETS, apply
from lomdm_jax.distributed.freed import keep_freed_memory
from lomdm_jax.errors import UserError

HELP = """\
lomdm_jax: masked text diffusion with the generation order under control.

usage: python -m lomdm_jax.main [--config configs/FILE.py[:ORDER]] [--data PRESET] [--job JOB]
                                [--workdir DIR] [--resume auto|never|STEP]
                                [--topology NAME] [--distributed HOW]
                                [--config.SECTION.KEY=VALUE ...]

jobs
  prepare    tokenise the data into a folder and say what it holds; the others do so if need be
  train      prepare the data, train (from the newest checkpoint in the workdir, if any),
             evaluate, sample, and draw the order; the default
  evaluate   both likelihood bounds of a checkpoint on the validation set, and what its order is
  zero-shot  the bounds on the seven sets on which models of OpenWebText are tried
  sample     text from a checkpoint, and the order in which it was generated
  score      the likelihood of a text, or of a part of it given the rest, token by token
  generative perplexity of samples under a judge, with their entropy, over network calls
  report     the orders of one or several runs side by side on the same text: pages and figures
  serve      a local page to try a run in: prompts, blanks, samplers, tokens as they appear
  export     a checkpoint as files for PyTorch and the package transformers
  import     a run's folder, --workdir, from such files, or from an MDLM's or a BD3-LM's checkpoint
  compile    whether the training step fits, and how fast it should be, on the devices that are
             here, or on a TPU slice or GPUs that are not: --topology v5e:4x4, h200:8.
             Needs no data

--resume       auto: train from the newest checkpoint in the workdir, if any; never: refuse one that
               has any; STEP: go back to that one
--distributed  how several processes find each other. auto: as Slurm, GKE or Open MPI tells; on:
               also on a Cloud TPU slice; off; or ADDRESS:PORT,PROCESSES,INDEX

data presets, as the papers have them (lomdm_jax/data/presets.py)
  {presets}

common keys (all of them, with defaults and reasons: lomdm_jax/config.py)
  --config.order.name=NAME               the generation order: lomdm-ranked, lomdm, lomdm-order,
                                         walk, genmd4, mdm, cosine, ar, r2l, block:SIZE or
                                         permutation:SEED
  --config.model.layout=own|ranked       ranked: any order, with a key-value cache
  --config.data.source=FILE              your own text: a file or a folder of .txt, .jsonl or
                                         .parquet (.gz, .xz, .zst), or hf:NAME
  --config.data.tokenizer=NAME           sentencepiece-bpe, sentencepiece:FILE, hf:NAME,
                                         characters, bytes
  --config.objective.name=continuous|order
  --config.train.steps=N                 --config.train.batch_size=SEQUENCES
  --config.data.length=TOKENS            --config.data.vocab_size=PIECES
  --config.model.width=N                 --config.model.layers=N
  --config.eval.sequences=N              --config.eval.draws=N
  --config.sample.prompt=TEXT            [[N]] in it is a blank of N tokens
  --config.sample.sampler=NAME           race, ancestral, velocity, confidence, margin, entropy
  --config.sample.reveal=POSITIONS       --config.sample.steps=N (ancestral)
  --config.sample.temperature=T          --config.sample.top_p=P
  --config.score.text=TEXT               --config.report.runs=FOLDER,FOLDER
  --config.export.folder=FOLDER          --config.import.source=FOLDER or FILE
  --config.checkpoint.restore=latest|best|STEP

examples
  python -m lomdm_jax.main --config configs/quickstart.py
  python -m lomdm_jax.main --config configs/quickstart.py:mdm --workdir runs/mdm
  python -m lomdm_jax.main --config configs/quickstart.py --job evaluate --config.eval.draws=32
  python -m lomdm_jax.main --workdir runs/quickstart --job sample \\
      --config.sample.prompt="Return the" --config.sample.count=4

The workdir is runs/<config>[-<order>] unless given. It holds config.json, train.csv, eval.csv,
TensorBoard events, checkpoints, evaluation.json, order_statistics.json and .png, samples.jsonl,
order.html and order.png; and what the jobs after training write.
"""
# What needs data, and what needs but a trained model; of a trained run both know the config.
WITH_DATA = ("train", "evaluate")
WITH_MODEL = ("zero-shot", "sample", "score", "generative", "report", "serve", "export")
JOBS = ("prepare", "compile", "import", *WITH_DATA, *WITH_MODEL)
OPTIONS = ("config", "data", "job", "workdir", "resume", "topology", "distributed")


class Command(NamedTuple):
    """A command line: the validated config, the job, the run's folder, and the other options."""

    config: ConfigDict
    job: str
    workdir: pathlib.Path
    resume: str = "auto"
    topology: str = ""
    distributed: str = "auto"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit status: 0, 2 for
    a user's error, 130 when interrupted, 143 when terminated (SIGTERM)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(HELP.format(presets=textwrap.fill(", ".join(PRESETS), 88, subsequent_indent="  ")))
        return 0
    try:
        return _run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> Command:
    """What the command line asks for, checked as far as it can be without data and devices.

    Raises:
      UserError: for an unknown option, key or job, a missing file or a bad value.
    """
    options, overrides = _split(argv)
    job = options.get("job", "train")
    if job not in JOBS:
        raise UserError(f"--job is {job!r}: use one of {', '.join(JOBS)}.")
    config, name = _config_of(options, job)
    if "data" in options:
        apply(config, options["data"])
    for key, text in overrides:
        override(config, key, text)
    validate(config)
    if job not in (*WITH_MODEL, "import"):  # a run's folder may lie where its data do not
        check(config.data)
    resume = options.get("resume", "auto")
    if resume not in ("auto", "never") and not resume.isdigit():
        raise UserError(f"--resume is {resume!r}: use auto, never or the step of a checkpoint.")
    if "topology" in options and job != "compile":
        raise UserError(f"--topology is for --job compile, not {job}.")
    workdir = pathlib.Path(options.get("workdir", pathlib.Path("runs", name)))
    others = {name: options[name] for name in ("topology", "distributed") if name in options}
    return Command(config, job, workdir, resume, **others)


def _config_of(options: dict[str, str], job: str) -> tuple[ConfigDict, str]:
    """The config that the options name, and a name for its run's folder."""
    if "config" in options:
        path, _, argument = options["config"].partition(":")  # the argument may hold a colon too
        name = "-".join(filter(None, [pathlib.Path(path).stem, argument.replace(":", "-")]))
        return load_config(path, argument), name
    if "workdir" in options and job in (*WITH_DATA, *WITH_MODEL):
        return saved_config(pathlib.Path(options["workdir"])), ""
    if "workdir" in options and job == "import":
        return default_config(), ""
    if job == "import":
        raise UserError("--workdir is missing: --job import writes a run's folder, a new one.")
    raise UserError(
        "--config is missing: for a first run, --config configs/quickstart.py; for a run that is "
        "trained, its --workdir is enough."
    )


def _split(argv: list[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Options by name, and config overrides in order; both `--a=b` and `--a b` are understood."""
    options, overrides, rest = {}, [], list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"{name!r} is not an option: options start with --; see --help.")
        if not equals:
            if not rest:
                raise UserError(f"{name} needs a value: {name}=VALUE; see --help.")
            value = rest.pop(0)
        if name.startswith("--config."):
            overrides.append((name.removeprefix("--config."), value))
        elif name.startswith("--") and name[2:] in OPTIONS:
            options[name[2:]] = value
        else:
            known = ", ".join(f"--{option}" for option in OPTIONS)
            raise UserError(
                f"{name} is not an option: use {known} or --config.SECTION.KEY; see --help."
            )
    return options, overrides


def load_config(path: str, argument: str = "") -> ConfigDict:
    """What get_config(argument), or get_config() if there is none, returns in the file `path`.

    Raises:
      UserError: if there is no such file, or it defines no get_config.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config is {path!r}, but there is no such file: see configs/.")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"--config is {path!r}, but it defines no get_config(): see configs/.")
    return get_config(argument) if argument else get_config()


def _run(command: Command) -> int:
    config, workdir = command.config, command.workdir
    if command.job == "prepare":
        print(f"prepare with\n{config}", flush=True)
        prepared = prepare(config.data)
        for split, entry in prepared.manifest["splits"].items():
            print(describe(split, entry))
        print(f"prepared in {prepared.folder}")
        return 0
    # JAX starts only once the command line is known to be sound.
    from lomdm_jax.distributed import multihost

    if command.job == "compile":
        from lomdm_jax.jobs.compile import compile

        compile(config, workdir, command.topology)
        return 0
    keep_freed_memory()
    multihost.initialise(command.distributed)
    try:
        with contextlib.ExitStack() as stack:
            if not multihost.leads():  # what all do is said once; errors are said by all
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            print(f"{command.job} in {workdir} with\n{config}", flush=True)
            status = _on_devices(command)
            multihost.wait_for_all("end")  # however long process 0 draws
            return status
    except (Exception, KeyboardInterrupt) as error:
        multihost.abandon(error)
        raise


def _on_devices(command: Command) -> int:
    import jax

    from lomdm_jax.run import start
    from lomdm_jax.trained import load

    do = _job(command.job)
    if command.job == "import":
        do(command.config, command.workdir)
        return 0
    if command.job in WITH_MODEL:
        trained = load(command.workdir, command.config)
        with jax.set_mesh(trained.mesh):
            do(trained)
        return 0
    run = start(command.config, command.workdir)
    with jax.set_mesh(run.mesh):
        if command.job == "train":
            return _train(run, command.resume)
        do(run)
        return 0


def _job(name: str) -> Callable[..., Any]:
    """The function of a job, in the module of its name; a word of Python's own has a _ behind."""
    name = name.replace("-", "_") + "_" * keyword.iskeyword(name)
    return getattr(importlib.import_module(f"lomdm_jax.jobs.{name}"), name)


def _train(run: Any, resume: str) -> int:
    from lomdm_jax.jobs.evaluate import describe_order
    from lomdm_jax.jobs.sample import sample
    from lomdm_jax.jobs.train import train
    from lomdm_jax.training.loop import Terminated

    try:
        params = train(run, resume)
    except Terminated as end:
        print(f"{end}, which is saved; the same command continues there", file=sys.stderr)
        return 143
    describe_order(run, params)
    sample(run.trained(params))
    return 0


if __name__ == "__main__":
    sys.exit(main())
