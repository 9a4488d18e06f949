"""A tiny world for training tests: documents, a domain vector, and run configurations that train in seconds."""

import dataclasses
import json
import pathlib

import numpy as np

from flexmoe_jax.config import ModelConfig, OptimizerConfig, RunConfig
from flexmoe_jax.data.embedding import DomainVector

MODEL = ModelConfig(
    vocab_size=512, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, max_seq_len=32
)
WORDS = {
    "public": ("the", "a", "of", "and", "river", "mountain", "king", "city", "year", "people", "water", "stone"),
    "news": ("minister", "said", "police", "election", "vote", "market", "shares", "rose", "fell", "today", "court"),
    "code": ("def", "return", "self", "import", "class", "for", "in", "range", "if", "else", "lambda", "print"),
}


def write_documents(folder: pathlib.Path, domain: str, count: int = 60, split: str = "train") -> pathlib.Path:
    """A domain folder with `count` documents of that domain's words."""
    rng = np.random.default_rng(len(domain))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(rng.choice(WORDS[domain], 40))}) + "\n")
    return folder


def write_vector(path: pathlib.Path, seed: int, encoder_digest: str = "e" * 64) -> pathlib.Path:
    """A domain vector as `flexmoe embed` would write it, drawn at random."""
    vector = np.random.default_rng(seed).normal(size=12).astype(np.float32)
    DomainVector(vector, "random", encoder_digest, 16, seed, 60).save(path)
    return path


def public_run(root: pathlib.Path, **changes) -> RunConfig:
    """A run that trains the public model in `root/public`."""
    run = RunConfig(
        owner="public",
        data=str(write_documents(root / "public" / "data", "public")),
        domain_vector=str(write_vector(root / "public" / "domain.json", 1)),
        out=str(root / "public" / "run"),
        tokenizer="cl100k:512",
        model=MODEL,
        steps=4,
        batch_size=4,
        seq_len=32,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1),
        router_z_loss=0.0,
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(run, **changes)


def expert_run(root: pathlib.Path, owner: str, public: pathlib.Path, **changes) -> RunConfig:
    """A run that trains `owner`'s expert in `root/owner`."""
    run = RunConfig(
        owner=owner,
        data=str(write_documents(root / owner / "data", owner)),
        public=str(public),
        domain_vector=str(write_vector(root / owner / "domain.json", 2 + len(owner))),
        out=str(root / owner / "run"),
        steps=6,
        batch_size=4,
        seq_len=32,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1),
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(run, **changes)


def build_world(root: pathlib.Path) -> pathlib.Path:
    """Trains a public model and two owners' experts under `root`, merges them as `root/model`; returns `root`."""
    from flexmoe_jax.compose.merge import merge
    from flexmoe_jax.training.loop import train

    release = train(public_run(root))
    packages = [train(expert_run(root, owner, release)) for owner in ("news", "code")]
    merge(release, packages, root / "model")
    for domain in WORDS:
        write_documents(root / domain / "data", domain, count=6, split="heldout")
    return root
