"""Checkpoints of MDLM and BD3-LM, whose network is the backbone here.

Names, shapes and conventions are those of kuleshov-group/mdlm and kuleshov-group/bd3lms: the
network in models/dit.py (the same in s-sahoo/duo), what a Lightning checkpoint holds in
diffusion.py and models/ema.py, the form on the Hugging Face hub in bd3lms, models/hf and
push_to_hf.py.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lomdm_jax.errors import UserError, one_line
from lomdm_jax.interop import pickles, weights
from lomdm_jax.interop.files import read_json
from lomdm_jax.interop.weights import Tensors

TYPES = ("mdlm", "bd3lm")  # model_type of config.json
DTYPES = ("float32", "bfloat16", "float16")  # all of which float32 holds exactly
ROTARY = "backbone.rotary_emb.inv_freq"
# What is no parameter: computed from the settings, or, of BD3-LM, the range of noise to train on.
_BUFFERS = r"backbone\.(rotary_emb\.inv_freq|block_diff_mask|mask)|sampling_eps_(min|max)|noise\..*"


class Said(NamedTuple):
    """What a checkpoint says of itself besides its tensors; None for what it does not say.

    sizes: by names of `config.model`, and vocab_size.
    block: positions per block, 0 for none.
    """

    length: int | None
    sizes: dict[str, int]
    time_conditioning: bool
    block: int
    ignore_first: bool | None = None


class Checkpoint(NamedTuple):
    """An MDLM, or a BD3-LM where said.block is not 0.

    tensors: its parameters, float32, by the names of `exporting.tensors`.
    sizes: by names of `config.model`, and vocab_size, read off the tensors.
    averaged: whether they are the exponential moving average; None if the file does not say.
    file: which holds the tensors.
    """

    tensors: Tensors
    said: Said
    sizes: dict[str, int]
    step: int
    averaged: bool | None
    file: pathlib.Path


def read(source: pathlib.Path, average: bool) -> Checkpoint:
    """A folder of the Hugging Face form, or a checkpoint of Lightning.

    average: whether to take the exponential moving average where a file has both.

    Raises:
      UserError: it cannot be read safely, is damaged, or is another model.
    """
    state, said, step, averaged, file = (
        _hugging_face(source) if source.is_dir() else _lightning(source, average)
    )
    found = {_name(name): a for name, a in state.items()}
    _check_kind(found, file)
    sizes = _sizes(found, said, file)
    tensors = {name: a for name, a in found.items() if not _is_buffer(name)}
    return Checkpoint(tensors, said, sizes, step, averaged, file)


def _is_buffer(name: str) -> bool:
    return re.fullmatch(_BUFFERS, name) is not None


def _name(name: str) -> str:
    """A tensor's own name, without what torch.compile and a model within a model put before."""
    return re.sub(r"^(backbone\.)+", "backbone.", name.replace("_orig_mod.", ""))


_State = tuple[Mapping[str, np.ndarray], Said, int, bool | None, pathlib.Path]


def _hugging_face(folder: pathlib.Path) -> _State:
    """Whether its weights are an average it does not say; those that were published are."""
    known = read_json(folder / "config.json")
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not safe.exists() and not pickled.exists():
        raise UserError(f"{folder} has neither {safe.name} nor {pickled.name}: copy it whole.")
    if safe.exists():
        return weights.read(safe), _said_by_hub(known), 0, None, safe
    return _arrays(pickles.load(pickled), pickled), _said_by_hub(known), 0, None, pickled


def _said_by_hub(known: dict[str, Any]) -> Said:
    theirs = {"width": "hidden_dim", "layers": "n_blocks", "heads": "n_heads"}
    theirs |= {name: name for name in ("cond_dim", "vocab_size")}
    blocks = known["model_type"] == "bd3lm" and known.get("cross_attn", True)
    return Said(
        _whole(known.get("model_length")),
        {ours: known[name] for ours, name in theirs.items() if name in known},
        bool(known.get("time_conditioning")),
        _whole(known.get("block_size")) or 1 if blocks else 0,
    )


def _lightning(file: pathlib.Path, average: bool) -> _State:
    held = pickles.load(file)
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
        raise UserError(
            f"{file} is no checkpoint of Lightning, which has a state_dict: give one, or a folder "
            "that holds config.json and model.safetensors."
        )
    said = _said_by_lightning(pickles.values(held.get("hyper_parameters", {})), file)
    state = _arrays(held["state_dict"], file)
    has_average = isinstance(held.get("ema"), dict)
    if has_average and average:
        state |= _average(held["ema"].get("shadow_params"), state, file)
    averaged = average and has_average
    return state, said, int(held.get("global_step", 0)), averaged, file


def _arrays(state: Any, file: pathlib.Path) -> Tensors:
    """torch's tensors as arrays; their types are kept, or, where numpy has none, widened."""

    def array(name: str, a: Any) -> np.ndarray:
        try:
            return (a.float() if str(a.dtype) == "torch.bfloat16" else a).detach().numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UserError(f"{file}: {name} is no plain tensor ({one_line(error)}).") from error

    if not isinstance(state, dict):
        raise UserError(f"{file} holds no tensors by name: give the file of a state_dict.")
    return {name: array(name, a) for name, a in state.items()}


