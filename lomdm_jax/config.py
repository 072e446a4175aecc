"""Every option with its default and the reason for it, and the checks that run before anything
expensive does. Defaults follow MDLM's published recipe (kuleshov-group/mdlm, configs/) where it
has one; a file in configs/ changes what differs."""

import difflib
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from lomdm_jax import objectives, orders
from lomdm_jax.data.presets import PRESETS
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.models.transformer import REMAT
from lomdm_jax.objectives.leave_one_out import groups
from lomdm_jax.sampling.ancestral import GRIDS
from lomdm_jax.sampling.best import SCORES

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("own", "ranked")
GIVEN = ("posterior", "text")
ON_BAD_STEP = ("stop", "skip")
IMPORTED_WEIGHTS = ("ema", "raw")


# By section; `validate` says what each leaf may be.
_DEFAULTS = {
    "data": {  # lomdm_jax/data/presets.py has those of the papers' data sets
        # Docstrings of the running Python, "stdlib"; a file or a folder (.txt, .jsonl, .parquet;
        # .gz, .xz, .zst); "hf:NAME[@REVISION][:CONFIG]"; "" for none, to evaluate only.
        "source": "stdlib",
        "split": "",  # hf: "train", "train[:-100000]"; files: a slice of documents, "[:90]"
        # Text to validate on: another source, another split of the same, or (both empty)
        # valid_share of the documents.
        "valid_source": "",
        "valid_split": "",
        "valid_share": 0.05,  # held out by content hash
        "column": "text",  # of a record
        "unit": "auto",  # a document: "paragraph", "line", "record", "file" or "characters:N"
        "streaming": False,  # hf: read over the network instead of downloading first
        "keep_empty": False,  # empty documents count as well: WikiText's blank lines
        "skip_bad": False,  # documents that cannot be read are skipped and counted
        "detokenizer": "none",  # lomdm_jax/data/detokenizers.py
        # "sentencepiece-bpe" (trained in 0.2 s) or "sentencepiece-unigram" (5 s);
        # "sentencepiece:FILE", "hf:NAME", "characters", "text8", "bytes".
        "tokenizer": "sentencepiece-bpe",
        "vocab_size": 1024,  # ids, an added mask token not counted; 0 for the tokenizer's own
        "length": 128,  # tokens per sequence, as MDLM's LM1B
        # "wrap": documents joined and cut; "documents": attention does not cross them besides;
        # "padded": one per block.
        "packing": "wrap",
        "insert_separator": True,  # separator_id after each document ("wrap", "documents")
        "separator_id": "eos",  # the tokenizer's own end of text, or an id
        # Each block starts and ends with the separator ("wrap") or the tokenizer's own marks
        # ("padded").
        "insert_bos": False,
        "insert_eos": False,
        "group": 0,  # documents cut together, their remainder dropped (MDLM: 1000); 0 carries it on
        "count_pads": False,  # pads count as text; MDLM masks them like tokens and counts them not
        "mixture": "",  # "FOLDER=WEIGHT,...": further prepared folders; the source has weight 1
        "workers": 0,  # processes that tokenise; 0 for one per core. The files do not depend on it
        "directory": "runs/data",  # one sub-folder per combination of the settings above
    },
    "model": {
        "width": 768,  # MDLM "small"
        "layers": 12,
        "heads": 12,
        "cond_dim": 128,
        "head_layers": 1,  # blocks in each order head, as in the paper; 0 costs next to nothing
        "dropout": 0.1,
        # Compute dtype; parameters, sums of products, norms and losses are float32 always.
        "dtype": "float32",
        # What blocks keep for the gradient: "none" recomputes nothing, "dots" all but products with
        # parameters, "full" all. Less memory for more computation.
        "remat": "none",
        # "own": what suits the order, with a shift or blocks where it is fixed and two-sided where
        # not. "ranked": one pass over twice the length scores a whole order, whichever it is.
        "layout": "own",
        "time_conditioning": False,  # the exact race needs a network that does not see t
    },
    "order": {
        "name": "lomdm",  # orders/__init__.py lists the others
        "c1": 0.7,  # mean exponent; the paper's best pair (arXiv 2602.02112)
        "c2": 0.65,  # spread of exponents, below c1
        "exponent": 1.0,  # order.name = "mdm": m(t) = t^exponent, 1 is linear
    },
    "objective": {
        "name": "continuous",  # the paper's bound; "order": the time-free one
        # Masked versions per sequence; a learned order needs 2. On the ranked layout, orders of
        # each sequence in the rows that come in groups of one.
        "mask_samples": 2,
        # Ranked layout: share of a batch's rows that come in groups. The order is learned from
        # those; the rest show the network more text.
        "order_share": 0.25,
        "eps": 1e-3,  # where the time integral ends, as in MDLM
        "reconstruction_share": 1 / 16,  # rows drawn at t = eps; few are needed
        # The order is learned from, and with, contexts of the order at this temperature; 1 is the
        # order itself. A flatter one shows the network more of the contexts of a sharp one.
        "temperature": 1.0,
        # How much of the weights by which cross-entropies teach the network is spread evenly over
        # the masked positions; 0 is the bound's own gradient (benchmarks/README.md compares).
        "uniform_share": 0.0,
        # On the ranked layout, share of the rows in which a random span comes last: from them the
        # network learns to fill a blank. 0 is the bound, of an order that may never fill one.
        "blank_share": 0.0,
        # Blocks learn from a narrower range of masked shares, the one where the loss varies least,
        # searched for at every evaluation (BD3-LM). Off: then the loss is the bound itself.
        "clip_noise": False,
        # The first token is given, not generated (MDLM, BD3-LM); evaluation leaves it out, the
        # training loss still divides by it. Off: then numbers are of the whole text.
        "ignore_first": False,
    },
    "optimizer": {
        "learning_rate": 3e-4,
        "warmup_steps": 2500,  # linear, then constant
        "head_multiplier": 1.0,  # rate of the order heads over that of the backbone
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,  # global norm of the gradient per token
        "ema_decay": 0.9999,  # less at first: min(decay, (1 + n) / (10 + n))
    },
    "train": {
        "steps": 1_000_000,
        # The folder of a run whose EMA parameters this one starts from: BD3-LM goes on from an
        # MDLM, and a long context from a short one. Empty for fresh ones.
        "start_from": "",
        # Steps in random order before an order is learned: at the cost of masked diffusion, and
        # with its broad view of contexts. An evaluation follows, which chooses a walk. On the
        # ranked layout walks take turns, and the one under which the text has cost least is taken.
        "random_steps": 0,
        "batch_size": 512,  # sequences per step over all devices
        "micro_batches": 1,  # parts a batch is cut into to save memory
        "donate": True,  # a step's state is written over that before; off: both exist at once
        "seed": 0,
        "log_every": 100,  # steps
        "eval_every": 10_000,  # steps; also after the last one
        # A step whose loss or gradient is not finite, or whose loss lies more than `spike` standard
        # deviations above its running mean: "stop" the run there, or "skip" the update.
        "on_bad_step": "stop",
        "spike": 0.0,  # 0 for not at all: what is far out depends on the text
        "profile": "",  # "FIRST:LAST", steps that a profiler traces into the run's folder
    },
    "eval": {
        "batch_size": 64,  # sequences
        "draws": 8,  # estimates per sequence, stratified
        "sequences": 0,  # how many validation sequences to score; 0 for all
        "estimator": "order",  # time-free: both bounds with the least noise
        # More rounds of draws follow until the bound's error from the draws alone, in nats per
        # token, is at most this; 0 for one round.
        "draw_error": 0.0,
        # Whole trajectories per sequence, whose weights together give a tighter bound; 0 for none.
        # A network that scores states is called for every token of each.
        "trajectories": 0,
        "seed": 1,
    },
    "sample": {
        # Which positions a network call reveals. "race": drawn by the order's own weights, exact
        # with reveal = 1; "ancestral": those of a step on a time grid; "velocity": the likeliest by
        # the order; "confidence", "margin", "entropy": those of whose token the network is surest.
        "sampler": "race",
        "reveal": 1,  # all but ancestral: positions per network call at most
        # "confidence", "margin", "velocity": a call reveals only positions that score at least this
        # (probabilities; "entropy": at most so many nats), but one always; 0 for no bound.
        "threshold": 0.0,
        # A call reveals fewer positions if drawing their tokens independently could lose more than
        # this many nats, by the sum of their entropies less the largest.
        "dependence": float("inf"),
        "steps": 64,  # ancestral: steps; what reveals nothing costs no network call
        # Ancestral: steps even in progress, or the literature's, "linear" in t or "cosine".
        "grid": "even",
        # Ancestral: share of the greatest chance with which a step may mask tokens again (ReMDM,
        # arXiv 2503.00307, rescaled); 0 for never.
        "remask": 0.0,
        "order_temperature": 1.0,  # race, ancestral: log-weights of positions are divided by it
        "temperature": 1.0,  # logits of tokens are divided by it; 0 takes the likeliest token
        "top_k": 0,  # tokens are drawn among so many likeliest; 0 for all
        "top_p": 1.0,  # and among the likeliest that have this probability together
        # Tokens per sequence, 0 for data.length. More need blocks.
        "length": 0,
        # Blocks of so many positions are filled from left to right; 0 for the order's own.
        "block": 0,
        # What follows the first end of text that is generated, is left out and not generated.
        "stop_at_eos": False,
        # Ranked layout: prompt and suffix are read as the "posterior" of the order would reveal
        # them, which is what the network has met; or from left to right, as in the "text".
        "given": "posterior",
        "count": 8,  # sequences, of each prompt
        "batch_size": 16,  # sequences at a time; what is drawn does not depend on it
        # Text that every sample starts with. [[N]] in it stands for a blank of N tokens.
        "prompt": "",
        "suffix": "",  # text that every sample ends with
        "prompts": "",  # a file with a prompt in each line instead
        "seed": 2,
    },
    "score": {  # --job score: the bounds of one text, and what each token costs when revealed
        "text": "",
        "file": "",  # read instead; longer text than data.length is scored in pieces
        "prefix": "",  # given, not scored: the likelihood is that of the text between
        "suffix": "",
        "orders": 16,  # orders drawn: their mean is the bound, all together tighten it
    },
    "zero_shot": {  # --job zero-shot: the validation text of these presets, with commas
        "sets": ",".join(name for name in PRESETS if name.startswith("zero-shot-")),
    },
    "generative": {  # --job generative: samples under a judge, over network calls
        # "hf:NAME", a causal model of Hugging Face; or the folder of a run of ours with order "ar".
        "judge": "hf:gpt2-large",
        # With changes to the section `sample` if need be: "ancestral@grid=linear,race@top_p=0.9".
        "samplers": "race,ancestral,confidence",
        "calls": "8,16,32,64,128",  # network calls per sample, as near as each sampler can come
        "samples": 64,  # of each sampler at each number of calls
        # Real text, judged as well: a file with a text in each line, "" for none.
        "reference": "",
    },
    "report": {  # --job report: orders side by side on the same text
        "runs": "",  # folders of further runs, with commas
        # A file with a text in each line, each at most as long as a sequence; "samples" for what
        # each run has generated; "" for the validation text.
        "texts": "",
        "sequences": 64,  # texts at most; 0 for all
    },
    "serve": {  # --job serve: a local page
        "host": "127.0.0.1",
        "port": 7860,
        "runs": "",  # folders of further runs to choose from, with commas
        "queue": 16,  # requests that may wait
        "samples": 8,  # per request at most
        "characters": 20_000,  # of a prompt and its suffix at most
    },
    "export": {  # --job export: files for PyTorch
        "folder": "",  # a new one, or that of an earlier export; "" for `export` in the run's own
    },
    "import": {  # --job import: a run's folder from what PyTorch holds
        # The folder of an export; a folder of the Hugging Face form, or a file of Lightning's, of
        # an MDLM or a BD3-LM.
        "source": "",
        "weights": "ema",  # "raw": not the average, where a file has both
        "length": 0,  # tokens per sequence of an MDLM or BD3-LM; 0 for what it says itself
        "order": "",  # of an MDLM or BD3-LM, "mdm" or "block:SIZE"; "" for what it says itself
    },
    "mesh": {  # devices; data x fsdp x tensor x sequence of them
        "data": -1,  # copies of the model, which share each batch; -1 for all that are left
        "fsdp": 1,  # share each batch, and the parameters, their average and the optimizer state
        "tensor": 1,  # share the work on each position: heads, hidden units, the vocabulary
        "sequence": 1,  # share the positions of each sequence, for long ones; parameters like fsdp
    },
    "checkpoint": {
        "every": 10_000,  # steps
        "keep": 2,  # latest ones kept, beside the best by nelbo_order
        "restore": "latest",  # evaluate and sample: "latest", "best" or a step
    },
}


