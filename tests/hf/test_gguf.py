"""GGUF files, compared with how transformers loads the same file."""

import dataclasses
import json
import math

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model, read_tree
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import flatten
from tests.hf.tiny import LLAMA, checkpoint, tokenizer

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path, model, quantized=(), extra=None, without=(), tokens=None, **fields):
    """A llama.cpp file of a tiny Llama: query and key rows in the order of its rotary embedding, a BPE tokenizer.

    `extra` are more tensors, `fields` more keys ("__" stands for "."), `without` names methods that are not called.
    """
    config, weights = model.config, {n: p.numpy() for n, p in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), fields.pop("arch", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    content = json.loads(load_tokenizer("cl100k:300").json_bytes)
    vocab = dict(sorted((i, t) for t, i in content["model"]["vocab"].items()))
    vocab |= {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    tokens = [vocab[i] for i in range(300)] if tokens is None else tokens
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "llama-bpe"))
    calls = {
        "add_vocab_size": config.vocab_size,
        "add_token_list": tokens,
        "add_token_types": ([1] * 298 + [3, 3])[: len(tokens)],
        "add_token_merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "add_eos_token_id": fields.pop("eos", 298),
    }
    for name, value in calls.items():
        if name not in without:
            getattr(writer, name)(value)
    add_field = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in fields.items():
        add_field[type(value)](key.replace("__", "."), value)

    def add(name, array):
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        where = f"model.layers.{layer}"
        for ours, theirs in LAYER.items():
            add(f"blk.{layer}.{ours}.weight", weights[f"{where}.{theirs}.weight"])
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            rows = weights[f"{where}.self_attn.{part}_proj.weight"]
            halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
            add(f"blk.{layer}.attn_{part}.weight", halves.swapaxes(1, 2).reshape(rows.shape))
    for name, array in (extra or {}).items():
        add(name, array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def test_a_file_of_float32_is_the_checkpoint_it_was_made_from(tmp_path):
    model = checkpoint(tmp_path / "hf", "llama")
    write_gguf(tmp_path / "x.gguf", model)
    config, params = read_tree(open_gguf(tmp_path / "x.gguf"))
    _, expected = read_tree(open_folder(tmp_path / "hf"))
    assert config == LLAMA
    assert {n: a.tobytes() for n, a in flatten(params).items()} == {
        n: a.tobytes() for n, a in flatten(expected).items()
    }


def test_quantized_tensors_and_logits_are_those_of_transformers(tmp_path):
    model = checkpoint(tmp_path / "hf", "llama")
    quantized = {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"}
    write_gguf(tmp_path / "x.gguf", model, quantized)
    source = open_gguf(tmp_path / "x.gguf")
    assert source.notes[0].endswith("LlamaForCausalLM, 20 tensors (F32, Q8_0; what is quantized becomes float32)")
    import_model(source, tmp_path / "model", licence="MIT")
    mine = fm.load(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="x.gguf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(mine.logits(tokens) - expected).max() < 2e-5  # as in tests/model/test_golden.py
    assert np.abs(model(torch.from_numpy(tokens)).logits.numpy() - expected).max() > 1e-3  # quantization is visible
    text = "In 1984 the naïve owner\n\n  agreed."
    assert mine.tokenizer.encode(text) == load_tokenizer("cl100k:300").encode(text)
    assert mine.tokenizer.eos_id == 298


def scaled(rope: dict):
    """The tiny Llama with a head size that its width does not determine and a scaled rotary embedding."""
    from tests.model.hf_oracle import make_model

    config = dataclasses.replace(LLAMA, head_dim=24, rope_theta=5e5, rope_scaling=RopeScaling(**rope))
    return config, make_model("llama", config)


def llama3_factors(head_dim: int, theta: float, factor: float, length: int = 8192) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight, with low_freq_factor 1 and high_freq_factor 4."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = (length / wavelength - 1) / 3
        short, long = wavelength < length / 4, wavelength > length
        factors.append(1 if short else factor if long else 1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


LINEAR = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
FACTORS = llama3_factors(24, 5e5, 32.0)


@pytest.mark.parametrize(
    ("rope", "how"),
    [
        ({"kind": "linear", "factor": 4.0}, LINEAR),
        ({"kind": "linear", "factor": 4.0}, {"llama__rope__scaling__factor": 4.0}),  # llama.cpp: linear without a type
        ({"kind": "llama3", "factor": 32.0, "original_max_seq_len": 8192}, {"extra": {"rope_freqs.weight": FACTORS}}),
    ],
)
def test_a_scaled_rotary_embedding_and_a_head_size_of_its_own_are_read(tmp_path, rope, how):
    assert len({*FACTORS.tolist()}) == 3  # unchanged, between, and slowed down by the whole factor
    config, model = scaled(rope)
    tokenizer(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf")
    sizes = dict.fromkeys(("attention__key_length", "attention__value_length", "rope__dimension_count"), 24)
    write_gguf(tmp_path / "x.gguf", model, **{f"llama__{k}": v for k, v in sizes.items()}, **how)
    source = open_gguf(tmp_path / "x.gguf")
    assert any("rope_freqs.weight is read as RopeScaling(kind='llama3'" in n for n in source.notes) == ("extra" in how)
    found, params = read_tree(source)
    expected, theirs = read_tree(open_folder(tmp_path / "hf"))
    assert found == expected == config
    assert all(np.array_equal(a, b) for a, b in zip(*(flatten(p).values() for p in (params, theirs)), strict=True))


def test_frequencies_that_are_all_unchanged_are_no_scaling(tmp_path):
    ones = {"rope_freqs.weight": np.ones(LLAMA.head_dim // 2, np.float32)}
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), extra=ones)
    source = open_gguf(tmp_path / "x.gguf")
    assert source.config.model == LLAMA
    assert "rope_freqs.weight is read as no scaling of the rotary embedding: its factors are 1" in source.notes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"extra": {"rope_freqs.weight": llama3_factors(8, 1e4, 8.0, 4096)}}, "is not the scaling 'llama3' of 8192"),
        ({"extra": {"rope_freqs.weight": np.zeros(4, np.float32)}}, "is not the scaling 'llama3'"),
        ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "is not the scaling 'llama3'"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "'blk.0.attn_q.bias' is unknown"),
        ({"llama__rope__scaling__type": "linear"}, r"scaled \('linear'\) with the factor None"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}, r"scaled \('yarn'\)"),
        ({"llama__rope__dimension_count": 4}, "a head has 8 dimensions, and llama.rope.dimension_count is 4"),
        ({"llama__attention__value_length": 4}, "a head has 8 dimensions, and llama.attention.value_length is 4"),
        ({"llama__expert_count": 4}, "llama.expert_count is 4"),
        ({"llama__logit_scale": 2.0}, "llama.logit_scale is 2.0"),
        ({"llama__attention__key_length": [8, 8]}, "llama.attention.key_length is a list"),
        ({"split__count": 2, "split__no": 1}, r"is file 2 of 2(.|\n)*llama-gguf-split --merge"),
        ({"pre": "unheard-of"}, "has no tokenizer.json"),
        ({"without": ["add_token_merges"]}, "has no tokenizer.json"),
        ({"without": ["add_token_types"]}, "has no tokenizer.json"),
        ({"without": ["add_token_list"]}, "has no tokenizer.json"),
        ({"eos": 300}, "has no tokenizer.json"),
        ({"tokens": ["a"] * 300}, "has no tokenizer.json"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, kwargs, message):
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), **kwargs)
    with pytest.raises(ArtifactError, match=message):
        import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"without": ["add_token_merges"]}, "it lacks tokens, a type of each token, or merges"),
        ({"eos": 300}, "it names the ids {'eos_token': 300} of 300 tokens"),
        ({"tokens": ["a"] * 300}, "of its 300 tokens 299 are given twice"),
        ({"pre": "unheard-of"}, "its kind is 'gpt2', its pre-tokenizer 'unheard-of'"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_says_why_and_the_remedy_works(tmp_path, kwargs, reason):
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), **kwargs)
    source = open_gguf(tmp_path / "x.gguf")
    assert f"no tokenizer is read from it: {reason}" in source.notes
    with pytest.raises(ArtifactError) as error:
        import_model(source, tmp_path / "model")
    assert "--tokenizer" in error.value.remedy
    import_model(source, tmp_path / "model", tokenizer=str(tmp_path / "hf"))


