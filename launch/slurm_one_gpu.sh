#!/usr/bin/env bash
# One owner's training on one GPU of a Slurm cluster, requeued until it is done.
# Usage: sbatch launch/slurm_one_gpu.sh train --config=experiments/olmo2_7b_expert.py:news --config.public=MODEL ...
#SBATCH --job-name=flexmoe
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
: "${FLEXMOE:=flexmoe}"        # the command, if it is not on the PATH
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "$FLEXMOE" "$@"
  echo
  exit 0
fi

# Slurm sends SIGTERM to this script five minutes before the time limit; the training saves and ends with code 75.
"$FLEXMOE" "$@" &
training=$!
trap 'kill -TERM "$training"' TERM
code=0
wait "$training" || code=$?
while kill -0 "$training" 2>/dev/null; do  # `wait` returned because of the trap, not of the training's end
  code=0
  wait "$training" || code=$?
done
if [[ "$code" == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