def default_config() -> ConfigDict:
    """A fresh copy of the default configuration."""
    return ConfigDict(_DEFAULTS)


def completed(values: dict[str, dict[str, Any]]) -> ConfigDict:
    """The default configuration with these values by section and name, as a run saves them.

    Raises:
      UserError: there is no such key.
    """
    config = default_config()
    for section, entries in values.items():
        for name, value in entries.items():
            if section not in config or name not in config[section]:
                raise UserError(
                    f"The saved config has {section}.{name} = {value!r}, which this version does "
                    "not know: use the version that trained the run."
                )
            config[section][name] = value
    return config


def saved_config(folder: pathlib.Path) -> ConfigDict:
    """The config that a run's folder holds; keys that it lacks have their defaults.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is no folder of a run ({error.strerror}: config.json): give the --workdir "
            "of its training, or a --config."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {one_line(error)}.") from error
    return completed(values)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set `section.name` to a value of the type it has.

    Raises:
      UserError: for an unknown key (with the nearest known ones) or a value of another type.
    """
    known = [f"{section}.{name}" for section in config for name in config[section]]
    if key not in known:
        near = difflib.get_close_matches(key, known) or sorted(config)
        raise UserError(
            f"--config.{key} = {text!r}: there is no such key. Near it: {', '.join(near)}; "
            "lomdm_jax/config.py has all of them."
        )
    section, name = key.split(".")
    config[section][name] = _convert(key, text, config[section][name])


