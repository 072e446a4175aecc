"""Processes on this machine: what each is told, and that none outlives the others or its parent."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import local_processes
from launch.local_processes import exit_status, main, run, start, stop, variables

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCHER = [sys.executable, str(ROOT / "launch" / "local_processes.py")]
# Programs get --distributed=ADDRESS:PORT,PROCESSES,INDEX as their last argument.
HEAD = "import os, pathlib, signal, sys, time; index = sys.argv[-1].split(',')[-1]\n"
SLEEP = HEAD + "pathlib.Path(sys.argv[1], index).write_text(str(os.getpid())); time.sleep(60)"


def program(text):
    return [sys.executable, "-I", "-S", "-c", HEAD + text]


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, though nobody has asked for its status


def pids(folder, count):
    """Of the processes of SLEEP, once all are there."""
    wait_until(lambda: len([f for f in folder.iterdir() if f.read_text()]) == count)
    return [int(file.read_text()) for file in folder.iterdir()]


def test_each_learns_the_address_the_number_and_its_index():
    children = start(
        3, ["a b"], program=program("print(sys.argv[1:])"), stdout=subprocess.PIPE, text=True
    )
    told = [ast.literal_eval(child.communicate()[0]) for child in children]
    assert [first for first, _ in told] == ["a b"] * 3
    addresses = {last.removeprefix("--distributed=").split(",")[0] for _, last in told}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    assert [last.split(",")[1:] for _, last in told] == [["3", "0"], ["3", "1"], ["3", "2"]]


def test_devices_are_simulated_on_the_cpu_and_otherwise_each_takes_one_gpu():
    flag = "--xla_force_host_platform_device_count"
    base = {"XLA_FLAGS": f"--a=1 {flag}=8 --b=2", "HOME": "/h"}
    assert variables(base, 1, 2) == {
        "XLA_FLAGS": f"--a=1 --b=2 {flag}=2",
        "JAX_PLATFORMS": "cpu",
        "HOME": "/h",
    }
    assert variables({"JAX_PLATFORMS": "cuda"}, 0, 1)["JAX_PLATFORMS"] == "cuda"
    assert variables(base, 1, 0) == {**base, "JAX_LOCAL_DEVICE_IDS": "1"}
    assert variables({"JAX_LOCAL_DEVICE_IDS": "5"}, 1, 0)["JAX_LOCAL_DEVICE_IDS"] == "5"


def test_status_is_zero_if_all_end_well():
    assert run(2, [], program=program("pass")) == 0


def test_the_one_that_fails_ends_the_others_and_gives_the_status(tmp_path, capfd):
    text = "index == '1' and sys.exit(7)\n" + SLEEP.removeprefix(HEAD)
    assert run(3, [str(tmp_path)], program=program(text)) == 7
    assert "process 1 of 3 ended with status 7" in capfd.readouterr().err
    assert not any(alive(int(file.read_text() or 0)) for file in tmp_path.iterdir())


def test_one_killed_by_a_signal_gives_128_and_the_signal_as_shells_do():
    assert run(2, [], program=program("os.kill(os.getpid(), 9)")) == 137
    assert [exit_status(code) for code in (0, 2, -15)] == [0, 2, 143]


def test_one_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP.removeprefix(HEAD)
    # Process 0 fails once process 1 ignores the signal.
    waits = "while index == '0':\n  pathlib.Path(sys.argv[1], '1').exists() and sys.exit(3)\n"
    assert run(2, [str(tmp_path)], program=program(waits + stubborn), grace=0.2) == 3
    assert not alive(int((tmp_path / "1").read_text()))


def launcher(folder, text=SLEEP):
    """The launcher as a process of its own, running `text` twice."""
    code = (
        "import sys; from launch.local_processes import run; "
        f"sys.exit(run(2, [{str(folder)!r}], program=[sys.executable, '-ISc', {text!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_all(tmp_path, number):
    saves = (
        "def end(number, frame):\n"
        "  pathlib.Path(sys.argv[1], index + '.saved').touch(); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
    )
    with launcher(tmp_path, HEAD + saves + SLEEP.removeprefix(HEAD)) as process:
        children = pids(tmp_path, 2)
        process.send_signal(number)
        assert process.wait(10) == 143
    assert {file.name for file in tmp_path.glob("*.saved")} == {"0.saved", "1.saved"}
    assert not any(map(alive, children))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_none_outlives_a_launcher_that_is_killed(tmp_path):
    with launcher(tmp_path) as process:
        children = pids(tmp_path, 2)
        process.kill()
    wait_until(lambda: not any(map(alive, children)))


def test_stop_ends_all_that_were_started(tmp_path):
    children = start(2, [str(tmp_path)], program=[sys.executable, "-ISc", SLEEP])
    pids(tmp_path, 2)
    stop(children)
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--processes"),
        (["--processes", "0", "--", "--help"], "'0' is not a number of at least 1"),
        (["--processes", "two", "--", "--help"], "'two' is not a number"),
        (["--processes", "2", "--devices", "-1", "--", "--help"], "'-1' is not a number"),
        (["--processes", "2"], "nothing to run"),
        (["--processes", "2", "--config", "x.py"], "-- ARGUMENTS"),
        (["--processes", "2", "--", "--distributed=off"], "--distributed is given"),
    ],
)
def test_bad_options_are_refused_in_words(arguments, error, capsys, monkeypatch):
    monkeypatch.setattr(local_processes, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--confg=x"], 2)])
def test_the_program_itself(arguments, status):
    command = [*LAUNCHER, "--processes", "2", "--devices", "1", "--", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert ("--confg is not an option" in done.stderr) == bool(status)
