"""The quickstart's public model: 4.9 M parameters, on the public split of the mini-FlexMix.

    flexmoe pretrain --config=experiments/quickstart_public.py

run in a folder that holds `data/` (train.jsonl) and `domain.json` (`flexmoe embed data --out domain.json`).
"""

from flexmoe_jax.experiment import run_config
from flexmoe_jax.model_config import ModelConfig

MODEL = ModelConfig(
    vocab_size=8192,
    num_layers=4,
    d_model=192,
    num_heads=3,
    num_kv_heads=3,
    head_dim=64,
    d_ff=512,
    max_seq_len=256,
)


def get_config(arg: str = ""):
    """`arg` is not used."""
    return run_config(
        owner="public",
        data="data",
        domain_vector="domain.json",
        out="run",
        tokenizer="cl100k:8192",
        model=MODEL,
        steps=300,
        batch_size=8,
        seq_len=256,
        optimizer={"lr": 3e-3, "warmup_steps": 20, "weight_decay": 0.1},
        router_z_loss=0.0,
        save_every=200,
        licence="CC BY-SA 4.0 and others: see data/mix.json",
    )
