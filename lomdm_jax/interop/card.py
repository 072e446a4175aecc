"""The card of an exported model: what it is, what is known of it, and how to use it."""

import pathlib
import textwrap
import types
from collections.abc import Iterable
from typing import Any

from lomdm_jax.data.prepare import sources_of
from lomdm_jax.evaluation.likelihood import BOUNDS

ORDERS = {
    "mdm": "at random",
    "cosine": "at random, MD4's schedule",
    "ar": "from left to right",
    "r2l": "from right to left",
    "block": "blocks from left to right, at random within each",
    "permutation": "one fixed permutation",
    "genmd4": "as learned, a rate for each vocabulary entry",
    "lomdm": "as learned from the context (arXiv 2602.02112)",
    "walk": "next to what is revealed already",
    "lomdm-order": "as learned from the context, on top of a walk",
    "lomdm-ranked": "as learned from what was revealed last, on top of a walk",
}
LAYOUTS = {
    "full": "two-sided, over the partly masked text",
    "causal": "causal, in the order of generation",
    "ranked": "queries see the contents before them in the order of generation",
}
# Functions `encode` and `decode` of Python, by the file that the tokenizer is in.
CODECS = {
    "tokenizer.json": """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True  # a text that spells one is a text like any other
encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)""",
    "tokenizer.model": """\
from sentencepiece import SentencePieceProcessor

tokenizer = SentencePieceProcessor(model_file="tokenizer.model")
encode, decode = tokenizer.encode, tokenizer.decode""",
    "characters": """\
import json

alphabet = json.load(open("symbols.json"))["alphabet"]
encode = lambda text: [alphabet.find(c) + 2 if c in alphabet else 1 for c in text]
decode = lambda ids: "".join(alphabet[i - 2] for i in ids if 2 <= i < len(alphabet) + 2)""",
    "text8": """\
alphabet = " abcdefghijklmnopqrstuvwxyz"
encode = lambda text: [alphabet.index(c) for c in text]
decode = lambda ids: "".join(alphabet[i] for i in ids if i < len(alphabet))""",
    "bytes": """\
encode = lambda text: list(text.encode())
decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")""",
}


