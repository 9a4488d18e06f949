"""llama.cpp beside this library: the same logits and the same greedy text of a GGUF file and the model it was made of.

    LLAMA_CPP=FOLDER python -m tests.hf.llama_cpp MODEL FILE.gguf

`FOLDER` has node-llama-cpp installed: `npm install --prefix FOLDER node-llama-cpp@3.22.1`.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

import flexmoe_jax as fm
from flexmoe_jax.model.generate import generate

ENGINE = pathlib.Path(os.environ.get("LLAMA_CPP", "nowhere"))
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "If 3x + 5 = 20, then x is equal to")
NEW_TOKENS = 32
SECONDS = 1800


def llama_cpp(file: pathlib.Path | str, texts: Sequence[str] = (), rows: Sequence = (), count: int = 0) -> dict:
    """What `llama_cpp.mjs` prints: tokens, logits and greedy ids."""
    job = {"file": str(pathlib.Path(file).resolve()), "texts": list(texts), "rows": np.asarray(rows).tolist()}
    script = pathlib.Path(__file__).with_name("llama_cpp.mjs").resolve()
    done = subprocess.run(
        ["node", script],
        cwd=ENGINE,
        input=json.dumps(job | {"count": count}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(model: fm.Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The ids of our own greedy continuations, past any end token."""
    run = dataclasses.replace(model.decoder(), dispatch="sparse")
    return generate(run, model._stacked, prompts, max_new_tokens=count, stop_ids=())


def same_text(model: fm.Model, file: pathlib.Path | str, texts: Sequence[str], count: int) -> list[list[int]]:
    """The greedy ids that follow `texts`; AssertionError where llama.cpp has other tokens or continues otherwise."""
    theirs = llama_cpp(file, texts, count=count)
    ids = [model.tokenizer.encode(text) for text in texts]
    assert theirs["tokens"] == ids
    ours = greedy(model, ids, count)
    assert theirs["greedy"] == ours
    return ours


def main(model: str, file: str) -> None:
    loaded = fm.load(model)
    for text, ids in zip(PROMPTS, same_text(loaded, file, PROMPTS, NEW_TOKENS), strict=True):
        sys.stdout.write(f"{len(ids)} greedy tokens equal: {text + loaded.tokenizer.decode(ids)!r}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
