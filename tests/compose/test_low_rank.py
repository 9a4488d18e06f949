"""Experts that are low-rank changes: trained, packed, merged beside whole ones, left out, exported."""

import itertools
import pathlib
import shutil
from unittest.mock import ANY

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexmoe_jax
from flexmoe_jax.artifacts.arrays import tensor_file
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, verify_package, write_package
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.compose.convert import compress, rebase
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out, replace
from flexmoe_jax.compose.tune import Tuning, tune
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.model.decoder import Decoder, forward
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.params import EXPERT, FFN_WEIGHTS, factors
from flexmoe_jax.training.loop import train
from flexmoe_jax.training.start import prepare
from flexmoe_jax.training.state import split_state
from flexmoe_jax.tree import PUBLIC, split
from tests.tiny import MODEL, contents, expert_run, flip_bit, max_difference, public_of, same_tree, write_documents

LEAVES = {leaf for matrix in FFN_WEIGHTS for leaf in factors(matrix)}


def test_a_package_holds_only_what_the_owner_trained(kinds):
    _, _, packages = kinds
    names = {owner: {*read_manifest(package).tensors} for owner, package in packages.items()}
    assert names["news"] == LEAVES | {"router", "bias"}
    assert names["math"] == {*FFN_WEIGHTS, "router", "bias"}
    assert names["code"] == {"w_gate_a", "w_gate_b", "w_up", "w_down_a", "w_down_b", "router", "bias"}
    news = load_package(packages["news"])
    assert news["w_gate_a"].shape == (MODEL.num_layers, MODEL.d_model, 4)
    assert all(np.abs(news[leaf]).max() > 0 for leaf in LEAVES)  # B has left 0


def test_training_starts_as_the_public_expert(kinds, tmp_path):
    _, release, _ = kinds
    start = prepare(expert_run(tmp_path, "news", release, rank="4"), mesh_of_one()).params["experts"]
    assert not any(start["news"][leaf].any() for leaf in LEAVES if leaf.endswith("_b"))
    whole = whole_expert("news", start["news"], start[PUBLIC])
    assert all(np.array_equal(whole[name], start[PUBLIC][name]) for name in FFN_WEIGHTS)
    # A keeps the deviation of its input: without, B would learn at another rate for every width.
    assert start["news"]["w_down_a"].std() == pytest.approx(MODEL.d_ff**-0.5, rel=0.2)
    other = prepare(expert_run(tmp_path, "news", release, rank="4", seed=1), mesh_of_one()).params["experts"]
    assert not np.array_equal(start["news"]["w_up_a"], other["news"]["w_up_a"])


def test_what_was_trained_is_what_the_merged_model_runs(kinds):
    """The hybrid of the training, with the change in its own form, against that of the model directory."""
    _, release, packages = kinds
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    params = load_params(open_model(release))
    news = load_package(packages["news"])
    trained = forward(Decoder(MODEL), {**params, "experts": {**params["experts"], "news": news}}, jnp.asarray(tokens))
    model = flexmoe_jax.load(kinds[0] / "model").select((PUBLIC, "news"))
    assert max_difference(trained.logits_BTV, model.logits(tokens)) < 1e-5  # W + A B by XLA and by NumPy
    alone = flexmoe_jax.load(kinds[0] / "model").select((PUBLIC,))
    assert max_difference(alone.logits(tokens), model.logits(tokens)) > 1e-3


def test_kinds_merge_in_any_order_and_opting_out_leaves_none_of_their_bytes(kinds, tmp_path):
    root, release, packages = kinds
    for order in itertools.permutations(packages):
        merged = merge(release, [packages[owner] for owner in order], tmp_path / "-".join(order), top_k=2).path
        assert contents(merged) == contents(root / "model")
    for owner in packages:
        left = opt_out(root / "model", owner, tmp_path / f"left-{owner}").path
        rest = [package for name, package in packages.items() if name != owner]
        assert contents(left) == contents(merge(release, rest, tmp_path / f"never-{owner}", top_k=2).path)
        assert all(check.ok for check in verify_model(left))
        bytes_left = b"".join(contents(left).values())
        for array in load_package(packages[owner]).values():
            if np.any(array):
                assert array.tobytes()[:64] not in bytes_left


