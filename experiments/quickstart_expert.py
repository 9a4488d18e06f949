"""One owner's expert in the quickstart, beside the public model of experiments/quickstart_public.py.

    flexmoe train --config=experiments/quickstart_expert.py:news

run in the owner's folder, which holds `data/` (train.jsonl), `release/` (the public model and documents) and
`domain.json`. A quarter of every batch is public text: the router row then learns what is *not* the owner's, which no
amount of the owner's own text can teach it (README, "What the router learns"). A twentieth of the owner's documents is
held out: the weights that score best on it are published.
"""

from flexmoe_jax.experiment import run_config


def get_config(arg: str = ""):
    """`arg` is the owner's name."""
    return run_config(
        owner=arg,
        data="data",
        public="release/model",
        public_data="release/documents",
        public_fraction=0.25,
        domain_vector="domain.json",
        out="run",
        steps=100,
        batch_size=8,
        seq_len=256,
        router_contrast=0.1,
        optimizer={"lr": 1.5e-3, "warmup_steps": 10, "weight_decay": 0.1},
        holdout=0.05,
        eval_every=20,
        publish="best",
        save_every=100,
    )
