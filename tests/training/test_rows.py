"""Router rows by discriminants: what they compute, and that training starts from them."""

import dataclasses
import json
import logging
import pathlib

import numpy as np
import pytest

from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training import loop, rows
from flexmoe_jax.tree import PUBLIC
from tests.tiny import expert_run, random_release, write_documents

GENERATIVE = {"router": "generative", "public_fraction": 0.5, "router_contrast": 0.1}


@pytest.fixture
def run(tmp_path):
    """An owner's run whose rows and biases are not trained: its product has those that it starts with."""
    release, _ = random_release(tmp_path)
    held = OptimizerConfig(lr=1e-2, warmup_steps=1, groups=".*/(router|bias) lr=0")
    public = str(write_documents(tmp_path / "public", "public"))
    return expert_run(tmp_path, "news", release, public_data=public, optimizer=held, **GENERATIVE)


def first_line(run) -> dict:
    loop.train(run)
    [line, *_] = (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_rows_tell_the_texts_apart_before_the_first_step(run):
    """In every layer of a model of random weights; the row of a domain vector does not, in some layer."""
    found = first_line(run)
    assert min(found["router_accuracy"]) > 0.65  # words are of a few tokens, some of which both texts have
    other = first_line(dataclasses.replace(run, router="trained", out=f"{run.out}-trained"))
    assert min(other["router_accuracy"]) < 0.65
    # Odds that are calibrated are never much worse than none, and better where they tell something: ln 2 is no odds.
    assert found["router_contrast"] < 0.65


def test_directions_are_those_of_linear_discriminant_analysis():
    """Against scikit-learn, with the same shrinkage, on inputs of two texts in two layers."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = np.random.default_rng(0)
    mixing, both = generator.standard_normal((2, 6, 6)), 5 * generator.standard_normal((2, 1, 6))
    own = np.einsum("lde,lne->lnd", mixing, generator.standard_normal((2, 500, 6))) + both + 1
    public = np.einsum("lde,lne->lnd", mixing, generator.standard_normal((2, 500, 6))) + both
    square = (np.einsum("lnd,lne->lde", own, own) + np.einsum("lnd,lne->lde", public, public)) / 1000
    found = rows._directions(own.mean(1), public.mean(1), square)
    for layer in range(2):
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=rows.SHRINKAGE)
        peer.fit(np.concatenate([public[layer], own[layer]]), np.repeat([0, 1], 500))
        # scikit-learn shrinks after it has scaled inputs to unit deviation; only the direction is compared.
        cosine = found[layer] @ peer.coef_[0] / np.linalg.norm(found[layer]) / np.linalg.norm(peer.coef_[0])
        assert cosine > 0.99


def test_directions_are_exact_where_means_and_variances_differ_much():
    """Against float64: inputs of a finished model have means above their deviations, and a few large directions."""
    generator = np.random.default_rng(3)
    own_LD, public_LD = 30 + generator.standard_normal((2, 3, 64))
    mixing_LDD = generator.standard_normal((3, 64, 64)) * 10.0 ** generator.uniform(-2, 1, (3, 1, 64))
    within_LDD = mixing_LDD @ mixing_LDD.swapaxes(1, 2)
    square_LDD = (
        within_LDD + (np.einsum("ld,le->lde", own_LD, own_LD) + np.einsum("ld,le->lde", public_LD, public_LD)) / 2
    )
    variance_L = np.trace(within_LDD, axis1=1, axis2=2) / 64
    shrunk_LDD = (1 - rows.SHRINKAGE) * within_LDD + rows.SHRINKAGE * variance_L[:, None, None] * np.eye(64)
    expected_LD = np.linalg.solve(shrunk_LDD, (own_LD - public_LD)[..., None])[..., 0]
    found_LD = np.asarray(rows._directions(*map(np.float32, (own_LD, public_LD, square_LDD))))
    # The residual, 1e-5, and the rounding of squares to float32 grow by at most the condition, 64 / SHRINKAGE.
    assert np.linalg.norm(found_LD - expected_LD, axis=1) == pytest.approx(
        np.zeros(3), abs=1e-2 * np.linalg.norm(expected_LD, axis=1).min()
    )


def test_odds_are_those_of_logistic_regression_on_texts_of_equal_weight():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(1)
    scores = np.concatenate([generator.normal(30, 8, 300), generator.normal(10, 12, 900)])
    own = np.arange(1200) < 300
    factor, constant, accuracy = rows.fit_odds(scores, own)
    peer = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], own)
    # The penalty of 1e-4 on the slope of standardized scores, of which these have 2.3, moves it by a hundredth at most.
    assert factor == pytest.approx(peer.coef_[0, 0], rel=1e-2)
    assert constant == pytest.approx(peer.intercept_[0], rel=1e-2)
    right = (factor * scores + constant > 0) == own
    assert accuracy == pytest.approx((right[own].mean() + right[~own].mean()) / 2)


def test_separable_scores_have_finite_odds():
    factor, constant, accuracy = rows.fit_odds(np.array([3.0, 4.0, -1.0, -2.0]), np.array([True, True, False, False]))
    assert np.isfinite([factor, constant]).all()
    assert factor > 0
    assert accuracy == 1


def test_the_owners_prior_shifts_the_bias_and_no_bias_is_above_0(run):
    plain = load_package(loop.train(run))
    shifted = load_package(loop.train(dataclasses.replace(run, bias_init=-50.0, out=f"{run.out}-shifted")))
    assert (plain["bias"] <= 0).all()
    np.testing.assert_array_equal(plain["router"], shifted["router"])
    assert (shifted["bias"] <= plain["bias"] - 49).all()  # a constant above 0 takes a part of the shift


def test_rows_are_computed_once_and_a_resumed_run_has_the_same(run, monkeypatch):
    """Also where the rows are frozen: no checkpoint holds them then."""
    run = dataclasses.replace(run, freeze=".*/(router|bias)", optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1))
    whole = load_package(loop.train(dataclasses.replace(run, out=f"{run.out}-whole")))
    make = loop.make_train_step

    def failing(*args):
        step, calls = make(*args), iter(range(100))

        def counted(*inputs):
            if next(calls) == 4:
                raise RuntimeError("a crash")
            return step(*inputs)

        return counted

    monkeypatch.setattr(loop, "make_train_step", failing)
    with pytest.raises(RuntimeError, match="a crash"):
        loop.train(run)
    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(rows, "_discriminants", lambda *_: pytest.fail("computed again"))
    resumed = load_package(loop.train(run))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert not np.allclose(whole["router"], load_package(pathlib.Path(run.public) / PUBLIC)["router"])


def test_rows_of_a_start_that_saved_nothing_are_made_again_and_damaged_ones_are_refused(run):
    """Such a folder may be used for other text: what it holds then is not this run's."""
    pathlib.Path(run.out).mkdir(parents=True)
    kept = pathlib.Path(run.out, "rows.npz")
    kept.write_bytes(b"of another run")
    package = load_package(loop.train(run))
    with np.load(kept) as rows_of_run:
        np.testing.assert_array_equal(rows_of_run["router"], package["router"])
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole.replace(whole[200:210], bytes(10))):
        kept.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"rows\.npz cannot be read"):
            rows._read(kept)


@pytest.mark.parametrize("changes", [{"public_data": None, "public_fraction": 0.0}, {"coordinate": False}])
def test_rows_need_public_text_and_the_public_expert(run, changes):
    with pytest.raises(ConfigError, match=r"config\.router is 'generative'"):
        dataclasses.replace(run, router_contrast=0.0, **changes)


def test_a_layer_at_chance_is_named(caplog):
    caplog.set_level(logging.INFO)
    rows._say(np.array([0.9, 0.52, 0.8]))
    assert "public text in layer 1 (at most 60%" in caplog.text


def test_a_run_whose_router_is_at_chance_says_so_at_its_end(run, caplog):
    """The row of a domain vector is at chance in the first layer, and is not trained."""
    caplog.set_level(logging.INFO)
    loop.train(dataclasses.replace(run, router="trained"))
    *_, last = (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()
    accuracy = json.loads(last)["router_accuracy"]
    weak = [str(layer) for layer, found in enumerate(accuracy) if found <= 0.6]
    assert "0" in weak
    assert caplog.text.count(f"public text in layer {', '.join(weak)} (at most 60%") == 1
