"""What an owner's expert is held against: SmolLM2-135M trained on the domain, with all parameters or without the trunk.

    flexmoe pretrain --config=experiments/smollm2_dense.py:math
    flexmoe pretrain --config=experiments/smollm2_dense.py:math --config.out=runs/smollm2/frozen_math \\
        --config.freeze='trunk/.*'
"""

from flexmoe_jax.experiment import run_config

ROOT = "runs/smollm2"


def get_config(arg: str = "math"):
    """`arg` is a domain of the mini-FlexMix."""
    return run_config(
        owner="public",
        data=f"{ROOT}/mix/{arg}",
        public=f"{ROOT}/model",
        out=f"{ROOT}/dense_{arg}",
        steps=30,
        batch_size=4,
        seq_len=256,
        router_z_loss=0.0,
        optimizer={"lr": 3e-4, "warmup_steps": 5, "weight_decay": 0.1},
        save_every=200,
    )