def test_a_low_rank_expert_is_trained_further_and_its_router_tuned_in_its_own_form(kinds, tmp_path):
    root, release, packages = kinds
    run = expert_run(tmp_path, "news", release, expert=str(packages["news"]), domain_vector=None, steps=2)
    further = train(run)
    assert {*read_manifest(further).tensors} == LEAVES | {"router", "bias"}
    assert not same_tree(load_package(further), load_package(packages["news"]))
    proxies = {"news": write_documents(tmp_path / "proxies", "news")}
    public = write_documents(tmp_path / "public", "public")
    for together in (False, True):
        how = Tuning(together=together, steps=2, batch_size=4, seq_len=32)
        tuned = tune(root / "model", proxies, public, tmp_path / f"tuned-{together}", how)
        for owner in ("news", "code"):
            before, after = (load_package(model.package(owner)) for model in (open_model(root / "model"), tuned))
            matrices = before.keys() - {"router", "bias"}
            assert same_tree({m: before[m] for m in matrices}, {m: after[m] for m in matrices})
        assert not np.array_equal(load_package(tuned.package("news"))["router"], before["router"])


def test_matrices_are_read_from_mapped_files_as_from_memory(kinds):
    model = open_model(kinds[0] / "model")
    read, mapped = load_params(model), load_params(model, mapped=True)
    assert same_tree(jax.tree.map(np.asarray, split(mapped)), split(read))
    only = load_params(model, ("news",))  # without public, whose matrices it changes
    assert same_tree(only["experts"], {"news": read["experts"]["news"]})


def test_low_rank_experts_do_not_go_on_an_expert_axis_and_need_the_public_one_beside_them(kinds, tmp_path):
    _, release, packages = kinds
    params = load_params(open_model(release))
    params["experts"]["news"] = load_package(packages["news"])
    run = expert_run(tmp_path, "news", release, rank="4")
    with pytest.raises(ConfigError, match=f"of which news is a low-rank change.*\n.*set {EXPERT}=1"):
        split_state(params, run, 2)
    with pytest.raises(ConfigError, match=r"config\.rank is 4 and config.coordinate is False"):
        expert_run(tmp_path, "news", release, rank="4", coordinate=False)
    run = expert_run(tmp_path, "news", release, expert=str(packages["news"]), domain_vector=None, coordinate=False)
    with pytest.raises(ConfigError, match=r"holds low-rank changes"):
        prepare(run, mesh_of_one())
    with pytest.raises(ConfigError, match=r"config\.rank is '4': this run trains"):
        expert_run(tmp_path, "news", release, rank="4", expert="x", domain_vector=None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda leaves: leaves.pop("w_gate_b"), "'w_gate_b' is missing"),
        (lambda leaves: leaves.pop("w_up_a"), "'w_up' is missing"),
        (lambda leaves: leaves.update(w_up=np.ones((2, 3), np.float32)), "'w_up' does not belong there"),
        (lambda leaves: leaves.update(w_up_b=leaves["w_up_b"][:, 1:].copy()), "'w_up_b' has shape"),
        (
            lambda leaves: leaves.update(w_up_a=np.ones((MODEL.num_layers, MODEL.d_model, 999), np.float32)),
            "the change of w_up has rank 999, and the matrix at most",
        ),
    ],
)
def test_a_change_that_is_not_whole_is_refused(kinds, tmp_path, change, problem):
    _, _, packages = kinds
    manifest, leaves = read_manifest(packages["news"]), load_package(packages["news"])
    change(leaves)
    what = {"owner": "news", "params": leaves, "config": MODEL, "base": manifest.base, "record": {}}
    with pytest.raises(ArtifactError, match=problem):
        write_package(tmp_path / "news", **what)
    if "w_gate_a" in leaves:  # nor is the public expert a change of itself
        with pytest.raises(ArtifactError, match=r"does not belong there|is missing"):
            write_package(tmp_path / "public", **what | {"owner": PUBLIC, "base": {"tokenizer": "0" * 64}})


def test_finite_factors_of_a_change_that_is_not_finite_are_refused_everywhere(kinds, tmp_path):
    """A and B of 1e30: every tensor is finite, and their product is not."""
    root, release, packages = kinds
    manifest, leaves = read_manifest(packages["news"]), load_package(packages["news"])
    leaves |= {leaf: np.full_like(leaves[leaf], 1e30) for leaf in ("w_up_a", "w_up_b")}
    bad = tmp_path / "bad"
    write_package(bad, owner="news", params=leaves, config=MODEL, base=manifest.base, record={})
    refused = pytest.raises(
        ArtifactError, match="w_up of 'news': the public expert's matrix and the change A B add up to"
    )
    with refused:
        merge(release, [bad], tmp_path / "model")
    with refused:
        replace(shutil.copytree(root / "model", tmp_path / "copy"), bad)
    with refused:
        compress(bad, release, tmp_path / "low", "2")
    with refused:
        rebase(bad, release, release, tmp_path / "moved")
    assert not any((tmp_path / name).exists() for name in ("model", "low", "moved"))
    parts = [bad, release / PUBLIC]
    with pytest.MonkeyPatch.context() as patch:  # a model that was put together by someone else
        patch.setattr("flexmoe_jax.compose.merge.check_sums", lambda *parts: None)
        model = merge(release, [bad], tmp_path / "theirs")
    assert [(c.subject, c.detail) for c in verify_model(model.path) if not c.ok] == [("news/sums", ANY)]
    for mapped in (False, True):
        with refused:
            jax.tree.map(np.asarray, load_params(model, mapped=mapped))
    assert all(check.ok for part in parts for check in verify_package(part))


