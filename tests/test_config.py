"""Configurations: refused values and their messages, the round trip, differences, and digests."""

import dataclasses
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.artifacts.sealed import differences, digest
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError, FlexMoEError
from flexmoe_jax.experiment import REQUIRED, keys_of, read_config
from flexmoe_jax.json_files import canonical_json
from flexmoe_jax.mapping import field_docs, from_mapping, to_mapping
from flexmoe_jax.model_config import ModelConfig, RopeScaling
from flexmoe_jax.optimizer_config import OptimizerConfig
from tests.tiny import CONFIG, TINY

MODEL = to_mapping(TINY)
RUN = {
    "owner": "public",
    "data": "d",
    "out": "o",
    "steps": 3,
    "batch_size": 4,
    "seq_len": 8,
    "model": MODEL,
    "domain_vector": "v",
}


def refused(values: dict, what: str, remedy: str, cls=RunConfig):
    with pytest.raises(ConfigError) as caught:
        from_mapping(cls, values)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


def test_unknown_keys_name_the_nearest_known_one():
    refused({**RUN, "stesp": 4}, "unknown key config.stesp", "did you mean 'steps'?")
    refused({**RUN, "optimizer": {"learning": 1}}, "unknown key config.optimizer.learning", "warmup_steps")
    refused({**RUN, "model": {**MODEL, "d_modle": 4}}, "unknown key config.model.d_modle", "'d_model'")


def test_missing_keys_name_their_type():
    refused({k: v for k, v in RUN.items() if k != "steps"}, "config.steps is not set", "add config.steps (int)")
    refused({k: v for k, v in RUN.items() if k != "data"}, "config.data is not set", "add config.data (str)")
    model = {k: v for k, v in MODEL.items() if k != "d_ff"}
    refused({**RUN, "model": model}, "config.model.d_ff is not set", "add config.model.d_ff (int)")


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("steps", "3", "int"),
        ("steps", 3.0, "int"),
        ("steps", True, "int"),
        ("steps", None, "int"),
        ("z_loss", "0.1", "float"),
        ("z_loss", True, "float"),
        ("remat", 1, "bool"),
        ("data", 5, "str"),
    ],
)
def test_mistyped_values_are_refused(key, value, kind):
    refused({**RUN, key: value}, f"config.{key} is {value!r} ({type(value).__name__})", f"a value of type {kind}")


def test_paths_may_be_path_objects_and_are_kept_as_strings():
    paths = {"data": pathlib.Path("d"), "out": pathlib.Path("o"), "domain_vector": pathlib.Path("v")}
    assert RunConfig(**{**RUN, "model": TINY, **paths}) == from_mapping(RunConfig, RUN)


def test_a_section_must_be_a_mapping():
    refused({**RUN, "optimizer": 3}, "config.optimizer is 3", "nested section")


def test_an_int_is_converted_where_the_field_is_a_float():
    run = from_mapping(RunConfig, {**RUN, "z_loss": 1, "optimizer": {"lr": 2}})
    assert (run.z_loss, run.optimizer.lr) == (1.0, 2.0)
    assert type(run.z_loss) is type(run.optimizer.lr) is float


def test_keys_left_out_have_their_defaults_and_an_optional_section_may_be_none():
    run = from_mapping(RunConfig, {**RUN, "owner": "news", "public": "p", "model": None})
    assert run.model is None
    assert run.optimizer == OptimizerConfig()
    assert not run.is_public


@given(
    lr=st.floats(1e-6, 1),
    theta=st.floats(1, 1e7),
    layers=st.integers(1, 99),
    groups=st.integers(1, 4),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32 - 1),
)
def test_configurations_survive_a_round_trip_through_json(lr, theta, layers, groups, flags, seed):
    names = ("norm_topk", "qk_norm", "tie_embeddings")
    model = ModelConfig(
        **{**MODEL, "num_layers": layers, "num_kv_heads": groups, "num_heads": 2 * groups, "rope_theta": theta},
    )
    model = dataclasses.replace(model, **dict(zip(names, flags, strict=True)))
    run = RunConfig(**{**RUN, "model": model, "optimizer": OptimizerConfig(lr=lr), "seed": seed})
    text = json.dumps(to_mapping(run))
    assert from_mapping(RunConfig, json.loads(text)) == run
    assert digest(run) == digest(json.loads(text))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"num_heads": 5}, "num_heads 5 is not a multiple of model.num_kv_heads 2"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_impossible_shapes_are_refused(change, what):
    with pytest.raises(ConfigError, match=what):
        ModelConfig(**{**MODEL, **change})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"steps": 0}, "config.steps is 0"),
        ({"batch_size": 5, "accumulation": 2}, "batch_size 5 is not a multiple of config.accumulation 2"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
        ({"model": None}, "config.model is missing: this run trains a new public model"),
        ({"domain_vector": None}, "config.domain_vector is missing: this run trains a new public model"),
        ({"owner": ""}, "config.owner is empty"),
        ({"owner": "trunk"}, "'trunk' is reserved"),
        ({"owner": "news"}, "config.public is missing: this run trains a new expert"),
        (
            {"owner": "news", "public": "p", "expert": "e"},
            "domain_vector is 'v': this run trains an owner's existing expert",
        ),
        ({"top_k": -1}, "config.top_k is -1"),
        ({"freeze": "experts/("}, "config.freeze .* is not a pattern"),
        ({"public": "release"}, "config.model is .*: this run trains all experts of an existing model"),
        (
            {"router_contrast": 0.1, "public_data": "x", "public_fraction": 0.5, "batch_size": 4},
            "router_contrast is 0.1: this run trains a new public model",
        ),
        (
            {"router_contrast": 0.1, "owner": "news", "public": "p", "model": None},
            "router_contrast is 0.1 and config.public_fraction 0.0",
        ),
    ],
)
def test_impossible_runs_are_refused(change, what):
    with pytest.raises(FlexMoEError, match=what):
        from_mapping(RunConfig, {**RUN, **change})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.d_model = 3


