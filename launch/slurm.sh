#!/usr/bin/env bash
# Trains on one GPU of a Slurm cluster, or on many nodes; requeued until it is done.
# Usage: sbatch launch/slurm.sh train --config=experiments/olmo2_7b_expert.py:news --config.public=MODEL ...
#        sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh pretrain --config=... --config.out=DISK
# One task per GPU: JAX takes that from a Slurm job by itself, each task the GPU of its local number. So every task must
# see all GPUs of its node: --gpus-per-node, never --gpus-per-task. `sbatch ... launch/slurm.sh doctor` tries it out.
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
  "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}"                # a jax without CUDA is an error, not a run on the CPU
  "XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.9}"  # JAX takes 75% otherwise; the rest is CUDA's and NCCL's
)
if ((${SLURM_NTASKS:-1} > 1)); then
  settings+=(
    FLEXMOE_PROCESSES=auto
    "NCCL_DEBUG=${NCCL_DEBUG:-WARN}"  # NCCL is silent otherwise, and a collective that failed says nothing of why
    # Off unless asked for (jaxlib 0.10): moves collectives away from where they are waited for, beside computations.
    "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
  )
fi
# srun takes this over from sbatch no longer (since 22.05); without it a task has one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# Tasks end at different moments: the first must not take the others with it while they save, nor leave them for ever.
command=(srun --kill-on-bad-exit=0 --wait=600 env "${settings[@]}" "$FLEXMOE" "$@")
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# Slurm sends SIGTERM to this script five minutes before the time limit; the training saves and ends with code 75.
# Not passed on to srun, which would kill its tasks: scancel signals the tasks alone.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
"${command[@]}" &
training=$!
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
