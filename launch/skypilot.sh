#!/usr/bin/env bash
# Trains on rented GPUs of any cloud as a managed SkyPilot job (launch/skypilot.yaml), recovered until training is done.
# Usage: BUCKET=NAME [NODES=2] [GPUS=H100:8] launch/skypilot.sh train --config=... --config.out=/runs/news
# Run it in the repository's root, which is copied to the machines. A stopped or preempted job resumes by itself.
set -euo pipefail
: "${BUCKET:?the bucket to mount at /runs, for config.out}"
: "${NODES:=1}"
: "${GPUS:=H100:8}"            # per node
: "${FLEXMOE:=flexmoe}"        # the command on the machines
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

printf -v words '%q ' "$FLEXMOE" "$@"
command=(
  sky jobs launch --yes "--num-nodes=$NODES" "--gpus=$GPUS"
  --env "FLEXMOE_COMMAND=${words% }" --env "BUCKET=$BUCKET"
  "$(dirname "${BASH_SOURCE[0]}")/skypilot.yaml"
)
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
