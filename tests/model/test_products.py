"""Products in both of their forms, that of a CPU and the plain one: the definition's numbers, and the compiled program.

Tolerances: float32 sums of some dozens of terms in another order, a few roundings of 6e-8 of the largest entry.
bfloat16 keeps 8 bits: one rounding is 2^-9 = 0.002 of an entry; a result that passes through several roundings (the
projections, the unit between them, the output) stays below 0.02 of the largest entry.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.model import attention, experts, loss, norm, products
from flexmoe_jax.model.decoder import Decoder, hidden_states
from flexmoe_jax.model.router import route
from tests.tiny import TINY, max_difference, random_params, random_tokens

ROUNDING = {"float32": 3e-6, "bfloat16": 0.02}
both_dtypes = pytest.mark.parametrize("dtype", ROUNDING)
N, D, F = 37, 12, 20


@pytest.fixture(params=["a CPU's form", "the plain form"])
def form(request, monkeypatch):
    monkeypatch.setattr(products, "platform", lambda: "cpu" if request.param == "a CPU's form" else "gpu")
    return request.param


def normal(*shape: int, seed: int = 0, scale: float = 1.0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * scale, jnp.float32)


def check(function, definition, arguments, dtype: str, differentiated: tuple[int, ...]):
    """Value and gradients of `function` in `dtype` against those of `definition` in float32, of the same arguments."""
    rounded = [a.astype(dtype) if a.dtype == jnp.float32 else a for a in arguments]
    exact = [a.astype(jnp.float32) if a.dtype == jnp.dtype(dtype) else a for a in rounded]
    mix = normal(*jax.eval_shape(definition, *exact).shape, seed=1)

    def run(f, arguments):
        def scalar(*arguments):
            y = f(*arguments)
            return (y.astype(jnp.float32) * mix).sum(), y

        gradients, y = jax.jit(jax.grad(scalar, differentiated, has_aux=True))(*arguments)
        return [y, *gradients]

    for at, (ours, theirs) in enumerate(zip(run(function, rounded), run(definition, exact), strict=True)):
        assert ours.dtype == jnp.dtype(dtype)
        size = float(jnp.abs(theirs).max())
        assert max_difference(ours.astype(jnp.float32), theirs) < ROUNDING[dtype] * size, at


@both_dtypes
def test_projections_equal_einsum(form, dtype):
    """Three weights of different widths in one group, as of grouped-query attention."""

    def ours(x, q, k, v):
        return jnp.concatenate([y.reshape(N, -1) for y in products.project(x, q, k, v)], -1)

    def definition(x, q, k, v):
        return jnp.concatenate([jnp.einsum("ND,DHK->NHK", x, w).reshape(N, -1) for w in (q, k, v)], -1)

    check(ours, definition, (normal(N, D), normal(D, 4, 5), normal(D, 2, 5), normal(D, 1, 5)), dtype, (0, 1, 2, 3))


@both_dtypes
@pytest.mark.parametrize("width", [5, 30], ids=["y is narrower", "x is narrower"])
def test_row_sums_equal_einsum(form, dtype, width):
    """With leading axes; in both orders of width, of which the narrower operand is transposed."""
    x, y = normal(2, N, D).astype(dtype), normal(2, N, width, seed=2).astype(dtype)
    ours = jax.jit(lambda x, y: products.row_sums(x, y, jnp.float32))(x, y)
    exact = jnp.einsum("BND,BNF->BDF", *(a.astype(jnp.float32) for a in (x, y)))
    assert ours.dtype == jnp.float32
    assert max_difference(ours, exact) < 3e-6 * float(jnp.abs(exact).max())  # sums are float32 in both dtypes


@both_dtypes
def test_the_gated_unit_equals_its_definition(form, dtype):
    def definition(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    weights = (normal(D, F, scale=0.3), normal(D, F, seed=3, scale=0.3), normal(F, D, scale=0.3))
    check(experts.ffn, definition, (normal(N, D), *weights), dtype, (0, 1, 2, 3))


@both_dtypes
def test_rms_norm_equals_its_definition(form, dtype):
    def definition(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) * weight

    check(lambda x, w: norm.rms_norm(x, w, 1e-2), definition, (normal(3, N, D), normal(D)), dtype, (0, 1))


@both_dtypes
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_masked_softmax(form, monkeypatch, dtype, groups):
    monkeypatch.setattr(attention, "MIN_BLOCK", 8)
    segments = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, N)) < 0.1, axis=1), jnp.int32)
    mask = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((N, N), bool))

    def definition(q, k, v):
        return attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)

    qkv = (normal(2, N, 4, 8), normal(2, N, groups, 8, seed=1), normal(2, N, groups, 8, seed=2))
    check(lambda *qkv: attention.attend_documents(*qkv, segments), definition, qkv, dtype, (0, 1, 2))


@both_dtypes
def test_the_loss_has_the_gradients_of_its_definition(form, dtype):
    targets, weights = jnp.arange(N)[None] % F, jnp.abs(normal(1, N))

    def definition(x, head):
        logits = x @ head
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weights * nll).sum()

    x, head = normal(1, N, D).astype(dtype), normal(D, F).astype(dtype)
    ours = jax.jit(jax.grad(lambda *a: loss.next_token_loss(a[0], a[1:], targets, weights)[0], (0, 1)))(x, head)
    exact = jax.grad(definition, (0, 1))(x.astype(jnp.float32), head.astype(jnp.float32))
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        assert max_difference(mine.astype(jnp.float32), theirs) < ROUNDING[dtype] * float(jnp.abs(theirs).max())


def test_weights_as_bits_give_the_numbers_of_the_weights_and_have_no_gradient():
    x, (gate, up, down) = normal(N, D).astype(jnp.bfloat16), (normal(*s).astype(jnp.bfloat16) for s in SHAPES)

    def gradient(*weights):
        run = jax.value_and_grad(lambda x: experts.ffn(x, *weights).astype(jnp.float32).sum())
        return jax.jit(run)(x)

    as_bits = gradient(*map(products.as_bits, (gate, up, down)))
    assert products.as_bits(gate).dtype == jnp.uint16
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), as_bits, gradient(gate, up, down)))


SHAPES = ((D, F), (D, F), (F, D))


@functools.cache
def step_program() -> tuple[str, str]:
    """(traced, compiled) gradient of a bfloat16 model of 2 layers: one expert is trained in float32, not the rest."""
    params = random_params(TINY, ("public", "news"))
    frozen = jax.tree.map(lambda w: products.as_bits(w.astype(jnp.bfloat16)), params["trunk"]["blocks"])
    names = [name for name in frozen if not name.startswith("w_")]
    frozen |= {name: params["trunk"]["blocks"][name] for name in names}
    tokens = random_tokens(TINY, 2, 32)

    def total(mine):
        tree = {"trunk": {**params["trunk"], "blocks": frozen}, "experts": {**params["experts"], "news": mine}}
        x, _ = hidden_states(Decoder(TINY, dtype="bfloat16"), tree, tokens)
        return loss.next_token_loss(x, (tree["trunk"]["head"],), tokens, jnp.ones(tokens.shape))[0]

    gradient = jax.jit(jax.grad(total))
    lowered = gradient.lower(params["experts"]["news"])
    return str(jax.make_jaxpr(gradient)(params["experts"]["news"])), lowered.compile().as_text()


def test_every_product_of_a_step_in_bfloat16_has_a_float32_result():
    traced, _ = step_program()
    results = re.findall(r":(\w+)\[[^\]]*\] = dot_general\[", traced)
    assert len(results) > 30
    assert set(results) == {"f32"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for CPUs")
def test_no_operand_of_a_bfloat16_product_is_read_along_its_leading_axis():
    """XLA multiplies rows by columns or rows by rows fast. The router's gradient, of a few rows, may be otherwise."""
    _, compiled = step_program()
    found = re.findall(r"= f32\[([\d,]*)\]\S* dot\(.*?lhs_contracting_dims=\{(\d)\}(?!.*N[ED],)", compiled)
    assert len(found) > 30
    assert all(int(axis) == shape.count(",") for shape, axis in found)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for CPUs")
