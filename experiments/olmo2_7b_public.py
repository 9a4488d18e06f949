"""The public model at the paper's scale: an OLMo-2 7B decoder (7.30 B parameters with one expert).

    flexmoe pretrain --config=experiments/olmo2_7b_public.py --config.data=STORE --config.domain_vector=domain.json

Runtime: not run here. The paper's public model saw 1 T tokens on a cluster; this configuration builds, and its training
step lowers, in `tests/test_experiments.py`. `data` is a dolma2 token store (`flexmoe data tokenize`).
"""

from flexmoe_jax.experiment import run_config
from flexmoe_jax.model_config import ModelConfig

MODEL = ModelConfig(
    vocab_size=100_352,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11_008,
    max_seq_len=4096,
)


def get_config(arg: str = ""):
    """`arg` is not used."""
    return run_config(
        owner="public",
        out="runs/olmo2_7b_public",
        tokenizer="dolma2",
        model=MODEL,
        steps=240_000,
        batch_size=1024,
        seq_len=4096,
        accumulation=8,
        optimizer={"lr": 9e-4, "warmup_steps": 2000, "weight_decay": 0.1},
        router_z_loss=0.0,
        compute_dtype="bfloat16",
        remat=True,
        save_every=1000,
    )