def text(
    known: dict[str, Any], evaluation: dict[str, Any] | None, size: int, files: Iterable[str]
) -> str:
    """The card, Markdown.

    known: the content of config.json; see `exporting.settings`.
    evaluation: the content of evaluation.json, None without one.
    size: number of parameters.
    files: names of the files beside it.
    """
    origin = known["lomdm_jax"]
    parts = [
        _HEAD.format(order=known["order"]["name"], **origin),
        _table("What it is", _facts(known, size)),
        _origin(origin),
        _evaluation(evaluation),
        _use(known, set(files)),
        _FOOT,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


_HEAD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- masked-diffusion
- text-diffusion
- lomdm
---

# Masked text diffusion with the order `{order}`

A language model that starts from masks and reveals one token after another, or several at a time,
in an order that is part of the model. lomdm_jax {version} exported it, at step {step:,} and in
float32."""

_FOOT = """\
## Back to JAX

`python -m lomdm_jax.main --job import --workdir NEW --config.import.source=FOLDER` restores the
folder of the run, for all jobs of lomdm_jax, and for another run to start from.

## Licence

`modeling_lomdm.py` is under the Apache License 2.0, as lomdm_jax is. The licence of the weights is
not said here: it is for those to state who trained them."""


def _table(title: str, rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _facts(known: dict[str, Any], size: int) -> dict[str, str]:
    order, origin = known["order"], known["lomdm_jax"]
    name, config = order["name"], origin["config"]
    kind = name.partition(":")[0]
    detail = {
        "lomdm": f"; c1 = {order['c1']:g}, c2 = {order['c2']:g}",
        "mdm": f"; exponent {order['exponent']:g}",
    }
    sha256 = origin["facts"]["tokenizer"][:12]
    return {
        "order": f"`{name}`: {ORDERS[kind]}{detail.get(kind, '')}",
        "attention": LAYOUTS[known["layout"]],
        "parameters": f"{size:,}",
        "network": f"{known['layers']} layers, width {known['width']}, {known['heads']} heads"
        + ("; it is told the noise level" if known["time_conditioning"] else ""),
        "tokens per sequence": f"{known['length']:,}",
        "vocabulary": f"{known['vocab_size']:,} rows with the mask token, {known['mask_id']}; end "
        f"of text {known['eos_id']}, padding {known['pad_id']}",
        "tokenizer": f"{_shown(config['data']['tokenizer'])}, SHA-256 {sha256}",
    }


def _shown(name: str) -> str:
    """A tokenizer's name without the folder of the machine where it was."""
    kind, colon, place = name.partition(":")
    return f"`{kind}{colon}{pathlib.Path(place).name if colon else ''}`"


def _origin(origin: dict[str, Any]) -> str:
    """Where the parameters come from."""
    config, started = origin["config"], origin["config"]["train"]["start_from"]
    source = config["import"]["source"]
    if source:
        return (
            "## Where it comes from\n\nIt was not trained by lomdm_jax: the parameters are those "
            f"of `{pathlib.Path(source).name}`, a checkpoint of MDLM or BD3-LM. What it was "
            "trained on, and its licence, are for that checkpoint's authors to say."
        )
    rows = _data(origin)
    if started:
        rows["started from"] = f"the parameters of another run, `{pathlib.Path(started).name}`"
    return _table("What it was trained on", rows)


def _data(origin: dict[str, Any]) -> dict[str, str]:
    """The passport of the training text, as far as a run keeps one."""
    data = types.SimpleNamespace(**origin["config"]["data"])
    source = sources_of(data).get("train")
    hashes = [f"{sha256[:12]} (weight {weight:g})" for sha256, weight in _hashes(origin)]
    return {
        "text": f"`{source.label()}`" if source else "none",
        "split": f"`{data.split}`" if data.split else "all but what is held out",
        "blocks": f"of {data.length:,} tokens, packing `{data.packing}`",
        "SHA-256 of the tokens": ", ".join(hashes) or "not known",
        "steps": f"{origin['step']:,} of {origin['config']['train']['batch_size']:,} sequences",
        "weights": "the exponential moving average over the steps",
    }


def _hashes(origin: dict[str, Any]) -> list[tuple[str, float]]:
    return [(sha256, weight) for sha256, weight in origin["facts"].get("data", []) if sha256]


def _evaluation(found: dict[str, Any] | None) -> str:
    """The last evaluation of the run."""
    if found is None:
        return ""
    lines = ["| bound | nats per token | perplexity | bits per byte |", "|---|---|---|---|"]
    for name in BOUNDS:
        cells = (
            _figure(found, f"{name}_nats_per_token", f"{name}_standard_error", 4),
            _figure(found, f"{name}_perplexity", f"{name}_perplexity_standard_error", 2),
            _figure(found, f"{name}_bits_per_byte", "", 4),
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    said = _counted(found) if "data" in found else ""  # an older report has none
    return "\n".join(["## How well it does", "", *lines, "", said]).rstrip()


def _figure(found: dict[str, Any], name: str, error: str, digits: int) -> str:
    """A number with its standard error; a report has None for what is not known."""
    if found.get(name) is None:
        return "not known"
    beside = "" if found.get(error) is None else f" ± {found[error]:.{digits}f}"
    return f"{found[name]:.{digits}f}{beside}"


def _counted(found: dict[str, Any]) -> str:
    data = found["data"]
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in data["uncounted_tokens"].items())
    said = (
        "Upper bounds on the negative log-likelihood, from the last evaluation of the run "
        f"(`evaluation.json`): {found['sequences']:,} sequences, {found['tokens']:,} tokens, "
        f"{found['draws']} draws each, estimator `{found['estimator']}`; text `{data['source']}`, "
        f"split `{data['split']}`, blocks of {data['length']:,}, SHA-256 {data['sha256'][:12]}; "
        f"not counted: {left_out} tokens. `nelbo` is the paper's bound; `nelbo_order` leaves out "
        "when tokens are revealed, which text has not, and is tighter."
    )
    return textwrap.fill(said, 100, break_on_hyphens=False)


def _use(known: dict[str, Any], files: set[str]) -> str:
    codec = _codec(known, files)
    steps = ", steps=64" if known["time_conditioning"] else ""
    first = known["lomdm_jax"]["config"]["objective"]["ignore_first"]
    values = {
        "codec": CODECS[codec],
        "prompt": "the" if codec == "text8" else "The",
        "half": max(1, known["length"] // 2),
        "steps": steps,
        "targets": "targets = torch.ones_like(texts, dtype=torch.bool)\n"
        "targets[:, 0] = False  # the first token is given, never generated\n"
        if first
        else "",
        "scored": "texts, targets" if first else "texts",
        **{name: known[name] for name in ("length", "mask_id")},
    }
    parts = [_TORCH.format(**values), _TRANSFORMERS.format(**values)]
    return "\n\n".join(parts + [_AUTO_TOKENIZER] * ("tokenizer_config.json" in files))


def _codec(known: dict[str, Any], files: set[str]) -> str:
    for file in ("tokenizer.json", "tokenizer.model"):
        if file in files:
            return file
    return known["lomdm_jax"]["config"]["data"]["tokenizer"]


_TORCH = """\
## Use it in PyTorch

`pip install torch safetensors`, and in this folder:

```python
{codec}

import torch
from modeling_lomdm import load

model = load(".")  # device="cuda" for a GPU
prompt = torch.tensor(encode("{prompt}")[:{half}])
given = torch.full((2, {length}), {mask_id})  # masks, which are to be filled
given[:, :len(prompt)] = prompt
texts = model.sample(given{steps}).tokens
print([decode(row) for row in texts.tolist()])
{targets}print(model.nelbo({scored}, draws=16).mean)  # >= -log p, in nats, of each text
```

`modeling_lomdm.py` says what else there is: several tokens per call, temperature, top-p, blanks
anywhere, the order in which tokens were revealed."""

_TRANSFORMERS = """\
## Use it through transformers

`pip install transformers` as well. `trust_remote_code` runs the file `modeling_lomdm.py` of this
folder: read it first.

```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained(".", trust_remote_code=True)
logits = model(input_ids=given).logits  # [rows, positions, vocabulary], -inf for the mask token
texts = model.sample(given{steps}).tokens  # all that is above works here too
```"""

_AUTO_TOKENIZER = """\
```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
ids = tokenizer("Some text", add_special_tokens=False).input_ids
```"""
