#!/usr/bin/env bash
# Train on a Cloud TPU slice, one process per host. In the repository's folder, with gcloud set up:
#
#   launch/tpu_pod.sh create             make the slice, or find the one there is; SPOT=1: a Spot one
#   launch/tpu_pod.sh install            this checkout and its packages to all workers
#   WORKDIR=/mnt/... launch/tpu_pod.sh start --config configs/FILE.py ...
#   launch/tpu_pod.sh attach             follow worker 0's log; Ctrl-C leaves the run alone
#   launch/tpu_pod.sh stop               SIGTERM to all workers; waits until they have saved
#   launch/tpu_pod.sh delete
#
# Every worker must see the same WORKDIR: a Filestore (NFS) share that you have mounted on all of them,
# or a bucket. With BUCKET=name, install puts gcsfuse on the workers, and start mounts the bucket
# at /mnt/name, where WORKDIR must then be. The bucket needs a hierarchical namespace (`gcloud storage
# buckets create --uniform-bucket-level-access --enable-hierarchical-namespace`): in others a folder
# cannot be renamed, which is how a checkpoint is completed.
#
# DRY_RUN=1 prints the gcloud commands instead of running them.
set -euo pipefail

# Edit these three, or set them in the environment.
NAME=${NAME-lomdm}
ZONE=${ZONE-us-west4-a}
ACCELERATOR=${ACCELERATOR-v5litepod-16}

# The state of a run on a worker: its process, if there is one. Text for the worker's shell.
# shellcheck disable=SC2016  # expanded there
FIND='cd ~/lomdm 2>/dev/null || { echo "not installed: launch/tpu_pod.sh install" >&2; exit 1; }
running() { pid=$(cat run.pid 2>/dev/null) && grep -qa lomdm_jax.main "/proc/$pid/cmdline" 2>/dev/null; }
'

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit 2
}

run() { # a command; shown instead, with DRY_RUN
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on() { # workers (all, or an index), text for their shells
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

state_of() { # tpu-vm or queued-resources, format: what the state is; nothing if there is none
  [ -n "${DRY_RUN:-}" ] && return
  gcloud compute tpus "$1" describe "$NAME" --zone="$ZONE" --format="value($2)" 2>/dev/null || true
}

runtime() { # the software of the machines, by generation
  case $ACCELERATOR in
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
  *) fail "ACCELERATOR is '$ACCELERATOR': give a type such as v5litepod-16, or set RUNTIME as well" ;;
  esac
}

create() {
  local state software
  software=${RUNTIME:-$(runtime)}
  local what=(--zone="$ZONE" --accelerator-type="$ACCELERATOR" --runtime-version="$software")
  state=$(state_of tpu-vm state)
  case $state in
  READY) echo "$NAME is there" ;;
  "")
    if [ -n "${SPOT:-}" ]; then
      create_spot "${what[@]}"
    else
      run gcloud compute tpus tpu-vm create "$NAME" "${what[@]}"
    fi
    ;;
  CREATING) wait_for_slice ;;
  *) fail "$NAME is $state: launch/tpu_pod.sh delete, then create it again" ;;
  esac
}

create_spot() { # options of the slice; a Spot slice comes out of a queue
  case $(state_of queued-resources state.state) in
  "") run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "$@" --spot ;;
  SUSPENDED | FAILED) # preempted, or never made; its name is free only once it is deleted
    run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "$@" --spot
    ;;
  esac
  wait_for_slice
}

wait_for_slice() {
  [ -n "${DRY_RUN:-}" ] && return
  until [ "$(state_of tpu-vm state)" = READY ]; do
    case $(state_of queued-resources state.state) in
    SUSPENDED | FAILED) fail "$NAME was not made: launch/tpu_pod.sh create asks again" ;;
    esac
    echo "waiting for $NAME"
    sleep "${POLL:-30}"
  done
}

install() {
  local archive
  [ -f lomdm_jax/main.py ] || fail "no lomdm_jax/main.py in $PWD: run this in the repository's folder"
  archive=$(mktemp --suffix=.tar.gz)
  # shellcheck disable=SC2064  # the name is known now, and gone when the trap runs
  trap "rm -f '$archive'" EXIT
  tar --exclude=__pycache__ -czf "$archive" lomdm_jax configs requirements.txt
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:/tmp/lomdm.tar.gz" --zone="$ZONE" --worker=all
  # The machines have Python 3.10; uv brings a newer one.
  on all 'set -e
mkdir -p ~/lomdm && cd ~/lomdm && rm -rf lomdm_jax && tar -xzf /tmp/lomdm.tar.gz
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[tpu]"'
  [ -z "${BUCKET:-}" ] || install_gcsfuse
}

install_gcsfuse() {
  # shellcheck disable=SC2016  # expanded on the workers
  on all 'set -e
command -v gcsfuse >/dev/null && exit
key=/usr/share/keyrings/cloud.google.asc
curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get update -qq && sudo apt-get install -yqq gcsfuse'
}

start() {
  [ $# -gt 0 ] || fail "nothing to run: launch/tpu_pod.sh start --config configs/FILE.py ..."
  case ${WORKDIR:-} in
  "") fail "WORKDIR is missing: set it to the run's folder, one that all workers see" ;;
  gs://*) fail "WORKDIR is '$WORKDIR': set BUCKET=name, and WORKDIR=/mnt/name/..., where it is mounted" ;;
  /*) ;;
  *) fail "WORKDIR is '$WORKDIR', which every worker has for itself: give a shared path, from / on" ;;
  esac
  local words mount
  if [ -n "${BUCKET:-}" ]; then
    mount=$(mount_bucket) # on its own line, so that its failure ends the script
    on all "$mount"
  fi
  words=$(printf '%q ' -u -m lomdm_jax.main --distributed=on --workdir="$WORKDIR" "$@")
  # A session of its own, so that the run outlives this connection.
  on all "$FIND"'if running; then echo "a run is on: launch/tpu_pod.sh stop" >&2; exit 1; fi
setsid .venv/bin/python '"$words"'>> run.log 2>&1 < /dev/null &
echo $! > run.pid'
}

mount_bucket() { # text for the workers' shells
  local folder
  folder=$(printf '%q' "/mnt/$BUCKET")
  case $WORKDIR in
  "/mnt/$BUCKET"/?*) ;;
  *) fail "WORKDIR is '$WORKDIR', but the bucket is mounted at /mnt/$BUCKET: give a folder in it" ;;
  esac
  echo "sudo mkdir -p $folder && sudo chown \"\$(id -u)\" $folder"
  echo "mountpoint -q $folder || gcsfuse --implicit-dirs $(printf '%q' "$BUCKET") $folder"
}

attach() {
  # shellcheck disable=SC2016  # expanded on the worker
  on 0 "$FIND"'tail --lines=100 --follow --pid="$(cat run.pid)" run.log'
}

stop() {
  # shellcheck disable=SC2016  # expanded on the workers
  on all "$FIND"'running || { echo "nothing runs"; exit 0; }
kill -TERM "$pid"
while running; do sleep 1; done
tail --lines=1 run.log'
}

delete() {
  if [ -n "$(state_of queued-resources state.state)" ]; then
    run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
  fi
}

for value in NAME ZONE ACCELERATOR; do
  [ -n "${!value}" ] || fail "$value is empty: set it at the top of launch/tpu_pod.sh"
done
case ${1:-} in
create | install | start | attach | stop | delete) "$@" ;;
*) fail "give one of create, install, start, attach, stop or delete; the file's top explains them" ;;
esac
