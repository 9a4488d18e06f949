"""One owner's 7B expert on one GPU of 80 GB, on a billion tokens: `experiments/olmo2_7b_expert.py` in less memory.

    flexmoe train --config=experiments/olmo2_7b_expert_80gb.py:news --config.public=MODEL --config.data=STORE \
        --config.domain_vector=domain.json

Not run here. `flexmoe plan --config=experiments/olmo2_7b_expert_80gb.py:news --topology h100:1` puts it at 70 GB: 15 of
frozen bfloat16 weights, 17 of trained float32 ones and 9 of their bfloat16 copy, 26 of gradients (a sum, and those of
one sequence), 3 of activations: it is tight. AdamW's moments would be 35 more: the second one is factored and there is
no first. At half of an H100's peak a step takes 170 seconds, the run 47 hours.
"""

import pathlib
import runpy

EXPERT = runpy.run_path(str(pathlib.Path(__file__).with_name("olmo2_7b_expert.py")))


def get_config(arg: str = ""):
    """`arg` is the owner's name."""
    config = EXPERT["get_config"](arg)
    config.update(out=f"runs/olmo2_7b_80gb_{arg}", steps=1000, batch_size=256, accumulation=256, save_every=50)
    config.optimizer.update(warmup_steps=100, b1=0.0, second_moment="factored")
    return config
