"""A folder keeps to one study, and a varied study shares what does not depend on the number."""

import dataclasses
import pathlib
import types

import pytest

from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.study import config as study_config
from flexmoe_jax.study import reproduce as study
from flexmoe_jax.study import train
from flexmoe_jax.study.reproduce import check_same, vary
from flexmoe_jax.study.results import read_results
from tests.study import tiny
from tests.study.tiny import CONFIG


def test_a_folder_of_another_study_is_refused_and_more_seeds_are_not(tmp_path):
    check_same(CONFIG, tmp_path)
    check_same(dataclasses.replace(CONFIG, seeds=5, ablations=""), tmp_path)
    with pytest.raises(ArtifactError, match="heldout_bytes: 40000 != 7"):
        check_same(dataclasses.replace(CONFIG, heldout_bytes=7), tmp_path)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("domains", ["math"], "config.domains cannot be varied"),
        ("owner_stps", ["1"], "config.owner_stps cannot be varied"),
        ("owner_steps", ["1", "x"], "owner_steps is varied over 1, x"),
        ("owner_steps", ["0"], "config.owner_steps is 0"),
        ("public_steps", ["1"], "config.public is 'here' and config.public_steps is varied"),
        ("public_share", ["0.1"], "config.public is 'here' and config.public_share is varied"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_is_written(key, values, message, tmp_path):
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "out"), public="here")
    with pytest.raises(ConfigError, match=message):
        vary(config, key, values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "own"), [("public_share", True), ("embed_count", True), ("owner_steps", False)])
def test_a_varied_study_has_text_and_vectors_of_its_own_where_they_depend_on_the_number(
    key, own, tmp_path, monkeypatch
):
    given = []

    def reproduce(config, shared):
        given.append((config.public, shared))
        return tiny.results(pathlib.Path(config.out).name)

    monkeypatch.setattr(study, "make_shared", lambda config, shared: None)
    monkeypatch.setattr(study, "train_public", lambda config, shared, home: shared / "public")
    monkeypatch.setattr(study, "reproduce", reproduce)
    values = ["0.1", "0.2"] if key == "public_share" else ["5", "6"]
    results = vary(dataclasses.replace(CONFIG, out=str(tmp_path)), key, values)
    assert given == [(None, None) if own else (str(tmp_path / "public"), tmp_path)] * 2
    assert list(results) == values
    written = read_results(tmp_path / f"{key}.jsonl")
    assert [one.study for one in written] == [f"{key}-{value}" for value in values]


def test_a_given_public_model_of_another_shape_is_refused(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, public="here")
    for module in (train, study_config):
        monkeypatch.setattr(module, "open_model", lambda path: types.SimpleNamespace(config=config.model))
    shapeless = dataclasses.replace(config, model=None)
    assert shapeless.shape == config.model
    for given in (config, shapeless):
        assert train.train_public(given, tmp_path, tmp_path) == pathlib.Path("here")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=9))
    with pytest.raises(ConfigError, match=r"another shape than config\.model: d_ff: 8 != 9"):
        train.train_public(other, tmp_path, tmp_path)