def _convert(key: str, text: str, default: bool | int | float | str) -> bool | int | float | str:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else f"{kind.__name__}, such as {default!r}"
        raise UserError(f"--config.{key} is {text!r}, but it must be {expected}.") from None


def validate(config: ConfigDict) -> None:
    """Check every leaf and every combination that can be checked without data or devices; the
    sources and the tokenizer are for `prepare.check`, for what needs them.

    Raises:
      UserError: names the key, the value and the remedy.
    """
    _check_numbers(config)
    _check_choices(config)
    _check_combinations(config)


_POSITIVE = (
    "data.length mesh.fsdp mesh.tensor mesh.sequence model.width model.layers model.heads "
    "model.cond_dim objective.mask_samples optimizer.learning_rate optimizer.eps "
    "optimizer.clip_norm optimizer.head_multiplier train.steps train.batch_size "
    "train.micro_batches train.log_every train.eval_every objective.temperature eval.batch_size "
    "eval.draws sample.reveal sample.steps sample.count sample.batch_size sample.order_temperature "
    "checkpoint.every checkpoint.keep objective.order_share score.orders generative.samples "
    "serve.samples serve.characters"
).split()
_NOT_NEGATIVE = (
    "optimizer.warmup_steps optimizer.weight_decay train.random_steps model.head_layers "
    "data.vocab_size data.group data.workers "
    "eval.sequences eval.draw_error eval.trajectories eval.seed "
    "sample.dependence sample.threshold sample.temperature sample.top_k "
    "sample.length sample.block sample.seed train.seed train.spike "
    "serve.port serve.queue import.length"
).split()
_BELOW_ONE = (
    "model.dropout optimizer.b1 optimizer.b2 optimizer.ema_decay objective.eps "
    "objective.reconstruction_share data.valid_share objective.uniform_share "
    "objective.blank_share sample.remask"
).split()
_ABOVE_ZERO = ("objective.eps", "objective.reconstruction_share", "data.valid_share")


