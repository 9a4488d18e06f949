"""GGUF files, compared with how transformers loads the same file."""

import json

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model, read_tree
from flexmoe_jax.tree import flatten
from tests.hf.tiny import LLAMA, checkpoint

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


def write_gguf(path, model, quantized=(), extra=(), names=None, ids=None, **fields):
    """A llama.cpp file of a tiny Llama: query and key rows in the order of its rotary embedding, a BPE tokenizer."""
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
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(load_tokenizer("cl100k:300").json_bytes)
    tokens = dict(sorted((i, t) for t, i in content["model"]["vocab"].items()))
    tokens |= {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "llama-bpe"))
    tokens |= names or {}
    writer.add_token_list([tokens[i] for i in range(300)])
    writer.add_token_types([1] * 298 + [3, 3])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    for name, token_id in ({"eos": 298} | (ids or {})).items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)

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
    for name in extra:
        add(name, np.zeros(4, np.float32))
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
    import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "model", licence="MIT")
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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"extra": ["rope_freqs.weight"]}, "'rope_freqs.weight' is unknown"),
        ({"llama__rope__scaling__type": "linear"}, r"scaled \('linear'\)"),
        ({"pre": "unheard-of"}, "has no tokenizer.json"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, kwargs, message):
    write_gguf(tmp_path / "x.gguf", checkpoint(tmp_path / "hf", "llama"), **kwargs)
    with pytest.raises(ArtifactError, match=message):
        import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match="is not a GGUF file"):
        open_gguf(tmp_path / "x.gguf")
