"""The shell scripts: shellcheck, and what they do with stand-ins for gcloud, srun and scontrol."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
POD, SLURM = ROOT / "launch" / "tpu_pod.sh", ROOT / "launch" / "slurm.sh"
# Writes down its arguments; a machine's state is what the test says; ssh runs the text here, in a
# home folder of its own.
GCLOUD = """
printf '%s\\n' "$*" >> "$SCRATCH/calls"
case "$3 $4" in
"tpu-vm describe") echo "${VM:-}" ;;
"queued-resources describe") echo "${QUEUED:-}" ;;
"tpu-vm ssh") HOME="$SCRATCH/home" bash -c "${8#--command=}" ;;
esac
"""
# The tasks in turn, then the highest status, as srun has it of tasks that no signal killed.
SRUN = """
while [[ $1 == --* ]]; do shift; done
highest=0
for code in $CODES; do
  SLURM_PROCID=0 CODE=$code "$@" || { s=$?; [ $s -gt $highest ] && highest=$s; }
done
exit $highest
"""
# Ends as CODE says; TERM: by a SIGTERM to all of its group, as Slurm sends it.
TASK = """
printf '%s\\n' "$*" >> "$SCRATCH/calls"
if [ "$CODE" = TERM ]; then kill -TERM $PPID; kill -TERM $$; fi
exit "$CODE"
"""


@pytest.fixture
def scratch(tmp_path):
    """A folder with the stand-ins, and a worker's home where the program is installed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home" / "lomdm" / ".venv" / "bin").mkdir(parents=True)
    scontrol = """echo "scontrol $*" >> "$SCRATCH/calls" """
    squeue = """echo "${STATE:-RUNNING}" """
    tools = dict(gcloud=GCLOUD, srun=SRUN, scontrol=scontrol, squeue=squeue, task=TASK)
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)
    return tmp_path


