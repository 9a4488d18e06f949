"""The input pipeline against the training step it feeds, in tokens of the quickstart's batches."""

import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks.harness import Row, interleaved
from benchmarks.train import SIZES, Step
from flexmoe_jax.data.pipeline import make_batches, make_iterator
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.model.decoder import init_params

GOAL, BATCHES = 10.0, 400


def run() -> list[Row]:
    model, B, T, repeats = SIZES["5 M"]
    words = np.random.default_rng(0).integers(0, 10**6, (2000, 300))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        texts = (" ".join(map(str, row)) for row in words)
        store = write_store(texts, load_tokenizer("cl100k:8192"), pathlib.Path(folder) / "tokens")
        tokenising = store.num_tokens / (time.perf_counter() - begin)
        iterator = make_iterator(make_batches(store, seq_len=T, batch_size=B, seed=0))
        next(iterator)
        began = time.process_time()
        for _ in range(BATCHES):
            next(iterator)
        # Seconds of one core: the pipeline's threads count in full.
        pipeline = BATCHES * B * T / (time.process_time() - began)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)
    step = Step(model, "dense", init_params(model, jax.random.key(0)), tokens)
    training = B * T / interleaved({"step": step}, repeats)["step"]
    ratio = pipeline / training
    return [
        Row(
            "input pipeline, one core; peer: our dense step, 5 M",
            pipeline,
            "tokens/s",
            training,
            ratio,
            goal=f">= {GOAL:.0f}x",
            met=ratio >= GOAL,
        ),
        Row("tokenising, both cores", tokenising, "tokens/s"),
    ]
