"""Folders that appear whole or not at all, and JSON that may be damaged."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from lomdm_jax.errors import UserError, one_line


@contextlib.contextmanager
def whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `folder`, which takes its place when the block ends without an error.

    What was there is gone then, so check first. A kill leaves it as it was, or, between the two
    renames at the end, the old and the new one, both whole, as .NAME.old and .NAME.new beside it.

    Raises:
      UserError: it cannot be written.
    """
    folder = folder.expanduser().resolve()
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)  # what a kill left
        new.mkdir()
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder} could not be written: {one_line(error)}.") from error
        raise


def entries(folder: pathlib.Path) -> list[str]:
    """The names of what a folder holds, in order; none if there is no such folder.

    Raises:
      UserError: it is a file.
    """
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a folder is to be written: give another name.")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): copy it again.") from error
    if not isinstance(known, dict):
        raise UserError(f"{file} holds no JSON object: copy it again.")
    return known
