"""One generation at a time; the others wait in turn."""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Iterator

from lomdm_jax.errors import UserError, one_line
from lomdm_jax.serving.protocol import Event, Events

log = logging.getLogger("uvicorn.error")


class Full(Exception):
    """As many requests wait as may."""


class Job:
    """The events of one generation, made in the device's thread and read in the event loop."""

    def __init__(self, source: Events) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[Event | None]()
        self._stopped = threading.Event()
        self.future: concurrent.futures.Future[None] | None = None

    def tell(self, event: Event | None) -> None:
        """Add an event, from the event loop; None is the end."""
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        """Every event until the end."""
        while (event := await self._events.get()) is not None:
            yield event

    def stop(self) -> None:
        """Leave the device, or the queue before it, as soon as can be."""
        self._stopped.set()
        if self.future is not None and self.future.cancel():  # it had not begun
            self._loop.call_soon_threadsafe(self.tell, None)

    def run(self) -> None:
        """Generate, in the device's thread."""
        with contextlib.closing(self._source):
            for event in self._caught():
                self._loop.call_soon_threadsafe(self.tell, event)
                if self._stopped.is_set():
                    break
        self._loop.call_soon_threadsafe(self.tell, None)

    def _caught(self) -> Iterator[Event]:
        try:
            yield from self._source
        except UserError as error:
            yield {"event": "error", "message": str(error)}
        except Exception as error:  # whatever a model raises, the page shows and the server lives
            log.exception("a generation failed")
            yield {"event": "error", "message": f"The generation failed: {one_line(error)}"}


class Device:
    """A thread that runs jobs in the order in which they came.

    waiting: how many may wait beside the one that runs.
    """

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._jobs = list[Job]()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "device")

    def enter(self, source: Events) -> Job:
        """Run these events, or wait for it; from the event loop.

        Raises:
          Full: there is no room.
        """
        self.check()
        job, loop = Job(source), asyncio.get_running_loop()
        self._jobs.append(job)
        if len(self._jobs) > 1:
            job.tell({"event": "waiting", "ahead": len(self._jobs) - 1})
        job.future = self._thread.submit(job.run)
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave, job))
        return job

    def check(self) -> None:
        """Raises Full if there is no room."""
        if len(self._jobs) > self._waiting:
            raise Full

    def stop(self) -> None:
        """Stop all jobs; also from a signal handler."""
        for job in [*self._jobs]:
            job.stop()

    def close(self) -> None:
        """Stop all jobs and wait until the thread is idle."""
        self.stop()
        self._thread.shutdown()

    def _leave(self, job: Job) -> None:
        place = self._jobs.index(job)
        self._jobs.remove(job)
        for ahead, later in enumerate(self._jobs[place:], place):
            if ahead:
                later.tell({"event": "waiting", "ahead": ahead})
