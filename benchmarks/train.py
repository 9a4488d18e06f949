"""Training steps against transformers in torch: (a) an owner's hybrid step, (b) the dense public step.

The peer is `FlexOlmoForCausalLM` / `Olmo2ForCausalLM` with the same weights, SDPA attention, its grouped experts, fused
AdamW, clipping, and the cross-entropy as its users write it. Its trunk is out of autograd; its experts are one fused
parameter, so the public half gets a gradient, which is zeroed as the published training does. In bfloat16 both sides
compute with bfloat16 weights and update float32 masters; autocast is not used.
"""

import jax
import numpy as np
import torch

from benchmarks.harness import Row, gemm, interleaved, require_close
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.flops import training_flops
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC
from tests.model import hf_oracle

SIZES = {  # name: (model, batch, sequence length, timed rounds)
    "5 M": (ModelConfig(8192, 4, 192, 3, 3, 64, 512, 256), 8, 256, 5),
    "30 M": (ModelConfig(8192, 8, 448, 7, 7, 64, 1216, 512), 4, 512, 3),
    "120 M": (ModelConfig(16384, 12, 768, 12, 12, 64, 2048, 512), 2, 512, 2),
    "SmolLM2-135M's shape": (ModelConfig(49152, 30, 576, 9, 3, 64, 1536, 512), 2, 512, 2),
}
GOALS = {  # the ratio to reach where a processor has AMX; without it no bfloat16 step may be slower than float32's
    ("hybrid", "float32"): 1.15,
    ("dense", "float32"): 1.0,
    ("hybrid", "bfloat16"): 1.0,
    ("dense", "bfloat16"): 1.0,
}
SMALL_GOAL = 1.5  # in bfloat16 at 5 M
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3}  # of the first loss; bfloat16 has 8 bits, and torch rounds the logits


def run() -> list[Row]:
    pairs = [(kind, size) for size in SIZES for kind in ("hybrid", "dense") if size[0].isdigit() or kind == "hybrid"]
    return [_measure(kind, size, dtype) for kind, size in pairs for dtype in TOLERANCES]


def _measure(kind: str, size: str, dtype: str) -> Row:
    model, B, T, repeats = SIZES[size]
    experts = 2 if kind == "hybrid" else 1
    architecture = "flex_olmo" if kind == "hybrid" else "olmo2"
    peer = hf_oracle.make_model(architecture, model, experts, experts)
    peer.set_attn_implementation("sdpa")
    if kind == "hybrid":
        peer.set_experts_implementation("grouped_mm")
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)
    ours = Step(model, kind, hf_oracle.to_tree(architecture, peer, model), tokens, dtype)
    theirs = _Peer(peer, kind, tokens, dtype)
    product, product_flops = gemm(B * T, model.d_model, 2048, dtype)
    seconds = interleaved({"ours": ours, "peer": theirs, "gemm": product}, repeats)
    # The first losses are of the same weights; later ones follow two optimizers' rounding.
    require_close(f"{kind} step, {size}, {dtype}", ours.losses[0], theirs.losses[0], TOLERANCES[dtype])
    needed = B * T * training_flops(model, T, "expert" if kind == "hybrid" else "joint")
    ratio = seconds["peer"] / seconds["ours"]
    goal = SMALL_GOAL if (size, dtype) == ("5 M", "bfloat16") else GOALS[kind, dtype]
    return Row(
        f"{kind} step, {size}, {dtype}",
        B * T / seconds["ours"],
        "tokens/s",
        B * T / seconds["peer"],
        ratio,
        needed / seconds["ours"] / (product_flops / seconds["gemm"]),
        f">= {goal}x",
        ratio >= goal,
    )


class Step:
    """Our training step on one batch, again and again; `losses` grows by one with each call."""

    def __init__(
        self, model: ModelConfig, kind: str, params, tokens, dtype: str = "float32", frozen_dtype: str | None = None
    ):
        owner, (B, T) = "owner-1" if kind == "hybrid" else PUBLIC, (len(tokens), tokens.shape[1] - 1)
        run = RunConfig(
            owner=owner,
            data="",
            out="",
            public=None if owner == PUBLIC else "-",
            domain_vector="-",
            model=model,
            steps=1000,
            batch_size=B,
            seq_len=T,
            z_loss=0.0,
            router_z_loss=0.0,
            compute_dtype=dtype,
            frozen_dtype=frozen_dtype,
            optimizer=OptimizerConfig(lr=1e-4, warmup_steps=1),
        )
        optimizer = make_optimizer(run.optimizer, run.steps)
        self.state, self.frozen = create_state(mesh_of_one(), params, run, optimizer)
        self.step, self.losses = make_train_step(model, run), []
        zeros, ones = np.zeros((B, T), np.int32), np.ones((B, T), np.float32)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], zeros, ones)

    def __call__(self):
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))


class _Peer:
    def __init__(self, model, kind: str, tokens, dtype: str):
        self.model, self.hybrid, self.losses = model.to(getattr(torch, dtype)).train(), kind == "hybrid", []
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.hybrid or ".mlp." in name)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        rounded = dtype != "float32"
        self.masters = [p.detach().float() for p in self.trained] if rounded else self.trained
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def __call__(self):
        self.model.zero_grad(set_to_none=True)
        logits = self.model(self.tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(self.masters, self.trained, strict=True):
            master.grad = parameter.grad.float()
            if self.hybrid:  # the published way of freezing: the first half is the public expert's
                master.grad[: len(master) // 2] = 0
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if self.masters is not self.trained:
                torch._foreach_copy_(self.trained, self.masters)
        self.losses.append(loss.item())
