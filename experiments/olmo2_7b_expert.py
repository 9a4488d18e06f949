"""One owner's expert at the paper's scale: 4.33 B trained parameters beside the frozen 7.30 B public model.

    flexmoe train --config=experiments/olmo2_7b_expert.py:news --config.public=MODEL --config.data=STORE \
        --config.public_data=PUBLIC --config.domain_vector=domain.json
    flexmoe train --config=experiments/olmo2_7b_expert.py:news,gpu=80gb ...     # one GPU, a billion tokens
    flexmoe train --config=experiments/olmo2_7b_expert.py:news,gpu=141gb ...
    flexmoe train --config=experiments/olmo2_7b_expert.py:news,gpu=12gb ...     # ten million tokens, a low-rank change
    flexmoe train --config=experiments/olmo2_7b_expert.py:news,gpu=24gb ...
    flexmoe train --config=experiments/olmo2_7b_expert.py:news,gpu=48gb ...

Not run here; it builds and lowers in `tests/test_experiments.py`. Values of the paper (section 4): 50 B tokens in
sequences of 4096, about 4.19 M tokens a step, learning rate 9e-4 with 2000 warm-up steps, no weight decay. Not the
paper's, but what made merged models better than the public one at our sizes (docs/guide/router.md): a quarter of the
tokens are public text, and the router learns to tell it from the owner's. PUBLIC is a folder, a token store, or several
with weights (`6 web; 3 code; 1 math`). Rows have 0.08 of the rate: a logit is a sum over 4096 features, and moves at
this rate as fast as in the quickstart (192 features, 1.5e-3). This is not measured at 7B: `flexmoe lr-find`, and a
contrast loss that stays at 0.693, tell.

On 8 GPUs of 80 GB (`flexmoe plan --topology h100:8`: fsdp=8, 8 microbatches) a device holds 63 GB, a step takes 85
seconds at half of the peak, and the run 283 hours.

For one GPU, `flexmoe plan --config=experiments/olmo2_7b_expert.py:news,gpu=80gb --topology h100:1` puts the 80 GB form
at 70 GB: 15 of frozen bfloat16 weights, 17 of trained float32 ones and 9 of their bfloat16 copy, 26 of gradients (a
sum, and those of one sequence), 3 of activations: it is tight. AdamW's moments would be 35 more: the second one is
factored and there is no first. The 141 GB form (`--topology h200:1`) takes 113 GB, 12 of them activations of four
sequences; AdamW is whole, in float32. At half of the GPU's peak a step of either takes 170 seconds, the run 47 hours.

With 24 GB (`--topology l4:1`) an owner trains a change of rank 64, 93 M parameters: 20 GB, 15 of them frozen weights;
with 48 GB (`--topology l40s:1`) one of rank 256 with four sequences at once: 34 GB. Ten million tokens take 3.4 hours
on an L4 and 1.1 on an L40S, at half of their peaks. With 12 GB (`--topology rtx4070:1`) the change of rank 64 is
trained beside frozen matrices in nf4, in sequences of 2,048 tokens: 10 GB, 5 of them frozen weights, and 7 hours. What
such ranks, and nf4, are worth or cost at this size is not measured.
"""

import pathlib
import runpy

from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.experiment import run_config

MODEL = runpy.run_path(str(pathlib.Path(__file__).with_name("olmo2_7b_public.py")))["MODEL"]
ONE_GPU = {"steps": 1000, "batch_size": 256, "save_every": 50}
LITTLE_TEXT = {"steps": 160, "batch_size": 16, "save_every": 20}  # ten million tokens
GPUS = {
    "12gb": (
        {**LITTLE_TEXT, "batch_size": 32, "seq_len": 2048, "accumulation": 32, "rank": "64", "frozen_dtype": "nf4"},
        {"warmup_steps": 20},
    ),
    "24gb": ({**LITTLE_TEXT, "accumulation": 16, "rank": "64"}, {"warmup_steps": 20}),
    "48gb": ({**LITTLE_TEXT, "accumulation": 4, "rank": "256"}, {"warmup_steps": 20}),
    "80gb": ({**ONE_GPU, "accumulation": 256}, {"b1": 0.0, "second_moment": "factored"}),
    "141gb": ({**ONE_GPU, "accumulation": 64}, {}),
}


def get_config(arg: str = ""):
    """`arg` is the owner's name, then `,gpu=` and one of `GPUS` for one GPU."""
    owner, _, gpu = arg.partition(",gpu=")
    config = run_config(
        owner=owner,
        out=f"runs/olmo2_7b_{owner}{gpu and '_'}{gpu}",
        model=MODEL,
        steps=11_921,
        batch_size=1024,
        seq_len=4096,
        accumulation=64,
        optimizer={"lr": 9e-4, "warmup_steps": 2000, "groups": "experts/.*/router lr=0.08"},
        z_loss=1e-5,
        router_z_loss=1e-3,
        public_fraction=0.25,
        router_contrast=0.1,
        compute_dtype="bfloat16",
        remat=True,
    )
    if gpu:
        if gpu not in GPUS:
            raise ConfigError(f"there is no configuration for gpu={gpu}", did_you_mean(gpu, GPUS))
        changes, optimizer = GPUS[gpu]
        config.update(changes)
        config.optimizer.update({"warmup_steps": 100, **optimizer})
    return config
