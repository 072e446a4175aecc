"""uvicorn around the page: an address to listen on, and an end that does not wait for models."""

import socket
from types import FrameType

import fastapi
import uvicorn

from lomdm_jax.errors import UserError
from lomdm_jax.serving.device import Device

GRACE = 2  # seconds that connections have to end; generations are stopped at once


class Server(uvicorn.Server):
    """A server that stops the device's jobs when it is told to stop; Ctrl-C ends in
    KeyboardInterrupt."""

    def __init__(self, app: fastapi.FastAPI, device: Device) -> None:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        super().__init__(config)
        self._device = device

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._device.stop()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket on `serve.host` and `serve.port`; port 0 is any that is free.

    Raises:
      UserError: it cannot be had.
    """
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"config.serve.host is {host!r} and config.serve.port is {port}, where nothing can "
            f"listen ({error}): choose another port, or 0 for any that is free."
        ) from error


def address(listener: socket.socket) -> str:
    """The URL of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
