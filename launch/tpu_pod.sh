#!/usr/bin/env bash
# Trains on a TPU VM or pod slice over ssh: the same command on every worker, repeated while it exits with code 75.
# Usage: TPU=NAME ZONE=us-central2-b launch/tpu_pod.sh train --config=experiments/olmo2_7b_expert.py:news ...
# Needs the repository and its .venv (pip install -e ".[tpu]") in $FOLDER of every worker (install them with
# `gcloud compute tpus tpu-vm scp --worker=all` and `... ssh --worker=all`), and config.out on a disk that all share.
# A preempted slice (ssh exits with 255, `tpu-vm list` shows PREEMPTED) does not come back: delete its queued resource,
# run `gcloud compute tpus queued-resources create ID --node-id=NAME --spot ...`, install, and run this again.
# LIBTPU_INIT_ARGS stays unset: its usual flags (async collective fusion, overlap with computation, data-parallel
# all-reduce) are on in libtpu 0.0.42, or do not change a program of sharded layers, on one slice and on two.
set -euo pipefail
: "${TPU:?the name of the TPU VM}"
: "${ZONE:?its zone}"
: "${PROJECT:=}"                    # empty: gcloud's default
: "${FOLDER:=flexmoe_jax}"          # on the workers, in the home folder
: "${FLEXMOE:=.venv/bin/flexmoe}"   # the command, relative to it
: "${PAUSE:=30}"                    # seconds before the command runs again
: "${DRY_RUN:=0}"                   # 1 prints the command instead of running it

ssh=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --worker=all)
settings=(
  FLEXMOE_PROCESSES=auto                     # JAX finds the other workers in the TPU's metadata
  "JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}"  # without a TPU JAX fails instead of running on the CPU
)
printf -v remote '%q ' env "${settings[@]}" "$FLEXMOE" "$@"
printf -v folder '%q' "$FOLDER"
command=("${ssh[@]}" "--command=cd $folder && exec ${remote% }")
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

stopped=0
running="[${FLEXMOE:0:1}]${FLEXMOE:1} ${1:-}"  # pkill's own shell does not match this pattern
stop() {
  stopped=1
  "${ssh[@]}" "--command=pkill -TERM -f '$running' || true" &
}
trap stop TERM INT
while :; do
  code=0
  "${command[@]}" &
  training=$!
  wait "$training" || code=$?
  while kill -0 "$training" 2>/dev/null; do  # `wait` returned for the trap: the training still runs
    code=0
    wait "$training" || code=$?
  done
  if [[ "$code" != 75 || "$stopped" == 1 ]]; then exit "$code"; fi
  sleep "$PAUSE"
  if [[ "$stopped" == 1 ]]; then exit 75; fi
done
