"""GGUF files that we write: read with the package `gguf`, and by our own import."""

import dataclasses
import json
import math
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.artifacts.arrays import tensor_file
from flexmoe_jax.artifacts.model_dir import create_model, load_params, open_model
from flexmoe_jax.cli.main import main
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.hf.gguf_export import DTYPES, export_gguf
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import read_tree
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import PUBLIC, TRUNK, flatten
from tests.hf.tiny import CONFIG, LLAMA, QWEN3, SHAPES, our_model
from tests.tiny import random_params

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return our_model(tmp_path_factory.mktemp("llama"), top_k=2, config=LLAMA)


def copy_of(model, folder, **config):
    """The model directory again, with a tokenizer_config.json of these keys."""
    params = load_params(model)
    records = {owner: model.manifests[owner].record.fields for owner in model.manifests}
    content = json.loads(model.tokenizer_path.read_bytes())
    content |= config.pop("content", {})
    source = folder / "tokenizer"
    source.mkdir(parents=True)
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    return create_model(folder / "model", params, model.config, source, records, model.top_k)


def read(path) -> tuple[dict, dict]:
    """({key: value}, {name: array}); arrays in the order of numpy, dequantized."""
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arrays = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        arrays[tensor.name] = np.asarray(values).reshape([int(n) for n in reversed(tensor.shape)])
    return fields, arrays


