#!/usr/bin/env bash
# Trains on this machine. Usage: [PROCESSES=N] launch/local.sh train --config=experiments/quickstart_expert.py:news ...
# One process uses all devices. Several processes rehearse a job of many machines, with one GPU each.
# After a stop (exit code 75: SIGTERM or Ctrl-C, state saved) the same command resumes the training.
set -euo pipefail
: "${FLEXMOE:=flexmoe}"        # the command, if it is not on the PATH
: "${PROCESSES:=1}"            # number of processes in the job
: "${PORT:=}"                  # port of process 0; empty: a free one
: "${DRY_RUN:=0}"              # 1 prints the commands instead of running them

if [[ ! "$PROCESSES" =~ ^[1-9][0-9]*$ ]]; then
  echo "PROCESSES is '$PROCESSES': give a number of at least 1" >&2
  exit 2
fi
if [[ "$PROCESSES" == 1 ]]; then
  if [[ "$DRY_RUN" == 1 ]]; then
    printf '%q ' "$FLEXMOE" "$@"
    echo
    exit 0
  fi
  exec "$FLEXMOE" "$@"
fi

if [[ -z "$PORT" ]]; then
  PORT=$((10000 + $$ % 20000))  # below the ports that Linux uses for outgoing connections
  while (: < "/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do PORT=$((PORT + 1)); done
fi

pids=()
for ((i = 0; i < PROCESSES; i++)); do
  command=(
    env "FLEXMOE_PROCESSES=$PROCESSES" "FLEXMOE_PROCESS_ID=$i" "FLEXMOE_COORDINATOR=127.0.0.1:$PORT"
    "JAX_LOCAL_DEVICE_IDS=$i"  # one GPU per process; CPUs ignore it
    "$FLEXMOE" "$@"
  )
  if [[ "$DRY_RUN" == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
  elif ((i == 0)); then
    "${command[@]}" &
    pids+=($!)
  else
    "${command[@]}" > >(sed "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done

# Background processes do not receive Ctrl-C: they get SIGTERM instead, and save their state.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
code=0 stopped=0
while ((${#pids[@]} > 0)); do
  sleep 0.2
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    result=0
    wait "${pids[i]}" || result=$?
    unset "pids[i]"
    if [[ "$result" == 75 ]]; then
      stopped=75
    elif [[ "$result" != 0 && "$code" == 0 ]]; then
      code=$result
      # The others would block in the all-reduce forever; their checkpoints survive a kill.
      if ((${#pids[@]} > 0)); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    fi
  done
done
exit $((code != 0 ? code : stopped))
