"""Both bounds of a checkpoint on the sets on which models of OpenWebText are tried, as a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lomdm_jax.data.prepare import MANIFEST_FILE, Prepared, prepare
from lomdm_jax.data.presets import apply
from lomdm_jax.data.sentence_piece import MODEL_FILE
from lomdm_jax.data.tokenizers import needs_text
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.evaluation.zero_shot import Row, markdown, write
from lomdm_jax.jobs.evaluate import make_scored
from lomdm_jax.run import Run
from lomdm_jax.trained import Trained

# What a preset must not change: the model reads its own ids, and as many at a time as ever.
_OWN = ("tokenizer", "vocab_size", "length", "workers", "directory")


def zero_shot(model: Trained) -> list[Row]:
    """Score the sets of `zero_shot.sets`; write zero_shot.json, .csv and .md after each.

    Raises:
      UserError: a set cannot be had, once all others are scored; or the settings do not fit.
    """
    config = model.config
    meshes.check_divides(model.mesh, "eval.batch_size", config.eval.batch_size)
    names = [name.strip() for name in config.zero_shot.sets.split(",")]
    configs = {name: config_of(model, name) for name in names}
    scored: Callable[..., Any] | None = None
    rows: list[Row] = []
    for name in names:
        print(f"--- {name}", flush=True)
        prepared, failure = _prepared(model, configs[name])
        if prepared is None:
            rows.append(Row(name, None, None, failure))
            print(f"failed: {failure}", flush=True)
        else:
            run = Run(configs[name], model.workdir, prepared, (), model.generator, model.mesh)
            scored = scored or make_scored(run)
            evaluation, _ = scored(run, model.params)
            rows.append(Row(name, evaluation, prepared.passport("valid")))
        if multihost.leads():
            paths = write(model.workdir, rows, config)
    print(markdown(rows, config), flush=True)
    if multihost.leads():
        print("\n".join(f"wrote {path}" for path in paths), flush=True)
    _check_all(rows)
    return rows


def _check_all(rows: list[Row]) -> None:
    failed = [row.name for row in rows if row.failure]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} sets could not be had: {', '.join(failed)}; the table "
            "has the reasons. Mend them and run the same command again: sets that are prepared "
            "stay so."
        )


def config_of(model: Trained, name: str) -> ConfigDict:
    """The run's config with the text of a preset to evaluate, and none to train on.

    Raises:
      UserError: the preset has no text to evaluate apart from that to train on, or the tokenizer
        of the run is one that no settings name.
    """
    config = model.config.copy_and_resolve_references()
    given = config.objective.ignore_first
    apply(config, name)
    data, own = config.data, model.config.data
    config.objective.ignore_first = given
    data.update({key: own[key] for key in _OWN}, mixture="")
    if not data.valid_source:
        if not data.valid_split:
            raise UserError(
                f"config.zero_shot.sets names {name!r}, which holds out text of its own to "
                "evaluate and has none apart: use --job evaluate with --data and that name."
            )
        data.update(valid_source=data.source, source="", split="")
    data.tokenizer = _tokenizer(model)
    if needs_text(own.tokenizer):
        data.vocab_size = 0
    if (Path(own.directory).expanduser() / MANIFEST_FILE).exists():
        data.directory = str(Path(own.directory).expanduser().parent)  # that is one set's folder
    return config


def _tokenizer(model: Trained) -> str:
    """A name by which `make_tokenizer` opens the run's tokenizer without its training text."""
    name: str = model.config.data.tokenizer
    if not needs_text(name):
        return name
    file = model.workdir / "tokenizer" / MODEL_FILE
    if not file.exists():
        raise UserError(
            f"config.data.tokenizer is {name!r}, made from the training text, and other text may "
            "have symbols that it lacks: --job zero-shot needs a model with another tokenizer, "
            "such as 'hf:gpt2', 'bytes' or 'sentencepiece-bpe'."
        )
    return f"sentencepiece:{file}"


def _prepared(model: Trained, config: ConfigDict) -> tuple[Prepared | None, str]:
    """The text of a set, or None and what went wrong, on any process."""

    def attempt() -> tuple[Prepared | None, str]:
        try:
            prepared = prepare(config.data)
        except UserError as error:
            return None, one_line(error)
        ours, theirs = model.tokenizer.fingerprint, prepared.tokenizer.fingerprint
        if ours != theirs:
            return None, (
                f"{config.data.tokenizer} has changed since the model was trained: SHA-256 "
                f"{theirs[:12]}, then {ours[:12]}"
            )
        return prepared, ""

    prepared, failure = multihost.in_turn(attempt)
    failures = [other for other in multihost.gather(failure) if other]
    return (None, failures[0]) if failures else (prepared, "")