def test_a_mixture_has_the_names_shapes_and_values_that_llama_cpp_reads(model, tmp_path):
    done = export_gguf(model, tmp_path / "x.gguf")
    fields, arrays = read(tmp_path / "x.gguf")
    c, names = model.config, ("public", "code", "news")
    assert (done.architecture, done.experts, done.top_k, done.dtype) == ("llama", names, 2, "f32")
    expected = {
        "general.architecture": "llama",
        "general.license": "Apache-2.0 AND code-licence AND news-licence",
        "llama.expert_count": 3,
        "llama.expert_used_count": 2,
        "llama.feed_forward_length": c.d_ff,
        "llama.attention.head_count_kv": c.num_kv_heads,
        "llama.rope.freq_base": c.rope_theta,
        "llama.context_length": c.max_seq_len,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 298,
        "flexmoe.experts": list(names),
        "flexmoe.model": model.digest,
    }
    assert {key: fields.get(key) for key in expected} == expected
    flat = flatten(load_params(model))
    assert (arrays["token_embd.weight"] == flat["trunk/embed"]).all()
    assert "output.weight" not in arrays  # the head is the embedding
    assert (arrays["output_norm.weight"] == flat["trunk/final_norm"]).all()
    for layer in range(c.num_layers):
        for stem, path in (("gate", "w_gate"), ("up", "w_up"), ("down", "w_down")):
            stack = np.stack([flat[f"experts/{name}/{path}"][layer].T for name in names])
            assert (arrays[f"blk.{layer}.ffn_{stem}_exps.weight"] == stack).all()
        rows = np.stack([flat[f"experts/{name}/router"][layer] for name in names])
        assert (arrays[f"blk.{layer}.ffn_gate_inp.weight"] == rows).all()
        # llama.cpp rotates rows 2j and 2j+1 of a head together; we rotate j and j + K/2.
        w_k = flat["trunk/blocks/w_k"][layer]
        found = arrays[f"blk.{layer}.attn_k.weight"].reshape(c.num_kv_heads, c.head_dim // 2, 2, c.d_model)
        assert (found[:, :, 0] == w_k[:, :, : c.head_dim // 2].transpose(1, 2, 0)).all()
        assert (found[:, :, 1] == w_k[:, :, c.head_dim // 2 :].transpose(1, 2, 0)).all()
        w_o = flat["trunk/blocks/w_o"][layer].reshape(-1, c.d_model)
        assert (arrays[f"blk.{layer}.attn_output.weight"] == w_o.T).all()


def test_a_dense_file_comes_back_with_the_same_weights(model, tmp_path):
    export_gguf(model, tmp_path / "x.gguf", experts=["news"])
    config, params = read_tree(open_gguf(tmp_path / "x.gguf"))
    assert config == model.config
    kept = load_params(model, ["news"])
    expected = flatten({"trunk": kept["trunk"], "experts": {PUBLIC: kept["experts"]["news"]}})
    found = flatten(params)
    weights = [path for path in expected if not path.endswith(("router", "bias"))]
    assert {p: found[p].tobytes() for p in weights} == {p: np.asarray(expected[p]).tobytes() for p in weights}


def test_one_expert_has_no_router(model, tmp_path):
    export_gguf(model, tmp_path / "x.gguf", experts=["code"])
    fields, arrays = read(tmp_path / "x.gguf")
    assert not any("expert_count" in key for key in fields)
    assert not any("exps" in name or "gate_inp" in name for name in arrays)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_rounds_the_matrices_and_nothing_else(tmp_path, dtype):
    config = dataclasses.replace(LLAMA, d_ff=64)
    model = our_model(tmp_path, ("news",), config=config)
    export_gguf(model, tmp_path / "x.gguf", dtype=dtype)
    export_gguf(model, tmp_path / "exact.gguf", dtype="f32")
    fields, arrays = read(tmp_path / "x.gguf")
    _, exact = read(tmp_path / "exact.gguf")
    # The largest relative error of a rounded number: half a unit in the last place; of a quantized one, in units of the
    # largest of its block: half a step of 1/127, and a step of 1/8 at the side of the range that is one step shorter.
    bound = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127, "q4_0": 1.05 / 8}[dtype]
    rounded = {name for name in arrays if (arrays[name] != exact[name]).any()}
    matrices = {name for name in arrays if arrays[name].ndim > 1 and "gate_inp" not in name}
    assert rounded == (set() if dtype == "f32" else matrices)
    for name in matrices:
        assert np.abs(arrays[name] - exact[name]).max() <= bound * np.abs(exact[name]).max()
    assert fields["general.file_type"] == gguf.LlamaFileType[DTYPES[dtype][1]]


def test_the_dtype_is_by_default_that_of_the_model(tmp_path):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), random_params(LLAMA))
    load_tokenizer("cl100k:300").save(tmp_path / "tokenizer.json")
    records = {TRUNK: {}, PUBLIC: {}}
    model = create_model(tmp_path / "model", params, LLAMA, tmp_path / "tokenizer.json", records)
    assert export_gguf(model, tmp_path / "x.gguf").dtype == "bf16"
    _, arrays = read(tmp_path / "x.gguf")
    assert (arrays["token_embd.weight"] == params["trunk"]["embed"].astype(np.float32)).all()


def scaled(**scaling):
    return dataclasses.replace(LLAMA, rope_scaling=RopeScaling(**scaling))


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path):
    config = scaled(kind="llama3", factor=8.0, original_max_seq_len=16)
    export_gguf(our_model(tmp_path, config=config), tmp_path / "x.gguf")
    _, arrays = read(tmp_path / "x.gguf")
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    expected = []  # arXiv 2407.21783 in the words of llama.cpp's convert script: factors divide the frequencies
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 16 / 4:
            expected.append(1.0)
        elif wavelength > 16 / 1:
            expected.append(8.0)
        else:
            smooth = (16 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert np.allclose(arrays["rope_freqs.weight"], expected, rtol=1e-6)  # float32 frequencies


def test_linear_and_yarn_scaling_are_keys(tmp_path):
    export_gguf(our_model(tmp_path / "a", config=scaled(kind="linear", factor=4.0)), tmp_path / "a.gguf")
    fields, _ = read(tmp_path / "a.gguf")
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)
    config = scaled(kind="yarn", factor=4.0, original_max_seq_len=16, attention_factor=1.5)
    export_gguf(our_model(tmp_path / "b", config=config), tmp_path / "b.gguf")
    fields, _ = read(tmp_path / "b.gguf")
    assert fields["llama.rope.scaling.original_context_length"] == 16
    factor = fields["llama.rope.scaling.attn_factor"] * (0.1 * math.log(4.0) + 1)  # llama.cpp multiplies the two
    assert factor == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("qwen2", "llama"), ("qwen3", "qwen3moe"), ("mistral", "llama")],
)
def test_other_anchors_have_their_architecture(tmp_path, kind, architecture):
    model = our_model(tmp_path, config=SHAPES[kind])
    assert export_gguf(model, tmp_path / "x.gguf").architecture == architecture
    _, arrays = read(tmp_path / "x.gguf")
    flat = flatten(load_params(model))
    assert (arrays["output.weight"] == flat["trunk/head"].T).all()
    if kind == "qwen3":  # no reordering, and one norm for every head
        w_q = flat["trunk/blocks/w_q"][1]
        assert (arrays["blk.1.attn_q.weight"] == w_q.reshape(w_q.shape[0], -1).T).all()
        assert (arrays["blk.1.attn_q_norm.weight"] == flat["trunk/blocks/q_norm"][1]).all()
    if kind == "qwen2":
        b_q = flat["trunk/blocks/b_q"][1].reshape(4, 2, 4)
        assert (arrays["blk.1.attn_q.bias"] == b_q.swapaxes(1, 2).reshape(-1)).all()


