#!/usr/bin/env bash
# Trains on a TPU VM or pod slice over ssh: the same command on every worker, again for as long as it ends with code 75.
# Usage: TPU=NAME ZONE=us-central2-b launch/tpu_pod.sh train --config=experiments/olmo2_7b_expert.py:news ...
# Before: the repository and its .venv (pip install -e ".[tpu]") in $FOLDER of every worker, put there with
# `gcloud compute tpus tpu-vm scp --worker=all` and `... ssh --worker=all`; config.out on a disk that all workers share.
# A slice that was taken back (ssh ends with 255, `tpu-vm list` says PREEMPTED) does not return: delete its queued
# resource, `gcloud compute tpus queued-resources create ID --node-id=NAME --spot ...`, install, run this again.
# No LIBTPU_INIT_ARGS: what is usually set there (async collective fusion, overlap with computations, the data-parallel
# all-reduce) is on in libtpu 0.0.42, or changes nothing in a program of sharded layers, on one slice and on two.
set -euo pipefail
: "${TPU:?the name of the TPU VM}"
: "${ZONE:?its zone}"
: "${PROJECT:=}"                    # empty: gcloud's own
: "${FOLDER:=flexmoe_jax}"          # on the workers, below the home folder
: "${FLEXMOE:=.venv/bin/flexmoe}"   # the command, from there
: "${PAUSE:=30}"                    # seconds before the command is run again
: "${DRY_RUN:=0}"                   # 1 prints the command instead of running it

ssh=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --worker=all)
settings=(
  FLEXMOE_PROCESSES=auto                     # JAX asks the TPU's metadata who the others are
  "JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}"  # a TPU that does not come up is an error, not a run on the CPU
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
running="[${FLEXMOE:0:1}]${FLEXMOE:1} ${1:-}"  # a pattern that the shell that carries it does not fit
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
  while kill -0 "$training" 2>/dev/null; do  # `wait` returned because of the trap, not of the training's end
    code=0
    wait "$training" || code=$?
  done
  if [[ "$code" != 75 || "$stopped" == 1 ]]; then exit "$code"; fi
  sleep "$PAUSE"
  if [[ "$stopped" == 1 ]]; then exit 75; fi
done
