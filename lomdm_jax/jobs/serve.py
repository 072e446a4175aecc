"""A local page to try runs in."""

import contextlib
import importlib
import pathlib

import jax

from lomdm_jax.config import validate
from lomdm_jax.errors import UserError
from lomdm_jax.trained import Trained, load


def serve(model: Trained) -> None:
    """Serve this run and those of `serve.runs` until interrupted.

    Raises:
      UserError: FastAPI or uvicorn is missing, there are several processes, a run cannot be
        loaded, or nothing can listen at the address.
    """
    _check()
    from lomdm_jax.serving.app import is_loopback, make_app
    from lomdm_jax.serving.device import Device
    from lomdm_jax.serving.models import Models
    from lomdm_jax.serving.server import Server, address, listen

    config = model.config.serve
    with listen(config.host, config.port) as listener:
        device = Device(config.queue)
        app = make_app(Models([model, *_others(config.runs)]), config, device)
        if not is_loopback(config.host):
            print(f"warning: whoever reaches {config.host} can use this server; it has no login")
        print(f"serving {address(listener)} (Ctrl-C stops)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            Server(app, device).run(sockets=[listener])
    print("stopped", flush=True)


def _check() -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"--job serve answers from one process, but there are {jax.process_count()}: use "
            "--distributed off."
        )
    try:
        for name in ("fastapi", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--job serve needs FastAPI and uvicorn ({error}): pip install fastapi uvicorn"
        ) from error


def _others(runs: str) -> list[Trained]:
    found = [load(pathlib.Path(part.strip())) for part in runs.split(",") if part.strip()]
    for model in found:
        validate(model.config)
    return found
