#!/usr/bin/env bash
# SmolLM2-135M-Instruct (out of a PyPI wheel) as a public anchor, with owners beside it.
#
#   experiments/smollm2.sh smollm2           # three owners, merged with top-2, out to transformers (Mixtral) and llama.cpp
#   experiments/smollm2.sh smollm2-scores    # the public model on held-out text and on MC9 (64 questions a task)
#   experiments/smollm2.sh smollm2-expert    # after smollm2: an expert on math against fine-tuning the whole model
#
# or `make smollm2` etc. The engines must compute what we compute: export-hf compares logits, tests/hf/llama_cpp.py
# greedy text (LLAMA_CPP is a folder with node-llama-cpp). Results: docs/guide/huggingface.md, evaluation.md and
# docs/evidence/reproduction.md. DRY_RUN=1 prints the commands.
set -euo pipefail

ROOT=${ROOT:-runs/smollm2}
OWNERS=(code math news)

run() {
    echo "$ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

anchor() {
    [ ! -e "$ROOT/model" ] || return 0
    run flexmoe data build --out "$ROOT/mix"
    run flexmoe embed "$ROOT/mix/public" --out "$ROOT/public.json"
    run flexmoe import-gguf smollm2 --out "$ROOT/model" --domain "$ROOT/public.json" --licence Apache-2.0
}

engines() {
    local packages=() folders=()
    for owner in "${OWNERS[@]}"; do
        run flexmoe embed "$ROOT/mix/$owner" --count 100 --out "$ROOT/$owner.json"
        run flexmoe train --config="experiments/smollm2_expert.py:$owner" --config.steps=10 --config.out="$ROOT/$owner"
        packages+=(--package "$ROOT/$owner/package")
        folders+=(--data "$ROOT/mix/$owner")
    done
    run flexmoe merge --public "$ROOT/model" "${packages[@]}" --top-k 2 --out "$ROOT/merged"
    for model in model merged; do
        run flexmoe eval "$ROOT/$model" --max-bytes 20000 --data "$ROOT/mix/public" "${folders[@]}"
    done
    run flexmoe export-hf "$ROOT/merged" --out "$ROOT/mixtral"
    for dtype in f32 q8_0; do
        run flexmoe export-gguf "$ROOT/merged" --dtype "$dtype" --out "$ROOT/merged.$dtype.gguf"
    done
    run python -m tests.hf.llama_cpp "$ROOT/merged" "$ROOT/merged.f32.gguf"
}

scores() {
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
    run flexmoe merge --public "$ROOT/model" --package "$ROOT/expert_math/package" --out "$ROOT/merged_math"
    run "${dense[@]}" --config.freeze='trunk/.*' --config.out="$ROOT/frozen_math"
    run "${dense[@]}"
    run "${dense[@]}" --config.optimizer.lr=1e-4 --config.out="$ROOT/dense_slow_math"
    for model in model merged_math frozen_math/model dense_math/model dense_slow_math/model; do
        run flexmoe eval "$ROOT/$model" --seq-len 512 --max-bytes 20000 --data "$ROOT/mix/math" --data "$ROOT/mix/public"
    done
}

case ${1:-} in
smollm2)
    anchor
    engines
    ;;
smollm2-scores)
    anchor
    scores
    ;;
smollm2-expert) expert ;;
*) echo "usage: experiments/smollm2.sh smollm2|smollm2-scores|smollm2-expert" >&2 && exit 2 ;;
esac
