"""One owner's 7B expert on one GPU of 141 GB, on a billion tokens: `experiments/olmo2_7b_expert.py` in smaller steps.

    flexmoe train --config=experiments/olmo2_7b_expert_141gb.py:news --config.public=MODEL --config.data=STORE \
        --config.domain_vector=domain.json

Not run here. `flexmoe plan --config=experiments/olmo2_7b_expert_141gb.py:news --topology h200:1` puts it at 113 GB, 12
of them activations of four sequences; AdamW is whole, in float32. At half of an H200's peak a step takes 170 seconds,
the run 47 hours.
"""

import pathlib
import runpy

EXPERT = runpy.run_path(str(pathlib.Path(__file__).with_name("olmo2_7b_expert.py")))


def get_config(arg: str = ""):
    """`arg` is the owner's name."""
    config = EXPERT["get_config"](arg)
    config.update(out=f"runs/olmo2_7b_141gb_{arg}", steps=1000, batch_size=256, accumulation=64, save_every=50)
    config.optimizer.update(warmup_steps=100)
    return config
