"""An owner's hybrid step on one accelerator, bf16: `python -m benchmarks.gpu [--shape 7b|smollm2] [--layers N]`.

Prints what it will run, then measures the GEMM and copy ceilings, the step, its share of the GEMM ceiling on needed
FLOPs, and peak memory. With --shape tiny the same code runs at toy size anywhere: a check of the script, not a figure.
"""

import argparse
import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.model.flops import training_flops
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC

SHAPES = {
    "7b": ModelConfig(100_352, 2, 4096, 32, 32, 128, 11_008, 4096),  # layers of OLMo-2 7B, a few of them
    "smollm2": ModelConfig(49_152, 30, 576, 9, 3, 64, 1536, 512, pre_norm=True, norm_topk=True, qk_norm=False),
    "tiny": ModelConfig(512, 2, 64, 2, 2, 32, 96, 64),
}
MFU_GOAL = 0.6


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="7b", help="layers of a 7B model, all of SmolLM2-135M, a toy")
    p.add_argument("--layers", type=int, help="as many as fit: about 4 of the 7B on 80 GB with float32 moments")
    p.add_argument("--batch", type=int, default=2, help="sequences, of 4096 tokens (7b) or 512 (smollm2)")
    args = p.parse_args(argv)
    model, tiny = SHAPES[args.shape], args.shape == "tiny"
    model = dataclasses.replace(model, num_layers=args.layers or model.num_layers)
    T = model.max_seq_len
    device = jax.devices()[0]
    what = f"{model.num_layers} layers, width {model.d_model}, {args.batch} x {T} tokens"
    print(f"hybrid step: {what}, on {device.device_kind}")
    if device.platform == "cpu" and not tiny:
        print("no accelerator here: nothing is measured (--shape tiny checks the script)")
        return 0
    wide = 256 if tiny else 8192
    x, y = (jax.random.normal(jax.random.key(n), (wide, wide), jnp.bfloat16) for n in range(2))
    rate = 2 * wide**3 / _seconds(jax.jit(jnp.matmul), x, y)
    del x, y
    big = jnp.ones(1 << (20 if tiny else 30), jnp.bfloat16)
    bandwidth = 2 * big.nbytes / _seconds(jax.jit(lambda x: x + 1), big)
    del big
    first, seconds, memory = _step(model, args.batch)
    result = {
        "command": "python -m benchmarks.gpu " + " ".join(argv),
        "device": device.device_kind,
        "jax": jax.__version__,
        "gemm_tflops": rate / 1e12,
        "copy_gb_per_s": bandwidth / 1e9,
        "first_step_s": first,
        "step_s": seconds,
        "tokens_per_s": args.batch * T / seconds,
        "share_of_gemm": args.batch * T * training_flops(model, T, "expert") / seconds / rate,
        "goal": MFU_GOAL,
        "peak_bytes": memory,
    }
    print(json.dumps(result, indent=1))
    return 0


def _step(model: ModelConfig, B: int):
    """(seconds of the first step and of a later one, peak bytes where the device tells)."""
    T = model.max_seq_len
    run = RunConfig(
        owner="news",
        data="",
        out="",
        public="-",
        domain_vector="-",
        model=model,
        steps=100,
        batch_size=B,
        seq_len=T,
        remat=model.d_model > 1024,
        compute_dtype="bfloat16",
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=1),
    )
    params = init_params(model, jax.random.key(0), (PUBLIC, "news"))
    state, frozen = create_state(mesh_of_one(), params, run, make_optimizer(run.optimizer, run.steps))
    del params
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)
    zeros, ones = np.zeros((B, T), np.int32), np.ones((B, T), np.float32)
    batch = jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], zeros, ones))
    step, seconds = make_train_step(model, run), []
    for _ in range(8):
        begin = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(float(metrics["loss"])):
        raise SystemExit("the loss is not finite: no figure is printed")
    return seconds[0], float(np.median(seconds[2:])), (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _seconds(call, *args) -> float:
    jax.block_until_ready(call(*args))
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
