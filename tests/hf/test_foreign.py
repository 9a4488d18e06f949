"""Checkpoints as people have them: links, pointers, two layouts, buffers, adapters, ids of the hub, mixed dtypes."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.cli.main import main
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.hf.architectures import LLAMA
from flexmoe_jax.hf.checkpoint import Checkpoint, open_folder
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model, read_tree
from flexmoe_jax.hf.tensors import INDEX, SINGLE, read_tensors, write_file
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import flatten
from tests.hf.tiny import LLAMA as TIED
from tests.hf.tiny import arrays, edit_config, tensor, write, write_float64
from tests.tiny import contents

CONFIG = dataclasses.replace(TIED, tie_embeddings=False)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4976698672\n" % (b"0" * 64)
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"


def llama(folder: pathlib.Path, config=CONFIG, weights=None, **how) -> pathlib.Path:
    return write(folder, arrays(0, LLAMA, config) if weights is None else weights, kind=LLAMA, config=config, **how)


def leaves(source: Checkpoint) -> dict[str, np.ndarray]:
    return flatten(read_tree(source)[1])


def same(a: Checkpoint, b: Checkpoint) -> bool:
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def frequencies(theta: float = 1e4, factor: float = 1.0) -> np.ndarray:
    return (theta ** -(np.arange(0, CONFIG.head_dim, 2) / CONFIG.head_dim) / factor).astype(np.float32)


def snapshot(plain: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """The folder that `snapshot_download` returns for the files of `plain`: links into `blobs`."""
    folder, blobs = cache / "models--acme--tiny/snapshots" / ("a" * 40), cache / "models--acme--tiny/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for file in plain.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / name)
        (folder / file.name).symlink_to(pathlib.Path("../../blobs", name))
    return folder


def test_a_snapshot_of_the_hub_cache_is_imported_and_the_model_holds_no_links(tmp_path, caplog):
    plain = llama(tmp_path / "plain")
    folder = snapshot(plain, tmp_path)
    caplog.set_level(logging.INFO, "flexmoe_jax")
    model = import_model(open_folder(folder), tmp_path / "out")
    assert model.digest == import_model(open_folder(plain), tmp_path / "expected").digest
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert f"its files are links into ['{tmp_path / 'models--acme--tiny/blobs'}']" in caplog.messages
    with pytest.raises(ArtifactError, match=r"no config.json(.|\n)*snapshots/aaaa"):
        open_folder(folder.parents[1])


def test_a_link_whose_file_was_not_downloaded_is_named(tmp_path):
    folder = snapshot(llama(tmp_path / "plain"), tmp_path)
    (folder / SINGLE).resolve().unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors is a link to '../../blobs/\w+', which does not exist"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", SINGLE, INDEX])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    folder = llama(tmp_path / "hf", max_shard_bytes=20_000 if name == INDEX else 1 << 30)
    (folder / name).write_bytes(POINTER)
    with pytest.raises(FlexMoEError, match=rf"{name} is a Git LFS pointer, not the file(.|\n)*git lfs pull"):
        import_model(open_folder(folder), tmp_path / "out")


def test_a_pointer_in_the_place_of_a_gguf_file_or_a_given_tokenizer_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(POINTER)
    with pytest.raises(FlexMoEError, match=r"x.gguf is a Git LFS pointer(.|\n)*git lfs pull"):
        open_gguf(tmp_path / "x.gguf")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(FlexMoEError, match=r"tokenizer.json is a Git LFS pointer"):
        import_model(open_folder(llama(tmp_path / "hf")), tmp_path / "out", tokenizer=str(tmp_path / "given"))


def both_layouts(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """`model.safetensors` of one model, and the index and shards of the model with `seed`."""
    llama(folder / "shards", weights=arrays(seed, LLAMA, CONFIG), max_shard_bytes=20_000)
    llama(folder / "both")
    for file in (folder / "shards").glob("model*"):
        shutil.copy(file, folder / "both")
    return folder / "both"


@pytest.mark.parametrize("lost", [False, True])
def test_two_layouts_that_disagree_are_refused_and_the_remedy_works(tmp_path, lost):
    """An index that a smaller save left behind, with its shards or without them."""
    folder = both_layouts(tmp_path, seed=1)
    if lost:
        for file in folder.glob("model-*"):
            file.unlink()
    what = "does not exist" if lost else "different numbers in the tensor 'lm_head.weight'"
    with pytest.raises(ArtifactError, match=f"not the same weights: .*{what}") as error:
        open_folder(folder)
    (deleted,) = re.findall(r"delete (\S+) \(transformers", error.value.remedy)
    (folder / deleted).unlink()
    assert same(open_folder(folder), open_folder(llama(tmp_path / "whole")))
    if not lost:
        other = both_layouts(tmp_path / "again", seed=1)
        (deleted,) = re.findall(r"or delete (\S+)", error.value.remedy)
        (other / deleted).unlink()
        assert same(open_folder(other), open_folder(tmp_path / "shards"))


def test_two_layouts_of_the_same_weights_are_one_model(tmp_path):
    source = open_folder(both_layouts(tmp_path, seed=0))
    assert same(source, open_folder(llama(tmp_path / "whole")))
    assert any("files passed over: ['model-00001" in note for note in source.notes)


def test_weights_and_code_that_nothing_names_are_passed_over_by_name(tmp_path):
    folder = llama(tmp_path / "hf", max_shard_bytes=20_000)
    for name in ("model-00099-of-00099.safetensors", "pytorch_model.bin", "modeling_acme.py"):
        (folder / name).write_bytes(b"x")
    notes = open_folder(folder).notes
    passed = "files passed over: ['model-00099-of-00099.safetensors', 'modeling_acme.py', 'pytorch_model.bin']"
    assert passed in notes
    assert re.search(r"read .*/hf: LlamaForCausalLM, 21 tensors \(float32\) in \d files, tokenizer.json", notes[0])


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_rotary_buffers_that_equal_those_of_theta_are_passed_over_by_name(tmp_path, name, dtype):
    plain, folder = llama(tmp_path / "plain"), llama(tmp_path / "hf")
    for theta, fits in ((1e4, True), (1.01e4, dtype == "bfloat16")):  # up to 0.7%: lost in its rounding
        shutil.copy(plain / SINGLE, folder / SINGLE)
        add(folder, name, frequencies(theta).astype(np.dtype(dtype)))
        if fits:
            source = open_folder(folder)
            assert same(source, open_folder(plain))
            assert f"rotary frequencies passed over, equal to those of config.json: ['{name}']" in source.notes
        else:
            with pytest.raises(ArtifactError, match=f"{name} is not the rotary frequencies of rope_theta 10000"):
                open_folder(folder)


def add(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
    """Adds a tensor to the checkpoint."""
    if array.dtype == np.float64:
        write_float64(folder / SINGLE, name, array)
        return
    tensors = {n: tensor(t.read()) for n, t in read_tensors(folder).items()} | {name: tensor(array)}
    (folder / SINGLE).unlink()
    write_file(folder / SINGLE, tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_buffers_of_another_theta_are_refused_in_any_dtype(tmp_path, dtype):
    folder = llama(tmp_path / "hf")
    add(folder, "model.rotary_emb.inv_freq", frequencies(5e5).astype(np.dtype(dtype)))
    with pytest.raises(ArtifactError, match=r"inv_freq is not the rotary frequencies") as error:
        open_folder(folder)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5})  # the remedy, where it is wrong
    assert "correct rope_theta in config.json" in error.value.remedy
    assert open_folder(folder).config.model.rope_theta == 5e5


def test_buffers_of_a_scaled_rotary_embedding_may_be_scaled(tmp_path):
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    for number, factor in enumerate((1.0, 4.0)):
        folder = llama(tmp_path / str(number), config)
        add(folder, "model.rotary_emb.inv_freq", frequencies(factor=factor))
        assert open_folder(folder).config.model == config
    folder = llama(tmp_path / "other", config)
    add(folder, "model.rotary_emb.inv_freq", frequencies(factor=2.0))
    with pytest.raises(ArtifactError, match="is not the rotary frequencies"):
        open_folder(folder)


def test_a_head_that_equals_the_embedding_it_is_tied_to_is_passed_over_by_name(tmp_path):
    weights = arrays(0, LLAMA, TIED)
    plain = open_folder(llama(tmp_path / "plain", TIED, weights))
    both = open_folder(llama(tmp_path / "both", TIED, weights | {HEAD: weights[EMBED]}))
    assert same(both, plain)
    assert "lm_head.weight passed over, equal to the embedding" in both.notes
    only = {**weights, HEAD: weights[EMBED]}  # some writers of shared tensors keep the head and drop the embedding
    del only[EMBED]
    head = open_folder(llama(tmp_path / "head", TIED, only))
    assert same(head, plain)
    assert "lm_head.weight is the embedding, too" in head.notes


def test_a_head_that_differs_from_the_embedding_is_refused_and_the_remedy_works(tmp_path):
    weights = arrays(0, LLAMA, CONFIG)
    folder = llama(tmp_path / "hf", CONFIG, weights)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ArtifactError, match=r"lm_head.weight differs from model.embed_tokens.weight") as error:
        open_folder(folder)
    assert "set tie_word_embeddings to false" in error.value.remedy
    edit_config(folder, tie_word_embeddings=False)
    assert same(open_folder(folder), open_folder(llama(tmp_path / "plain", CONFIG, weights)))


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_layers_of_different_dtypes_are_widened_and_nothing_is_rounded(tmp_path, narrow):
    kind = np.dtype(narrow)
    weights = {name: array.astype(kind) for name, array in arrays(0, LLAMA, CONFIG).items()}
    weights[NORM] = weights[NORM].astype(np.float32) + np.float32(2**-20)  # no 16-bit number
    source = open_folder(llama(tmp_path / "hf", CONFIG, weights))
    found = leaves(source)
    assert found["trunk/blocks/attn_norm"].dtype == np.float32
    assert np.array_equal(found["trunk/blocks/attn_norm"][1], weights[NORM])
    assert np.array_equal(found["trunk/blocks/attn_norm"][0], weights[NORM.replace("1", "0")].astype(np.float32))
    assert found["trunk/blocks/w_q"].dtype == kind
    assert f"trunk/blocks/attn_norm is {narrow} and float32 in different layers, and becomes float32" in source.notes


def test_half_precision_of_both_kinds_becomes_float32(tmp_path):
    """Neither of bfloat16 and float16 holds the other's numbers."""
    weights = arrays(0, LLAMA, CONFIG)
    weights[NORM], weights[NORM.replace("1", "0")] = (
        np.full(32, 1e-7, np.float16),
        np.full(32, 1e30, ml_dtypes.bfloat16),
    )
    found = leaves(open_folder(llama(tmp_path / "hf", CONFIG, weights)))["trunk/blocks/attn_norm"]
    assert found.dtype == np.float32
    assert np.array_equal(found[1], weights[NORM].astype(np.float32))
    assert found[0, 0] == np.float32(weights[NORM.replace("1", "0")][0])