def test_an_embedding_may_have_more_rows_than_there_are_tokens(tmp_path):
    tokens = [f"t{i}" for i in range(298)] + ["<|endoftext|>"]
    model = checkpoint(tmp_path / "hf", "llama")
    write_gguf(tmp_path / "x.gguf", model, tokens=tokens, without=["add_vocab_size", "add_token_merges"])
    assert open_gguf(tmp_path / "x.gguf").config.model.vocab_size == 300


def test_a_sliding_window_limits_the_sequences_and_is_named(tmp_path):
    """Up to its length every token sees all before it, as in the decoder."""
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), llama__attention__sliding_window=32)
    source = open_gguf(tmp_path / "x.gguf")
    assert source.config.model.max_seq_len == 32
    assert "sequences are limited to 32 tokens, the sliding window of its attention" in source.notes


def test_keys_that_are_not_read_are_named(tmp_path):
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), llama__acme=1)
    assert "unknown keys passed over: ['llama.acme']" in open_gguf(tmp_path / "x.gguf").notes


@pytest.mark.parametrize(("content", "message"), [(b"", "is not a GGUF"), (b"GGUF" + bytes(100), "version 0")])
def test_a_file_that_is_not_gguf_is_refused(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        open_gguf(tmp_path / "x.gguf")
