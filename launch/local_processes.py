"""Several processes of the program on this machine, as one run.

python launch/local_processes.py --processes 4 [--devices 1] -- --config configs/quickstart.py ...

Run it in the repository's folder. What comes after -- goes to every process, and each learns the
others' address. On a machine with GPUs each process takes one, by its index among those that
CUDA_VISIBLE_DEVICES leaves (JAX_LOCAL_DEVICE_IDS, if set, is left as it is); elsewhere each has
the CPU. --devices K gives each K simulated devices on the CPU instead.

SIGTERM and SIGINT are passed on to all. If one fails, the others get a SIGTERM, and half a minute
later a SIGKILL; the exit status is that of the one that failed first, 128 + its signal if it was
killed. On Linux no process outlives this one.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PROGRAM = (sys.executable, "-m", "lomdm_jax.main")
GRACE = 30.0  # seconds from SIGTERM to SIGKILL: enough to write a checkpoint of a small model
POLL = 0.05  # seconds between looks at the processes
# What a child is until it becomes the program: the kernel is told to kill it when its parent dies,
# which may have happened already. A preexec_fn would fork, which is unsafe beside JAX's threads.
_TIE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(
    processes: int,
    arguments: Sequence[str],
    *,
    devices: int = 0,
    program: Sequence[str] = PROGRAM,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> list[subprocess.Popen]:
    """The started processes, in the order of their indices.

    They are killed when the calling thread ends, so call it from one that stays.

    Args:
      arguments: of the program; `--distributed` is added.
      devices: simulated CPU devices of each; 0 for the machine's own.
      environment: variables to start from; this process's unless given.
      options: of subprocess.Popen, such as stdout.
    """
    address, base = f"127.0.0.1:{free_port()}", dict(environment or os.environ)
    tie = [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *program, *arguments]
    # A group of its own: a Ctrl-C in the terminal reaches a process once, through this one.
    options = {"stdin": subprocess.DEVNULL, "process_group": 0} | options
    return [
        subprocess.Popen(
            [*tie, f"--distributed={address},{processes},{index}"],
            env=variables(base, index, devices),
            **options,
        )
        for index in range(processes)
    ]


def variables(base: Mapping[str, str], index: int, devices: int) -> dict[str, str]:
    """The environment of process `index`: one GPU, or `devices` simulated ones on the CPU."""
    if not devices:
        return {"JAX_LOCAL_DEVICE_IDS": str(index)} | dict(base)
    flag = "--xla_force_host_platform_device_count"
    others = re.sub(rf"{flag}=\S*", "", base.get("XLA_FLAGS", ""))
    flags = " ".join([*others.split(), f"{flag}={devices}"])
    return {"JAX_PLATFORMS": "cpu"} | dict(base) | {"XLA_FLAGS": flags}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def run(processes: int, arguments: Sequence[str], *, grace: float = GRACE, **options: Any) -> int:
    """Start them, wait for them, leave none; returns the exit status. For the main thread.

    grace: seconds from SIGTERM to SIGKILL for those that outlive a failed one.
    options: of `start`.
    """
    children = start(processes, arguments, **options)
    try:
        with _passing_signals_to(children):
            return _wait(children, grace)
    finally:
        stop(children, 0)


def stop(children: Sequence[subprocess.Popen], grace: float = GRACE) -> None:
    """End those that run: SIGTERM, and SIGKILL for what is left after `grace` seconds."""
    if grace:
        _send(children, signal.SIGTERM)
    end = time.monotonic() + grace
    while _running(children) and time.monotonic() < end:
        time.sleep(POLL)
    for child in _running(children):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
        child.wait()


def _wait(children: Sequence[subprocess.Popen], grace: float) -> int:
    """The status of the first that failed, once the others are ended; 0 once all ended well."""
    while True:
        codes = [child.poll() for child in children]
        failed = next((index for index, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            break
        time.sleep(POLL)
    if failed is None:
        return 0
    status = exit_status(children[failed].returncode)
    print(f"process {failed} of {len(children)} ended with status {status}", file=sys.stderr)
    stop(children, grace)
    return status


def exit_status(code: int) -> int:
    """As a shell gives it: 128 + the signal for what `Popen` has as minus the signal."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_signals_to(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda got, _: _send(children, got)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _send(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        child.send_signal(number)  # does nothing to one that has ended


def _running(children: Sequence[subprocess.Popen]) -> list[subprocess.Popen]:
    return [child for child in children if child.poll() is None]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    own, arguments = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="launch/local_processes.py",
        usage="%(prog)s --processes N [--devices K] -- ARGUMENTS OF lomdm_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=_count, required=True, help="how many to start")
    parser.add_argument("--devices", type=_count, default=0, help="simulated CPU devices of each")
    options = parser.parse_args(own)
    if not arguments:
        parser.error("nothing to run: give the program's arguments after --, such as -- --help")
    if any(argument.partition("=")[0] == "--distributed" for argument in arguments):
        parser.error("--distributed is given to each process here: leave it out")
    return run(options.processes, arguments, devices=options.devices)


if __name__ == "__main__":
    sys.exit(main())
