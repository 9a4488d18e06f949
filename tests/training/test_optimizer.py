"""The bytes that optimizers keep per parameter, and that they train with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training.optimizer import make_optimizer

L, D, F = 3, 128, 256
PARAMS = {"w_up": jnp.zeros((L, D, F)), "bias": jnp.zeros(L)}
FACTORED = {"second_moment": "factored"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8),
        ({"first_moment": "bfloat16"}, 6),
        (FACTORED, 4),
        (FACTORED | {"first_moment": "bfloat16"}, 2),
        (FACTORED | {"b1": 0.0}, 0),
    ],
)
def test_moments_take_the_stated_bytes_per_parameter(changes, expected):
    """In addition only means of rows and columns, the moments of biases, and counters: 4 bytes each."""
    state = make_optimizer(OptimizerConfig(**changes), 10).init(PARAMS)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    small = 4 * (L * (D + F) + 3 * L + 10)
    assert 0 <= size - expected * L * D * F <= small


def test_updates_equal_adamw_written_by_hand():
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64, of gradients clipped to norm 3.

    Five steps, of which the second and fourth are clipped; every number of the configuration differs from its default.
    Tolerance: float32 moments.
    """
    config = OptimizerConfig(
        lr=0.1, warmup_steps=0, end_lr_fraction=1.0, b1=0.7, b2=0.9, eps=0.05, weight_decay=0.5, clip_norm=3.0
    )
    optimizer, rng = make_optimizer(config, 5), np.random.default_rng(0)
    w = rng.normal(size=(2, 3, 4))
    params = {"w_up": jnp.asarray(w, jnp.float32)}
    state = optimizer.init(params)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 6):
        g = rng.normal(size=w.shape)
        g *= (1.0 if t % 2 else 30.0) / np.linalg.norm(g)
        updates, state = optimizer.update({"w_up": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g *= min(1.0, 3.0 / np.linalg.norm(g))
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.7**t) / (np.sqrt(v / (1 - 0.9**t)) + 0.05) + 0.5 * w)
        np.testing.assert_allclose(params["w_up"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, FACTORED])
def test_a_huge_gradient_moves_as_far_as_the_clipped_one(changes):
    """The second of two steps: AdamW's first step has the same length for any gradient. Tolerance: float32."""
    config = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1.0, **changes)
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(L, D, F)).astype(np.float32) for _ in range(2))
    second /= np.linalg.norm(second)
    moved = []
    for scale in (1.0, 1e4):
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(PARAMS)
        for gradient in (first, scale * second):
            grads = {"w_up": jnp.asarray(gradient), "bias": jnp.zeros(L)}
            updates, state = optimizer.update(grads, state, PARAMS)
        moved.append(np.asarray(updates["w_up"]))
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, FACTORED])
def test_a_weight_without_gradient_shrinks_by_its_decay(changes):
    """By the learning rate times the decay; without a decay it stays."""
    params = {"w_up": jnp.asarray(np.random.default_rng(0).normal(size=(L, D, F)), jnp.float32)}
    still = {"w_up": jnp.zeros((L, D, F))}
    for decay in (0.5, 0.0):
        config = OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=decay, **changes)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(still, optimizer.init(params), params)
        np.testing.assert_allclose(updates["w_up"], -0.1 * decay * params["w_up"], rtol=1e-6)


def test_a_factored_update_equals_adafactors():
    """Shazeer and Stern, arXiv 1804.04235, algorithm 4, computed by hand; the first step has no decay.

    Tolerance: float32 means of 256 squares, summed in another order.
    """
    config = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1e9, b1=0.0, second_moment="factored")
    optimizer = make_optimizer(config, 10)
    grad = np.random.default_rng(0).normal(size=(L, D, F)).astype(np.float32)
    grads = {"w_up": jnp.asarray(grad), "bias": jnp.ones(L)}
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    square = grad.astype(np.float64) ** 2
    rows, columns = square.mean(2, keepdims=True), square.mean(1, keepdims=True)
    expected = grad / np.sqrt(rows * columns / square.mean((1, 2), keepdims=True))
    expected /= max(1, np.sqrt((expected**2).mean()))
    np.testing.assert_allclose(updates["w_up"], -0.1 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"first_moment": "bfloat16"}, FACTORED, FACTORED | {"first_moment": "bfloat16"}])
def test_a_least_squares_problem_is_solved(changes):
    """As AdamW does: the loss falls to a hundredth. A first moment in bfloat16 is rounded by 0.4%."""
    key = jax.random.key(0)
    x, target = jax.random.normal(key, (512, D)), jax.random.normal(jax.random.fold_in(key, 1), (D, F))

    def loss(w):
        return jnp.mean((x @ (w - target)) ** 2)

    optimizer = make_optimizer(OptimizerConfig(lr=0.1, warmup_steps=1, **changes), 200)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros((D, F))
    state = optimizer.init(w)
    for _ in range(200):
        w, state = step(w, state)
    assert loss(w) < loss(jnp.zeros_like(w)) / 100


@pytest.mark.parametrize(("name", "value"), [("first_moment", "float16"), ("second_moment", "none")])
def test_unknown_moments_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        OptimizerConfig(**{name: value})