def test_no_stack_of_frozen_bfloat16_matrices_is_converted():
    """A loop over layers takes one layer's slice; without bits XLA converts the stack of all layers first."""
    L, width, heads = TINY.num_layers, TINY.d_model, TINY.num_heads * TINY.head_dim
    stacks = {f"f32[{L},{width},{TINY.num_heads},{TINY.head_dim}]", f"f32[{L},{width},{heads}]"}
    _, compiled = step_program()
    converted = set(re.findall(r"= (f32\[[\d,]*\])\S* (?:convert|fusion)\(", compiled))
    assert not converted & stacks


@both_dtypes
def test_sparse_dispatch_equals_its_definition(form, monkeypatch, dtype):
    """Values and gradients; tiles that do not divide an expert's rows."""
    monkeypatch.setattr(experts, "MIN_TILE_ROWS", 8)
    monkeypatch.setitem(experts.GROUPED, "gpu", experts._tiled)
    shapes = {"w_gate": (3, D, F), "w_up": (3, D, F), "w_down": (3, F, D)}
    weights = [normal(*shape, seed=at, scale=0.3) for at, shape in enumerate(shapes.values())]
    routing = route(normal(N, 3), 2)

    def ours(x, *weights):
        return experts.sparse(x, routing, dict(zip(shapes, weights, strict=True)))

    def definition(x, gate, up, down):
        hidden = jax.nn.silu(jnp.einsum("ND,EDF->ENF", x, gate)) * jnp.einsum("ND,EDF->ENF", x, up)
        return jnp.einsum("NE,ENF,EFD->ND", routing.weights_NE, hidden, down)

    check(ours, definition, (normal(N, D), *weights), dtype, (0, 1, 2, 3))
