#!/usr/bin/env bash
# Trains on this machine, one process. Usage: launch/local.sh train --config=experiments/quickstart_expert.py:news ...
# Goes on after a stop (exit code 75: SIGTERM, state saved) when started again with the same arguments.
set -euo pipefail
: "${FLEXMOE:=flexmoe}"        # the command, if it is not on the PATH
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

command=("$FLEXMOE" "$@")
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
