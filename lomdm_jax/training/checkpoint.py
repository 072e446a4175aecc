"""Checkpoints: everything a run needs to continue as if it had never stopped."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lomdm_jax.data.pipeline import Mixture
from lomdm_jax.data.prepare import Prepared
from lomdm_jax.data.tokenizers import Tokenizer
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.training.state import TrainState

BOUND = "nelbo_order"  # the best checkpoint is the one with the lowest


class Damaged(Exception):
    """A checkpoint cannot be read; says why in one line."""


class Restored(NamedTuple):
    """state: a TrainState; data: state of the data iterator."""

    state: TrainState
    data: dict[str, Any]


def _best(bounds: dict[int, float], steps: Iterable[int]) -> int | None:
    """Which of the steps has the lowest bound; None if none was evaluated."""
    return min((step for step in steps if step in bounds), key=bounds.__getitem__, default=None)


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the best checkpoint. bounds: by step, looked at whenever one is saved."""

    def __init__(self, bounds: dict[int, float]):
        self._bounds = bounds

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = _best(self._bounds, [each.step for each in checkpoints])
        return [each.step == best for each in checkpoints]


class Checkpoints:
    """Saves in the background; keeps the latest `keep` and the best.

    With several processes each writes what its devices hold and reads what they need, so that a
    run may go on with other processes and another mesh. All must call `save`, `restore`,
    `set_aside` and `wait`.

    Args:
      folder: where checkpoints live, one sub-folder per step.
      keep: how many of the latest are kept.
      create: whether to make the folder if there is none.

    Raises:
      UserError: if there is no folder and none is to be made.
    """

    def __init__(self, folder: pathlib.Path, keep: int, *, create: bool):
        self.folder = folder.absolute()
        if not create and not folder.is_dir():
            raise self._missing("at all", [])
        self._bounds: dict[int, float] = {}
        policies = [preservation_policy.LatestN(keep), _Best(self._bounds)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        found = {step: self._bound(step) for step in self.steps()}
        self._bounds |= {step: bound for step, bound in found.items() if bound is not None}

    def save(
        self,
        state: TrainState,
        data: dict[str, Any],
        facts: dict[str, Any],
        bound: float | None = None,
    ) -> None:
        """Start saving; returns once the arrays are copied off the devices.

        Args:
          state: saved under its own step.
          data: JSON-able state of the data iterator.
          facts: see `facts`.
          bound: nelbo_order in nats per token if it was just evaluated.

        Raises:
          UserError: this or the one before could not be written; the others are as they were.
        """
        step = int(state.step)
        self._bounds.pop(step, None)
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data),
            "facts": ocp.args.JsonSave(facts),
        }
        if bound is not None:
            self._bounds[step] = bound
            items["evaluation"] = ocp.args.JsonSave({BOUND: bound})
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        return sorted(self._manager.all_steps())

    def set_aside(self, step: int, name: str) -> pathlib.Path:
        """Move a checkpoint into the folder `name` beside, where nothing looks for it; its new
        place."""
        place = self.folder.with_name(name) / str(step)
        while multihost.same(place.exists()):
            place = place.with_name(f"{place.name}_")
        if multihost.leads():
            place.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(place)
        multihost.wait_for_all("set_aside")
        self._manager.reload()
        return place

    def find(self, which: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
          UserError: if there is no such checkpoint.
        """
        steps = self.steps()
        if which == "latest":
            step = self.latest()
        elif which == "best":
            step = _best(self._bounds, steps)
        else:
            step = int(which)
        if step is None or step not in steps:
            raise self._missing(repr(which), steps)
        return step

    def _bound(self, step: int) -> float | None:
        """nelbo_order as it was evaluated at `step`; None if it was not, or cannot be read."""
        try:
            return self._read(step, "evaluation")[BOUND]
        except (Damaged, KeyError):
            return None

    def _missing(self, which: str, steps: list[int]) -> UserError:
        return UserError(
            f"No checkpoint {which} in {self.folder} (there: {steps or 'none'}): train first, or "
            "point --workdir or config.checkpoint.restore at one that exists."
        )

    def restore(self, step: int, target: TrainState) -> Restored:
        """The checkpoint of `step`.

        Args:
          step: a step that exists; see `find`.
          target: shapes and dtypes of the state, with the shardings it is to have.

        Raises:
          Damaged: a file is missing or cannot be read, on this process or another.
        """
        folder, found, reason = self.folder / str(step), None, ""
        try:
            # Straight from the files: the manager would have processes wait for one that failed.
            args = ocp.args.StandardRestore(target)
            state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
            found = Restored(state, ocp.JsonCheckpointHandler().restore(folder / "data"))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # nothing is wrong with the files
        except Exception as error:  # what a damaged file gives is as various as the files
            reason = one_line(error)
        for index, theirs in enumerate(multihost.gather(reason)):
            if theirs:
                where = f"process {index}: " if jax.process_count() > 1 else ""
                raise Damaged(f"{where}{theirs}")
        assert found is not None
        return found

    def parameters(self, step: int, sharding: Sharding) -> dict[str, Any]:
        """The EMA parameters of a checkpoint of any model, by name (see `by_name`), placed by
        `sharding`."""
        folder = self.folder / str(step) / "state"
        with ocp.PyTreeCheckpointer() as reader:
            saved = reader.metadata(folder).item_metadata.tree["ema"]
            target = {
                "ema": jax.tree.map(
                    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), saved
                )
            }
            how = ocp.checkpoint_utils.construct_restore_args(target)
            args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
            return by_name(reader.restore(folder, args=args)["ema"])

    def facts(self, step: int) -> dict[str, Any]:
        """The facts saved with a checkpoint, without its arrays.

        Raises:
          Damaged: they are missing or cannot be read.
        """
        return self._read(step, "facts")

    def _read(self, step: int, item: str) -> dict[str, Any]:
        try:
            return ocp.JsonCheckpointHandler().restore(self.folder / str(step) / item)
        except Exception as error:
            raise Damaged(one_line(error)) from error

    def wait(self) -> None:
        """Return when all that was asked for is written.

        Raises:
          UserError: something could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what it means that writing failed, in the background or at once."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # an exchange with another process failed, not the disk
        except Exception as error:
            good = self.latest()
            intact = "There was none before" if good is None else f"Step {good} is intact"
            raise UserError(
                f"A checkpoint could not be written to {self.folder}: {one_line(error)}. {intact}. "
                "Make room there if the disk is full, or point --workdir elsewhere, and run the "
                "same command again."
            ) from error

    def close(self) -> None:
        """Wait, and release what is held."""
        self.wait()
        self._manager.close()


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts, by their keys with slashes between: "backbone/blocks/0/..."."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


IMPORTED = "imported"  # the fact that says where parameters came from that were not trained here
# Facts that parameters depend on, and what a run that continues must share besides.
_SAME_MODEL = (
    *("vocab_size", "tokenizer", "order.name", "model.width", "model.layers", "model.heads"),
    *("model.cond_dim", "model.head_layers", "model.time_conditioning", "model.layout"),
)
_SAME_RUN = (
    *("order.c1", "order.c2", "order.exponent", "train.batch_size", "train.seed"),
    *("data", "data.length", "data.count_pads"),
    *("objective.clip_noise", "objective.ignore_first", "objective.temperature"),
    *("objective.uniform_share", "objective.blank_share", "objective.order_share"),
    *("train.random_steps",),
)


def facts(config: ConfigDict, prepared: Prepared, mixture: Mixture = ()) -> dict[str, Any]:
    """What is saved with a checkpoint: JSON-able values by flat name.

    `data` says what is trained on: the hash of the training tokens of each corpus, and its weight.
    """
    corpora = [
        [corpus.manifest["splits"].get("train", {}).get("sha256", ""), weight]
        for corpus, weight in ((prepared, 1.0), *mixture)
    ]
    return model_facts(config, prepared.tokenizer) | {"data": corpora}


def model_facts(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """`facts` without those of the training data."""
    flat = {
        f"{section}.{name}": config[section][name] for section in config for name in config[section]
    }
    return {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint} | flat


def check_facts(saved: dict[str, Any], current: dict[str, Any], *, resume: bool) -> None:
    """Refuse a checkpoint of another model, tokenizer or, to continue it, another run.

    Raises:
      UserError: names the first difference, with both values.
    """
    if resume and IMPORTED in saved:
        raise UserError(
            f"The checkpoint was imported from {saved[IMPORTED]}: it has parameters, but neither "
            "an optimizer's state nor a place in the data. Train another run from them, with "
            "another --workdir and config.train.start_from = this folder."
        )
    for key in _SAME_MODEL + (_SAME_RUN if resume else ()):
        if saved.get(key) != current[key]:  # an older one may lack a key
            raise UserError(
                f"The checkpoint was made with {key} = {saved.get(key)!r}, but this run has "
                f"{current[key]!r}: use the config and data it was trained with, or another "
                "--workdir."
            )
    if resume:
        for key in saved.keys() & current.keys():
            if saved[key] != current[key]:
                print(f"since the checkpoint: {key} was {saved[key]!r}, is {current[key]!r}")