def bash(scratch, script, *arguments, **variables):
    path = f"{scratch / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SCRATCH": str(scratch), "POLL": "0"} | variables
    return subprocess.run(
        [script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30
    )


def calls(scratch):
    file = scratch / "calls"
    return file.read_text().splitlines() if file.exists() else []


def changes(scratch):
    return [" ".join(call.split()[2:5]) for call in calls(scratch) if "describe" not in call]


@pytest.mark.parametrize("script", [POD, SLURM], ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = pathlib.Path(sys.prefix, "bin", "shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_create_makes_a_slice_or_finds_the_one_there_is(scratch):
    assert bash(scratch, POD, "create").returncode == 0
    assert changes(scratch) == ["tpu-vm create lomdm"]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in calls(scratch)[-1]
    again = bash(scratch, POD, "create", VM="READY")
    assert (again.returncode, again.stdout) == (0, "lomdm is there\n")
    assert changes(scratch) == ["tpu-vm create lomdm"]


def test_create_says_what_to_do_with_a_slice_that_is_lost(scratch):
    done = bash(scratch, POD, "create", VM="PREEMPTED")
    assert done.returncode == 2 and "lomdm is PREEMPTED" in done.stderr
    assert changes(scratch) == []


def test_a_spot_slice_is_queued_for_and_asked_for_again_once_preempted(scratch):
    done = bash(scratch, POD, "create", SPOT="1", QUEUED="SUSPENDED")
    assert changes(scratch) == ["queued-resources delete lomdm", "queued-resources create lomdm"]
    assert "--spot" in calls(scratch)[3]
    assert done.returncode == 2 and "was not made" in done.stderr  # this stand-in never makes it


def test_dry_run_shows_the_commands_and_runs_none(scratch):
    for command in ("create", "install", "attach", "stop", "delete"):
        done = bash(scratch, POD, command, DRY_RUN="1", NAME="my pod")
        assert done.returncode == 0
        assert done.stdout.startswith("gcloud compute tpus tpu-vm ")
        assert "my\\ pod" in done.stdout
    assert calls(scratch) == []


def test_install_sends_the_checkout_and_only_that(scratch):
    keep = scratch / "bin" / "python3"  # of the worker: makes no environment here
    keep.write_text("#!/bin/sh\n")
    keep.chmod(0o755)
    sent = scratch / "bin" / "tar"  # what is packed here, and unpacked there
    sent.write_text('#!/bin/sh\nprintf "tar %s\\n" "$*" >> "$SCRATCH/calls"\n')
    sent.chmod(0o755)
    assert bash(scratch, POD, "install").returncode == 0
    packed = next(call for call in calls(scratch) if call.startswith("tar --exclude"))
    assert packed.endswith("lomdm_jax configs requirements.txt")
    assert [call.split()[3] for call in calls(scratch) if "tpus" in call] == ["scp", "ssh"]


def worker(scratch, text):
    python = scratch / "home" / "lomdm" / ".venv" / "bin" / "python"
    python.write_text(f"#!/usr/bin/env bash\n{text}\n")
    python.chmod(0o755)
    return scratch / "home" / "lomdm"


def wait_for(path, seconds=10):
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)
    return path.read_text()


def test_start_passes_arguments_as_they_are(scratch):
    # /proc/PID/cmdline has the arguments with a NUL after each, quotes and spaces as they came.
    home = worker(scratch, "tr '\\0' '\\n' < /proc/$$/cmdline > arguments.new; mv arguments.new a")
    odd = ["--config", "configs/my file.py:block:4", '--config.sample.prompt=it\'s "$HOME" & `x`;']
    done = bash(scratch, POD, "start", *odd, WORKDIR="/shared/my runs")
    assert done.returncode == 0, done.stderr
    told = wait_for(home / "a").splitlines()[2:]
    assert told == [
        "-u",
        "-m",
        "lomdm_jax.main",
        "--distributed=on",
        "--workdir=/shared/my runs",
        *odd,
    ]


def test_stop_asks_with_sigterm_and_waits_for_the_end(scratch):
    home = worker(
        scratch,
        "trap 'sleep 0.5; echo saved; exit 143' TERM; echo on > on; while :; do sleep 0.05; done",
    )
    start = ["start", "--config", "x.py"]
    assert bash(scratch, POD, *start, WORKDIR="/shared/x").returncode == 0
    wait_for(home / "on")
    pid = int((home / "run.pid").read_text())
    try:
        second = bash(scratch, POD, *start, WORKDIR="/shared/x")
        assert second.returncode == 1 and "a run is on" in second.stderr
        assert bash(scratch, POD, "stop").stdout == "saved\n"
        assert bash(scratch, POD, "stop").stdout == "nothing runs\n"
    finally:
        if pathlib.Path(f"/proc/{pid}/cmdline").exists():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "variables", "error"),
    [
        (["start", "--config", "x"], {}, "WORKDIR is missing"),
        (["start", "--config", "x"], {"WORKDIR": "runs/x"}, "give a shared path"),
        (["start", "--config", "x"], {"WORKDIR": "gs://b/x"}, "set BUCKET=name"),
        (["start", "--config", "x"], {"WORKDIR": "/runs", "BUCKET": "b"}, "mounted at /mnt/b"),
        (["start"], {"WORKDIR": "/runs"}, "nothing to run"),
        (["create"], {"ZONE": ""}, "ZONE is empty"),
        (["create"], {"ACCELERATOR": "h100"}, "ACCELERATOR is 'h100'"),
        (["begin"], {}, "give one of create"),
        ([], {}, "give one of create"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(scratch, arguments, variables, error):
    done = bash(scratch, POD, *arguments, **{"WORKDIR": ""} | variables)
    assert (done.returncode, error in done.stderr) == (2, True)
    assert calls(scratch) == []


def sbatch(scratch, codes, *arguments, **variables):
    arguments = arguments or ("--config", "a b.py", "--workdir", "/runs/x")
    variables |= dict(SLURM_JOB_ID="17", CODES=codes, PYTHON=str(scratch / "bin/task"))
    return bash(scratch, SLURM, *arguments, **variables)


@pytest.mark.parametrize(
    ("codes", "status", "requeued"),
    [
        ("0 0 0", 0, False),
        ("143 143 143", 143, True),
        ("143 TERM 0", 143, True),  # one ended by the signal before it could take it
        ("2 143 TERM", 2, False),  # the others were ended because one refused its input
        ("1 143 143", 1, False),
        ("134 143 143", 1, False),
        ("137 143", 1, False),
    ],
)
def test_slurm_requeues_what_saved_and_nothing_else(scratch, codes, status, requeued):
    done = sbatch(scratch, codes)
    assert done.returncode == status, done.stderr
    assert ("scontrol requeue 17" in calls(scratch)) == requeued
    assert calls(scratch)[0] == "-u -m lomdm_jax.main --config a b.py --workdir /runs/x"


def test_slurm_does_not_bring_back_what_was_cancelled(scratch):
    done = sbatch(scratch, "143 143", STATE="COMPLETING")
    assert (done.returncode, "was cancelled" in done.stdout) == (143, True)
    assert not any("requeue" in call for call in calls(scratch))


def test_slurm_refuses_what_cannot_work(scratch):
    assert "start it with sbatch" in bash(scratch, SLURM, SLURM_JOB_ID="").stderr
    done = sbatch(scratch, "0", "--config", "x.py")
    assert done.returncode == 2 and "--workdir is missing" in done.stderr
    assert calls(scratch) == []
