"""Checkpoints that are incomplete, altered or of an unknown kind are refused with the reason; nothing is written."""

import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.hf.architectures import FLEX_OLMO
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.load import import_model, read_tree
from flexmoe_jax.hf.mapping import slots
from flexmoe_jax.hf.tensors import read_file, write_file
from flexmoe_jax.tree import canonical_order
from tests.hf.tiny import CONFIG, arrays, edit_config, join_file, split_file, tensor, write

NAMES = ("public", "code", "news")
NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def refused(folder: pathlib.Path, message: str, out: pathlib.Path, **kwargs):
    with pytest.raises(FlexMoEError, match=message) as error:
        import_model(open_folder(folder), out, **kwargs)
    assert error.value.remedy
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


def test_a_complete_checkpoint_is_imported(tmp_path):
    model = import_model(open_folder(write(tmp_path / "hf", arrays())), tmp_path / "out", names=NAMES)
    assert model.experts == NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"'{NORM}' is missing"),
        (lambda w: w.update({"model.layers.2.mlp.gate.weight": w[NORM]}), r"layers.2.mlp.gate.weight' is unknown"),
        (lambda w: w.update({"model.layers.0.mlp.gate.bias": w[NORM]}), r"layers.0.mlp.gate.bias' is unknown"),
        (lambda w: w.update({Q: w[Q][:16]}), r"q_proj.weight' has shape \(16, 32\), config.json implies \(32, 32\)"),
        (lambda w: w.update({NORM: np.full(32, np.nan, np.float32)}), "'final_norm' of 'trunk' has 32 values"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    weights = arrays()
    change(weights)
    refused(write(tmp_path / "hf", weights), message, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
        ({"architectures": ["FlexOlmoModel"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"scaled by 'llama3' with \['factor'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "scaled by 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotates 0.5 of each head"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has \['sliding_attention'\]"),
        ({"no_rope_layers": [0, 1]}, r"no_rope_layers is \[0, 1\]"),
        ({"rope_theta": 1e4}, "rope_theta has the values"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4 with num_experts 3"),
        ({"num_experts": 2}, "experts.2.down_proj.weight' is unknown"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"vocab_size": 256}, r"embed_tokens.weight' has shape \(300, 32\)|lm_head"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / "hf", arrays())
    edit_config(folder, **changes)
    refused(folder, message, tmp_path / "out")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"names": ("public", "code")}, "has 3 experts, the names are: public, code"),
        ({"names": ("math", "code", "news")}, "one of them 'public'"),
        ({"names": ("public", "code", "code")}, "3 different names"),
        ({"names": ("public", "Code", "news")}, "'Code' is not usable"),
        ({"names": NAMES, "keep": ("new",)}, "did you mean 'news'"),
        ({"tokenizer": "cl100k:400"}, "has 400 ids, the model 300"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, kwargs, message):
    refused(write(tmp_path / "hf", arrays()), message, tmp_path / "out", **kwargs)


def test_an_import_makes_no_hard_links(tmp_path, monkeypatch):
    """Some file systems do not support them."""
    monkeypatch.setattr(os, "link", lambda *_, **__: pytest.fail("a hard link was made"))
    model = import_model(open_folder(write(tmp_path / "hf", arrays())), tmp_path / "out", names=NAMES)
    assert all(check.ok for check in verify_model(model.path))
    assert [entry.event for entry in read_journal(model.path)] == ["created", "imported"]


def test_a_checkpoint_without_tokenizer_needs_one(tmp_path):
    folder = write(tmp_path / "hf", arrays())
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json", tmp_path / "out")
    import_model(open_folder(folder), tmp_path / "out", tokenizer="cl100k:300")


def test_experts_may_have_any_order_in_the_checkpoint(tmp_path):
    """Experts keep their parameters with their names; the model has them in canonical order."""
    folder = write(tmp_path / "hf", arrays())
    a = import_model(open_folder(folder), tmp_path / "a", names=("public", "code", "news"))
    b = import_model(open_folder(folder), tmp_path / "b", names=("news", "public", "code"))
    contents = [{n: m.content for n, m in model.manifests.items()} for model in (a, b)]
    assert b.experts == ("public", "code", "news")
    for ours, theirs in (("public", "news"), ("code", "public"), ("news", "code")):
        assert contents[0][ours] == contents[1][theirs]


def test_more_than_nine_unnamed_experts_keep_their_order(tmp_path):
    table = slots(CONFIG, FLEX_OLMO, tuple(f"e{i}" for i in range(12)))
    weights = {n: np.zeros(slot.shape, np.float32) for n, slot in table.items()}
    for i in range(12):
        weights[f"model.layers.0.mlp.experts.{i}.down_proj.weight"][0, 0] = i
    folder = write(tmp_path / "hf", weights)
    edit_config(folder, num_experts=12)
    _, params = read_tree(open_folder(folder))
    assert tuple(params["experts"]) == ("public", *(f"expert_{i:02}" for i in range(1, 12)))
    ordered = [params["experts"][name] for name in canonical_order(params["experts"])]
    assert [expert["w_down"][0, 0, 0] for expert in ordered] == list(range(12))


def test_a_duplicate_name_in_one_file_is_refused(tmp_path):
    folder = write(tmp_path / "hf", arrays())
    header, data = split_file(folder / "model.safetensors")
    text = json.dumps(header)
    doubled = text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    join_file(folder / "model.safetensors", doubled.encode(), data)
    refused(folder, f"the key '{NORM}' is given twice", tmp_path / "out")


def test_a_duplicate_name_in_two_files_is_refused(tmp_path):
    folder = write(tmp_path / "hf", arrays(), 40_000)
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    weights = {name: t.read() for name, t in read_file(last).items()} | {
        "lm_head.weight": np.zeros((300, 32), np.float32)
    }
    last.unlink()
    write_file(last, {name: tensor(array) for name, array in weights.items()})
    refused(folder, "'lm_head.weight' is in both model-00001.* and model-0", tmp_path / "out")


def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path):
    folder = write(tmp_path / "hf", arrays(), 40_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, message in (
        ({NORM: index["weight_map"]["lm_head.weight"]}, f"'{NORM}' is in .*, the index names"),
        ({"extra": index["weight_map"][NORM]}, "'extra' is in None, the index names"),
        ({NORM: "../model.safetensors"}, "no weight_map from tensors to file names"),
    ):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | change}))
        refused(folder, message, tmp_path / "out")
    path.write_text(json.dumps(index))
    next(iter(folder.glob("model-00002*"))).unlink()
    refused(folder, "does not exist", tmp_path / "out")


