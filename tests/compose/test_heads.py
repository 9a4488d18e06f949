"""An owner's change of the output head: in the model, trained, packed, merged, left out, refused by other formats."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexmoe_jax
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest
from flexmoe_jax.compose.convert import compress
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.compose.tune import Tuning, tune
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.hf.export import export
from flexmoe_jax.hf.gguf_export import export_gguf
from flexmoe_jax.model.decoder import Decoder, decode, forward, hidden_states, logits, prefill
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.params import FFN_WEIGHTS, HEAD_LEAVES
from flexmoe_jax.training.loop import train
from flexmoe_jax.training.start import prepare
from flexmoe_jax.tree import PUBLIC
from tests.tiny import (
    MODEL,
    contents,
    expert_run,
    max_difference,
    random_params,
    random_release,
    stacked,
    write_documents,
)

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 24)), jnp.int32)


def with_heads(zero: bool = False):
    """Three experts, of which two change the head, by other ranks; B and bias are 0 with `zero`."""
    params, rng = random_params(MODEL, (PUBLIC, "math", "news")), np.random.default_rng(3)
    for name, rank in (("math", 2), ("news", 3)):
        shapes = zip(HEAD_LEAVES, [(MODEL.d_model, rank), (rank, MODEL.vocab_size), (MODEL.vocab_size,)], strict=True)
        for leaf, shape in shapes:
            value = rng.standard_normal(shape).astype(np.float32)
            params["experts"][name][leaf] = jnp.asarray(0 * value if zero and leaf != "head_a" else value)
    return params


def without_heads(params):
    experts = {n: {k: leaf for k, leaf in e.items() if k not in HEAD_LEAVES} for n, e in params["experts"].items()}
    return {**params, "experts": experts}


def test_the_logits_are_those_of_the_definition():
    """x W + sum over owners of g (x A B + bias), with the mean router logits' softmax g; dense and sparse models."""
    params = with_heads()
    plain = forward(Decoder(MODEL), without_heads(params), TOKENS)
    gate_NE = jax.nn.softmax(plain.router_logits_LNE.mean(0), axis=-1)
    x_ND = hidden(params)
    expected = plain.logits_BTV.reshape(-1, MODEL.vocab_size)
    for at, name in enumerate(("math", "news"), start=1):
        a, b, bias = (params["experts"][name][leaf] for leaf in HEAD_LEAVES)
        expected = expected + gate_NE[:, at, None] * (x_ND @ a @ b + bias)
    assert max_difference(expected, plain.logits_BTV.reshape(expected.shape)) > 1
    for run, tree in ((Decoder(MODEL), params), (Decoder(MODEL, 3, "sparse"), stacked(params))):
        found = forward(run, tree, TOKENS).logits_BTV.reshape(expected.shape)
        assert max_difference(found, expected) < 1e-4 * float(jnp.abs(expected).max())  # sums in another order


