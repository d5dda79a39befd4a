#!/usr/bin/env bash
# Training on a Cloud TPU slice, from creation to its end: every worker runs the same command.
#
#   export PROJECT=my-project ZONE=us-west4-a TPU=vrt TYPE=v5litepod-16 BUCKET=gs://my-bucket
#   scripts/pods/tpu_vm.sh bucket        # once
#   scripts/pods/tpu_vm.sh create
#   scripts/pods/tpu_vm.sh setup
#   scripts/pods/tpu_vm.sh train --config configs/vrt_sa2va_4b_qwen3_sft.py
#   scripts/pods/tpu_vm.sh logs          # of worker 0, as they come
#   scripts/pods/tpu_vm.sh watch --config configs/vrt_sa2va_4b_qwen3_sft.py
#   scripts/pods/tpu_vm.sh profile       # opens a tunnel for xprof
#   scripts/pods/tpu_vm.sh delete
#
# `watch` keeps a spot slice busy: when it is taken away, it is made again and training goes on from
# the last checkpoint. BUCKET is mounted at ~/bucket on every worker and holds models, data and runs.
# It has a hierarchical namespace: checkpoints and models are renamed when they are complete, and in
# a flat bucket that copies file by file. With DRY_RUN=1 the gcloud commands are printed, not run.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${TPU:?}"
type=${TYPE:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
repository=${REPOSITORY:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin 2>/dev/null || true)}
poll_seconds=${POLL_SECONDS:-60}

gcloud() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' gcloud "$@" && echo
  else
    command gcloud "$@"
  fi
}

tpu() { gcloud compute tpus "$@" --project "$PROJECT" --zone "$ZONE"; }

on_workers() { # which, command
  tpu tpu-vm ssh "$TPU" --worker "$1" --command "$2"
}

state() {
  [[ -z ${DRY_RUN:-} ]] || { echo ACTIVE && return; }
  tpu queued-resources describe "$TPU" --format 'value(state.state)' 2>/dev/null || echo NONE
}

bucket() {
  : "${BUCKET:?}"
  gcloud storage buckets create "$BUCKET" --project "$PROJECT" --location "${ZONE%-*}" \
    --uniform-bucket-level-access --enable-hierarchical-namespace
}

create() {
  tpu queued-resources create "$TPU" --node-id "$TPU" --accelerator-type "$type" \
    --runtime-version "$runtime" --spot
  until [[ $(state) == ACTIVE ]]; do
    echo "waiting for $TPU: $(state)"
    sleep "$poll_seconds"
  done
}

setup() {
  : "${BUCKET:?}" "${repository:?REPOSITORY names a git repository}"
  on_workers all "
    set -e
    sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv gcsfuse
    test -d vrt-jax || git clone --quiet '$repository' vrt-jax
    python3.11 -m venv venv && venv/bin/pip install --quiet -e 'vrt-jax[tpu]'
    mkdir -p bucket
    mountpoint -q bucket ||
      gcsfuse --implicit-dirs --rename-dir-limit 200000 '${BUCKET#gs://}' bucket
  "
}

# SIGTERM reaches the trainer some seconds before a spot slice goes: it saves and ends.
train() {
  local arguments
  arguments=$(printf ' %q' "$@")
  on_workers all "
    cd vrt-jax && mkdir -p ../logs
    nohup ../venv/bin/python -m vrt_jax.train --workdir ../bucket/runs/$TPU$arguments \
      > ../logs/train.log 2>&1 < /dev/null & echo \$! > ../logs/pid
  "
}

logs() { on_workers 0 'tail -n 200 -F logs/train.log'; }

# 0 while the trainer of worker 0 lives, 1 when it has ended.
alive() { on_workers 0 'kill -0 "$(cat logs/pid)"' > /dev/null 2>&1; }

finished() { on_workers 0 "test -f bucket/runs/$TPU/model/config.json" > /dev/null 2>&1; }

watch() {
  while true; do
    case $(state) in
      ACTIVE)
        if finished; then
          echo "$TPU has finished"
          return
        fi
        alive || train "$@"
        ;;
      SUSPENDED | FAILED | NONE)
        echo "$TPU is gone: making it again"
        delete || true
        create
        setup
        train "$@"
        ;;
    esac
    sleep "$poll_seconds"
  done
}

profile() {
  echo "traces are in bucket/runs/$TPU/profile: xprof --logdir bucket/runs/$TPU/profile --port 8791"
  gcloud compute tpus tpu-vm ssh "$TPU" --project "$PROJECT" --zone "$ZONE" --worker 0 \
    -- -L 8791:localhost:8791
}

delete() { tpu queued-resources delete "$TPU" --force --quiet; }

command=${1:-}
case $command in
  bucket | create | setup | train | logs | watch | profile | delete)
    shift
    "$command" "$@"
    ;;
  *)
    sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 1
    ;;
esac
