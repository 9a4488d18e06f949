"""Every key of a study has a docstring, and impossible studies are refused."""

import dataclasses

import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.mapping import field_docs, from_mapping, to_mapping
from flexmoe_jax.study.config import ABLATIONS, StudyConfig
from tests.study.tiny import CONFIG


def test_every_key_has_a_docstring():
    docs = field_docs(StudyConfig)
    assert list(docs) == [field.name for field in dataclasses.fields(StudyConfig)]
    assert all(len(doc) > 10 for doc in docs.values())


def test_no_public_model_is_none():
    assert CONFIG.public is None
    assert from_mapping(StudyConfig, {**to_mapping(CONFIG), "public": ""}) == CONFIG


def test_ablations_are_chosen_by_name():
    assert CONFIG.chosen_ablations == ABLATIONS
    assert dataclasses.replace(CONFIG, ablations="").chosen_ablations == {}
    chosen = dataclasses.replace(CONFIG, ablations="no bias,random rows").chosen_ablations
    assert chosen == {name: ABLATIONS[name] for name in ("no bias", "random rows")}


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
        {"public_domains": "nws"},
        {"public_domains": "public"},
        {"public_domains": "math,news"},  # news is an owner's
        {"compute_dtype": "float16"},
        {"model": None},
    ],
)
def test_impossible_studies_are_refused(change):
    with pytest.raises(ConfigError, match=f"config.{next(iter(change))}"):
        dataclasses.replace(CONFIG, **change)
