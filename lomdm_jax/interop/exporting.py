"""A run as files for PyTorch: the weights by PyTorch's names, what the network is, and the card."""

import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from lomdm_jax import __version__
from lomdm_jax.config import default_config
from lomdm_jax.data.tokenizers import Tokenizer
from lomdm_jax.errors import UserError
from lomdm_jax.generator import architecture, init_params
from lomdm_jax.interop import card
from lomdm_jax.interop.files import entries, read_json
from lomdm_jax.interop.weights import Shapes, Tensors
from lomdm_jax.orders import make_order
from lomdm_jax.training.checkpoint import IMPORTED, by_name, model_facts

WEIGHTS, CONFIG, CARD, EVALUATION = (
    "model.safetensors",
    "config.json",
    "README.md",
    "evaluation.json",
)
MODELING = "modeling_lomdm.py"
# tokenizer_config.json tells the package transformers of tokenizer.json; symbols.json and
# tokenizer.model are read without it.
TOKENIZER = ("tokenizer.model", "tokenizer.json", "special_ids.json", "symbols.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
FILES = (WEIGHTS, CONFIG, CARD, EVALUATION, MODELING, *TOKENIZER, TOKENIZER_CONFIG)
MODEL_TYPE = "lomdm"
# The classes of modeling_lomdm.py that the package transformers is to take.
AUTO_MAP = {
    "AutoConfig": "modeling_lomdm.LoMDMConfig",
    "AutoModel": "modeling_lomdm.LoMDMModel",
    "AutoModelForMaskedLM": "modeling_lomdm.LoMDMForMaskedLM",
}


class Rule(NamedTuple):
    """Which arrays of which modules are called what.

    module: pattern of the last parts of the module's name, with slashes.
    ours, theirs: the array's own name here and in PyTorch.
    transposed: whether it is a Linear's kernel [in, out], which PyTorch holds as [out, in].
    """

    module: str
    ours: str
    theirs: str
    transposed: bool = False


_LINEAR = r"sigma_map/mlp/\d|mlp/\d|linear|adaLN_modulation|content"
# Every array matches one rule, by either name.
RULES = (
    Rule(_LINEAR + r"|attn_qkv|attn_out", "kernel", "weight", transposed=True),
    Rule(_LINEAR, "bias", "bias"),
    Rule(r"norm\w*", "scale", "weight"),
    Rule("vocab_embed", "embedding", "embedding"),
    Rule("walk_head", "table", "table"),
    Rule("token_head", "log_rate", "log_rate"),
    *(Rule(r"\w+_head", name, name) for name in ("position", "distance", "neighbours")),
)


def tensors(params: Any) -> Tensors:
    """Parameters as PyTorch holds them: "backbone.blocks.0.attn_qkv.weight" [out, in].

    params: nested dicts of arrays, or arrays by name (`checkpoint.by_name`).

    Raises:
      KeyError: RULES has none for an array.
    """
    found = {}
    for name, a in by_name(params).items():
        their_name, transposed = _translated(name.split("/"), lambda r: (r.ours, r.theirs))
        found[".".join(their_name)] = _laid(a, transposed)
    return found


def parameters(found: Mapping[str, np.ndarray]) -> Tensors:
    """The inverse of `tensors`: arrays by name, "backbone/blocks/0/attn_qkv/kernel" [in, out]."""
    params = {}
    for name, a in found.items():
        our_name, transposed = _translated(name.split("."), lambda r: (r.theirs, r.ours))
        params["/".join(our_name)] = _laid(a, transposed)
    return params


def _translated(
    parts: list[str], names: Callable[[Rule], tuple[str, str]]
) -> tuple[list[str], bool]:
    """The parts of a name in the other language, and whether the array is transposed there."""
    *module, last = parts
    for rule in RULES:
        here, there = names(rule)
        if last == here and re.search(f"(^|/)({rule.module})$", "/".join(module)):
            return [*module, there], rule.transposed
    raise KeyError(f"interop/exporting.py has no rule for {parts}")


def _laid(a: Any, transposed: bool) -> np.ndarray:
    # In memory as it is to lie in the file: safetensors looks at nothing else.
    return np.ascontiguousarray(np.asarray(a).T if transposed else a)


def shapes(config: ConfigDict, rows: int) -> Shapes:
    """The shape of each tensor of a model of this config, by PyTorch's names."""
    found = {}
    for name, a in by_name(parameter_shapes(config, rows)).items():
        their_name, transposed = _translated(name.split("/"), lambda r: (r.ours, r.theirs))
        found[".".join(their_name)] = a.shape[::-1] if transposed else a.shape
    return found


def parameter_shapes(config: ConfigDict, rows: int) -> Any:
    """The parameters of a model of this config, as nested dicts of shapes and types."""
    return jax.eval_shape(lambda: init_params(config, rows, jax.random.key(0)))


class Exported(NamedTuple):
    """What an export says, whatever the form.

    config: the run's own, resolved.
    params: its EMA parameters at `step`, nested dicts of host arrays.
    facts: those of the checkpoint.
    evaluation: the content of evaluation.json, None without one.
    """

    config: ConfigDict
    tokenizer: Tokenizer
    params: Any
    step: int
    facts: dict[str, Any]
    evaluation: str | None = None


def evaluation_of(folder: pathlib.Path) -> str | None:
    """The content of a folder's evaluation.json, None if there is none.

    Raises:
      UserError: it is damaged.
    """
    file = folder / EVALUATION
    if not file.exists():
        return None
    read_json(file)
    return file.read_text(encoding="utf-8")


def write(folder: pathlib.Path, exported: Exported) -> None:
    """All files of an export, into a folder that is empty."""
    found = tensors(exported.params)
    safetensors.numpy.save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    exported.tokenizer.save(folder)
    _write_tokenizer_config(folder, exported)
    if exported.evaluation is not None:
        (folder / EVALUATION).write_text(exported.evaluation, encoding="utf-8")
    shutil.copyfile(pathlib.Path(__file__).with_name(MODELING), folder / MODELING)
    known = settings(exported)
    (folder / CONFIG).write_text(_json(known), encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors would keep others out
    report = None if exported.evaluation is None else json.loads(exported.evaluation)
    size, files = sum(a.size for a in found.values()), [path.name for path in folder.iterdir()]
    (folder / CARD).write_text(card.text(known, report, size, files), encoding="utf-8")


def settings(exported: Exported) -> dict[str, Any]:
    """The content of config.json: what modeling_lomdm.py needs, and under "lomdm_jax" what a run's
    folder needs besides the tensors and the tokenizer. JSON-able."""
    config, tokenizer = exported.config, exported.tokenizer
    names = ("width", "layers", "heads", "cond_dim", "time_conditioning")
    return {
        "model_type": MODEL_TYPE,
        "architectures": [AUTO_MAP["AutoModelForMaskedLM"].rpartition(".")[2]],
        "auto_map": AUTO_MAP,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.rows,
        "mask_id": tokenizer.mask_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        **{name: config.model[name] for name in names},
        **architecture(config),
        "one_pass": make_order(**config.order).one_pass(config.model.layout),
        "order": config.order.to_dict(),
        "objective": {
            name: config.objective[name] for name in ("eps", "reconstruction_share", "temperature")
        },
        "lomdm_jax": _provenance(exported),
    }


def _provenance(exported: Exported) -> dict[str, Any]:
    config = exported.config.to_dict()
    config["checkpoint"]["restore"] = "latest"  # there is but one
    known = model_facts(exported.config, exported.tokenizer)
    facts = {
        name: value
        for name, value in exported.facts.items()
        if name != IMPORTED and (name in ("vocab_size", "tokenizer") or known.get(name) != value)
    }
    return {
        "version": __version__,
        "step": exported.step,
        "facts": _plain(facts),
        "config": _plain(config),
    }


def _plain(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def restored(values: dict[str, Any]) -> dict[str, Any]:
    """Values by "section.name" or by section and name, of which `_plain` made JSON."""
    floats = {
        f"{section}.{name}"
        for section, defaults in default_config().to_dict().items()
        for name, default in defaults.items()
        if isinstance(default, float)
    }

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(each, f"{place}.{name}".lstrip(".")) for name, each in value.items()}
        return float(value) if place in floats and isinstance(value, str) else value

    return walk(values, "")


def _write_tokenizer_config(folder: pathlib.Path, exported: Exported) -> None:
    """What the package transformers reads beside a tokenizer.json. It appends a mask token that
    the tokenizer has not, behind all others, which is its id here too."""
    file, known = folder / "tokenizer.json", exported.tokenizer
    if not file.exists():
        return
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    if tokenizer.get_vocab_size() != known.vocab_size:
        return  # with gaps in its ids, what is appended would get another
    names = {"eos_token": known.eos_id, "pad_token": known.pad_id, "mask_token": known.mask_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": exported.config.data.length,
        **{name: tokenizer.id_to_token(i) or "<mask>" for name, i in names.items()},
    }
    (folder / TOKENIZER_CONFIG).write_text(_json(settings), encoding="utf-8")


def check_folder(folder: pathlib.Path) -> None:
    """Make sure that nothing but an earlier export would be replaced.

    Raises:
      UserError: the folder holds something else.
    """
    found = entries(folder)
    if not found:
        return
    strange = [name for name in found if name not in FILES]
    if strange or not _is_export(folder):
        what = strange[0] if strange else f"no {CONFIG} of an export"
        raise UserError(
            f"config.export.folder is {str(folder)!r}, which is not empty and no earlier export "
            f"(there: {what}): nothing is overwritten, so give another folder."
        )


def _is_export(folder: pathlib.Path) -> bool:
    try:
        return read_json(folder / CONFIG).get("model_type") == MODEL_TYPE
    except UserError:
        return False


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
