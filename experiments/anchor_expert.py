"""One owner's expert beside a finished public model of about a billion parameters, on one GPU in an evening.

    flexmoe import-hf OLMo-2-0425-1B --out anchor --domain public.json --licence Apache-2.0
    flexmoe embed DOCUMENTS --out domain.json
    flexmoe lr-find --config=experiments/anchor_expert.py:news,anchor=olmo2-1b ...
    flexmoe train --config=experiments/anchor_expert.py:news,anchor=olmo2-1b --config.public=anchor \
        --config.data=DOCUMENTS --config.public_data=PUBLIC --config.domain_vector=domain.json

Needs one GPU of 24 GB, and 131 M tokens, of which 98 M are the owner's: with less text, set `config.steps` so that no
source is read over four times (the start of the run says how often each is). A fiftieth of the documents is held out:
the weights that score best on it are published. PUBLIC is text like that which the anchor
has read, or several sources with weights: `--config.public_data='6 web; 3 code; 1 math'`.

Not run here. The shapes are those of the models' config.json files, and the steps lower in `tests/test_experiments.py`.
By `flexmoe plan --config=experiments/anchor_expert.py:news,anchor=olmo2-1b --topology h100:1` and so on, which takes
products at half of the peak:

    anchor         block                      trained of     memory     s a step    hours
    olmo2-1b       post-norm, qk-norm         0.81 + 1.48 B  21.5 GB    3.8         1.1
    llama3.2-1b    pre-norm, tied             0.81 + 1.24 B  21.4 GB    3.7         1.0
    qwen3-0.6b     pre-norm, qk-norm by head  0.26 + 0.60 B   8.5 GB    1.7         0.5
"""

import dataclasses

from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.experiment import run_config
from flexmoe_jax.model_config import ModelConfig, RopeScaling

OLMO2_1B = ModelConfig(
    vocab_size=100_352,
    num_layers=16,
    d_model=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    d_ff=8192,
    max_seq_len=4096,
)
LLAMA3_1B = dataclasses.replace(
    OLMO2_1B,
    vocab_size=128_256,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_seq_len=131_072,
    rope_scaling=RopeScaling("llama3", 32.0, original_max_seq_len=8192),
    norm_eps=1e-5,
    pre_norm=True,
    qk_norm=False,
    tie_embeddings=True,
    norm_topk=True,
)
QWEN3_06B = ModelConfig(
    vocab_size=151_936,
    num_layers=28,
    d_model=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    max_seq_len=40_960,
    rope_theta=1e6,
    pre_norm=True,
    qk_norm_per_head=True,
    tie_embeddings=True,
    norm_topk=True,
)
LR = 5e-4  # not measured at these sizes: find yours with `flexmoe lr-find`
# A logit is a sum over the width: rows move it as fast as in the quickstart (192 wide, 1.5e-3) at this rate (muP, arXiv
# 2203.03466). Not measured at these sizes: a contrast loss that stays at ln 2 = 0.693 asks for another rate.
ROW_LR = 1.5e-3 * 192
ANCHORS = {"olmo2-1b": OLMO2_1B, "llama3.2-1b": LLAMA3_1B, "qwen3-0.6b": QWEN3_06B}


def get_config(arg: str = ""):
    """`arg` is the owner's name, then `,anchor=` and one of `ANCHORS`."""
    owner, _, anchor = arg.partition(",anchor=")
    anchor = anchor or "olmo2-1b"
    if anchor not in ANCHORS:
        raise ConfigError(f"there is no configuration for anchor={anchor}", did_you_mean(anchor, ANCHORS))
    model = ANCHORS[anchor]
    return run_config(
        owner=owner,
        out=f"runs/{anchor}_{owner}",
        model=model,
        public_fraction=0.25,
        router_contrast=0.1,
        steps=1000,
        batch_size=64,
        seq_len=2048,
        accumulation=16,
        optimizer={
            "lr": LR,
            "warmup_steps": 50,
            "weight_decay": 0.1,
            "groups": f"experts/.*/router lr={ROW_LR / model.d_model / LR:.2g}",
        },
        compute_dtype="bfloat16",
        remat=True,
        holdout=0.02,
        eval_every=100,
        publish="best",
        save_every=100,
    )
