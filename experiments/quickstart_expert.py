"""One owner's expert in the quickstart, beside the public model of experiments/quickstart_public.py.

    flexmoe train --config=experiments/quickstart_expert.py:news

run in the owner's folder, which holds `data/` (train.jsonl), `public/` (the public release) and `domain.json`.
"""

from flexmoe_jax.cli.configs import run_config


def get_config(arg: str = ""):
    """`arg` is the owner's name."""
    return run_config(
        owner=arg,
        data="data",
        public="public",
        domain_vector="domain.json",
        out="run",
        steps=150,
        batch_size=8,
        seq_len=256,
        optimizer={"lr": 3e-3, "warmup_steps": 10, "weight_decay": 0.1},
        save_every=100,
    )
