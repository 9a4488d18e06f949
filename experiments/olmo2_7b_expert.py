"""One owner's expert at the paper's scale: 4.33 B trained parameters beside the frozen 7.30 B public model.

    flexmoe train --config=experiments/olmo2_7b_expert.py:news --config.public=MODEL --config.data=STORE \
        --config.domain_vector=domain.json

Runtime: not run here; builds and lowers in `tests/test_experiments.py`. Values of the paper (section 4): 50 B tokens in
sequences of 4096, about 4.19 M tokens a step, learning rate 9e-4 with 2000 warm-up steps, no weight decay.
"""

import pathlib
import runpy

from flexmoe_jax.experiment import run_config

MODEL = runpy.run_path(str(pathlib.Path(__file__).with_name("olmo2_7b_public.py")))["MODEL"]


def get_config(arg: str = ""):
    """`arg` is the owner's name."""
    return run_config(
        owner=arg,
        out=f"runs/olmo2_7b_{arg}",
        model=MODEL,
        steps=11_921,
        batch_size=1024,
        seq_len=4096,
        accumulation=64,
        optimizer={"lr": 9e-4, "warmup_steps": 2000},
        z_loss=1e-5,
        router_z_loss=1e-3,
        compute_dtype="bfloat16",
        remat=True,
    )