def test_pickled_weights_are_not_read(tmp_path):
    folder = write(tmp_path / "hf", arrays())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "neither model.safetensors nor .*pytorch_model.bin", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 128]), "starts at byte"),
        (lambda h: h[NORM].update(shape=[64]), r"of shape \(64,\) has 128 bytes"),
        (lambda h: h[NORM].update(shape=[-32]), "has the header entry"),
        (lambda h: h[NORM].update(dtype="I64"), "has dtype I64"),
        (lambda h: h[NORM].pop("dtype"), "has the header entry"),
        (lambda h: h.update({NORM: 3}), "has the header entry"),
    ],
)
def test_headers_that_misdescribe_their_file_are_refused(tmp_path, change, message):
    folder = write(tmp_path / "hf", arrays())
    header, data = split_file(folder / "model.safetensors")
    change(header)
    join_file(folder / "model.safetensors", header, data)
    refused(folder, message, tmp_path / "out")


def test_bytes_that_no_header_accounts_for_are_refused(tmp_path):
    folder = write(tmp_path / "hf", arrays())
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(folder, "its header accounts for", tmp_path / "out")


@pytest.mark.parametrize("cut", [4, 100, -4])
def test_a_truncated_file_is_refused(tmp_path, cut):
    folder = write(tmp_path / "hf", arrays())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder, "header", tmp_path / "out")


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    """The three dtypes, an empty tensor and a scalar."""
    safetensors = pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (7,)}
    dtypes = {"a": np.float32, "b": ml_dtypes.bfloat16, "c": np.float16, "d": np.float16}
    written = {n: np.asarray(rng.standard_normal(shape)).astype(dtypes[n]) for n, shape in shapes.items()}
    write_file(tmp_path / "x.safetensors", {n: tensor(a) for n, a in written.items()})
    entries = dict(safetensors.deserialize((tmp_path / "x.safetensors").read_bytes()))
    assert {n: bytes(e["data"]) for n, e in entries.items()} == {n: a.tobytes() for n, a in written.items()}
    back = read_file(tmp_path / "x.safetensors")
    assert {n: t.shape for n, t in back.items()} == shapes
    assert all(back[n].read().tobytes() == a.tobytes() for n, a in written.items())
    assert math.prod(back["c"].shape) == 0
