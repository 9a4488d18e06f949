"""An owner's step that trains a low-rank change of the public expert, against one that trains whole matrices; also with
frozen matrices in int8 and nf4.

Memory is that of the compiled program: its arguments (weights, moments, frozen weights) and its temporary buffers.
"""

import jax
import numpy as np

from benchmarks.harness import Row, interleaved
from benchmarks.train import SIZES, Step
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.model.quantized import DTYPES
from flexmoe_jax.params import FFN_WEIGHTS, factors, owner_leaves
from flexmoe_jax.tree import PUBLIC

SIZE, RANKS = "SmolLM2-135M's shape", (16, 64)


def run() -> list[Row]:
    return [row for dtype in ("float32", "bfloat16") for row in _measure(dtype)]


def _measure(dtype: str) -> list[Row]:
    model, B, T, repeats = SIZES[SIZE]
    params = init_params(model, jax.random.key(0))
    public = params["experts"][PUBLIC]
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)

    def step(rank: int | None, frozen_dtype: str | None = None) -> Step:
        own = dict(public)
        for name in FFN_WEIGHTS if rank else ():
            leaves = owner_leaves(model, "owner-1", {name: rank})
            own |= {leaf: np.zeros(leaves[leaf].shape, np.float32) for leaf in factors(name)}
            del own[name]
        experts = {PUBLIC: public, "owner-1": own}
        return Step(model, "hybrid", {**params, "experts": experts}, tokens, dtype, frozen_dtype)

    steps = {"whole": step(None), **{f"rank {rank}": step(rank) for rank in RANKS}}
    steps |= {f"rank {RANKS[0]}, frozen matrices {kind}": step(RANKS[0], kind) for kind in DTYPES}
    seconds = interleaved(steps, repeats)
    memory = {name: _bytes(found) for name, found in steps.items()}
    rows = []
    for name in list(steps)[1:]:
        where = f"hybrid step, {SIZE}, {dtype}, {name}; peer: whole matrices"
        ours, peer = B * T / seconds[name], B * T / seconds["whole"]
        rows.append(Row(where, ours, "tokens/s", peer, ours / peer))
        rows.append(
            Row(
                f"... its memory, {name}",
                memory[name] / 1e9,
                "GB",
                memory["whole"] / 1e9,
                memory["whole"] / memory[name],
            )
        )
    return rows


def _bytes(step: Step) -> int:
    found = step.step.lower(step.state, step.frozen, step.batch).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes
