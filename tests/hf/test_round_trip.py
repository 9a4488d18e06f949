"""Round trips between checkpoints of transformers and our models keep every byte, and both compute the same."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import content_digest, load_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.hf.architectures import ARCHITECTURES, FLEX_OLMO
from flexmoe_jax.hf.check import TOLERANCE, compare_logits
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.configuration import read_config
from flexmoe_jax.hf.export import ExportOptions, _map_leaves, _tensor, export
from flexmoe_jax.hf.load import import_expert, import_model, read_tree
from flexmoe_jax.hf.mapping import slots
from flexmoe_jax.hf.tensors import read_tensors, write_tensors
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model.generate import generate
from flexmoe_jax.parallel.mesh import mesh_of_one
from tests.hf.tiny import CONFIG, SHAPES, checkpoint, edit_config, our_model, tokenizer, write
from tests.tiny import contents, jit_forward, stacked

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A model of public, code and news without bias, top-2, and its parts."""
    folder = tmp_path_factory.mktemp("ours")
    our_model(folder, top_k=2)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biased")
    our_model(folder, biased=True)
    return folder


def load_theirs(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **kwargs).eval()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("flex_olmo", "float16"), ("flex_olmo", "bfloat16"), *((kind, "float32") for kind in SHAPES)],
)
def test_theirs_to_ours_and_back_is_the_same_file(tmp_path, kind, dtype):
    """All bytes of model.safetensors and tokenizer.json; all keys of config.json and generation_config.json."""
    checkpoint(tmp_path / "theirs", kind, dtype=dtype)
    model = import_model(open_folder(tmp_path / "theirs"), tmp_path / "ours")
    assert all(check.ok for check in verify_model(tmp_path / "ours"))
    assert model.experts == (("public", "expert_1", "expert_2") if ARCHITECTURES[kind].mixture else ("public",))
    assert model.top_k == (2 if ARCHITECTURES[kind].mixture else 1)
    export(model, tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    for name in ("config.json", "generation_config.json"):
        theirs, back = (json.loads((tmp_path / at / name).read_text()) for at in ("theirs", "back"))
        back.pop("flexmoe", None)
        assert back == theirs


def test_the_vocabulary_of_olmo2_goes_both_ways(tmp_path):
    """100,278 ids in 100,352 rows, a tokenizer.json of 3 MB: as a public model, as an owner's package, and back."""
    names, config = ("public", "code"), dataclasses.replace(CONFIG, vocab_size=100_352, d_model=8, num_layers=1)
    table = slots(config, FLEX_OLMO, names)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(slot.shape).astype(np.float32) for name, slot in table.items()}
    theirs = write(tmp_path / "theirs", weights, config=config, experts=2)
    dolma2 = load_tokenizer("dolma2")
    dolma2.save(theirs / "tokenizer.json")
    assert (theirs / "tokenizer.json").stat().st_size > 3e6
    public = import_model(open_folder(theirs), tmp_path / "public", names=names, keep=["public"])
    import_expert(open_folder(theirs), public, tmp_path / "package", expert="code")
    merged = merge(tmp_path / "public", [tmp_path / "package"], tmp_path / "merged")
    done = export(merged, tmp_path / "back", ExportOptions(check_logits=True))
    assert done.logits_difference < 5e-6  # as in test_anchors.py
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes(), name
    text = "In 1984 the naïve owner\n\n  agreed: 東京."
    ids = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "back"))(text)["input_ids"]
    assert ids == dolma2.encode(text) == load_tokenizer(merged.tokenizer_path).encode(text)


def test_shards_are_read_and_written(tmp_path):
    """Our shards hold the same tensors as theirs, none exceeds the limit, and both indexes have the same metadata."""
    checkpoint(tmp_path / "theirs", "flex_olmo", max_shard_size="30KB")
    model = import_model(open_folder(tmp_path / "theirs"), tmp_path / "ours")
    done = export(model, tmp_path / "back", ExportOptions(max_shard_bytes=30_000))
    assert len(done.files) > 3
    theirs, back = (read_tensors(tmp_path / at) for at in ("theirs", "back"))
    assert {n: t.read().tobytes() for n, t in theirs.items()} == {n: t.read().tobytes() for n, t in back.items()}
    indexes = [json.loads((tmp_path / at / "model.safetensors.index.json").read_text()) for at in ("theirs", "back")]
    assert indexes[0]["metadata"] == indexes[1]["metadata"]
    largest = max(t.nbytes for t in back.values())
    for name in done.files[:-1]:
        assert (tmp_path / "back" / name).stat().st_size < max(30_000, largest) + 4096  # 4096: the header
    assert compare_logits(tmp_path / "back", model, model.experts, custom_code=False, leave_out_bias=False) < TOLERANCE


def test_an_export_needs_the_memory_of_a_few_tensors(tmp_path):
    """Writing 4 MB in shards of 1 MB allocates at most a few times the largest tensor (38 KB)."""
    config = dataclasses.replace(CONFIG, num_layers=12, d_ff=256)
    model = our_model(tmp_path, config=config)
    leaves = {owner: _map_leaves(model, owner) for owner in ("trunk", *model.experts)}
    tensors = {n: _tensor(slot, leaves) for n, slot in slots(config, FLEX_OLMO, model.experts).items()}
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "out", tensors, 1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(t.nbytes for t in tensors.values()) > 3 << 20
    assert peak < 1 << 19


@pytest.mark.parametrize("top_k", [None, 2])
def test_ours_to_theirs_and_back_is_the_same_model(tmp_path, ours, top_k):
    """The digest of model.json covers every tensor, record and tokenizer file, and top-k."""
    model = merge(ours / "release", [ours / "news", ours / "code"], tmp_path / "model", top_k=top_k)
    export(model, tmp_path / "theirs")
    back = import_model(open_folder(tmp_path / "theirs"), tmp_path / "back")
    assert back.digest == model.digest
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_ours_with_a_bias_to_theirs_and_back_is_the_same_model(tmp_path, biased):
    model = open_model(biased / "model")
    export(model, tmp_path / "theirs", ExportOptions(custom_code=True))
    back = import_model(open_folder(tmp_path / "theirs"), tmp_path / "back")
    assert back.digest == model.digest


def test_a_record_is_not_kept_for_parameters_that_changed(tmp_path, ours):
    """An export that somebody trained further must not carry the owner's training record."""
    export(open_model(ours / "model"), tmp_path / "theirs")
    theirs = load_theirs(tmp_path / "theirs")
    with torch.no_grad():
        theirs.model.layers[0].mlp.experts.down_proj[1] += 1
    theirs.save_pretrained(tmp_path / "tuned")
    tokenizer(tmp_path / "tuned")
    back = import_model(open_folder(tmp_path / "tuned"), tmp_path / "back")
    records = {name: manifest.record.fields for name, manifest in back.manifests.items()}
    assert records["news"] == {"licence": "news-licence", "contact": "someone@news"}  # its parameters are unchanged
    assert records["code"]["imported"] == {"architecture": "FlexOlmoForCausalLM"}
    assert records["code"]["contact"] == ""


def test_opting_out_then_exporting_is_exporting_the_smaller_model(tmp_path, ours):
    """Every file, the model card included."""
    without = opt_out(ours / "model", "news", tmp_path / "without")
    export(without, tmp_path / "a")
    export(merge(ours / "release", [ours / "code"], tmp_path / "never", top_k=2), tmp_path / "b")
    export(open_model(ours / "model"), tmp_path / "c", ExportOptions(experts=["public", "code"]))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert not [name for name, raw in contents(tmp_path / "a").items() if b"news" in raw and name != "tokenizer.json"]


def test_top_k_is_clamped_to_what_is_exported(tmp_path, ours):
    export(open_model(ours / "model"), tmp_path / "one", ExportOptions(experts=["code"]))
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (1, 1)
    load_theirs(tmp_path / "one")  # transformers refuses a top-k above the number of experts


