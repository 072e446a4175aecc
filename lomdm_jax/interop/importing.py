"""Folders of runs from what PyTorch holds: our own exports, and checkpoints of MDLM and BD3-LM."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lomdm_jax.config import completed, validate
from lomdm_jax.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, needs_text
from lomdm_jax.errors import UserError
from lomdm_jax.interop import mdlm, weights
from lomdm_jax.interop.exporting import (
    CONFIG,
    EVALUATION,
    MODEL_TYPE,
    WEIGHTS,
    Exported,
    evaluation_of,
    parameter_shapes,
    parameters,
    restored,
    settings,
    shapes,
)
from lomdm_jax.interop.files import entries, read_json, whole
from lomdm_jax.trained import save
from lomdm_jax.training.checkpoint import BOUND, IMPORTED, Checkpoints, by_name, model_facts
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import init_state

AVERAGE = "ema"
# Whose vocabulary has so many rows, the mask token included (kuleshov-group/mdlm, diffusion.py).
TOKENIZERS = {50258: "hf:gpt2", 30522: "hf:bert-base-uncased"}
# What time conditioning needs, since the network sees a time (config.validate).
_TIMED = {
    "objective": {"name": "continuous"},
    "eval": {"estimator": "continuous", "trajectories": 0},
    "sample": {"sampler": "ancestral"},
}


def read(source: pathlib.Path, base: ConfigDict) -> Exported:
    """What `source` holds, whichever it is.

    base: settings of an MDLM or BD3-LM that its checkpoint does not give, and the section "import".

    Raises:
      UserError: it is damaged, unsafe, or none of these.
    """
    if not source.exists():
        raise UserError(f"config.import.source is {str(source)!r}, but there is no such file.")
    kind = ""
    if source.is_dir():
        kind = str(read_json(source / CONFIG).get("model_type"))
        if kind not in (MODEL_TYPE, *mdlm.TYPES):
            raise UserError(
                f"{source / CONFIG} has model_type = {kind!r}: {MODEL_TYPE}, which --job export "
                f"writes, {' and '.join(mdlm.TYPES)} can be imported."
            )
    return _own(source) if kind == MODEL_TYPE else _mdlm(source, base)


def _own(folder: pathlib.Path) -> Exported:
    """The run that an export was made of."""
    file = folder / CONFIG
    known = read_json(file)
    try:
        origin = known["lomdm_jax"]
        step, facts = int(origin["step"]), dict(restored(origin["facts"]))
        fingerprint = str(facts["tokenizer"])
        config = completed(restored(origin["config"]))
        validate(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no longer what --job export wrote: copy it again.") from error
    tokenizer = _own_tokenizer(folder, fingerprint)
    found = weights.read(folder / WEIGHTS)
    weights.check(found, shapes(config, tokenizer.rows), folder / WEIGHTS)
    facts = model_facts(config, tokenizer) | facts
    params = _nested(config, tokenizer, found)
    exported = Exported(config, tokenizer, params, step, facts, evaluation_of(folder))
    _check_settings(known, settings(exported), file)
    return exported


def _own_tokenizer(folder: pathlib.Path, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"The tokenizer in {folder} is not the one that the model was trained with: SHA-256 "
            f"{tokenizer.fingerprint[:12]}, then {fingerprint[:12]}. Copy it again."
        )
    return tokenizer


# What says how a network is used in PyTorch, not which it is.
_FOR_PYTORCH = ("lomdm_jax", "architectures", "auto_map", "torch_dtype")


def _check_settings(known: dict[str, Any], expected: dict[str, Any], file: pathlib.Path) -> None:
    """Both halves of config.json must tell of the same network."""
    for key in expected.keys() - set(_FOR_PYTORCH):
        value = list(expected[key]) if isinstance(expected[key], tuple) else expected[key]
        if known.get(key) != value:
            raise UserError(
                f"{file} has {key} = {known.get(key)!r}, but the run in its part lomdm_jax has "
                f"{value!r}: the file was changed; copy it again."
            )


def _mdlm(source: pathlib.Path, base: ConfigDict) -> Exported:
    """A run whose checkpoint is an MDLM's or a BD3-LM's."""
    asked = base["import"]
    found = mdlm.read(source, average=asked.weights == AVERAGE)
    config = _config_of(found, base)
    validate(config)
    tokenizer = _tokenizer(config, found)
    weights.check(found.tensors, shapes(config, tokenizer.rows), found.file, mdlm.DTYPES)
    print(_describe(found, config), flush=True)
    params = _nested(config, tokenizer, found.tensors)
    return Exported(config, tokenizer, params, found.step, model_facts(config, tokenizer))


def _config_of(found: mdlm.Checkpoint, base: ConfigDict) -> ConfigDict:
    """The base with the network, order, length and tokenizer of the checkpoint."""
    config, said = base.copy_and_resolve_references(), found.said
    config.model.update(
        {name: value for name, value in found.sizes.items() if name != "vocab_size"}
    )
    config.model.update(layout="own", time_conditioning=said.time_conditioning)
    config.order.update(name=base["import"].order or _order(said), exponent=1.0)
    config.objective.ignore_first = _ignores_first(said, base)
    config.data.update(length=_length(found, base), vocab_size=0, tokenizer=_name(found, base))
    for section, changes in _TIMED.items() if said.time_conditioning else ():
        config[section].update(changes)
    return config


def _order(said: mdlm.Said) -> str:
    return f"block:{said.block}" if said.block else "mdm"


def _ignores_first(said: mdlm.Said, base: ConfigDict) -> bool:
    """BD3-LM never masks the first token, and says so only where Lightning wrote its settings."""
    given = bool(said.block) if said.ignore_first is None else bool(said.ignore_first)
    return given or base.objective.ignore_first


def _length(found: mdlm.Checkpoint, base: ConfigDict) -> int:
    length = base["import"].length or found.said.length
    if not length:
        raise UserError(
            f"{found.file} does not say how many tokens its sequences have: give config.import."
            "length, such as 1024."
        )
    return length


def _name(found: mdlm.Checkpoint, base: ConfigDict) -> str:
    """The tokenizer that was asked for, or the one that has so many rows."""
    rows = found.sizes["vocab_size"]
    if not needs_text(base.data.tokenizer):  # no checkpoint has one that is made from text
        return base.data.tokenizer
    if rows not in TOKENIZERS:
        raise UserError(
            f"{found.file} has a vocabulary of {rows} rows, the mask token included, which is not "
            "that of GPT-2 (50258) or BERT (30522): give config.data.tokenizer, such as hf:FOLDER."
        )
    return TOKENIZERS[rows]


def _tokenizer(config: ConfigDict, found: mdlm.Checkpoint) -> Tokenizer:
    name, rows = config.data.tokenizer, found.sizes["vocab_size"]
    try:
        tokenizer = make_tokenizer(name, 0, lambda: ())
    except UserError as error:
        raise UserError(
            f"The checkpoint has {rows} rows, for which config.data.tokenizer = {name!r} is taken, "
            "but that cannot be opened here: give it as a local folder, config.data.tokenizer="
            f"hf:FOLDER. {error}"
        ) from error
    if tokenizer.rows != rows:
        raise UserError(
            f"config.data.tokenizer is {name!r}, which has {tokenizer.rows} rows with the mask "
            f"token, but {found.file} has {rows}: give the tokenizer that it was trained with."
        )
    return tokenizer


def _describe(found: mdlm.Checkpoint, config: ConfigDict) -> str:
    which = {
        True: "their exponential moving average",
        False: "as training left them, not their average",
        None: "as the file has them; it does not say whether they are an average",
    }
    model = config.model
    return (
        f"{'BD3-LM' if found.said.block else 'MDLM'} in {found.file}: {model.layers} layers, width "
        f"{model.width}, {model.heads} heads, {config.data.length:,} tokens, step {found.step:,}; "
        f"order {config.order.name}, tokenizer {config.data.tokenizer}\n"
        f"weights: {which[found.averaged]}"
    )


def _nested(config: ConfigDict, tokenizer: Tokenizer, found: weights.Tensors) -> Any:
    """The parameters of the model, nested dicts of float32 arrays."""
    wanted, params = parameter_shapes(config, tokenizer.rows), parameters(found)
    leaves = [params[name].astype(np.float32) for name in by_name(wanted)]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def check_workdir(workdir: pathlib.Path) -> None:
    """Raises UserError unless there is nothing in the folder that a run is to be written to."""
    found = entries(workdir)
    if found:
        raise UserError(
            f"--workdir is {str(workdir)!r}, which is not empty (there: {found[0]}): a run is "
            "imported into a new folder; give another name."
        )


def write(workdir: pathlib.Path, exported: Exported, source: pathlib.Path) -> None:
    """The folder of a run, which appears whole: config, tokenizer, evaluation, and a checkpoint
    with the parameters for average and parameters, and a fresh optimizer state."""
    config = exported.config
    with whole(workdir) as folder:
        save(folder, config, exported.tokenizer)
        if exported.evaluation is not None:
            (folder / EVALUATION).write_text(exported.evaluation, encoding="utf-8")
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, create=True)
        state = jax.jit(lambda params: init_state(params, make_optimizer(config.optimizer)))(
            exported.params
        )
        state = state.replace(step=state.step + exported.step)
        facts = exported.facts | {IMPORTED: source.name}
        checkpoints.save(state, {}, facts, _bound(exported))
        checkpoints.close()


def _bound(exported: Exported) -> float | None:
    """nelbo_order of the evaluation, by which checkpoints are told apart."""
    if exported.evaluation is None:
        return None
    return json.loads(exported.evaluation).get(f"{BOUND}_nats_per_token")
