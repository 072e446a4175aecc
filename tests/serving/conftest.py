"""A server with a backend that answers at once, or when it is told to."""

import contextlib
import threading
import time

import pytest

from lomdm_jax.config import default_config
from lomdm_jax.errors import UserError

WORDS = ["so", " it", " goes", "\n", " <b>&", " end"]


class Fake:
    """Reveals WORDS from right to left after the prompt, which also says how.

    "wait": only while `go` is set; "fail": raises in the middle; "large": more than sockets hold.
    """

    def __init__(self):
        self.go = threading.Event()
        self.started, self.ended = [], []  # prompts
        self.at_once = self.most_at_once = 0

    def runs(self):
        samplers = {"race": None, "velocity": None, "ancestral": None, "margin": "for no reason"}
        defaults = default_config().sample.to_dict() | {"dependence": None, "prompt": ""}
        names = {"first": samplers, "second": samplers | {"velocity": "not in this run"}}
        common = {"order": "ar", "layout": "state", "length": 7, "defaults": defaults}
        return [{"name": name, "samplers": s} | common for name, s in names.items()]

    def stream(self, request):
        if request.run not in ("", "first", "second"):
            raise UserError(f"run is {request.run!r}: there is none.")
        return self._events(request)

    def _events(self, request):
        self.started.append(request.prompt)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            given = [request.prompt] + [None] * len(WORDS)
            yield {"event": "start", "compiling": True, "count": request.count, "given": given}
            yield from self._reveal(request)
            yield {"event": "end", "trace": self._trace(request)}
        finally:
            self.at_once -= 1
            self.ended.append(request.prompt)

    def _reveal(self, request):
        for step, i in enumerate(range(len(WORDS), 0, -1), start=1):
            while "wait" in request.prompt and not self.go.wait(0.01):
                yield {"event": "reveal", "seconds": 0.0, "calls": step - 1, "changes": []}
            time.sleep(0.001)  # others would get in, if they could
            if "fail" in request.prompt and step == 3:
                raise RuntimeError("out of paper")
            padding = {"padding": "x" * 1_000_000} if "large" in request.prompt else {}
            rows = range(request.count)
            changes = [[row, i, WORDS[i - 1], step, 0.25, -1.5] for row in rows]
            yield {"event": "reveal", "seconds": 0.1, "calls": step, "changes": changes} | padding

    def _trace(self, request):
        sample = {
            "text": request.prompt + "".join(WORDS),
            "tokens": list(range(7)),
            "pieces": [request.prompt, *WORDS],
            "revealed": [0, 6, 5, 4, 3, 2, 1],
            "share": [0.0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.5],
            "log_p": [0.0] + 6 * [-1.5],
            "calls": 6,
            "length": 7,
        }
        settings = request.model_dump() | {"seed": 5}
        counted = {"calls": 6, "tokens": 6 * request.count, "tokens_per_second": 60.0}
        facts = {"run": request.run or "first", "settings": settings, "seconds": 0.1}
        return facts | counted | {"samples": [sample] * request.count}


@contextlib.contextmanager
def serving(backend, **changes):
    """The URL of a server in a thread of its own."""
    from lomdm_jax.serving.app import make_app
    from lomdm_jax.serving.device import Device
    from lomdm_jax.serving.server import Server, address, listen

    config = default_config().serve
    config.update(changes)
    device = Device(config.queue)
    with listen("127.0.0.1", 0) as listener:
        server = Server(make_app(backend, config, device), device)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address(listener)
        server.handle_exit(2, None)
        thread.join(20)
        assert not thread.is_alive(), "the server must end"


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def serve():
    pytest.importorskip("fastapi", reason="the page needs FastAPI: pip install fastapi uvicorn")
    pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install fastapi uvicorn")
    return serving


@pytest.fixture
def url(fake, serve):
    with serve(fake, queue=2, characters=200, samples=3) as address:
        yield address
        fake.go.set()  # whatever failed, the server can end


@pytest.fixture
def eventually():
    def wait(condition):
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it did not come about in 10 s"
            time.sleep(0.01)

    return wait