def leaf(config: ConfigDict, key: str):
    """The value of "section.key"."""
    section, name = key.split(".")
    return config[section][name]


def _reject(config: ConfigDict, key: str, remedy: str) -> None:
    raise UserError(f"config.{key} is {leaf(config, key)!r}, but {remedy}")


def _check_numbers(config: ConfigDict) -> None:
    for key in _POSITIVE:
        if leaf(config, key) <= 0:
            _reject(config, key, "it must be above zero.")
    for key in _NOT_NEGATIVE:
        if leaf(config, key) < 0:
            _reject(config, key, "it must not be negative.")
    for key in _BELOW_ONE:
        lowest = key in _ABOVE_ZERO
        if not 0 <= leaf(config, key) < 1 or (lowest and leaf(config, key) == 0):
            _reject(config, key, f"it must lie in {'(' if lowest else '['}0, 1).")
    if config.mesh.data < 1 and config.mesh.data != -1:
        _reject(config, "mesh.data", "it must be a number of devices, or -1 for all of them.")


def _check_choices(config: ConfigDict) -> None:
    choices = {
        "objective.name": objectives.NAMES,
        "eval.estimator": objectives.NAMES,
        "model.dtype": DTYPES,
        "model.layout": LAYOUTS,
        "model.remat": tuple(REMAT),
        "train.on_bad_step": ON_BAD_STEP,
        "sample.sampler": (*SCORES, "ancestral"),
        "sample.grid": GRIDS,
        "sample.given": GIVEN,
        "import.weights": IMPORTED_WEIGHTS,
    }
    for key, allowed in choices.items():
        if leaf(config, key) not in allowed:
            _reject(config, key, f"it must be one of {', '.join(allowed)}.")
    if not re.fullmatch(r"(mdm|block:\d+)?", leaf(config, "import.order")):
        _reject(config, "import.order", 'it must be "mdm", "block:SIZE" or "".')
    for name in config.zero_shot.sets.split(","):
        if name.strip() not in PRESETS:
            remedy = f"{name.strip()!r} is no preset: use some of {', '.join(PRESETS)}."
            _reject(config, "zero_shot.sets", remedy)
    profile, steps = config.train.profile, config.train.steps
    ends = re.fullmatch(r"(\d+):(\d+)", profile)
    if profile and not (ends and 1 <= int(ends[1]) <= min(int(ends[2]), steps)):
        remedy = f'it must be FIRST:LAST, with FIRST from 1 to {steps} and not above LAST, or ""'
        _reject(config, "train.profile", remedy)
    restore = str(config.checkpoint.restore)
    if restore not in ("latest", "best") and not restore.isdigit():
        _reject(config, "checkpoint.restore", 'it must be "latest", "best" or a step number.')