def test_what_llama_cpp_cannot_compute_is_refused_and_the_remedy_works(tmp_path):
    cases = {
        "no architecture of a mixture with pre_norm False": our_model(tmp_path / "a", config=CONFIG),
        "no expert bias": our_model(tmp_path / "b", config=LLAMA, biased=True),
    }
    for number, (message, model) in enumerate(cases.items()):
        out = tmp_path / f"{number}.gguf"
        with pytest.raises(ArtifactError, match=message) as caught:
            export_gguf(model, out)
        assert not out.exists()
        assert "--experts public" in str(caught.value)
        export_gguf(model, out, experts=["public"])
    with pytest.raises(ArtifactError, match="already exists"):
        export_gguf(model, out, experts=["public"])


def test_rotary_embeddings_that_llama_cpp_lacks_are_refused(tmp_path):
    scaling = RopeScaling("yarn", 4.0, 16, truncate=False)
    with pytest.raises(ArtifactError, match="truncate false"):
        export_gguf(our_model(tmp_path / "a", config=dataclasses.replace(LLAMA, rope_scaling=scaling)), tmp_path / "x")
    scaling = RopeScaling("llama3", 4.0, 16)
    with pytest.raises(ArtifactError, match="'qwen3moe' has no rotary embedding of kind 'llama3'"):
        export_gguf(our_model(tmp_path / "b", config=dataclasses.replace(QWEN3, rope_scaling=scaling)), tmp_path / "x")


def test_numbers_and_sizes_that_a_dtype_cannot_hold_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="q8_0 holds rows in blocks of 32, and d_ff is 40"):
        export_gguf(model, tmp_path / "x.gguf", dtype="q8_0")
    params = load_params(model, [PUBLIC])
    params["trunk"]["embed"] = params["trunk"]["embed"].copy()
    params["trunk"]["embed"][7, 3] = 1e5
    large = create_model(tmp_path / "large", params, LLAMA, model.tokenizer_path, {TRUNK: {}, PUBLIC: {}})
    with pytest.raises(ArtifactError, match=r"token_embd.weight \(trunk\) holds 100000, beyond float16"):
        export_gguf(large, tmp_path / "x.gguf", dtype="f16")
    assert not (tmp_path / "x.gguf").exists()
    export_gguf(large, tmp_path / "x.gguf", dtype="bf16")


