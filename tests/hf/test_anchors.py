"""From an anchor of transformers to a mixture that transformers loads: import, owners' experts, merge, export."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

from flexmoe_jax.artifacts.arrays import tensor_file
from flexmoe_jax.artifacts.model_dir import ModelDir, open_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.architectures import ARCHITECTURES, architecture_of
from flexmoe_jax.hf.check import compare_logits
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.export import ExportOptions, export
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.hf.tensors import read_tensors, write_tensors
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.hf.tiny import CONFIG, SHAPES, checkpoint, edit_config, our_model, tokenizer
from tests.tiny import flip_bit, random_params

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

OWNERS = ("code", "math", "news")
# Relative to the largest logit. Both sides compute in float32 and sum in other orders: at most 1.3e-6 was measured.
TOLERANCE = 5e-6
LLAMA3 = RopeScaling("llama3", 8.0, 32, 1.0, 4.0)
YARN = RopeScaling("yarn", 4.0, 16)
# {anchor: (kind of checkpoint, changes of its shape, class of its mixture, class of one expert)}
ANCHORS = {
    "olmo2": ("olmo2", {}, "FlexOlmo", "Olmo2"),
    "llama": ("llama", {}, "Mixtral", "Llama"),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "tie_embeddings": False}, "Mixtral", "Llama"),
    "mistral": ("mistral", {}, "Mixtral", "Mistral"),
    "mistral-yarn": ("mistral", {"rope_scaling": YARN}, "Mixtral", "Mistral"),
    "qwen3": ("qwen3", {}, "Qwen3Moe", "Qwen3"),
    "qwen2": ("qwen2", {}, None, "Qwen2"),
    "smollm3": ("smollm3", {}, None, "SmolLM3"),
}


def test_the_page_lists_every_class_that_comes_in_and_what_goes_out():
    """The guide's first table: the rows, and both columns of classes, as the exporter chooses them."""
    page = (pathlib.Path(__file__).parents[2] / "docs/guide/huggingface.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    shown = {row[1].strip(" `"): [cell.partition("(")[0].strip(" `") for cell in row[3:5]] for row in rows[:10]}
    assert shown.keys() == ARCHITECTURES.keys()
    for kind, names in shown.items():
        architecture = ARCHITECTURES[kind]
        config = dataclasses.replace(SHAPES.get(kind, CONFIG), **architecture.decoder)
        for name, mixture in zip(names, (True, False), strict=True):
            try:
                expected = architecture_of(config, mixture, architecture.bias and mixture, kind).name
            except ArtifactError:
                expected = "none"
            assert name == expected, (kind, mixture)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function: the folder in which `build` made the model of an anchor, once; read only."""

    @functools.cache
    def folder(anchor: str, biased: bool = False) -> pathlib.Path:
        return build(tmp_path_factory.mktemp(anchor), anchor, biased).path.parent

    return folder


def build(root: pathlib.Path, anchor: str, biased: bool = False) -> ModelDir:
    """`root`/model: the anchor's public model and three owners' experts, top-2 of 4."""
    from tests.model.hf_oracle import make_model

    kind, changes, *_ = ANCHORS[anchor]
    config = dataclasses.replace(SHAPES[kind], **changes)
    tokenizer(root / "hf")
    make_model(kind, config).save_pretrained(root / "hf")
    public = import_model(open_folder(root / "hf"), root / "public")
    assert public.config == config
    base = {name: public.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": public.tokenizer_digest}
    params = random_params(config, OWNERS)
    for owner in OWNERS:
        part = {path: np.asarray(leaf) for path, leaf in params["experts"][owner].items()}
        part["bias"] = part["bias"] * biased
        write_package(root / owner, owner=owner, params=part, config=config, base=base, record={})
    return merge(root / "public", [root / owner for owner in OWNERS], root / "model", top_k=2)


@pytest.mark.parametrize("anchor", [name for name, (_, _, mixture, _) in ANCHORS.items() if mixture])
def test_a_merged_anchor_is_a_mixture_of_transformers_with_the_same_logits(tmp_path, anchor, built):
    model = open_model(built(anchor) / "model")
    done = export(model, tmp_path / "out", ExportOptions(check_logits=True))
    assert (done.architecture.name, done.top_k) == (f"{ANCHORS[anchor][2]}ForCausalLM", 2)
    assert done.logits_difference < TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_experts_per_tok"] = 1  # the check sees which experts are active
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="differ from ours"):
        compare_logits(tmp_path / "out", model, model.experts, custom_code=False, leave_out_bias=False)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_an_anchor_with_one_expert_left_is_dense_again(tmp_path, anchor, built):
    """As the class that it came from, and to the byte."""
    model = open_model(built(anchor) / "model")
    for owner in OWNERS:
        model = opt_out(model.path, owner, tmp_path / f"without-{owner}")
    assert model.experts == (PUBLIC,)
    done = export(model, tmp_path / "out", ExportOptions(check_logits=True))
    assert done.architecture.name == f"{ANCHORS[anchor][3]}ForCausalLM"
    assert done.logits_difference < TOLERANCE
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        built(anchor) / "hf/model.safetensors"
    ).read_bytes()


def test_a_smollm3_whose_layers_all_have_rope_is_not_exported_as_one(tmp_path):
    """A class of that name without the list of layers leaves rope out of every fourth."""
    checkpoint(tmp_path / "hf", "smollm3")
    edit_config(tmp_path / "hf", no_rope_layers=[1, 1, 1, 1])
    model = import_model(open_folder(tmp_path / "hf"), tmp_path / "model")
    assert model.config.rope_skip is None
    done = export(model, tmp_path / "out", ExportOptions(check_logits=True))
    assert (done.architecture.name, done.logits_difference < TOLERANCE) == ("LlamaForCausalLM", True)


@pytest.mark.parametrize("anchor", [name for name, (_, _, mixture, _) in ANCHORS.items() if not mixture])
def test_a_mixture_that_no_class_holds_is_refused_and_the_remedy_works(tmp_path, anchor, built, capsys):
    command = ["export-hf", str(built(anchor) / "model"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "transformers has no class of a mixture with" in printed
    assert not (tmp_path / "out").exists()
    remedy = printed.partition("remedy: ")[2].partition(": ")[2].split()
    assert remedy == ["--experts", "public", "--dense"]
    assert main([*command, *remedy]) == 0
    assert main([*command[:3], str(tmp_path / "one"), "--experts", "code", "--dense"]) == 0


@pytest.mark.parametrize("anchor", ["olmo2", "llama", "qwen3"])
def test_a_bias_is_refused_and_only_remedies_that_work_are_named(tmp_path, anchor, built):
    """The model file that adds a bias is FlexOlmo's."""
    model = open_model(built(anchor, True) / "model")
    with pytest.raises(ArtifactError, match=f"{ANCHORS[anchor][2]}ForCausalLM has no expert bias.*math in") as error:
        export(model, tmp_path / "out")
    assert "--zero-bias" in error.value.remedy
    assert ("--custom-code" in error.value.remedy) == (anchor == "olmo2")
    custom = ExportOptions(custom_code=True, check_logits=True)
    if anchor == "olmo2":
        assert export(model, tmp_path / "custom", custom).logits_difference < TOLERANCE
    else:
        with pytest.raises(ArtifactError, match="is of FlexOlmoForCausalLM") as error:
            export(model, tmp_path / "custom", custom)
        assert "--zero-bias" in error.value.remedy
    export(model, tmp_path / "zero", ExportOptions(zero_bias={"data": "none"}, check_logits=True))


def test_a_byte_that_changed_in_any_part_never_becomes_an_export(tmp_path):
    """Without the comparison of logits, too; only the damaged part is named, and what the remedy runs finds it."""
    model = our_model(tmp_path, owners=("code",))
    for owner, manifest in model.manifests.items():
        for path, tensor in manifest.tensors.items():
            file = model.package(owner) / tensor_file(path, tensor.shape)
            whole = file.read_bytes()
            flip_bit(file, at=len(whole) // 2)
            with pytest.raises(ArtifactError, match=rf"/{owner}: {path} was exported with the sha256") as error:
                export(open_model(model.path), tmp_path / "out")
            assert "flexmoe verify" in error.value.remedy
            assert not (tmp_path / "out").exists()
            file.write_bytes(whole)
    flip_bit(file, at=0)
    assert main(["verify", str(model.path)]) == 1
    assert main(["export-hf", str(model.path), "--out", str(tmp_path / "out"), "--no-logits"]) == 1
    file.write_bytes(whole)
    export(model, tmp_path / "out")


def test_a_byte_that_changed_on_the_way_to_the_disk_never_becomes_an_export(tmp_path, monkeypatch):
    """The tensors are read back from what was written."""
    model = our_model(tmp_path, owners=("code",))

    def write_and_damage(folder, *args):
        files = write_tensors(folder, *args)
        flip_bit(folder / files[0], at=(folder / files[0]).stat().st_size - 1)
        return files

    monkeypatch.setattr("flexmoe_jax.hf.export.write_tensors", write_and_damage)
    with pytest.raises(ArtifactError, match="was exported with the sha256"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_different_dtypes_are_exported_and_checked(tmp_path):
    """Owners may have stored their router rows in bfloat16 and float16; float32 holds both."""
    model = our_model(tmp_path, owners=())
    base = {name: model.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": model.tokenizer_digest}
    params = random_params(model.config, ("code", "news"))
    for owner, dtype in (("code", "bfloat16"), ("news", "float16")):
        part = {path: np.asarray(leaf).astype(np.dtype(dtype)) for path, leaf in params["experts"][owner].items()}
        part["bias"] = np.zeros_like(part["bias"])
        write_package(tmp_path / owner, owner=owner, params=part, config=model.config, base=base, record={})
    merged = merge(model.path, [tmp_path / "code", tmp_path / "news"], tmp_path / "merged")
    export(merged, tmp_path / "out")
    assert read_tensors(tmp_path / "out")["model.layers.0.mlp.gate.weight"].dtype == "float32"