def _check_combinations(config: ConfigDict) -> None:
    order = config.order
    made = orders.make_order(**order)
    made.check(config.data.length)
    if made.learned and config.objective.mask_samples < 2:
        _reject(
            config,
            "objective.mask_samples",
            f"order.name = {order.name!r} learns from the difference between masked versions of "
            "the same sequence: use 2 or more.",
        )
    if config.model.width % (2 * config.model.heads):
        _reject(
            config,
            "model.width",
            f"rotary positions need a multiple of 2 * model.heads = {2 * config.model.heads}.",
        )
    _check_within(config)
    if config.train.batch_size % config.train.micro_batches:
        _reject(
            config,
            "train.batch_size",
            f"it must be a multiple of train.micro_batches = {config.train.micro_batches}.",
        )
    _check_sample(config, made)
    if made.one_pass(config.model.layout) == "order":
        _check_ranked(config, made)
    elif config.objective.blank_share:
        _reject(config, "objective.blank_share", 'it needs model.layout = "ranked": use 0.')
    if made.walks:
        _check_walk(config)
    if config.train.random_steps:
        _check_random_steps(config, made)
    if config.objective.name == "continuous":
        for key, value in {"objective.temperature": 1.0, "objective.uniform_share": 0.0}.items():
            if leaf(config, key) != value:
                _reject(config, key, f"objective.name = 'continuous' has none: use {value}.")
    if config.objective.clip_noise:
        _check_clip_noise(config, made)
    if config.objective.ignore_first and config.data.length < 2:
        _reject(config, "data.length", "objective.ignore_first leaves nothing: use 2 or more.")
    if config.model.time_conditioning:
        _check_time_conditioning(config, made)