@pytest.mark.parametrize("damaged", ["trunk/blocks/w_o", "news/w_down", "code/router", "code/bias"])
def test_damaged_weights_are_found_while_they_stream(model, tmp_path, damaged):
    shutil.copytree(model.path, tmp_path / "model")
    owner, _, path = damaged.partition("/")
    file = tmp_path / "model" / owner / tensor_file(path, model.manifests[owner].tensors[path].shape)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert main(["export-gguf", str(tmp_path / "model"), "--out", str(tmp_path / "x.gguf")]) == 1
    with pytest.raises(ArtifactError, match=f"{path} has sha256"):
        export_gguf(open_model(tmp_path / "model"), tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_memory_is_that_of_one_matrix(tmp_path):
    config = dataclasses.replace(LLAMA, d_model=256, head_dim=64, d_ff=1024, num_layers=4)
    model = our_model(tmp_path, ("a", "b", "c"), config=config)
    export_gguf(model, tmp_path / "warm.gguf")
    matrix = 4 * config.d_model * config.d_ff
    tracemalloc.start()
    size = export_gguf(model, tmp_path / "x.gguf").size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 48 * matrix
    # A matrix is copied, transposed and converted; the tokenizer takes less than one more.
    assert peak < 5 * matrix


def test_chat_template_and_begin_token_travel(model, tmp_path):
    begin = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [299], "tokens": ["<|pad|>"]}},
    }
    template = "{{ messages[0].content }}"
    other = copy_of(model, tmp_path, content={"post_processor": begin}, chat_template=template)
    export_gguf(other, tmp_path / "x.gguf")
    fields, _ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.chat_template"] == template
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (299, True)
    assert fields["tokenizer.ggml.token_type"][297:] == [1, 3, 3]


def test_a_begin_token_of_the_configuration_and_the_end_of_turns_travel(model, tmp_path):
    other = copy_of(model, tmp_path, bos_token="<|pad|>", add_bos_token=True, eos_token="<|pad|>")
    export_gguf(other, tmp_path / "x.gguf")
    fields, _ = read(tmp_path / "x.gguf")
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (299, True)
    assert fields["tokenizer.ggml.eos_token_id"] == 299


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_refused_in_words(model, tmp_path):
    bpe = {**json.loads(model.tokenizer_path.read_bytes())["model"], "ignore_merges": False}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    known = copy_of(model, tmp_path / "gpt-2", content={"model": bpe, "pre_tokenizer": step})
    assert export_gguf(known, tmp_path / "x.gguf").pre_tokenizer == "gpt-2"
    step = {**step, "add_prefix_space": True}
    other = copy_of(model, tmp_path / "other", content={"model": bpe, "pre_tokenizer": step})
    what = r"does not know this tokenizer .*add_prefix_space(.|\n)*known are sentence"
    with pytest.raises(ArtifactError, match=what):
        export_gguf(other, tmp_path / "y.gguf")


def test_a_sentencepiece_tokenizer_has_scores_in_the_order_of_its_merges(model, tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {piece: 259 + i for i, piece in enumerate(["ab", "a", "b", "▁", "▁ab"])}
    content = {
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False} | flags
            for i, name in enumerate(("<unk>", "<s>", "</s>"))
            for flags in [{"normalized": False, "special": True}]
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": None,
        "model": {
            **json.loads(model.tokenizer_path.read_bytes())["model"],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [["a", "b"], ["▁", "ab"]],
        },
    }
    other = copy_of(model, tmp_path, content=content, eos_token="</s>", bos_token="<s>")
    assert export_gguf(other, tmp_path / "x.gguf").pre_tokenizer == "default"
    fields, _ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    scores = fields["tokenizer.ggml.scores"]
    assert scores[vocab["ab"]] > scores[vocab["▁ab"]]
    types = fields["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[3], types[259], types[264]) == (2, 3, 6, 1, 5)
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def test_the_verb_prints_what_was_written(model, tmp_path, capsys):
    argv = ["export-gguf", str(model.path), "--out", str(tmp_path / "x.gguf"), "--experts", "public,news"]
    assert main([*argv, "--dtype", "f16"]) == 0
    assert "llama, top-2 of public, news; f16, " in capsys.readouterr().out
    assert main([*argv, "--json"]) == 1
    assert "x.gguf already exists\n  remedy: give another path" in capsys.readouterr().err
