"""`flexmoe keys`, and keys on the command line: every key is explained, and a value is what its type says."""

import dataclasses
import json

import pytest

from flexmoe_jax.cli.keys import VERBS, configuration, markdown
from flexmoe_jax.cli.main import main
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import keys_of, read_config, read_values, run_config
from flexmoe_jax.model_config import ModelConfig, RopeScaling
from flexmoe_jax.optimizer_config import OptimizerConfig

EXPERIMENT = """
from flexmoe_jax.experiment import run_config
def get_config(arg):
    return run_config(owner=arg, data="d", out="o", public="p", domain_vector="v", steps=3, batch_size=4, seq_len=8,
                      mesh="data=2", top_k=2, optimizer={"lr": 0.5})
"""


@pytest.fixture
def spec(tmp_path) -> str:
    """An owner's experiment."""
    (tmp_path / "run.py").write_text(EXPERIMENT)
    return f"{tmp_path / 'run.py'}:news"


@dataclasses.dataclass(frozen=True)
class Plain:
    """A configuration in which one field has a docstring."""

    size: int
    name: str | None = None
    rate: float = 0.5
    """Either a|b."""


def test_keys_are_all_fields_and_those_of_sections():
    keys = keys_of(RunConfig)
    expected = {field.name for field in dataclasses.fields(RunConfig)}
    expected |= {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    expected |= {f"model.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    expected |= {f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerConfig)}
    assert set(keys) == expected
    assert all(key.text for key in keys.values())
    assert [name for name, key in keys.items() if key.is_section] == ["model", "model.rope_scaling", "optimizer"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_of_a_verb_is_shown_with_type_and_default(verb, capsys):
    assert main(["keys", verb]) == 0
    printed = capsys.readouterr().out
    for name in keys_of(configuration(verb)):
        assert f"\n{name}  (" in f"\n{printed}"
    assert main(["keys", verb, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [key["key"] for key in result["keys"]] == list(keys_of(configuration(verb)))


def test_one_key_or_one_section_is_shown(capsys):
    assert main(["keys", "train", "router_scale"]) == 0
    assert capsys.readouterr().out.startswith("router_scale  (float, default 0.1)\n    Initial L2 norm ")
    assert main(["keys", "train", "top_k"]) == 0
    assert capsys.readouterr().out.startswith("top_k  (int or none, default none)\n")
    assert main(["keys", "train", "steps", "--json"]) == 0
    [key] = json.loads(capsys.readouterr().out)["keys"]
    assert (key["key"], key["type"], key["required"], key["default"]) == ("steps", "int", True, None)
    assert main(["keys", "pretrain", "optimizer"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line and line[0] != " "]
    assert shown == ["optimizer", *(f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerConfig))]


@pytest.mark.parametrize(("key", "meant"), [("routerscale", "router_scale"), ("lr", "optimizer.lr")])
def test_an_unknown_key_gets_a_hint(key, meant, capsys, spec):
    assert main(["keys", "train", key]) == 1
    assert f"did you mean '{meant}'?" in capsys.readouterr().err
    assert main(["train", f"--config={spec}", f"--config.{key}=1"]) == 1
    assert f"unknown key config.{key}\n  remedy: did you mean '{meant}'?" in capsys.readouterr().err


def test_markdown_has_the_text_of_fields_that_have_one():
    assert markdown(Plain).splitlines() == [
        *("## `size`", "", "*int, required*", "", "", ""),
        *("## `name`", "", "*str or none, default none*", "", "", ""),
        *("## `rate`", "", "*float, default 0.5*", "", "Either a|b."),
    ]


def test_markdown_has_a_heading_for_every_key():
    lines = markdown(RunConfig).splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("## ")] == list(keys_of(RunConfig))
    assert lines[lines.index("## `router_scale`") + 2] == "*float, default 0.1*"


@pytest.mark.parametrize("verb", ["train", "pretrain", "plan", "reproduce"])
def test_help_of_a_verb_lists_its_keys_and_says_where_they_are_explained(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert f"flexmoe keys {verb}" in printed
    words = {word.partition("=")[0] for word in printed.split()}
    assert {name for name, key in keys_of(configuration(verb)).items() if not key.is_section} <= words


def test_overrides_are_read_as_the_keys_type_says(spec):
    overrides = ["steps=7", "optimizer.lr=1e-3", "coordinate=false", "remat=1", "owner=law", "freeze=a=b"]
    run = read_config(RunConfig, spec, overrides)
    assert (run.steps, run.optimizer.lr, run.coordinate, run.remat) == (7, 1e-3, False, True)
    assert (run.owner, run.freeze) == ("law", "a=b")
    assert (run.optimizer.b1, run.mesh) == (OptimizerConfig.b1, "data=2")


@pytest.mark.parametrize("text", ["", "none", "None"])
def test_an_empty_value_and_none_are_none_for_an_optional_key(text, spec):
    run = read_config(RunConfig, spec, [f"mesh={text}", f"top_k={text}"])
    assert (run.mesh, run.top_k) == (None, None)


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("steps=x", "config.steps is 'x'", "give a value of type int"),
        ("steps=", "config.steps is ''", "give a value of type int"),
        ("steps=none", "config.steps is 'none'", "give a value of type int"),
        ("top_k=x", "config.top_k is 'x'", "give a value of type int, or none"),
        ("remat=yes", "config.remat is 'yes'", "give true or false"),
        ("optimizer.lr=fast", "config.optimizer.lr is 'fast'", "give a value of type float"),
        ("remat", "config.remat is given without a value", "write --config.remat=VALUE"),
        ("optimizer=adam", "unknown key config.optimizer", "did you mean"),
        ("model.d_model=8", "config.model.vocab_size is not set", "add config.model.vocab_size (int)"),
    ],
)
def test_a_value_of_another_type_is_refused(override, what, remedy, spec):
    with pytest.raises(ConfigError) as error:
        read_config(RunConfig, spec, [override])
    assert what in error.value.what
    assert remedy in error.value.remedy


def test_keys_that_nobody_sets_are_absent():
    config = run_config(owner="news", optimizer={"lr": 0.5})
    assert (config.optimizer.lr, config.optimizer.b1, config.steps) == (0.5, OptimizerConfig.b1, None)


def test_a_whole_shape_can_be_given_on_the_command_line(spec):
    shape = {"vocab_size": 8, "num_layers": 1, "d_model": 4, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4}
    overrides = [f"model.{key}={value}" for key, value in {**shape, "d_ff": 8, "max_seq_len": 8}.items()]
    assert read_values(RunConfig, spec, overrides)["model"] == {**shape, "d_ff": 8, "max_seq_len": 8}