def test_greedy_tokens_agree_with_transformers(tmp_path, ours):
    export(open_model(ours / "model"), tmp_path / "theirs")
    model, theirs = fm.load(ours / "model"), load_theirs(tmp_path / "theirs")
    params = stacked(model.params)
    prompts = [[5, 100, 7], [42], [9, 8, 7, 6, 5, 4]]
    common = {"max_new_tokens": 12, "stop_ids": ()}
    mine = generate(Decoder(model.config, model.top_k, "sparse"), params, prompts, **common)
    for prompt, continued in zip(prompts, mine, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out[0, len(prompt) :].tolist() == continued


def test_their_tokenizer_reads_ours(tmp_path, ours):
    export(open_model(ours / "model"), tmp_path / "theirs")
    theirs, mine = (
        transformers.AutoTokenizer.from_pretrained(str(tmp_path / "theirs")),
        fm.load(ours / "model").tokenizer,
    )
    text = "The 3 naïve owners\n  agreed."
    assert theirs(text)["input_ids"] == mine.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (mine.eos_id, mine.pad_id)


def test_a_bias_is_refused_by_name_and_layer(tmp_path, biased):
    with pytest.raises(ArtifactError, match="code in layers 0, 1; news in layers 0, 1") as error:
        export(open_model(biased / "model"), tmp_path / "theirs")
    assert "--custom-code" in error.value.remedy
    assert "--zero-bias" in error.value.remedy
    assert not (tmp_path / "theirs").exists()
    export(open_model(biased / "model"), tmp_path / "public", ExportOptions(experts=["public"]))  # has none


def test_custom_code_computes_the_bias_and_loads_only_when_trusted(tmp_path, biased):
    model = open_model(biased / "model")
    export(model, tmp_path / "theirs", ExportOptions(custom_code=True))
    check = {"custom_code": True, "leave_out_bias": False}
    assert compare_logits(tmp_path / "theirs", model, model.experts, **check) < TOLERANCE
    with pytest.raises(ArtifactError, match="differ from ours"):  # the check sees the bias
        compare_logits(tmp_path / "theirs", model, model.experts, **check | {"leave_out_bias": True})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_theirs(tmp_path / "theirs", trust_remote_code=False)
    theirs = load_theirs(tmp_path / "theirs", trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    saved, first = read_tensors(tmp_path / "again"), read_tensors(tmp_path / "theirs")
    assert {n: t.read().tobytes() for n, t in saved.items()} == {n: t.read().tobytes() for n, t in first.items()}


def test_zero_bias_is_the_model_without_it_and_says_so(tmp_path, biased):
    model = open_model(biased / "model")
    export(model, tmp_path / "theirs", ExportOptions(zero_bias={"bits_per_byte_without": 1.5}))
    check = {"custom_code": False, "leave_out_bias": True}
    assert compare_logits(tmp_path / "theirs", model, model.experts, **check) < TOLERANCE
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "bias was left out" in card
    assert "bits_per_byte_without: 1.5" in card


def test_a_single_expert_becomes_a_dense_model(tmp_path, ours):
    """It needs no router row: the logits are the same."""
    model = open_model(ours / "model")
    done = export(model, tmp_path / "dense", ExportOptions(experts=["code"], dense=True))
    assert done.architecture.name == "Olmo2ForCausalLM"
    assert compare_logits(tmp_path / "dense", model, ["code"], custom_code=False, leave_out_bias=True) < TOLERANCE
    with pytest.raises(ArtifactError, match="a dense model of 3 experts"):
        export(model, tmp_path / "no", ExportOptions(dense=True))


def test_the_card_names_owners_licences_and_records(tmp_path, ours):
    from huggingface_hub import ModelCard

    evaluation = {"domains": {"news": {"bits_per_byte": 1.2345, "documents": 7}}}
    export(open_model(ours / "model"), tmp_path / "theirs", ExportOptions(evaluation=evaluation))
    text = (tmp_path / "theirs" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["license_name"] == "Apache-2.0, code-licence, news-licence"
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert list(rows) == ["trunk", "public", "code", "news"]
    assert "someone@news" in rows["news"]
    assert "| 7 | 700 | none: trained without differential privacy |" in rows["public"]
    assert rows["news"].count("not stated") == 3  # steps, tokens and privacy budget
    assert "| news | 1.234 | 7 |" in text or "| news | 1.235 | 7 |" in text


def test_two_experts_become_a_package_beside_their_public_model(tmp_path, ours):
    """Exported as public + news and imported as news, byte for byte the package that news made; it merges."""
    export(open_model(ours / "model"), tmp_path / "two", ExportOptions(experts=["public", "news"]))
    release = open_model(ours / "release")
    manifest = import_expert(open_folder(tmp_path / "two"), release, tmp_path / "news", expert="news")
    assert contents(tmp_path / "news") == contents(ours / "news")
    assert manifest.content == content_digest(load_package(ours / "news"))
    merge(ours / "release", [tmp_path / "news"], tmp_path / "merged")


def test_a_published_pair_needs_the_public_model_it_was_trained_beside(tmp_path):
    checkpoint(tmp_path / "pair", "flex_olmo", experts=2)
    pair = open_folder(tmp_path / "pair")
    public = import_model(pair, tmp_path / "public", keep=["public"])
    assert public.experts == ("public",)
    import_expert(pair, public, tmp_path / "math", expert="math")
    merged = merge(tmp_path / "public", [tmp_path / "math"], tmp_path / "merged")
    assert export(merged, tmp_path / "back").architecture.name == "FlexOlmoForCausalLM"
    assert contents(tmp_path / "back")["model.safetensors"] == contents(tmp_path / "pair")["model.safetensors"]

    model = load_theirs(tmp_path / "pair")
    weight = model.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))  # one unit in the last place
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="trunk/blocks/w_k"):
        import_expert(open_folder(tmp_path / "other"), public, tmp_path / "no", expert="math")
    checkpoint(tmp_path / "dense", "olmo2")
    dense = import_model(open_folder(tmp_path / "dense"), tmp_path / "dense-model")
    with pytest.raises(ArtifactError, match="trunk/"):
        import_expert(pair, dense, tmp_path / "no", expert="math")


