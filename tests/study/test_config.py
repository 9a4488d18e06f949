"""Every key of a study has a docstring, and impossible studies are refused."""

import dataclasses
import itertools

import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.mapping import field_docs, from_mapping, to_mapping
from flexmoe_jax.study.config import ABLATIONS, Experts, StudyConfig
from tests.study.tiny import CONFIG


def test_every_key_has_a_docstring():
    docs = field_docs(StudyConfig)
    assert list(docs) == [field.name for field in dataclasses.fields(StudyConfig)]
    assert all(len(doc) > 10 for doc in docs.values())


def test_no_public_model_is_none():
    assert CONFIG.public is None
    assert from_mapping(StudyConfig, {**to_mapping(CONFIG), "public": ""}) == CONFIG


def test_ablations_are_chosen_by_name():
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.shape, d_model=64, d_ff=96))
    assert wide.chosen_ablations == ABLATIONS
    assert ABLATIONS.keys() - CONFIG.chosen_ablations.keys() == {
        "rank 16",
        "rank 64",
        "head 32",
    }  # its matrices are 8 wide
    assert dataclasses.replace(CONFIG, ablations="").chosen_ablations == {}
    chosen = dataclasses.replace(CONFIG, ablations="no bias,random rows").chosen_ablations
    assert chosen == {name: ABLATIONS[name] for name in ("no bias", "random rows")}


def test_ablations_have_every_feasible_combination_of_four_factors_once():
    """Contrast tells own text from public text beside the public expert: it needs both."""
    methods = [how for name, how in ABLATIONS.items() if "paper" in name]
    found = [(how.coordinate, how.public_text, how.contrast, how.router_scale is None) for how in methods]
    assert not any(how.generative for how in methods)
    every = itertools.product((True, False), repeat=4)
    assert sorted(found) == sorted(row for row in every if not row[2] or (row[0] and row[1]))
    assert len(found) == 10
    paper = Experts(public_text=False, contrast=False, generative=False, router_scale=1.0)
    assert ABLATIONS["the paper's training"] == paper
    name = "paper without coordination + public text + small rows"
    assert ABLATIONS[name] == Experts(coordinate=False, contrast=False, generative=False)


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 0},
        {"domains": "nws"},
        {"domains": "public"},
        {"top_k": 3},
        {"systems": "some"},
        {"public_share": 0.6},
        {"router_scale": 0.0},
        {"ablations": "no biases"},
        {"leave_out": "("},
        {"public_domains": "nws"},
        {"public_domains": "public"},
        {"public_domains": "math,news"},  # news is an owner's
        {"compute_dtype": "float16"},
        {"rates": "1e-3,x"},
        {"rates": "1e-3,0"},
        {"rates": "1e-3,0.001"},
        {"rates": ""},
        {"model": None},
    ],
)
def test_impossible_studies_are_refused(change):
    with pytest.raises(ConfigError, match=f"config.{next(iter(change))}"):
        dataclasses.replace(CONFIG, **change)
