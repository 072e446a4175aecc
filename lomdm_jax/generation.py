"""Text from a trained model: prompts with blanks, samplers compiled once, and what they wrote."""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.data.tokenizers import Tokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.generator import Generator
from lomdm_jax.sampling import length_of, make_sampler
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.trained import Trained

BLANK = re.compile(r"\[\[(\d+)\]\]")
SECONDS = 2.0  # between two looks at a sampler that is running
TOGETHER = 64  # steps between two looks where several processes sample
KEPT = 32  # compiled samplers: each takes seconds to make, and memory
# What a compiled sampler does not depend on, of a config section `sample`.
FREE = ("prompt", "suffix", "prompts", "seed", "count", "batch_size")


class Given(NamedTuple):
    """What is known of each sequence: int32 ids [B, T], and where they stand, bool [B, T]."""

    tokens_BT: np.ndarray
    given_BT: np.ndarray


class Generated(NamedTuple):
    """What a sampler wrote, on the host.

    texts: up to the end of text, where sampling stops at one.
    seconds: of sampling, without compiling.
    """

    samples: Samples
    texts: list[str]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were generated and count, of all sequences together."""
        return float(written(self.samples).sum() / self.seconds)


class Completion(NamedTuple):
    """One sample. By position, with given text at its place: the token ids; the step that revealed
    each (1, 2, ...; 0 if given); the order's probability that the position came next, and the
    log-probability of the token (nats), both 0 if given.

    text: of the first `length` tokens, up to the end of text where sampling stops at one.
    calls: network calls that it needed.
    """

    text: str
    tokens: list[int]
    revealed: list[int]
    share: list[float]
    log_p: list[float]
    length: int
    calls: int


def completions(generated: Generated) -> list[Completion]:
    """Each sample by itself."""
    samples = generated.samples
    names = ("tokens_BT", "revealed_BT", "share_BT", "log_p_BT", "length_B", "calls_B")
    columns = (getattr(samples, name).tolist() for name in names)
    return [Completion(*each) for each in zip(generated.texts, *columns, strict=True)]


def written(samples: Samples) -> np.ndarray:
    """The positions that were generated and count, bool [B, T]."""
    where = np.arange(samples.tokens_BT.shape[-1])
    counts = where < np.asarray(samples.length_B)[:, None]
    return np.asarray((samples.revealed_BT > 0) & counts)


def given_of(model: Trained, settings: ConfigDict) -> Given:
    """The sequences that a config section `sample` asks for, `count` of each prompt.

    In a prompt [[N]] stands for a blank of N tokens; what follows it, up to the suffix, is blank.
    Where the first position is never generated (`objective.ignore_first`), an end of text precedes
    what begins with a blank.

    Raises:
      UserError: a prompt does not fit, or the file of prompts is missing or empty.
    """
    tokenizer, rows = model.tokenizer, []
    length = length_of(settings, model.config.data.length)
    for prompt in _prompts(settings):
        start, end = (_ids(tokenizer, text, length) for text in (prompt, settings.suffix))
        if model.config.objective.ignore_first and start[:1] in ([], [None]):
            start = [tokenizer.eos_id, *start]
        blank = length - len(start) - len(end)
        if blank < 0:
            raise UserError(
                f"The prompt {prompt!r} ({len(start)} tokens, blanks included) and "
                f"config.sample.suffix ({len(end)} tokens) do not fit in "
                f"{length} tokens: shorten them, or set config.sample.length."
            )
        rows += [start + [None] * blank + end] * settings.count
    given_BT = np.array([[token is not None for token in row] for row in rows])
    return Given(np.array([[token or 0 for token in row] for row in rows], np.int32), given_BT)


def _prompts(settings: ConfigDict) -> list[str]:
    if not settings.prompts:
        return [settings.prompt]
    try:
        with open(settings.prompts, encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.sample.prompts is {settings.prompts!r}, which cannot be read ({error}): give "
            "a text file with a prompt in each line."
        ) from error
    if not prompts:
        raise UserError(f"config.sample.prompts is {settings.prompts!r}, which holds no prompt.")
    return prompts


def _ids(tokenizer: Tokenizer, text: str, length: int) -> list[int | None]:
    """Token ids, None in blanks, none of which may have more than `length`."""
    ids: list[int | None] = []
    for number, part in enumerate(BLANK.split(text)):
        if number % 2 and (len(part) > len(str(length)) or int(part) > length):
            raise UserError(
                f"The prompt has a blank of {part[:20]} tokens, but a sample has {length}: make it "
                "shorter."
            )
        ids += [None] * int(part) if number % 2 else tokenizer.encode(part)
    return ids


class Program(NamedTuple):
    """A sampler compiled for sequences of one shape.

    start: (params, keys [B], tokens, given) -> state; advance: (params, state, steps) -> state;
    finish: state -> (Samples, whether the sampler is done), on every process.
    """

    model: Trained
    rows: int
    start: Callable[..., Any]
    advance: Callable[..., Any]
    finish: Callable[[Any], tuple[Samples, jax.Array]]


def compiled(model: Trained, settings: ConfigDict, rows: int) -> Program:
    """Compile the sampler of a config section `sample` for `rows` sequences at a time.

    Raises:
      UserError: `rows` do not split over the devices.
    """
    meshes.check_divides(model.mesh, "sample.batch_size", rows)
    window = model.config.data.length
    eos_id = model.tokenizer.eos_id
    do = _functions(facts_of(settings), model.mesh, model.generator, eos_id, window)
    shape = (rows, length_of(settings, window))
    known = model.place((np.zeros(shape, np.int32), np.zeros(shape, bool)))
    keys_B = model.row_keys(0, np.arange(rows))
    start = jax.jit(do.start).lower(model.params, keys_B, *known).compile()
    state = start(model.params, keys_B, *known)
    # Where a state begins it stays, so that it can be advanced again.
    stays = jax.tree.map(lambda a: a.sharding, state)
    traced = jax.jit(do.advance, out_shardings=stays).lower(model.params, state, np.int32(1))
    return Program(model, rows, start, traced.compile(), do.finish)


def facts_of(settings: ConfigDict) -> str:
    """What a compiled sampler depends on, of a config section `sample`."""
    return json.dumps({k: v for k, v in settings.items() if k not in FREE}, sort_keys=True)


class _Functions(NamedTuple):
    """See `Program`; not compiled but for `finish`, which is when it is called."""

    start: Callable[..., Any]
    advance: Callable[..., Any]
    finish: Callable[[Any], tuple[Samples, jax.Array]]


@functools.lru_cache(KEPT)
def _functions(
    facts: str, mesh: Mesh, generator: Generator, eos_id: int, window: int
) -> _Functions:
    """Kept, for JAX compiles the very same function once for the same shapes."""
    sampler = make_sampler(ConfigDict(json.loads(facts)), generator, eos_id, window)

    def finish(state: Any) -> tuple[Samples, jax.Array]:
        return sampler.finish(state), ~sampler.unfinished(state)

    return _Functions(sampler.start, sampler.advance, meshes.run_everywhere(mesh, finish))


def stream(
    program: Program, given: Given, seed: int, every: int = 0, first: int = 0
) -> Iterator[Samples]:
    """What there is of the samples from time to time, on the host; the last is complete.

    every: steps between two looks; 0 for as many as take about SECONDS, or for TOGETHER.
    first: number of the first sequence among all; each has draws of its own.
    """
    # All processes must take the same steps, so their clocks have no say.
    alone, model, done = jax.process_count() == 1, program.model, False
    steps = every or (1 if alone else TOGETHER)
    keys_B = model.row_keys(seed, first + np.arange(program.rows))
    state = program.start(model.params, keys_B, *model.place(tuple(given)))
    while not done:
        began = time.perf_counter()
        state = program.advance(model.params, state, np.int32(steps))
        samples, done = jax.device_get(program.finish(state))
        if alone and not every and time.perf_counter() - began < SECONDS:
            steps *= 2
        yield samples


def generate(model: Trained, settings: ConfigDict, given: Given | None = None) -> Generated:
    """Sample with a config section `sample`, printing progress.

    given: what is known of each sequence; None for what the section says.

    Raises:
      UserError: a prompt does not fit, or sequences do not split over the devices.
    """
    if given is None:
        given = given_of(model, settings)
    total = len(given.given_BT)
    program = compiled(model, settings, min(settings.batch_size, model.even(total)))
    began = time.perf_counter()
    found: list[Samples] = []
    progress = _progress(int((~given.given_BT).sum()))
    for first_row in range(0, total, program.rows):
        # The last sequence fills up the last batch.
        index_B = np.minimum(first_row + np.arange(program.rows), total - 1)
        part = Given(*(a[index_B] for a in given))
        for samples in stream(program, part, settings.seed, first=first_row):
            progress(sum(int(written(s).sum()) for s in (*found, samples)))
        found.append(_first(samples, total - first_row))
    seconds = time.perf_counter() - began
    samples = _joined(found)
    rows = zip(samples.tokens_BT, samples.length_B, strict=True)
    texts = [model.tokenizer.decode(tokens[:length].tolist()) for tokens, length in rows]
    return Generated(samples, texts, seconds)


def _first(samples: Samples, rows: int) -> Samples:
    return jax.tree.map(lambda a: a[:rows] if a.ndim else a, samples)


def _joined(parts: list[Samples]) -> Samples:
    """The batches as one; their calls add up."""
    return jax.tree.map(lambda *a: np.concatenate(a) if a[0].ndim else np.sum(a), *parts)


def _progress(total: int) -> Callable[[int], None]:
    """Prints how many of `total` tokens are written and what time is left, every ten seconds."""
    began = shown = time.perf_counter()

    def show(count: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown >= 10 and count:
            shown, left = now, (now - began) * (total - count) / count
            print(
                f"sampled {count:,} of {total:,} tokens, {count / (now - began):,.0f} per second, "
                f"{left:.0f} s left",
                flush=True,
            )

    return show
