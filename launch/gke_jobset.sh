#!/usr/bin/env bash
# Trains on Google Kubernetes Engine as a JobSet made by XPK (pip install xpk), restarted until it is done.
# Usage: CLUSTER=NAME WORKLOAD=news-1 IMAGE=REGISTRY/flexmoe DEVICE=v5litepod-16 launch/gke_jobset.sh train --config=...
#        CLUSTER=NAME WORKLOAD=news-1 IMAGE=REGISTRY/flexmoe DEVICE=h100-80gb-8 NODES=4 launch/gke_jobset.sh train ...
# The image has flexmoe installed; config.out lies on storage that all pods mount (`xpk storage attach`; STORAGE=NAME).
set -euo pipefail
: "${CLUSTER:?the cluster}"
: "${WORKLOAD:?a new name for this job}"
: "${IMAGE:?the container image}"
: "${DEVICE:?the device type, as XPK calls it}"
: "${SLICES:=1}"               # TPU slices
: "${NODES:=1}"                # GPU nodes
: "${STORAGE:=}"               # an XPK storage to mount
: "${PROJECT:=}" "${ZONE:=}"   # empty: gcloud's own
: "${FLEXMOE:=flexmoe}"        # the command in the image
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

if [[ "$DEVICE" == v[2-9]* || "$DEVICE" == tpu* ]]; then
  device=(
    "--device-type=$DEVICE" "--num-slices=$SLICES"
    --env=FLEXMOE_PROCESSES=auto    # GKE tells every TPU pod who the others are, and JAX asks it
    "--env=JAX_PLATFORMS=tpu,cpu"   # a TPU that does not come up is an error, not a run on the CPU
  )  # and no LIBTPU_INIT_ARGS: see launch/tpu_pod.sh
else
  # One process per node, of all its GPUs. Kubernetes fills in what stands in $( ), from variables that XPK sets.
  # shellcheck disable=SC2016
  device=(
    "--device-type=$DEVICE" "--num-nodes=$NODES"
    "--env=FLEXMOE_PROCESSES=$NODES"
    '--env=FLEXMOE_PROCESS_ID=$(NODE_RANK)'
    '--env=FLEXMOE_COORDINATOR=$(JAX_COORDINATOR_ADDRESS):$(JAX_COORDINATOR_PORT)'
    "--env=JAX_PLATFORMS=cuda,cpu"      # a jax without CUDA is an error, not a run on the CPU
    --env=XLA_CLIENT_MEM_FRACTION=.9    # JAX takes 75% otherwise; the rest is CUDA's and NCCL's
    --env=NCCL_DEBUG=WARN               # NCCL is silent otherwise, and a collective that failed says nothing of why
    # Off unless asked for (jaxlib 0.10): moves collectives away from where they are waited for, beside computations.
    --env=XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
  )
fi
words=("$FLEXMOE" "$@")
command=(
  xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" "--docker-image=$IMAGE" "${device[@]}"
  ${PROJECT:+"--project=$PROJECT"} ${ZONE:+"--zone=$ZONE"} ${STORAGE:+"--storage=$STORAGE"}
  --restart-on-exit-codes=75                # SIGTERM, state saved; XPK adds 42 and 127 to 255, what a dead node leaves
  --max-restarts=100                        # none otherwise
  --termination-grace-period-seconds=300    # time to save after SIGTERM; a spot VM leaves less
  "--command=exec ${words[*]@Q}"            # exec: XPK sends SIGTERM to the shell that began it
)
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
