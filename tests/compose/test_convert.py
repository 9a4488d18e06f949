"""Packages in another form: compressed to a low rank or another dtype, and carried over to a newer public model."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import flexmoe_jax
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import create_model, load_params, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.compose.convert import compress, rebase
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.params import FFN_WEIGHTS
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.tiny import MODEL, expert_run, max_difference, public_of, random_release, same_tree, write_documents


def test_compressing_keeps_the_largest_part_of_the_change_and_says_what_that_costs(kinds, tmp_path):
    _, release, packages = kinds
    public, math = public_of(release), load_package(packages["math"])
    full = min(MODEL.d_model, MODEL.d_ff)
    exact = compress(packages["math"], release, tmp_path / "full", str(full))
    assert all(share == pytest.approx(1) for share in exact.kept.values())
    again = whole_expert("news", load_package(tmp_path / "full"), public)
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


def test_training_goes_on_from_a_change_of_nothing(kinds, tmp_path):
    """A and B of 0 would have no gradient."""
    _, release, packages = kinds
    manifest, leaves = read_manifest(packages["math"]), load_package(packages["math"])
    leaves["w_up"] = public_of(release)["w_up"]
    write_package(tmp_path / "same", owner="math", params=leaves, config=MODEL, base=manifest.base, record={})
    found = compress(tmp_path / "same", release, tmp_path / "low", "w_up=2")
    made = load_package(tmp_path / "low")
    assert found.kept == {"w_up": 1.0}
    assert not made["w_up_b"].any()
    run = expert_run(tmp_path, "math", release, expert=str(tmp_path / "low"), domain_vector=None, steps=2)
    assert load_package(train(run))["w_up_b"].any()


def test_compressing_and_rebasing_refuse_what_does_not_belong(kinds, tmp_path):
    _, release, packages = kinds
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


def test_a_rebased_expert_is_the_new_public_one_with_the_owners_change(kinds, tmp_path):
    _, release, packages = kinds
    router = open_model(release).manifests[PUBLIC].record.fields["router"]
    newer = with_router(release, tmp_path / "newer", router, 1.5)
    public, public_now = public_of(release), public_of(newer)
    for owner, package in packages.items():
        moved = rebase(package, release, newer, tmp_path / owner)
        assert moved == pytest.approx(dict.fromkeys(FFN_WEIGHTS, 0.5), rel=1e-5)
        before, after = load_package(package), load_package(tmp_path / owner)
        assert before.keys() == after.keys()
        old, new = whole_expert("news", before, public), whole_expert("news", after, public_now)
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


def test_the_command_line_compresses_and_rebases(kinds, tmp_path, capsys):
    from flexmoe_jax.cli.main import main

    _, release, packages = kinds
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
