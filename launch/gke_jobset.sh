#!/usr/bin/env bash
# Trains on Google Kubernetes Engine as a JobSet that XPK makes (pip install xpk), restarted until training is done.
# Usage: CLUSTER=NAME WORKLOAD=news-1 IMAGE=REGISTRY/flexmoe DEVICE=v5litepod-16 launch/gke_jobset.sh train --config=...
#        CLUSTER=NAME WORKLOAD=news-1 IMAGE=REGISTRY/flexmoe DEVICE=h100-80gb-8 NODES=4 launch/gke_jobset.sh train ...
# The image must have flexmoe; config.out must be on storage that all pods mount (`xpk storage attach`; STORAGE=NAME).
set -euo pipefail
: "${CLUSTER:?the cluster}"
: "${WORKLOAD:?a new name for this job}"
: "${IMAGE:?the container image}"
: "${DEVICE:?the device type, as XPK calls it}"
: "${SLICES:=1}"               # TPU slices
: "${NODES:=1}"                # GPU nodes
: "${STORAGE:=}"               # XPK storage to mount
: "${PROJECT:=}" "${ZONE:=}"   # empty: gcloud's default
: "${FLEXMOE:=flexmoe}"        # the command in the image
: "${DRY_RUN:=0}"              # 1 prints the command instead of running it

if [[ "$DEVICE" == v[2-9]* || "$DEVICE" == tpu* ]]; then
  device=(
    "--device-type=$DEVICE" "--num-slices=$SLICES"
    --env=FLEXMOE_PROCESSES=auto    # JAX finds the other pods in the variables that GKE sets
    "--env=JAX_PLATFORMS=tpu,cpu"   # without a TPU JAX fails instead of running on the CPU
  )  # LIBTPU_INIT_ARGS stays unset: see launch/tpu_pod.sh
else
  # One process per node, with all its GPUs. Kubernetes expands $( ) from variables that XPK sets.
  # shellcheck disable=SC2016
  device=(
    "--device-type=$DEVICE" "--num-nodes=$NODES"
    "--env=FLEXMOE_PROCESSES=$NODES"
    '--env=FLEXMOE_PROCESS_ID=$(NODE_RANK)'
    '--env=FLEXMOE_COORDINATOR=$(JAX_COORDINATOR_ADDRESS):$(JAX_COORDINATOR_PORT)'
    "--env=JAX_PLATFORMS=cuda,cpu"      # without CUDA JAX fails instead of running on the CPU
    --env=XLA_CLIENT_MEM_FRACTION=.9    # the default is 75%; CUDA and NCCL use the rest
    --env=NCCL_DEBUG=WARN               # the default hides why a collective failed
    # Off by default (jaxlib 0.10): overlaps collectives with computation.
    --env=XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
  )
fi
words=("$FLEXMOE" "$@")
command=(
  xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" "--docker-image=$IMAGE" "${device[@]}"
  ${PROJECT:+"--project=$PROJECT"} ${ZONE:+"--zone=$ZONE"} ${STORAGE:+"--storage=$STORAGE"}
  --restart-on-exit-codes=75                # SIGTERM, state saved; XPK adds 42 and 127-255, the codes of a dead node
  --max-restarts=100                        # the default is 0
  --termination-grace-period-seconds=300    # time to save after SIGTERM; a spot VM gives less
  "--command=exec ${words[*]@Q}"            # exec: XPK sends SIGTERM to the shell
)
if [[ "$DRY_RUN" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
