"""What refusals of foreign checkpoints say to do works, and what transformers does with the same folder."""

import pathlib
import re
import shutil

import numpy as np
import pytest

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.load import import_model, read_tree
from flexmoe_jax.hf.tensors import INDEX, SINGLE, read_tensors, write_file
from flexmoe_jax.tree import flatten
from tests.hf.tiny import checkpoint, edit_config, tensor
from tests.tiny import jit_forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch
AutoModelForCausalLM = transformers.AutoModelForCausalLM
HEAD, EMBED, BUFFER = "lm_head.weight", "model.embed_tokens.weight", "model.rotary_emb.inv_freq"
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 20))
TOLERANCE = 2e-5  # of logits, both in float32; as in tests/model/test_golden.py


def same(a: pathlib.Path, b: pathlib.Path) -> bool:
    first, second = (flatten(read_tree(open_folder(path))[1]) for path in (a, b))
    return all(np.array_equal(first[name], second[name]) for name in first.keys() | second.keys())


def with_tensor(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
    tensors = {n: tensor(t.read()) for n, t in read_tensors(folder).items()} | {name: tensor(array)}
    (folder / SINGLE).unlink()
    write_file(folder / SINGLE, tensors)


def their_logits(folder: pathlib.Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(folder: pathlib.Path) -> np.ndarray:
    config, params = read_tree(open_folder(folder))
    return np.asarray(jit_forward(config, params, TOKENS).logits_BTV)


def test_pickled_weights_are_converted_by_what_the_refusal_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint(tmp_path / "theirs", "llama")
    shutil.copytree("theirs", "pickled")
    pathlib.Path("pickled", SINGLE).unlink()
    torch.save(model.state_dict(), "pickled/pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"it has: \['pytorch_model.bin'\]") as error:
        open_folder("pickled")
    eval(re.findall(r"AutoModelForCausalLM.*", error.value.remedy)[0])
    assert same(tmp_path / "converted", tmp_path / "theirs")


def test_a_buffer_of_another_theta_is_left_out_by_what_the_refusal_says(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")
    shutil.copytree(tmp_path / "theirs", tmp_path / "other")
    with_tensor(tmp_path / "other", BUFFER, np.array([1, 0.5, 0.25, 0.125], np.float32))
    with pytest.raises(ArtifactError, match="is not the rotary frequencies") as error:
        open_folder(tmp_path / "other")
    (command,) = re.findall(r"AutoModelForCausalLM\S+", error.value.remedy)
    eval(
        command.rstrip(","),
        {"AutoModelForCausalLM": AutoModelForCausalLM, "DIR": tmp_path / "other", "NEW": tmp_path / "new"},
    )
    assert same(tmp_path / "new", tmp_path / "theirs")


def test_a_head_of_its_own_is_used_by_what_the_refusal_says_and_by_transformers(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")  # tied
    head = np.random.default_rng(1).standard_normal((300, 32)).astype(np.float32) / np.float32(6)
    with_tensor(tmp_path / "theirs", HEAD, head)
    expected = their_logits(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=r"lm_head.weight differs"):
        open_folder(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", tie_word_embeddings=False)
    assert np.abs(our_logits(tmp_path / "theirs") - expected).max() < TOLERANCE


@pytest.mark.parametrize("kept", [(EMBED, HEAD), (HEAD,)])
def test_a_tied_head_that_was_saved_too_gives_the_logits_of_transformers(tmp_path, kept):
    model = checkpoint(tmp_path / "theirs", "llama")
    weights = {n: t.read() for n, t in read_tensors(tmp_path / "theirs").items()}
    embed = weights.pop(EMBED)
    (tmp_path / "theirs" / SINGLE).unlink()
    write_file(tmp_path / "theirs" / SINGLE, {n: tensor(a) for n, a in (weights | dict.fromkeys(kept, embed)).items()})
    expected = their_logits(tmp_path / "theirs")
    assert np.abs(our_logits(tmp_path / "theirs") - expected).max() < TOLERANCE
    with torch.no_grad():
        assert np.abs(model(torch.from_numpy(TOKENS)).logits.numpy() - expected).max() < TOLERANCE


def test_of_two_layouts_transformers_reads_the_one_that_the_refusal_says(tmp_path):
    checkpoint(tmp_path / "new", "llama")
    other = checkpoint(tmp_path / "old", "llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path / "old", max_shard_size="30KB")
    expected = their_logits(tmp_path / "new")
    for file in (tmp_path / "old").glob("model-*"):
        shutil.copy(file, tmp_path / "new")
    shutil.copy(tmp_path / "old" / INDEX, tmp_path / "new")
    assert np.array_equal(their_logits(tmp_path / "new"), expected)
    with pytest.raises(ArtifactError, match="not the same weights") as error:
        open_folder(tmp_path / "new")
    assert "transformers, too, reads model.safetensors" in error.value.remedy


def test_layers_of_different_dtypes_give_the_logits_of_transformers(tmp_path):
    """transformers, asked for float32, widens every tensor by itself, as the import does."""
    checkpoint(tmp_path / "theirs", "olmo2", dtype="bfloat16")
    name = "model.layers.1.post_attention_layernorm.weight"
    with_tensor(tmp_path / "theirs", name, np.linspace(0.5, 1.5, 32, dtype=np.float32))
    assert np.abs(our_logits(tmp_path / "theirs") - their_logits(tmp_path / "theirs")).max() < TOLERANCE
    import_model(open_folder(tmp_path / "theirs"), tmp_path / "model")