def _check_within(config: ConfigDict) -> None:
    """The axes of the mesh that share the work on each sequence."""
    heads, mesh = config.model.heads, config.mesh
    if heads % mesh.tensor:
        _reject(config, "mesh.tensor", f"it splits heads: use a divisor of model.heads = {heads}.")
    left = heads // mesh.tensor
    if left % mesh.sequence or config.data.length % mesh.sequence:
        remedy = (
            f"attention splits heads by it: use a divisor of model.heads / mesh.tensor = {left} "
            f"and of data.length = {config.data.length}."
        )
        _reject(config, "mesh.sequence", remedy)


def _check_ranked(config: ConfigDict, order: orders.Order) -> None:
    why = "the ranked layout scores whole orders, without a time: use "
    if order.scores not in ("none", "pointer"):
        remedy = (
            f"order.name = {config.order.name!r} reads states, which it has none of: use 'own'."
        )
        _reject(config, "model.layout", remedy)
    needed = {
        "objective.name": "order",
        "eval.estimator": "order",
        "objective.temperature": 1.0,
        "objective.uniform_share": 0.0,
        "objective.clip_noise": False,
        "model.time_conditioning": False,
        "sample.sampler": "race",
    }
    for key, value in needed.items():
        if leaf(config, key) != value:
            _reject(config, key, f"{why}{value!r}.")
    if order.walks:
        _check_groups(config)
    if order.walks and not order.learned and not config.train.random_steps:
        remedy = f"order.name = {config.order.name!r} is found in them: use more."
        _reject(config, "train.random_steps", remedy)


def _check_groups(config: ConfigDict) -> None:
    size, share = config.objective.mask_samples, config.objective.order_share
    rows = config.train.batch_size // config.train.micro_batches
    if rows % size:
        _reject(
            config,
            "objective.mask_samples",
            f"it must divide the {rows} rows of a micro-batch, some of which come in such groups.",
        )
    if not share <= 1 or not groups(rows, size, share):
        _reject(
            config,
            "objective.order_share",
            f"of {rows} rows per micro-batch one group of objective.mask_samples = {size} must "
            f"come of it: use {size / rows:g} to 1.",
        )


def _check_sample(config: ConfigDict, order: orders.Order) -> None:
    sample = config.sample
    if not 0 < sample.top_p <= 1:
        _reject(config, "sample.top_p", "it must lie in (0, 1]; 1 is for all tokens.")
    if sample.remask and (sample.sampler, sample.grid) not in (
        ("ancestral", "linear"),
        ("ancestral", "cosine"),
    ):
        remedy = "steps mask again on a grid of times: use sample.sampler = 'ancestral' with "
        _reject(config, "sample.remask", remedy + "sample.grid = 'linear' or 'cosine', or 0.")
    greedy = sample.sampler in SCORES and sample.sampler != "race"
    if greedy and sample.order_temperature != 1:
        remedy = f"sample.sampler = {sample.sampler!r} draws no positions: use 1.0."
        _reject(config, "sample.order_temperature", remedy)
    if sample.threshold and not greedy:
        _reject(config, "sample.threshold", f"sample.sampler = {sample.sampler!r} has none: use 0.")
    for key, nothing in (("threshold", 0.0), ("dependence", float("inf"))):
        if sample[key] != nothing and (sample.reveal == 1 or sample.sampler == "ancestral"):
            remedy = "it bounds how many of sample.reveal positions a call reveals: set that to "
            _reject(config, f"sample.{key}", remedy + f"2 or more, or this to {nothing}.")
    if sample.stop_at_eos and sample.suffix:
        _reject(config, "sample.stop_at_eos", "sample.suffix ends every sample: use one of both.")
    if sample.prompts and sample.prompt:
        _reject(config, "sample.prompts", "sample.prompt is set too: use one of both.")
    _check_blocks(config, order)


