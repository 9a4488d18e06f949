"""Run by test_plan.py in a process with eight CPU devices: plans beside what JAX places and compiles.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.plan.on_eight_devices     prints one JSON object
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from flexmoe_jax.cli.main import use_compilation_cache
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.decoder import Decoder, init_params
from flexmoe_jax.model.generate import generate
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.chips import parse_topology
from flexmoe_jax.parallel.mesh import make_mesh, mesh_of_one, parse_mesh
from flexmoe_jax.parallel.specs import place, place_batch
from flexmoe_jax.parallel.stacked import stack_weights
from flexmoe_jax.params import EXPERT
from flexmoe_jax.plan.compiled import read
from flexmoe_jax.plan.costs import estimate, part_bytes
from flexmoe_jax.plan.work import Work, leaves, lower
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state

MODEL = ModelConfig(
    vocab_size=512, num_layers=3, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=256, max_seq_len=128
)
PUBLIC_RUN = RunConfig(
    owner="public",
    data="-",
    out="-",
    model=MODEL,
    domain_vector="-",
    steps=10,
    batch_size=16,
    seq_len=128,
    accumulation=2,
    remat=True,
)
# float32: CPU devices communicate nothing smaller.
OWNER_RUN = dataclasses.replace(PUBLIC_RUN, owner="news", model=None, public="-")
ROUTER = "trunk/.*|experts/public/.*|experts/.*/w_(gate|up|down)"
FOUR = ("public", "code", "news", "sea")
FACTORED = OptimizerConfig(first_moment="bfloat16", second_moment="factored")
WORKS = {
    "public": Work(MODEL, ("public",), PUBLIC_RUN),
    "expert": Work(MODEL, ("public", "news"), OWNER_RUN),
    "quantized": Work(MODEL, ("public", "news"), dataclasses.replace(OWNER_RUN, frozen_dtype="int8")),
    "factored": Work(MODEL, ("public", "news"), dataclasses.replace(OWNER_RUN, optimizer=FACTORED)),
    "joint": Work(MODEL, FOUR, dataclasses.replace(PUBLIC_RUN, top_k=2)),
    "router": Work(MODEL, FOUR, dataclasses.replace(PUBLIC_RUN, top_k=2, freeze=ROUTER)),
    "prefill": Work(MODEL, FOUR, dataclasses.replace(PUBLIC_RUN, top_k=2), "prefill"),
}
PLACED = {
    "public": ("fsdp=8", "data=2,fsdp=2,tensor=2"),
    "expert": ("data=2,fsdp=2,tensor=2",),
    "quantized": ("data=2,fsdp=2,tensor=2",),
    "factored": ("data=2,fsdp=2,tensor=2",),
    "joint": ("data=2,fsdp=2,expert=2",),
    "router": ("fsdp=2,expert=4",),
}
COMPILED = {
    "expert": ("fsdp=8", "data=2,fsdp=2,tensor=2"),
    "router": ("fsdp=2,expert=4",),
    "prefill": ("data=2,expert=4",),
}


def placed(work: Work, text: str) -> dict[str, tuple[int, int]]:
    """{part: (bytes of arrays on one device, planned bytes)} of a real state and batch."""
    mesh, run = make_mesh(text), work.run
    params = init_params(work.model, jax.random.key(0), work.experts)
    optimizer = make_optimizer(run.optimizer, run.steps, work.experts)
    state, frozen = create_state(mesh, params, run, optimizer)
    rows = np.zeros((run.batch_size, run.seq_len), np.int32)
    batch = Batch(rows, rows, rows, rows.astype(np.float32))
    trees = {
        "trained": state.trainable,
        "moments": state.opt_state,
        "frozen": frozen,
        "batch": place_batch(mesh, batch),
    }
    device = jax.devices()[3]

    def bytes_of(tree) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    sizes = parse_mesh(text)
    table = leaves(work, sizes[EXPERT])
    planned = {part: sum(part_bytes(leaf, sizes) for leaf in table if leaf.part == part) for part in trees}
    return {part: (bytes_of(tree), planned[part]) for part, tree in trees.items()}


def received(work: Work, text: str) -> tuple[dict, dict]:
    """(compiled, planned) bytes that a device receives, by kind of collective."""
    compiled = read(lower(work, make_mesh(text))).collectives
    planned: dict[str, float] = {}
    for transfer in estimate(work, parse_topology("h100:8"), parse_mesh(text)).transfers:
        planned[transfer.kind] = planned.get(transfer.kind, 0) + transfer.size
    return {kind: size for kind, (_, size) in compiled.items()}, planned


def flops(work: Work, text: str) -> tuple[float, float]:
    """(compiled, planned) operations of a device; one layer and one microbatch, as the compiler counts a loop once."""
    run = dataclasses.replace(work.run, accumulation=1, remat=False)
    one = Work(dataclasses.replace(work.model, num_layers=1), work.experts, run, work.kind)
    compiled = lower(one, make_mesh(text)).compile().cost_analysis()["flops"]
    return compiled, estimate(one, parse_topology("h100:8"), parse_mesh(text)).computed_flops


def generated(text: str) -> tuple[list, list]:
    """The continuations of eight prompts (on one device, on a mesh) by the programs that are planned."""
    params = init_params(MODEL, jax.random.key(0), FOUR)
    stacked = {**params, "experts": stack_weights(params["experts"])}
    prompts = [[row + 1, 7, 3 * row] for row in range(8)]
    continue_ = functools.partial(generate, Decoder(MODEL, 2, "sparse"), prompts=prompts, max_new_tokens=4, stop_ids=())
    mesh = make_mesh(text)
    on_one = continue_(params=place(mesh_of_one(), stacked))
    with jax.set_mesh(mesh):
        return on_one, continue_(params=place(mesh, stacked))


def main() -> dict:
    found: dict = {"flops": {}}
    found["placed"] = {f"{n} {mesh}": placed(WORKS[n], mesh) for n, meshes in PLACED.items() for mesh in meshes}
    found["received"] = {f"{n} {mesh}": received(WORKS[n], mesh) for n, meshes in COMPILED.items() for mesh in meshes}
    found["generated"] = generated("data=2,expert=4")
    for name in ("public", "joint"):
        found["flops"][name] = flops(WORKS[name], "fsdp=8")
    return found


if __name__ == "__main__":
    use_compilation_cache()
    sys.stdout.write(json.dumps(main()) + "\n")