def test_differences_list_each_leaf_that_differs():
    theirs = {**RUN, "steps": 4, "model": {**MODEL, "d_ff": 99}, "extra": 1}
    expected = ["extra: None != 1", f"model.d_ff: {MODEL['d_ff']} != 99", "steps: 3 != 4"]
    assert differences(RUN, theirs) == expected
    assert differences(RUN, dict(reversed(RUN.items()))) == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def turned(value):
    """The same JSON value, every mapping written in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(inner) for key, inner in reversed(value.items())}
    return [turned(inner) for inner in value] if isinstance(value, list) else value


@given(value=st.dictionaries(st.text(), json_values, max_size=4))
def test_digest_ignores_the_order_of_keys_and_survives_json(value):
    assert digest(value) == digest(turned(value))
    assert digest(value) == digest(json.loads(canonical_json(value)))


def test_digest_equals_the_stored_one_and_depends_on_every_value():
    # Computed with sha256sum from the text: another canonical form would invalidate every signed manifest.
    assert canonical_json({"b": [1, 2.5, None], "a": "\u00e9"}) == '{"a":"\u00e9","b":[1,2.5,null]}'.encode()
    assert (
        digest({"b": [1, 2.5, None], "a": "\u00e9"})
        == "d764fee2563da33e3d57334755404e635da33c995824b0adfabc4b6e1af4f608"
    )
    assert digest([1, 2]) != digest([2, 1])
    changed = {
        digest(dataclasses.replace(TINY, **{name: not getattr(TINY, name)})) for name in ("norm_topk", "qk_norm")
    }
    assert len(changed | {digest(TINY)}) == 3


def test_digest_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"x": float("nan")})


@pytest.mark.parametrize("cls", [ModelConfig, OptimizerConfig, RunConfig])
def test_every_key_has_a_docstring(cls):
    docs = field_docs(cls)
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    assert all(len(doc) > 10 for doc in docs.values())


def test_an_empty_value_of_an_optional_key_is_none():
    values = {**RUN, "owner": "news", "public": "p", "model": None}
    run = from_mapping(RunConfig, {**values, "mesh": "", "freeze": "", "expert": "", "top_k": None})
    assert run == from_mapping(RunConfig, values)
    assert (run.mesh, run.freeze, run.expert, run.top_k) == (None, None, None, None)


def test_none_is_a_value_where_the_default_is_another(tmp_path):
    """`save_every=none` is not 500: on the command line, in an experiment file, and in none of the others."""
    switched = {
        name for name, key in keys_of(RunConfig).items() if key.optional and key.default not in (None, REQUIRED)
    }
    assert {"eval_every", "save_every", "track"} <= switched
    file = tmp_path / "expert.py"
    file.write_text(
        "from flexmoe_jax.experiment import run_config\ndef get_config(arg):\n    return run_config(owner=arg)"
    )
    paths = [
        *(f"{key}=x" for key in ("data", "out", "public", "domain_vector")),
        "steps=1",
        "batch_size=1",
        "seq_len=8",
    ]
    run = read_config(RunConfig, f"{file}:news", [*paths, *(f"{name}=none" for name in switched)])
    assert {name: getattr(run, name) for name in switched} == dict.fromkeys(switched)
    default = read_config(RunConfig, f"{file}:news", paths)
    assert (default.eval_every, default.save_every, default.track) == (100, 500, "tensorboard")
    file.write_text(file.read_text().replace("owner=arg", "owner=arg, save_every=None"))
    assert read_config(RunConfig, f"{file}:news", paths).save_every is None


def test_a_model_without_the_later_keys_has_the_digest_it_had_before_they_came():
    """Packages hold this digest: those of the first version must stay readable. Pinned by that version."""
    pinned = "b259f44ec4aabbf636a30da5ae93fba907fe3f4ddab4dfb4580f6bebff6f677d"
    assert digest(CONFIG) == pinned
    assert from_mapping(ModelConfig, to_mapping(CONFIG)) == CONFIG
    scaled = dataclasses.replace(CONFIG, norm_topk=True, rope_scaling=RopeScaling("linear", 2.0))
    assert digest(scaled) != pinned
    assert from_mapping(ModelConfig, to_mapping(scaled)) == scaled


@pytest.mark.parametrize("cls", [ModelConfig, RunConfig])
def test_the_later_keys_are_optional_keys(cls):
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    assert cls.LATER
    assert all(defaults[name] is not dataclasses.MISSING for name in cls.LATER)
