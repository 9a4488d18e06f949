"""A low-rank change of the public expert is what its matrices added up are: in values, gradients and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.artifacts.low_rank import ChangedLeaf, whole_expert
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.decoder import Decoder, forward
from flexmoe_jax.model.experts import changed_ffn, ffn
from flexmoe_jax.params import FFN_WEIGHTS, count_parameters, factors, owner_leaves, ranks_of, read_ranks
from tests.tiny import MODEL, max_difference, random_params

RANKS = {"w_gate": 2, "w_down": 3}  # w_up is whole


def low_rank_expert(ranks=RANKS, seed: int = 5, zero: bool = False):
    """Random leaves of an expert with these ranks; B is 0 with `zero`."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: rng.standard_normal(leaf.shape).astype(np.float32) * (leaf.std or 0.3)
        for path, leaf in owner_leaves(MODEL, "news", ranks).items()
    }
    leaves["bias"] = -np.abs(leaves["bias"])
    return {path: np.zeros_like(leaf) if zero and path.endswith("_b") else leaf for path, leaf in leaves.items()}


def with_expert(expert):
    params = random_params(MODEL)
    return {**params, "experts": {**params["experts"], "news": expert}}


def logits(params, **how):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 24)), jnp.int32)
    return forward(Decoder(MODEL, **how), params, tokens).logits_BTV


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_that_of_the_matrices_added_up(dtype):
    params = with_expert(low_rank_expert())
    experts = params["experts"]
    whole = with_expert(whole_expert("news", experts["news"], experts["public"]))
    assert logits(whole).shape == logits(params).shape
    # The same matrices, made by XLA and by NumPy in float32: rounding, in bfloat16 of one matrix entry in a thousand.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert max_difference(logits(params, dtype=dtype), logits(whole, dtype=dtype)) < tolerance
    assert max_difference(logits(whole, dtype=dtype), logits(with_expert(experts["public"]), dtype=dtype)) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_of_zero_is_the_public_expert_bit_for_bit(dtype):
    params = with_expert(low_rank_expert(dict.fromkeys(FFN_WEIGHTS, 2), zero=True))
    experts = params["experts"]
    rows = {leaf: experts["news"][leaf] for leaf in ("router", "bias")}
    same = with_expert({**experts["public"], **rows})
    assert np.array_equal(logits(params, dtype=dtype), logits(same, dtype=dtype))
    made = whole_expert("news", experts["news"], experts["public"])
    assert all(np.array_equal(made[name], experts["public"][name]) for name in FFN_WEIGHTS)


def test_gradients_are_those_of_automatic_differentiation_and_that_of_the_public_matrix_is_not_taken():
    rng = np.random.default_rng(1)
    x_ND, mix_ND = jnp.asarray(rng.standard_normal((2, 7, 4)), jnp.float32)
    w_gate, w_up, w_down = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 6), (4, 6), (6, 4)))
    a, b, down_a, down_b = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 2), (2, 6), (6, 3), (3, 4))
    )

    def ours(x, w_up, a, b, down_a, down_b):
        return (changed_ffn(x, ((w_gate, a, b), (w_up,), (w_down, down_a, down_b))) * mix_ND).sum()

    def theirs(x, w_up, a, b, down_a, down_b):
        return (ffn(x, w_gate + a @ b, w_up, w_down + down_a @ down_b) * mix_ND).sum()

    arguments = (x_ND, w_up, a, b, down_a, down_b)
    found, expected = (jax.grad(f, argnums=range(6))(*arguments) for f in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert max_difference(one, other) < 1e-4 * float(jnp.abs(other).max())  # float32 sums in another order
    public = jax.grad(lambda w: changed_ffn(x_ND, ((w, a, b), (w_up,), (w_down, down_a, down_b))).sum())(w_gate)
    assert not public.any()


def test_the_derivative_keeps_no_matrix():
    """Between its passes a training step holds the matrices that it was given, which all steps share, and not a sum."""
    D, F, N, r = 32, 48, 5, 2
    rng = np.random.default_rng(2)
    shapes = {"x": (N, D), "up": (D, F), "gate": (D, F), "down": (F, D), "a": (D, r), "b": (r, F)}
    x, up, gate, down, a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes.values())
    _, pull = jax.vjp(lambda x, a, b: changed_ffn(x, ((gate, a, b), (up,), (down,))), x, a, b)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == D * F]
    given = [matrix.tobytes() for matrix in (gate, up, down)]
    assert len(kept) == 3
    assert all(np.asarray(leaf).tobytes() in given for leaf in kept)


@pytest.mark.parametrize(
    "index", [1, (slice(0, 1), slice(2, 5), slice(None)), (slice(None), slice(None), slice(1, 3)), slice(None)]
)
def test_slices_of_a_mapped_matrix_are_those_of_the_whole_one(index):
    params = with_expert(low_rank_expert())
    public, expert = params["experts"]["public"], params["experts"]["news"]
    leaf = ChangedLeaf("w_down of news", public["w_down"], expert["w_down_a"], expert["w_down_b"])
    whole = np.asarray(leaf)
    assert whole.shape == leaf.shape == public["w_down"].shape
    assert np.allclose(leaf[index], whole[index], atol=1e-6)  # products of parts, in another order
    assert np.allclose(whole, public["w_down"] + expert["w_down_a"] @ expert["w_down_b"], atol=1e-6)


def test_ranks_are_read_strictly_and_found_again_in_the_leaves():
    assert read_ranks("4", MODEL) == dict.fromkeys(FFN_WEIGHTS, 4)
    assert read_ranks(" w_down = 3, w_gate=2", MODEL) == {"w_down": 3, "w_gate": 2}
    for ranks in (RANKS, dict.fromkeys(FFN_WEIGHTS, 1), {}):
        assert ranks_of(owner_leaves(MODEL, "news", ranks)) == ranks
    most = min(MODEL.d_model, MODEL.d_ff)
    for text in ("", "0", "-1", "1.5", "w_q=2", "w_gate=2,w_gate=3", "w_gate=", "w_gate", str(most + 1)):
        with pytest.raises(ConfigError, match=f"give a rank from 1 to {most}"):
            read_ranks(text, MODEL)
    leaves = owner_leaves(MODEL, "news", dict.fromkeys(FFN_WEIGHTS, 2))
    assert sum(np.prod(leaf.shape) for leaf in leaves.values()) < count_parameters(MODEL, "news") / 2
    assert {name for matrix in FFN_WEIGHTS for name in factors(matrix)} < {*leaves}
    assert not dataclasses.asdict(leaves["w_up_b"])["std"]
