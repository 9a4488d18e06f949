"""The bootstrap is exact without noise, paired, and as wide as theory says."""

import dataclasses

import numpy as np
import pytest

from flexmoe_jax.study.intervals import Bootstrap, Interval, summary


def test_the_value_is_of_all_documents_and_constant_data_has_no_width():
    bootstrap = Bootstrap(2, {"news": 5})
    result = summary(bootstrap.ratio("news", np.full((2, 5), 3.0), np.full(5, 2.0)))
    assert result == Interval(1.5, 1.5, 1.5)


def test_a_ratio_of_sums_not_a_mean_of_ratios():
    values = Bootstrap(1, {"news": 2}).ratio("news", [[1.0, 9.0]], np.array([1.0, 3.0]))
    assert values[0] == 10 / 4


def test_an_interval_leaves_out_a_fortieth_at_either_end():
    """The first value is that of all documents; the others, here 0 to 1000 in any order, are its resamples."""
    values = np.concatenate([[2000.0], np.random.default_rng(0).permutation(1001)])
    assert summary(values) == Interval(2000.0, 25.0, 975.0)


def test_differences_are_paired():
    """A system that is worse by a constant everywhere is worse by it in every resample, however documents vary."""
    rng = np.random.default_rng(0)
    bootstrap, nats, size = Bootstrap(3, {"news": 40}), rng.normal(5, 2, (3, 40)), np.ones(40)
    difference = summary(bootstrap.ratio("news", nats + 0.25, size) - bootstrap.ratio("news", nats, size))
    assert dataclasses.astuple(difference) == pytest.approx((0.25, 0.25, 0.25), rel=1e-9)


def test_the_interval_is_that_of_a_mean_of_documents():
    """One seed, 400 documents of standard deviation 1: half the interval is 1.96 / sqrt(400), to 15% (1000 draws)."""
    nats = np.random.default_rng(1).standard_normal((1, 400))
    result = summary(Bootstrap(1, {"news": 400}).ratio("news", nats, np.ones(400)))
    assert result.half_width == pytest.approx(1.96 / 20, rel=0.15)


def test_seeds_that_differ_widen_it():
    same, different = np.zeros((3, 9)), np.repeat([[0.0], [1.0], [2.0]], 9, axis=1)
    bootstrap = Bootstrap(3, {"news": 9})
    widths = [summary(bootstrap.ratio("news", nats, np.ones(9))) for nats in (same, different)]
    assert widths[0].half_width == 0
    assert widths[1].half_width > 0.5