def with_added(folder: pathlib.Path, special: bool = True, **config: str) -> pathlib.Path:
    """A token is added to the tokenizer of 300 ids, and no row to the embedding."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["added_tokens"].append(fields["added_tokens"][-1] | {"id": 300, "content": "[PAD]", "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_special_token_without_a_row_is_named_and_never_used(tmp_path, caplog):
    folder = with_added(llama(tmp_path / "hf"), eos_token="<|endoftext|>", pad_token="[PAD]")
    caplog.set_level(logging.INFO, "flexmoe_jax")
    import_model(open_folder(folder), tmp_path / "out")
    assert "special tokens from id 300 on have no row in the model; no text gives them" in caplog.messages
    read = fm.load(tmp_path / "out").tokenizer
    assert (read.vocab_size, read.pad_id, read.eos_id) == (300, read.eos_id, 298)
    assert max(read.encode("a [PAD] b")) < 298  # the string is text


@pytest.mark.parametrize(
    ("special", "config"), [(False, {}), (True, {"eos_token": "[PAD]"})], ids=["in text", "between documents"]
)
def test_a_token_without_a_row_that_data_can_hold_is_refused(tmp_path, special, config):
    folder = with_added(llama(tmp_path / "hf"), special, **config)
    if config:  # else <|endoftext|> separates documents, whatever the configuration names
        content = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(FlexMoEError, match=r"has 301 ids, the model 300 rows, and text gives the id 300"):
        import_model(open_folder(folder), tmp_path / "out")


def test_an_adapter_is_named_with_its_base(tmp_path):
    folder = llama(tmp_path / "hf")  # also beside weights: transformers then loads the base model
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    with pytest.raises(ArtifactError, match=r"is a PEFT adapter of the model 'acme/base'") as error:
        open_folder(folder)
    assert "merge_and_unload" in error.value.remedy


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], f"download {INDEX} too"),
        (["pytorch_model.bin"], r"pickle can run code.*from_pretrained\('.*'\).save_pretrained"),
        (["model.Q8_0.gguf"], "flexmoe import-gguf"),
        ([], "give a folder of safetensors files"),
    ],
)
def test_a_folder_without_readable_weights_says_what_it_has_and_what_to_do(tmp_path, names, remedy):
    folder = llama(tmp_path / "hf")
    (folder / SINGLE).unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ArtifactError) as error:
        open_folder(folder)
    assert all(name in error.value.what for name in names)
    assert re.search(remedy, error.value.remedy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acme/tiny-1B", "acme/tiny-1B does not exist\n.*hf download acme/tiny-1B --local-dir DIR"),
        ("hf://acme/tiny-1B", "hf download acme/tiny-1B --local-dir DIR"),
        ("https://huggingface.co/acme/tiny-1B", "hf download acme/tiny-1B --local-dir DIR"),
        ("s3://bucket/tiny", "s3://bucket/tiny is an address, and only paths on this machine(.|\n)*local disk"),
        ("nowhere", "nowhere does not exist\n.*relative paths start at"),
    ],
)
def test_an_id_of_the_hub_or_an_address_is_answered_with_what_to_do(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    for verb in ("import-hf", "import-gguf"):
        assert main([verb, text, "--out", "model"]) == 1
        assert re.search(words, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_says_what_to_do(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"is not a folder(.|\n)*import-gguf"):
        open_folder(tmp_path / "x.gguf")
    with pytest.raises(ArtifactError, match=r"is not a folder(.|\n)*folder that holds it"):
        open_folder(llama(tmp_path / "hf") / SINGLE)


def test_the_command_prints_what_was_read_and_passed_over(tmp_path, capsys):
    folder = llama(tmp_path / "hf")
    edit_config(folder, acme_key="\x1b[2J", rms_norm_eps=None)
    assert main(["import-hf", str(folder), "--out", str(tmp_path / "model"), "--json"]) == 0
    printed = capsys.readouterr()
    notes = json.loads(printed.out)["notes"]
    assert len(notes) == 3
    assert notes[1:] == [
        "config.json has no rms_norm_eps: 1e-06, as in transformers",
        "unknown keys of config.json passed over: ['acme_key']",
    ]
    assert [line for line in printed.err.splitlines() if line in notes] == notes