def test_nobody_draws_what_another_owner_draws_and_frozen_factors_are_nobodys_data(kinds, tmp_path):
    _, release, _ = kinds
    runs = [
        expert_run(tmp_path, owner, release, rank="2", steps=2, freeze="experts/.*/w_.*_[ab]")
        for owner in ("news", "math")
    ]
    packages = [train(run) for run in runs]
    news, math = map(load_package, packages)
    assert not any(np.array_equal(news[leaf], math[leaf]) for leaf in LEAVES if leaf.endswith("_a"))
    assert not any(news[leaf].any() or math[leaf].any() for leaf in LEAVES if leaf.endswith("_b"))
    merge(release, packages, tmp_path / "model")
    left = opt_out(tmp_path / "model", "news", tmp_path / "left", certificate=tmp_path / "left.json")
    assert [check for check in verify_certificate(tmp_path / "left.json", left.path) if not check.ok] == []


def as_whole(release, packages, folder: pathlib.Path):
    """Packages of the same experts with whole matrices, and biases of 0."""
    public = public_of(release)
    for owner, package in packages.items():
        leaves, base = load_package(package), read_manifest(package).base
        leaves["bias"] = np.zeros_like(leaves["bias"])
        for kind, form in (("changed", leaves), ("whole", whole_expert("news", leaves, public))):
            path = folder / kind / owner
            record = {"tuned": {"with": ["code", "news"]}}
            write_package(path, owner=owner, params=form, config=MODEL, base=base, record=record)
    return (
        merge(release, [folder / kind / owner for owner in packages], folder / f"{kind}-model", top_k=2)
        for kind in ("changed", "whole")
    )


def test_exports_hold_the_matrices_added_up(kinds, tmp_path):
    pytest.importorskip("safetensors")
    from flexmoe_jax.hf.checkpoint import open_folder
    from flexmoe_jax.hf.export import export
    from flexmoe_jax.hf.load import import_model

    _, release, packages = kinds
    for model in (models := {m.path.name: m for m in as_whole(release, packages, tmp_path)}).values():
        export(model, tmp_path / f"{model.path.name}-hf")
    files = [contents(tmp_path / f"{name}-hf") for name in models]
    weights = [name for name in files[0] if name.endswith(".safetensors")]
    assert weights
    assert all(files[0][name] == files[1][name] for name in weights)
    again = import_model(open_folder(tmp_path / "changed-model-hf"), tmp_path / "again").path
    tuned = {name: manifest.record.tuned_with for name, manifest in open_model(again).manifests.items()}
    assert tuned["news"] == ("code", "news")  # opting out of code is approximate there, too
    damaged = open_model(tmp_path / "changed-model")
    factor = damaged.manifests["news"].tensors["w_up_b"]
    flip_bit(damaged.package("news") / tensor_file("w_up_b", factor.shape), 100)
    with pytest.raises(ArtifactError, match="is damaged"):
        export(damaged, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_gguf_file_holds_the_matrices_added_up(kinds, tmp_path):
    gguf = pytest.importorskip("gguf")
    from flexmoe_jax.hf.gguf_export import export_gguf

    _, release, packages = kinds
    tables = []
    for model in as_whole(release, packages, tmp_path):
        path = tmp_path / f"{model.path.name}.gguf"
        assert export_gguf(model, path, experts=["code"]).dtype == "f32"
        tables.append({t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors})
        public = model.package(PUBLIC) / tensor_file("w_gate", (MODEL.num_layers, MODEL.d_model, MODEL.d_ff))
        flip_bit(public, 100)
        if model.path.name == "changed-model":  # the matrix that is changed is read, too
            with pytest.raises(ArtifactError, match="w_gate has sha256"):
                export_gguf(model, tmp_path / "damaged.gguf", experts=["code"])
    assert tables[0].keys() == tables[1].keys()
    for name, tensor in tables[0].items():  # a layer's product by NumPy, in both
        assert np.array_equal(tensor, tables[1][name]), name
