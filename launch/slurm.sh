#!/usr/bin/env bash
# Train on GPU nodes under Slurm, one process per GPU. In the repository's folder, with the Python
# environment active:
#
#   sbatch launch/slurm.sh --config configs/quickstart.py --workdir /shared/runs/x ...
#
# Edit the three values here, or give them to sbatch: --nodes=4 and so on. The folder given as
# --workdir must be one that all nodes see.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#
# Every process sees all GPUs of its node and takes the one of its SLURM_LOCALID, as JAX does by
# itself; --gpus-per-task would show it one GPU only, and that under another number.
#
# Five minutes before the time limit all processes get a SIGTERM (without B: it goes to the job's
# steps, not to this script), as they do where a preempted job has a grace time. They save and
# exit with 143; then the job goes back into the queue, and continues from there. One that is ended
# by scancel saves as well, and stays out of it.
#SBATCH --job-name=lomdm
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lomdm-%j.log
set -euo pipefail

fail() {
  echo "slurm.sh: $1" >&2
  exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job: start it with sbatch launch/slurm.sh ..."
[ -f lomdm_jax/main.py ] || fail "no lomdm_jax/main.py in $PWD: run sbatch in the repository's folder"
[ $# -gt 0 ] || fail "nothing to run: sbatch launch/slurm.sh --config configs/FILE.py ..."
case " $* " in
*" --workdir"[\ =]*) ;;
*) fail "--workdir is missing: give a folder that all nodes see" ;;
esac

# If one process fails the others are ended, and say 143 as well or are killed; srun returns the
# highest status of all, or the signal of one that was killed. So that 143 is not read where
# something failed, a process that saved says 1, the lowest there is, and a traceback's 1 becomes 3.
# The shell around each process outlives the SIGTERM (`trap :`), which its child gets too.
# shellcheck disable=SC2016  # expanded by the shell that srun starts
task='trap : TERM
"$0" -u -m lomdm_jax.main "$@"
case $? in 0) exit 0 ;; 143) exit 1 ;; 1) exit 3 ;; 2) exit 2 ;; *) exit 4 ;; esac'

status=0
# Since Slurm 22.05 srun does not take --cpus-per-task from the job by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  bash -c "$task" "${PYTHON:-python}" "$@" || status=$?

case $status in
0) echo "slurm.sh: done" ;;
1)
  # scancel sends a SIGTERM too; Slurm would requeue the job even then.
  case $(squeue --noheader --format=%T --job "$SLURM_JOB_ID") in
  COMPLETING | CANCELLED)
    echo "slurm.sh: all saved; job $SLURM_JOB_ID was cancelled; the same sbatch command continues the run"
    exit 143
    ;;
  esac
  echo "slurm.sh: all saved; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 143
  ;;
2) fail "the program refused its input (above); a restart would not help" ;;
*)
  echo "slurm.sh: a process failed (srun: $status); the same sbatch command continues the run" >&2
  exit 1
  ;;
esac
