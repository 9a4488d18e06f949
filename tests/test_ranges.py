"""Every number that a configuration or the command line takes declares its range, and others are refused."""

import argparse
import math
import typing

import pytest

from flexmoe_jax.cli import common
from flexmoe_jax.cli.main import VERBS, main
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import keys_of
from flexmoe_jax.mapping import from_mapping, to_mapping
from flexmoe_jax.model_config import ModelConfig, RopeScaling
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import check_mesh
from flexmoe_jax.ranges import COUNT, POSITIVE, SEED, SHARE_BELOW_ONE, Range, ranges_of
from flexmoe_jax.study.config import StudyConfig
from tests.test_config import RUN
from tests.tiny import TINY

# Values that some program has taken for a number of steps. The last one is above what float32 holds.
SUSPECTS = (-1, 0, 2, 10**20, math.nan, math.inf, -math.inf, 1e39)


def wrong(allowed: Range) -> list:
    """The suspects outside `allowed`, and its own bounds where they are excluded; of the range's type."""
    values = [
        *SUSPECTS,
        *([allowed.least] if allowed.open_below else []),
        *([allowed.most] if allowed.open_above else []),
    ]
    return [value for value in values if value not in allowed and (allowed.kind is float or isinstance(value, int))]


def test_a_range_holds_its_bounds_unless_they_are_excluded():
    assert [value in COUNT for value in (0, 1, 2**31 - 1, 2**31, 1.5, True)] == [False, True, True, False, False, False]
    assert [value in POSITIVE for value in (0.0, 1e-300, 1, 3.4e38, math.inf, math.nan)] == [
        False,
        *[True] * 3,
        False,
        False,
    ]
    assert [value in SHARE_BELOW_ONE for value in (0, 0.999, 1)] == [True, True, False]
    assert (str(COUNT), str(SEED)) == ("a whole number from 1 to 2147483647", "a whole number from 0 to 4294967295")
    assert str(POSITIVE) == "a number above 0 and at most 3.4e+38"
    assert str(SHARE_BELOW_ONE) == "a number of at least 0 and below 1"


# -- configurations ----------------------------------------------------------------------------------------------------

SCALING = {"kind": "linear", "factor": 2.0}
STUDY = {"out": "o", "domains": "news,math", "model": to_mapping(TINY)}
CONFIGURATIONS = {
    RunConfig: RUN,
    OptimizerConfig: {},
    ModelConfig: to_mapping(TINY),
    RopeScaling: SCALING,
    StudyConfig: STUDY,
}


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_every_number_of_a_configuration_declares_its_range(cls):
    hints = typing.get_type_hints(cls)
    numbers = {name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}}
    assert numbers == ranges_of(cls).keys()


def wrong_values():
    for cls in CONFIGURATIONS:
        for name, allowed in ranges_of(cls).items():
            for value in wrong(allowed):
                yield pytest.param(cls, name, value, id=f"{cls.__name__}.{name}={value}")


@pytest.mark.parametrize(("cls", "name", "value"), list(wrong_values()))
def test_a_number_outside_its_range_is_refused_with_the_range(cls, name, value):
    from_mapping(cls, CONFIGURATIONS[cls])
    with pytest.raises(ConfigError, match=f"{name} is ") as refusal:
        from_mapping(cls, {**CONFIGURATIONS[cls], name: value})
    assert refusal.value.remedy == f"give {ranges_of(cls)[name]}"


@pytest.mark.parametrize("verb", ["pretrain", "reproduce"])
def test_a_wrong_number_on_the_command_line_is_refused_in_two_lines(verb, tmp_path, capsys):
    """All numeric keys of the verb's configuration, sections included."""
    cls, values = (RunConfig, RUN) if verb == "pretrain" else (StudyConfig, STUDY)
    values = {**values, "model": {**to_mapping(TINY), "rope_scaling": SCALING}}
    (tmp_path / "run.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({values!r})\n"
    )
    for name, key in keys_of(cls).items():
        if key.kind not in (int, float):
            continue
        for value in (*wrong(_range(cls, name)), math.nan, "x"):
            assert main([verb, f"--config={tmp_path / 'run.py'}", f"--config.{name}={value}"]) == 1, (name, value)
            first, second = capsys.readouterr().err.splitlines()
            assert f"{name.rpartition('.')[2]} is " in first
            assert second.startswith("  remedy: give a")


def _range(cls: type, name: str) -> Range:
    *sections, last = name.split(".")
    for section in sections:
        cls = {"model": ModelConfig, "optimizer": OptimizerConfig, "rope_scaling": RopeScaling}[section]
    return ranges_of(cls)[last]


@pytest.mark.parametrize("value", [-1, 0, 10**20, "9" * 5000, math.nan, math.inf, "x", ""])
def test_a_mesh_of_a_size_that_is_no_number_of_devices_is_refused(value):
    with pytest.raises(ConfigError, match="mesh"):
        check_mesh(f"fsdp={value}", 8)


# -- options of the command line ---------------------------------------------------------------------------------------


class Built(Exception):
    """Carries the parser of a verb out of it."""


def options():
    """(words of a verb, option, its type) for every option that is not a text or a switch."""

    def built(parser, argv):
        if parser.prog == "flexmoe data":
            return argparse.Namespace(action=argv[0])
        raise Built(parser)

    patch = pytest.MonkeyPatch()
    patch.setattr(common.Parser, "parse", built)
    verbs = [[verb] for verb in VERBS if verb != "data"] + [
        ["data", action] for action in ("build", "info", "tokenize")
    ]
    try:
        for words in verbs:
            try:
                main(words)
            except Built as caught:
                for action in caught.args[0]._actions:
                    if action.type is not None:
                        yield words, action.option_strings[-1], action.type
    finally:
        patch.undo()


NUMBERS = list(options())


def test_numeric_options_are_found():
    assert len(NUMBERS) > 30
    assert (["eval"], "--seq-len", COUNT) in NUMBERS
    assert (["data", "build"], "--public-share", Range(float, 0, 0.5)) in NUMBERS


@pytest.mark.parametrize(("words", "option", "allowed"), NUMBERS, ids=lambda value: str(value))
def test_a_wrong_number_of_an_option_is_wrong_usage(words, option, allowed, capsys):
    assert isinstance(allowed, Range), "declare the range of the option: type=COUNT, .. (flexmoe_jax/ranges.py)"
    for value in (*wrong(allowed), "x", ""):
        with pytest.raises(SystemExit, match="2"):
            main([*words, f"{option}={value}"])
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.endswith(f"argument {option}: it is '{value}': give {allowed}")
