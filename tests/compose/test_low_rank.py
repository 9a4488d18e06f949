"""Experts that are low-rank changes: trained, packed, merged beside whole ones, left out, compressed, exported."""

import dataclasses
import itertools
import json
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
from flexmoe_jax.artifacts.model_dir import create_model, load_params, open_model
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
from flexmoe_jax.tree import PUBLIC, TRUNK, split
from tests.tiny import MODEL, contents, expert_run, flip_bit, max_difference, random_release, same_tree, write_documents

RANKS = {"news": "4", "math": None, "code": "w_gate=2,w_down=3"}
LEAVES = {leaf for matrix in FFN_WEIGHTS for leaf in factors(matrix)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A release and the packages of three owners: of rank 4, whole, and with one whole matrix."""
    root = tmp_path_factory.mktemp("world")
    release, _ = random_release(root)
    before = contents(release)
    packages = {owner: train(expert_run(root, owner, release, rank=rank)) for owner, rank in RANKS.items()}
    assert contents(release) == before
    merge(release, [*packages.values()], root / "model", top_k=2)
    return root, release, packages


def public_of(release):
    return load_package(open_model(release).package(PUBLIC))


def test_a_package_holds_only_what_the_owner_trained(world):
    _, _, packages = world
    names = {owner: {*read_manifest(package).tensors} for owner, package in packages.items()}
    assert names["news"] == LEAVES | {"router", "bias"}
    assert names["math"] == {*FFN_WEIGHTS, "router", "bias"}
    assert names["code"] == {"w_gate_a", "w_gate_b", "w_up", "w_down_a", "w_down_b", "router", "bias"}
    news = load_package(packages["news"])
    assert news["w_gate_a"].shape == (MODEL.num_layers, MODEL.d_model, 4)
    assert all(np.abs(news[leaf]).max() > 0 for leaf in LEAVES)  # B has left 0


def test_training_starts_as_the_public_expert(world, tmp_path):
    _, release, _ = world
    start = prepare(expert_run(tmp_path, "news", release, rank="4"), mesh_of_one()).params["experts"]
    assert not any(start["news"][leaf].any() for leaf in LEAVES if leaf.endswith("_b"))
    whole = whole_expert(start["news"], start[PUBLIC])
    assert all(np.array_equal(whole[name], start[PUBLIC][name]) for name in FFN_WEIGHTS)
    # A keeps the deviation of its input: without, B would learn at another rate for every width.
    assert start["news"]["w_down_a"].std() == pytest.approx(MODEL.d_ff**-0.5, rel=0.2)
    other = prepare(expert_run(tmp_path, "news", release, rank="4", seed=1), mesh_of_one()).params["experts"]
    assert not np.array_equal(start["news"]["w_up_a"], other["news"]["w_up_a"])


def test_what_was_trained_is_what_the_merged_model_runs(world):
    """The hybrid of the training, with the change in its own form, against that of the model directory."""
    _, release, packages = world
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    params = load_params(open_model(release))
    news = load_package(packages["news"])
    trained = forward(Decoder(MODEL), {**params, "experts": {**params["experts"], "news": news}}, jnp.asarray(tokens))
    model = flexmoe_jax.load(world[0] / "model").select((PUBLIC, "news"))
    assert max_difference(trained.logits_BTV, model.logits(tokens)) < 1e-5  # W + A B by XLA and by NumPy
    alone = flexmoe_jax.load(world[0] / "model").select((PUBLIC,))
    assert max_difference(alone.logits(tokens), model.logits(tokens)) > 1e-3


def test_kinds_merge_in_any_order_and_opting_out_leaves_none_of_their_bytes(world, tmp_path):
    root, release, packages = world
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


def test_a_low_rank_expert_is_trained_further_and_its_router_tuned_in_its_own_form(world, tmp_path):
    root, release, packages = world
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


def test_matrices_are_read_from_mapped_files_as_from_memory(world):
    model = open_model(world[0] / "model")
    read, mapped = load_params(model), load_params(model, mapped=True)
    assert same_tree(jax.tree.map(np.asarray, split(mapped)), split(read))
    only = load_params(model, ("news",))  # without public, whose matrices it changes
    assert same_tree(only["experts"], {"news": read["experts"]["news"]})


def test_low_rank_experts_do_not_go_on_an_expert_axis_and_need_the_public_one_beside_them(world, tmp_path):
    _, release, packages = world
    params = load_params(open_model(release))
    params["experts"]["news"] = load_package(packages["news"])
    with pytest.raises(ConfigError, match=f"of which news is a low-rank change.*\n.*set {EXPERT}=1"):
        split_state(params, "news", None, 2)
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
def test_a_change_that_is_not_whole_is_refused(world, tmp_path, change, problem):
    _, _, packages = world
    manifest, leaves = read_manifest(packages["news"]), load_package(packages["news"])
    change(leaves)
    what = {"owner": "news", "params": leaves, "config": MODEL, "base": manifest.base, "record": {}}
    with pytest.raises(ArtifactError, match=problem):
        write_package(tmp_path / "news", **what)
    if "w_gate_a" in leaves:  # nor is the public expert a change of itself
        with pytest.raises(ArtifactError, match=r"does not belong there|is missing"):
            write_package(tmp_path / "public", **what | {"owner": PUBLIC, "base": {"tokenizer": "0" * 64}})


def test_finite_factors_of_a_change_that_is_not_finite_are_refused_everywhere(world, tmp_path):
    """A and B of 1e30: every tensor is finite, and their product is not."""
    root, release, packages = world
    manifest, leaves = read_manifest(packages["news"]), load_package(packages["news"])
    leaves |= {leaf: np.full_like(leaves[leaf], 1e30) for leaf in ("w_up_a", "w_up_b")}
    bad = tmp_path / "bad"
    write_package(bad, owner="news", params=leaves, config=MODEL, base=manifest.base, record={})
    refused = pytest.raises(ArtifactError, match="w_up: the change A B has values that are not finite")
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


def test_nobody_draws_what_another_owner_draws_and_frozen_factors_are_nobodys_data(world, tmp_path):
    _, release, _ = world
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


def test_compressing_keeps_the_largest_part_of_the_change_and_says_what_that_costs(world, tmp_path):
    _, release, packages = world
    public, math = public_of(release), load_package(packages["math"])
    full = min(MODEL.d_model, MODEL.d_ff)
    exact = compress(packages["math"], release, tmp_path / "full", str(full))
    assert all(share == pytest.approx(1) for share in exact.kept.values())
    again = whole_expert(load_package(tmp_path / "full"), public)
    for name in FFN_WEIGHTS:  # float32 rounding of two factors
        assert max_difference(again[name], math[name]) < 1e-6 + 1e-5 * np.abs(math[name] - public[name]).max()

    scored = []
    found = compress(
        packages["math"], release, tmp_path / "low", "w_gate=2", "bfloat16", lambda e: scored.append(e) or 7.0
    )
    made, record = load_package(tmp_path / "low"), read_manifest(tmp_path / "low").record.fields
    assert {path: leaf.dtype.name for path, leaf in made.items()} == dict.fromkeys(
        ("w_gate_a", "w_gate_b", "w_up", "w_down"), "bfloat16"
    ) | {"router": "float32", "bias": "float32"}
    change = (math["w_gate"] - public["w_gate"]).astype(np.float64)
    singular = np.linalg.svd(change, compute_uv=False)
    assert found.kept["w_gate"] == pytest.approx((singular[:, :2] ** 2).sum() / (singular**2).sum())
    left = np.linalg.norm(change - made["w_gate_a"].astype(np.float64) @ made["w_gate_b"].astype(np.float64))
    # The best of rank 2 (Eckart and Young), up to factors in bfloat16.
    assert left == pytest.approx(np.sqrt((singular[:, 2:] ** 2).sum()), rel=0.02)
    assert same_tree(scored[0], math)
    assert {*scored[1]} == {*math}
    assert (found.bits_per_byte_before, found.bits_per_byte_after) == (7.0, 7.0)
    assert record["compressed"] == {"from": read_manifest(packages["math"]).digest, **dataclasses.asdict(found)}
    assert found.bytes_after < found.bytes_before
    model = merge(release, [tmp_path / "low", packages["news"]], tmp_path / "model")
    assert all(check.ok for check in verify_model(model.path))


def test_training_goes_on_from_a_change_of_nothing(world, tmp_path):
    """A and B of 0 would have no gradient."""
    _, release, packages = world
    manifest, leaves = read_manifest(packages["math"]), load_package(packages["math"])
    leaves["w_up"] = public_of(release)["w_up"]
    write_package(tmp_path / "same", owner="math", params=leaves, config=MODEL, base=manifest.base, record={})
    found = compress(tmp_path / "same", release, tmp_path / "low", "w_up=2")
    made = load_package(tmp_path / "low")
    assert found.kept == {"w_up": 1.0}
    assert not made["w_up_b"].any()
    run = expert_run(tmp_path, "math", release, expert=str(tmp_path / "low"), domain_vector=None, steps=2)
    assert load_package(train(run))["w_up_b"].any()


def test_compressing_and_rebasing_refuse_what_does_not_belong(world, tmp_path):
    _, release, packages = world
    other, _ = random_release(tmp_path, scale=0.2)
    for call in (
        lambda: compress(packages["math"], other, tmp_path / "x", "2"),
        lambda: rebase(packages["math"], other, release, tmp_path / "x"),
    ):
        with pytest.raises(ArtifactError, match="was trained with the public expert"):
            call()
    with pytest.raises(ArtifactError, match="not a data owner's expert"):
        compress(release / PUBLIC, release, tmp_path / "x", "2")
    with pytest.raises(ConfigError, match="the dtype 'int4' is not one"):
        compress(packages["math"], release, tmp_path / "x", dtype="int4")
    with pytest.raises(ConfigError, match="the change of w_gate has rank 4, and 4 is asked for"):
        compress(packages["news"], release, tmp_path / "x", "4")
    assert not (tmp_path / "x").exists()
    unscored = lambda expert: pytest.fail("scored before it is refused")  # noqa: E731
    with pytest.raises(ArtifactError, match="already exists"):
        compress(packages["math"], release, packages["code"], "2", score=unscored)
    with pytest.raises(ArtifactError, match="is inside"):
        compress(packages["math"], release, release / "x", "2", score=unscored)
    manifest, leaves = read_manifest(packages["math"]), load_package(packages["math"])
    leaves["w_up"] = leaves["w_up"] + np.float32(1e6)
    write_package(tmp_path / "wide", owner="math", params=leaves, config=MODEL, base=manifest.base, record={})
    with pytest.raises(ConfigError, match=r"w_up of .* does not fit into float16"):
        compress(tmp_path / "wide", release, tmp_path / "x", dtype="float16", score=unscored)
    with pytest.raises(ArtifactError, match="held-out bits per byte are nan"):
        compress(packages["math"], release, tmp_path / "x", "2", score=lambda expert: float("nan"))
    router = open_model(release).manifests[PUBLIC].record.fields["router"]
    apart = with_router(release, tmp_path / "apart", {**router, "projection_seed": 7})
    with pytest.raises(ArtifactError, match="are in other spaces: projection_seed 0, 7"):
        rebase(packages["math"], release, apart, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def with_router(release, path: pathlib.Path, router: dict, factor: float = 1.0) -> pathlib.Path:
    """The release with its public matrices times `factor` and this record of its router row."""
    params, opened = load_params(open_model(release)), open_model(release)
    for name in FFN_WEIGHTS:
        params["experts"][PUBLIC][name] = params["experts"][PUBLIC][name] * np.float32(factor)
    records = {name: opened.manifests[name].record.fields for name in (TRUNK, PUBLIC)}
    records[PUBLIC] = {**records[PUBLIC], "router": router}
    files = {name: (release / name).read_bytes() for name in opened.tokenizer}
    return create_model(path, params, MODEL, files, records).path


def test_a_rebased_expert_is_the_new_public_one_with_the_owners_change(world, tmp_path):
    _, release, packages = world
    router = open_model(release).manifests[PUBLIC].record.fields["router"]
    newer = with_router(release, tmp_path / "newer", router, 1.5)
    public, public_now = public_of(release), public_of(newer)
    for owner, package in packages.items():
        moved = rebase(package, release, newer, tmp_path / owner)
        assert moved == pytest.approx(dict.fromkeys(FFN_WEIGHTS, 0.5), rel=1e-5)
        before, after = load_package(package), load_package(tmp_path / owner)
        assert before.keys() == after.keys()
        old, new = whole_expert(before, public), whole_expert(after, public_now)
        for name in FFN_WEIGHTS:
            assert max_difference(new[name] - public_now[name], old[name] - public[name]) < 1e-6
        assert np.array_equal(before["router"], after["router"])
        record = read_manifest(tmp_path / owner).record.fields["rebased"]
        assert record["from"] == read_manifest(package).digest
        assert record["base"] == read_manifest(package).base
        with pytest.raises(ArtifactError, match="was trained with the public expert"):
            merge(release, [tmp_path / owner], tmp_path / "x")
    model = merge(newer, [tmp_path / owner for owner in packages], tmp_path / "model")
    assert all(check.ok for check in verify_model(model.path))
    rebase(packages["news"], release, release, tmp_path / "same")
    assert same_tree(load_package(tmp_path / "same"), load_package(packages["news"]))


def as_whole(release, packages, folder: pathlib.Path):
    """Packages of the same experts with whole matrices, and biases of 0."""
    public = public_of(release)
    for owner, package in packages.items():
        leaves, base = load_package(package), read_manifest(package).base
        leaves["bias"] = np.zeros_like(leaves["bias"])
        for kind, form in (("changed", leaves), ("whole", whole_expert(leaves, public))):
            path = folder / kind / owner
            record = {"tuned": {"with": ["code", "news"]}}
            write_package(path, owner=owner, params=form, config=MODEL, base=base, record=record)
    return (
        merge(release, [folder / kind / owner for owner in packages], folder / f"{kind}-model", top_k=2)
        for kind in ("changed", "whole")
    )


def test_exports_hold_the_matrices_added_up(world, tmp_path):
    pytest.importorskip("safetensors")
    from flexmoe_jax.hf.checkpoint import open_folder
    from flexmoe_jax.hf.export import export
    from flexmoe_jax.hf.load import import_model

    _, release, packages = world
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


def test_a_gguf_file_holds_the_matrices_added_up(world, tmp_path):
    gguf = pytest.importorskip("gguf")
    from flexmoe_jax.hf.gguf_export import export_gguf

    _, release, packages = world
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


def test_the_command_line_compresses_and_rebases(world, tmp_path, capsys):
    from flexmoe_jax.cli.main import main

    _, release, packages = world
    heldout = write_documents(tmp_path / "heldout", "math", 4, split="heldout")
    words = ["compress", str(packages["math"]), "--public", str(release), "--rank", "2", "--out", str(tmp_path / "low")]
    assert main([*words, "--heldout", str(heldout), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == dict.fromkeys(FFN_WEIGHTS, 2)
    hybrid = merge(release, [packages["math"]], tmp_path / "model").path
    texts = [json.loads(line)["text"] for line in (heldout / "heldout.jsonl").read_text().splitlines()]
    assert found["bits_per_byte_before"] == pytest.approx(flexmoe_jax.load(hybrid).score(texts).bits_per_byte, abs=1e-6)
    assert found["bits_per_byte_after"] != found["bits_per_byte_before"]
    words = [
        "rebase",
        str(tmp_path / "low"),
        "--old",
        str(release),
        "--new",
        str(release),
        "--out",
        str(tmp_path / "same"),
    ]
    assert main(words) == 0
    assert "sign it again" in capsys.readouterr().out
    assert main(["compress", str(packages["math"]), "--public", str(release), "--out", str(tmp_path / "x")]) == 1
    assert "neither --rank nor --dtype" in capsys.readouterr().err