def hidden(params) -> jax.Array:
    return hidden_states(Decoder(MODEL), without_heads(params), TOKENS)[0].reshape(-1, MODEL.d_model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_of_zero_changes_no_bit(dtype):
    params, run = with_heads(zero=True), Decoder(MODEL, dtype=dtype)
    assert np.array_equal(
        forward(run, params, TOKENS).logits_BTV, forward(run, without_heads(params), TOKENS).logits_BTV
    )


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence():
    params, run = stacked(with_heads()), Decoder(MODEL, 2, "sparse")
    whole = forward(run, params, TOKENS).logits_BTV
    x_BTD, cache = prefill(run, params, TOKENS[:, :20], 24)
    assert max_difference(logits(run, params, x_BTD), whole[:, :20]) < 1e-4
    for n in range(20, 24):
        x_B1D, cache = decode(run, params, TOKENS[:, n : n + 1], jnp.full((2, 1), n), cache)
        assert max_difference(logits(run, params, x_B1D)[:, 0], whole[:, n]) < 1e-4


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """(folder, release, packages): a head beside a whole expert, one beside low ranks, and none; their `model`."""
    root = tmp_path_factory.mktemp("heads")
    release, _ = random_release(root)
    before = contents(release)
    ranks = {"news": "head=3", "math": "w_gate=2,w_up=2,w_down=2,head=2", "code": None}
    packages = {owner: train(expert_run(root, owner, release, rank=rank)) for owner, rank in ranks.items()}
    assert contents(release) == before
    merge(release, [*packages.values()], root / "model", top_k=2)
    return root, release, packages


def test_a_package_holds_the_change_that_was_trained(heads):
    _, _, packages = heads
    names = {owner: {*read_manifest(package).tensors} for owner, package in packages.items()}
    assert names["news"] == {*FFN_WEIGHTS, *HEAD_LEAVES, "router", "bias"}
    assert names["code"] == {*FFN_WEIGHTS, "router", "bias"}
    news = load_package(packages["news"])
    assert [news[leaf].shape for leaf in HEAD_LEAVES] == [(16, 3), (3, MODEL.vocab_size), (MODEL.vocab_size,)]
    assert all(np.abs(news[leaf]).max() > 0 for leaf in HEAD_LEAVES)  # B and bias have left 0


def test_training_starts_with_the_head_of_the_public_model(heads, tmp_path):
    _, release, _ = heads
    start = prepare(expert_run(tmp_path, "news", release, rank="head=3"), mesh_of_one()).params["experts"]["news"]
    assert not start["head_b"].any()
    assert not start["head_bias"].any()
    assert start["head_a"].std() == pytest.approx(MODEL.d_model**-0.5, rel=0.3)  # of 48 draws


def test_owners_with_and_without_heads_merge_in_any_order_and_leave_no_byte(heads, tmp_path):
    root, release, packages = heads
    for order in itertools.permutations(packages):
        merged = merge(release, [packages[owner] for owner in order], tmp_path / "-".join(order), top_k=2).path
        assert contents(merged) == contents(root / "model")
    assert all(check.ok for check in verify_model(root / "model"))
    for owner in packages:
        left = opt_out(root / "model", owner, tmp_path / f"left-{owner}").path
        rest = [package for name, package in packages.items() if name != owner]
        assert contents(left) == contents(merge(release, rest, tmp_path / f"never-{owner}", top_k=2).path)
        bytes_left = b"".join(contents(left).values())
        own = [array for array in load_package(packages[owner]).values() if np.any(array)]
        assert not any(array.tobytes()[:64] in bytes_left for array in own)
        model = flexmoe_jax.load(left)
        tokens = np.asarray(TOKENS)
        assert np.array_equal(model.logits(tokens), flexmoe_jax.load(root / "model").without(owner).logits(tokens))
    params = load_params(open_model(root / "model"))
    whole = flexmoe_jax.load(root / "model").logits(np.asarray(TOKENS))
    plain = forward(Decoder(MODEL, 2, "sparse"), stacked(without_heads(params)), TOKENS).logits_BTV
    assert max_difference(whole, plain) > 1e-3


def test_tuning_and_further_training_keep_a_head(heads, tmp_path):
    root, release, packages = heads
    proxies = {"news": write_documents(tmp_path / "proxies", "news")}
    public = write_documents(tmp_path / "public", "public")
    before = load_package(packages["news"])
    for together in (False, True):
        how = Tuning(together=together, steps=2, batch_size=4, seq_len=32)
        tuned = tune(root / "model", proxies, public, tmp_path / f"tuned-{together}", how)
        after = load_package(tuned.package("news"))
        assert after.keys() == before.keys()
        assert all(np.array_equal(after[leaf], before[leaf]) for leaf in HEAD_LEAVES)
        assert not np.array_equal(after["router"], before["router"])
    run = expert_run(tmp_path, "news", release, expert=str(packages["news"]), domain_vector=None, steps=2)
    further = load_package(train(run))
    assert further.keys() == before.keys()
    assert not np.array_equal(further["head_b"], before["head_b"])
    compress(packages["news"], release, tmp_path / "small", rank="2")
    small = load_package(tmp_path / "small")
    assert all(np.array_equal(small[leaf], before[leaf]) for leaf in HEAD_LEAVES)
    with pytest.raises(ConfigError, match=r"a change of the output head is not made here"):
        compress(packages["news"], release, tmp_path / "none", rank="head=2")


def test_other_formats_refuse_a_head_by_name(heads, tmp_path):
    model = open_model(heads[0] / "model")
    with pytest.raises(ArtifactError, match="the output head is changed by math, news"):
        export(model, tmp_path / "hf")
    with pytest.raises(ArtifactError, match="the output head is changed by news"):
        export_gguf(model, tmp_path / "x.gguf", experts=["news"])
    assert not [*tmp_path.iterdir()]
