"""One owner's expert beside SmolLM2-135M, a public model that has read two trillion tokens; its model and text are
those of `make smollm2`. Needs 3.5 GB of memory (`flexmoe plan`) and reads 31 k tokens; a step takes 5 to 10 seconds on
two CPU cores.

    flexmoe embed runs/smollm2/mix/math --out runs/smollm2/math.json
    flexmoe train --config=experiments/smollm2_expert.py:math
"""

from flexmoe_jax.experiment import run_config

ROOT = "runs/smollm2"


def get_config(arg: str = "math"):
    """`arg` is the owner's name, a domain of the mini-FlexMix."""
    return run_config(
        owner=arg,
        data=f"{ROOT}/mix/{arg}",
        public=f"{ROOT}/model",
        public_data=f"{ROOT}/mix/public",
        public_fraction=0.25,
        domain_vector=f"{ROOT}/{arg}.json",
        out=f"{ROOT}/expert_{arg}",
        steps=30,
        batch_size=4,
        seq_len=256,
        router_contrast=0.1,
        optimizer={"lr": 3e-4, "warmup_steps": 5, "weight_decay": 0.1},
        save_every=200,
    )
