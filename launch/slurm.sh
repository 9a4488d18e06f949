#!/usr/bin/env bash
# Trains on one GPU of a Slurm cluster, or on many nodes; requeued until training is done.
# Usage: sbatch launch/slurm.sh train --config=experiments/olmo2_7b_expert.py:news --config.public=MODEL ...
#        sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh pretrain --config=... --config.out=DISK
# One task per GPU: in a Slurm job JAX gives each task the GPU of its local number. So every task must see all GPUs of
# its node: use --gpus-per-node, never --gpus-per-task. `sbatch ... launch/slurm.sh doctor` checks the setup.
#SBATCH --job-name=flexmoe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
: "${FLEXMOE:=flexmoe}"        # the command, if it is not on the PATH
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

settings=(
  "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}"                # without CUDA JAX fails instead of running on the CPU
  "XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.9}"  # the default is 75%; CUDA and NCCL use the rest
)
if ((${SLURM_NTASKS:-1} > 1)); then
  settings+=(
    FLEXMOE_PROCESSES=auto
    "NCCL_DEBUG=${NCCL_DEBUG:-WARN}"  # the default hides why a collective failed
    # Off by default (jaxlib 0.10): overlaps collectives with computation.
    "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
  )
fi
# Since Slurm 22.05 srun no longer inherits this from sbatch; without it a task has one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# Tasks end at different times: the first must not kill the others while they save, which takes at most ten minutes.
command=(srun --kill-on-bad-exit=0 --wait=600 env "${settings[@]}" "$FLEXMOE" "$@")
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# Slurm sends SIGTERM to this script five minutes before the time limit; the training saves and exits with code 75.
# scancel signals only the tasks; srun itself would kill them on SIGTERM.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
"${command[@]}" &
training=$!
code=0
wait "$training" || code=$?
while kill -0 "$training" 2>/dev/null; do  # `wait` returned for the trap: the training still runs
  code=0
  wait "$training" || code=$?
done
if [[ "$code" == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