def test_a_dense_public_model_has_no_router_row_to_compare(tmp_path, ours):
    """The remedy: import the public model from the pair, which has the row."""
    release = open_model(ours / "release")
    export(release, tmp_path / "dense", ExportOptions(dense=True))
    dense = import_model(open_folder(tmp_path / "dense"), tmp_path / "public")
    export(open_model(ours / "model"), tmp_path / "two", ExportOptions(experts=["public", "news"]))
    with pytest.raises(ArtifactError, match="public/router") as error:
        import_expert(open_folder(tmp_path / "two"), dense, tmp_path / "no", expert="news")
    assert "--experts public" in error.value.remedy


def test_owners_can_train_beside_a_dense_public_model_given_a_domain_vector(tmp_path):
    from flexmoe_jax.data.embedding import DomainVector
    from flexmoe_jax.training.start import prepare
    from tests.tiny import expert_run, write_vector

    checkpoint(tmp_path / "theirs", "llama")
    source = open_folder(tmp_path / "theirs")
    domain = DomainVector.load(write_vector(tmp_path / "domain.json", 1))
    public = import_model(source, tmp_path / "public", domain=domain)
    initial = prepare(expert_run(tmp_path, "news", tmp_path / "public"), mesh_of_one())
    rows = [initial.params["experts"][name]["router"] for name in ("public", "news")]
    np.testing.assert_allclose([np.linalg.norm(row[0]) for row in rows], 0.1, rtol=1e-5)
    assert initial.base["trunk"] == public.manifests["trunk"].content
    import_model(source, tmp_path / "bare")
    with pytest.raises(FlexMoEError, match="no domain vector"):
        prepare(expert_run(tmp_path / "again", "news", tmp_path / "bare"), mesh_of_one())


def test_the_old_spelling_of_a_configuration_is_read(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")
    config, params = read_tree(open_folder(tmp_path / "theirs"))
    edit_config(
        tmp_path / "theirs", rope_parameters=None, rope_theta=1e4, head_dim=None, dtype=None, torch_dtype="float32"
    )
    assert read_tree(open_folder(tmp_path / "theirs"))[0] == config == SHAPES["llama"]
    edit_config(tmp_path / "theirs", rope_theta=None)
    assert open_folder(tmp_path / "theirs").config.model.rope_theta == 1e4  # Llama's own default
    edit_config(tmp_path / "theirs", rope_theta=5e5)
    other = open_folder(tmp_path / "theirs").config.model
    tokens = np.arange(20, dtype=np.int32)[None]
    assert not np.allclose(*(jit_forward(c, params, tokens).logits_BTV for c in (config, other)), atol=1e-3)


def test_the_published_configuration_has_the_names_and_shapes_of_transformers():
    """FlexOlmo-7x7B-1T, 7 experts of width 4096: names and shapes of the class in transformers; no allocation."""
    hf_config = transformers.FlexOlmoConfig()
    read = read_config(hf_config.to_dict() | {"architectures": ["FlexOlmoForCausalLM"]})
    assert (read.experts, read.top_k, read.model.d_model, read.model.num_layers) == (7, 5, 4096, 32)
    table = slots(read.model, read.architecture, ("public", *"abcdef"))
    with torch.device("meta"):
        theirs = {n: tuple(p.shape) for n, p in transformers.FlexOlmoForCausalLM(hf_config).state_dict().items()}
    expected = {}
    for name, shape in theirs.items():  # experts are separate tensors on disk
        if name.endswith("experts.gate_up_proj"):
            for i in range(shape[0]):
                for part in ("gate", "up"):
                    expected[name.replace("gate_up_proj", f"{i}.{part}_proj.weight")] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            expected |= {name.replace("down_proj", f"{i}.down_proj.weight"): shape[1:] for i in range(shape[0])}
        else:
            expected[name] = shape
    assert {name: slot.shape for name, slot in table.items()} == expected
    count = sum(int(np.prod(slot.shape)) for slot in table.values())
    assert count / 1e9 == pytest.approx(33.27, abs=0.005)