def _average(shadow: Any, state: Tensors, file: pathlib.Path) -> Tensors:
    """The average by name: a list in the order of the parameters, that of the backbone first."""
    names = [name for name in state if not _is_buffer(_name(name))]
    if not isinstance(shadow, list | tuple) or len(shadow) < len(names):
        raise UserError(
            f"{file}: ema.shadow_params does not hold an average of each of the {len(names)} "
            "parameters: take the weights as they are, config.import.weights=raw."
        )
    averages = _arrays(dict(zip(names, shadow, strict=False)), file)
    for name, a in averages.items():
        if a.shape != state[name].shape:
            raise UserError(
                f"{file}: the average in the place of {name} {state[name].shape} has the shape "
                f"{a.shape}: take the weights as they are, config.import.weights=raw."
            )
    return averages


def _said_by_lightning(known: Any, file: pathlib.Path) -> Said:
    """From the config that Lightning keeps; of BD3-LM and Duo parts are in its section `algo`."""
    config = known.get("config") if isinstance(known, dict) else None
    config = config if isinstance(config, dict) else {}
    model, algo = (config.get(name) or {} for name in ("model", "algo"))
    own = config | algo
    for key, allowed in (("parameterization", ("subs",)), ("backbone", ("dit", "hf_dit"))):
        if own.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{file} was trained with {key} = {own[key]!r}, which is no MDLM or BD3-LM: "
                f"{' or '.join(allowed)} can be imported."
            )
    timed, noise = bool(own.get("time_conditioning")), (config.get("noise") or {}).get("type")
    if timed and noise not in (None, "loglinear", "log-linear"):
        raise UserError(
            f"{file} has time_conditioning with noise.type = {noise!r}: the network is told a "
            "noise level that only loglinear gives here."
        )
    theirs = {"width": "hidden_size", "layers": "n_blocks", "heads": "n_heads"}
    theirs["cond_dim"] = "cond_dim"
    length = _whole(model.get("length"))
    block = _whole(config.get("block_size")) or length or 0  # it refers to the length if not set
    return Said(
        length,
        {ours: model[name] for ours, name in theirs.items() if _whole(model.get(name))},
        timed,
        block if own.get("cross_attn") else 0,
        own.get("ignore_bos"),
    )


def _whole(value: Any) -> int | None:
    """A number; None for nothing, and for a reference to another setting."""
    return value if isinstance(value, int) else None


def _check_kind(found: Tensors, file: pathlib.Path) -> None:
    if not any("adaLN_modulation" in name for name in found):
        raise UserError(
            f"{file} has no adaLN_modulation in any block: it is no MDLM or BD3-LM, perhaps the "
            "network that they train from left to right, which cannot be imported. Train order "
            "'ar' here instead."
        )


def _sizes(found: Tensors, said: Said, file: pathlib.Path) -> dict[str, int]:
    """The network's sizes, which the tensors tell, and what the checkpoint says must agree."""
    rows, width = _tensor(found, "backbone.vocab_embed.embedding", 2, file).shape
    cond_dim = len(_tensor(found, "backbone.sigma_map.mlp.2.bias", 1, file))
    blocks = (re.match(r"backbone\.blocks\.(\d+)\.", name) for name in found)
    layers = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    sizes = {"vocab_size": rows, "width": width, "layers": layers, "cond_dim": cond_dim}
    sizes["heads"] = _heads(found, said, width, file)
    for name, value in said.sizes.items():
        if value != sizes[name]:
            raise UserError(
                f"{file} has tensors of {name} = {sizes[name]}, but its config says {value}: they "
                "do not belong together."
            )
    return sizes


def _tensor(found: Tensors, name: str, axes: int, file: pathlib.Path) -> np.ndarray:
    if name not in found or found[name].ndim != axes:
        there = f"of the shape {found[name].shape}" if name in found else "missing"
        raise UserError(f"{file}: the tensor {name}, with {axes} axes, is {there}.")
    return found[name]


def _heads(found: Tensors, said: Said, width: int, file: pathlib.Path) -> int:
    """From the frequencies of the rotary positions, which must be those that are used here."""
    if ROTARY not in found:
        if "heads" not in said.sizes:
            raise UserError(f"{file} has no {ROTARY}, and no config that says how many heads.")
        return said.sizes["heads"]
    frequency_D = _tensor(found, ROTARY, 1, file).astype(np.float32)
    half = len(frequency_D)
    expected_D = 10000.0 ** (-np.arange(half) / max(half, 1))
    if not half or width % (2 * half) or not np.allclose(frequency_D, expected_D, rtol=1e-2):
        raise UserError(
            f"{file}: {ROTARY} holds other frequencies than 10000^(-2 i / {2 * half}), or for "
            f"heads that do not divide the width {width}: such a network is not one of ours."
        )
    return width // (2 * half)
