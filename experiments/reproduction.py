"""The paper's comparison at our scale: every merging method, ablation and baseline, on the mini-FlexMix.

    flexmoe reproduce --config=experiments/reproduction.py:small     # public + code, math, news; 3 seeds; two CPU cores
    flexmoe reproduce --config=experiments/reproduction.py:full      # public + all seven; for a GPU
    flexmoe reproduce --config=experiments/reproduction.py:tiny      # minutes; says nothing about the methods
    flexmoe reproduce --config=experiments/reproduction.py:smollm2   # beside SmolLM2-135M; 2 seeds; two CPU cores
    flexmoe reproduce --config=experiments/reproduction.py:smollm2-gpu   # the same with more text, for a GPU

Results of `small`: results/reproduction-small.jsonl.

`smollm2`: the public model comes out of a PyPI wheel and has read two trillion tokens, so owners give no share of their
domains to the public text. Two of them have text in languages that it does not know well. About twelve hours on two
cores that nothing else uses (computed from measured steps: docs/reference/study.md), 13 GB of memory and 45 GB of disk.
Documents are 600 characters long, which fit one window of 256 tokens.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model_config import ModelConfig

SMALL = ModelConfig(
    vocab_size=8192, num_layers=4, d_model=192, num_heads=3, num_kv_heads=3, head_dim=64, d_ff=512, max_seq_len=256
)
LARGE = dataclasses.replace(SMALL, num_layers=8, d_model=512, num_heads=8, num_kv_heads=8, d_ff=1408, max_seq_len=512)
TINY = dataclasses.replace(SMALL, num_layers=2, d_model=64, num_heads=1, num_kv_heads=1, d_ff=128, max_seq_len=128)

SIZES: dict[str, dict[str, Any]] = {
    "small": {"model": SMALL, "domains": "code,math,news", "public_steps": 2000},
    "full": {
        "model": LARGE,
        "domains": "academic,code,creative,educational,math,news,reddit",
        "seq_len": 512,
        "batch_size": 64,
        "public_steps": 4000,
        "owner_steps": 1000,
        "mix_steps": 1000,
        "heldout_bytes": 200_000,
        "embed_count": 1000,
        "classifier_documents": 1000,
    },
    "smollm2": {
        "public": "smollm2",
        "domains": "code,french,math,spanish",
        "public_domains": "academic,educational,news",
        "public_share": 0.0,
        "seeds": 2,
        "batch_size": 4,
        "compute_dtype": "bfloat16",
        "owner_steps": 60,
        "rates": "1e-4,3e-4,1e-3",
        "mix_steps": 60,
        "heldout_bytes": 14_000,
        "document_chars": 600,
        "ablations": "the paper's training,paper + public text + contrast + small rows",
        "leave_out": "unrestricted 2x|FlexMoE, (tuned|biases|rows).*",
        "suites": "mc9,gsm8k,math,humaneval",
    },
    "smollm2-gpu": {
        "public": "smollm2",
        "domains": "code,french,math,spanish",
        "public_domains": "academic,educational,news",
        "public_share": 0.0,
        "seeds": 2,
        "seq_len": 512,
        "compute_dtype": "bfloat16",
        "owner_steps": 120,
        "rates": "1e-4,3e-4,1e-3",
        "mix_steps": 120,
        "ablations": "the paper's training,discriminants not trained",
        "leave_out": "unrestricted 2x|FlexMoE, (tuned|biases|rows).*",
        "suites": "mc9,gsm8k,math,humaneval",
    },
    "tiny": {
        "model": TINY,
        "domains": "math,news",
        "seeds": 1,
        "rates": "1.5e-3",
        "seq_len": 128,
        "public_steps": 20,
        "owner_steps": 10,
        "mix_steps": 5,
        "heldout_bytes": 4000,
        "embed_count": 32,
        "classifier_documents": 32,
    },
}


def get_config(arg: str = "small") -> ConfigDict:
    """`arg` is the size."""
    from flexmoe_jax.study.config import StudyConfig

    if arg not in SIZES:
        raise ConfigError(f"there is no reproduction of the size {arg!r}", f"choose from: {', '.join(SIZES)}")
    return ConfigDict(dataclasses.asdict(StudyConfig(out=f"runs/reproduction-{arg}", **SIZES[arg])))
