"""Prefill and decoding of a merged model (8 experts, 4 active) against transformers' `generate`, token for token."""

import numpy as np
import torch

from benchmarks.harness import Row, copy, interleaved, require_close
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model.generate import generate
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import count_parameters
from flexmoe_jax.tree import TRUNK
from tests.model import hf_oracle
from tests.tiny import stacked

MODEL = ModelConfig(8192, 6, 512, 8, 8, 64, 1408, 1024)
EXPERTS, ACTIVE, PROMPT, NEW, REPEATS = 8, 4, 256, 17, 3
GOALS = {1: 2.0, 8: 1.5}
PREFILL_GOAL, CEILING_GOAL = 1.2, 0.6


def run() -> list[Row]:
    peer = hf_oracle.make_model("flex_olmo", MODEL, EXPERTS, ACTIVE)
    peer.set_attn_implementation("sdpa")
    peer.set_experts_implementation("grouped_mm")
    params = hf_oracle.to_tree("flex_olmo", peer, MODEL)
    params = stacked(params)
    return [row for batch in GOALS for row in _measure(peer, params, batch)]


def _measure(peer, params, batch: int) -> list[Row]:
    prompts = np.random.default_rng(batch).integers(0, MODEL.vocab_size, (batch, PROMPT))
    tokens = torch.from_numpy(prompts)

    def ours(new: int):
        run = Decoder(MODEL, ACTIVE, "sparse")
        return generate(run, params, prompts.tolist(), max_new_tokens=new, stop_ids=())

    def theirs(new: int):
        with torch.no_grad():
            out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
        return out[:, PROMPT:].numpy()

    require_close(f"greedy tokens, batch {batch}", ours(NEW), theirs(NEW), 0.0)
    copying, copied = copy()
    calls = {("ours", new): (lambda n=new: ours(n)) for new in (1, NEW)}
    calls |= {("peer", new): (lambda n=new: theirs(n)) for new in (1, NEW)}
    seconds = interleaved({**calls, "copy": copying}, REPEATS)
    step = {who: (seconds[who, NEW] - seconds[who, 1]) / (NEW - 1) for who in ("ours", "peer")}
    bandwidth = bytes_read(batch) / step["ours"] / (copied / seconds["copy"])
    ratio, prefill = step["peer"] / step["ours"], seconds["peer", 1] / seconds["ours", 1]
    N = batch * PROMPT
    return [
        Row(
            f"prefill, batch {batch} of {PROMPT}",
            N / seconds["ours", 1],
            "tokens/s",
            N / seconds["peer", 1],
            prefill,
            goal=f">= {PREFILL_GOAL}x",
            met=prefill >= PREFILL_GOAL,
        ),
        Row(
            f"decode, batch {batch}",
            batch / step["ours"],
            "tokens/s",
            batch / step["peer"],
            ratio,
            bandwidth,
            f">= {GOALS[batch]}x, {CEILING_GOAL:.0%}",
            bool(ratio >= GOALS[batch] and bandwidth >= CEILING_GOAL),
        ),
    ]


def bytes_read(batch: int) -> float:
    """Of one decoding step: trunk without the embedding table, the experts that `batch` tokens are expected to choose
    (were choices independent), and the cache at its mean length."""
    experts = EXPERTS * (1 - (1 - ACTIVE / EXPERTS) ** batch)
    trunk = count_parameters(MODEL, TRUNK) - MODEL.vocab_size * MODEL.d_model
    cache = 2 * batch * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * (PROMPT + NEW / 2)
    return 4.0 * (trunk + experts * count_parameters(MODEL, "x") + cache)