def _check_blocks(config: ConfigDict, order: orders.Order) -> None:
    window, block = config.data.length, config.sample.block
    length, one_pass = config.sample.length or window, order.one_pass(config.model.layout)
    permuted = False
    if one_pass == "groups":
        assert order.groups is not None
        group_L, given = order.groups(window), block
        block = int((group_L == 0).sum())
        permuted = bool((group_L[1:] < group_L[:-1]).any())
        if given not in (0, block):
            remedy = f"the network was trained in blocks of {block}, those of the order: use 0."
            _reject(config, "sample.block", remedy)
    if one_pass == "order" or permuted:
        for key, allowed in (("length", (0, window)), ("block", (0,))):
            if config.sample[key] not in allowed:
                remedy = f"order.name = {config.order.name!r} is one of all {window} positions"
                _reject(config, f"sample.{key}", f"{remedy} that it was trained on: use 0.")
        return
    if length > window and not block:
        remedy = f"the network was trained on {window} tokens: set sample.block, so that it goes "
        _reject(config, "sample.length", remedy + "on from block to block, or use 0.")
    if block and (length % block or block > window):
        key = "sample.block" if config.sample.block else "sample.length"
        remedy = f"blocks of {block} must divide {length} tokens and be at most {window} long."
        _reject(config, key, remedy)


def _check_walk(config: ConfigDict) -> None:
    for key in ("objective.name", "eval.estimator"):
        if leaf(config, key) != "order":
            _reject(
                config,
                key,
                f"order.name = {config.order.name!r} follows what is revealed already, so no "
                "position has a mask probability at a time: use 'order', the time-free one.",
            )


def _check_random_steps(config: ConfigDict, order: orders.Order) -> None:
    if not (order.learned or order.walks):
        remedy = f"order.name = {config.order.name!r} learns none: use 0."
        _reject(config, "train.random_steps", remedy)
    if config.train.random_steps >= config.train.steps:
        remedy = f"train.steps = {config.train.steps} leaves none to learn an order in: use fewer."
        _reject(config, "train.random_steps", remedy)


def _check_clip_noise(config: ConfigDict, order: orders.Order) -> None:
    length = config.data.length
    if order.groups is None or len(set(order.groups(length).tolist())) == length:
        _reject(
            config,
            "objective.clip_noise",
            f"order.name = {config.order.name!r} has no blocks of several positions to clip the "
            "noise of: use order.name = 'block:<size>' with a size of 2 or more, or turn it off.",
        )
    if config.objective.name != "order":
        _reject(
            config,
            "objective.clip_noise",
            f"objective.name = {config.objective.name!r} draws times, not masked shares: use "
            "objective.name = 'order', or turn it off.",
        )


def _check_time_conditioning(config: ConfigDict, order: orders.Order) -> None:
    if config.sample.block:
        remedy = "with model.time_conditioning there is one time for all positions: use 0."
        _reject(config, "sample.block", remedy)
    if order.groups is not None:
        _reject(
            config,
            "model.time_conditioning",
            f"order.name = {config.order.name!r} has no one time for all groups: turn it off.",
        )
    needed = {
        "objective.name": "continuous",
        "eval.estimator": "continuous",
        "sample.sampler": "ancestral",
        "eval.trajectories": 0,
    }
    for key, value in needed.items():
        if leaf(config, key) != value:
            _reject(
                config,
                key,
                f"with model.time_conditioning the network sees t, which this has not: use "
                f"{value!r}, or turn time conditioning off.",
            )
