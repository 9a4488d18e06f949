"""Schedules, groups and initial biases in whole runs: a resumed run keeps the curve of its start."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.errors import ConfigError, FlexMoEError
from flexmoe_jax.optimizer_config import SCHEDULES, OptimizerConfig
from flexmoe_jax.training import loop
from flexmoe_jax.training.metrics import OF_TIME
from flexmoe_jax.training.optimizer import learning_rate
from tests.tiny import expert_run, public_run


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    """A trained public release, shared by the module; tests must not change it."""
    return loop.train(public_run(tmp_path_factory.mktemp("world"), steps=1))


def metrics_of(run) -> list[dict]:
    lines = (pathlib.Path(run.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_TIME} for line in lines]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_longer_run_follows_the_schedule_of_its_start(release, tmp_path, schedule, caplog):
    """Its rates, its weights and its metrics are those of a run of that many steps with the same schedule."""
    caplog.set_level("INFO", "flexmoe_jax")
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1, schedule=schedule, decay_share=0.4, cycles=2)
    short = expert_run(tmp_path / "a", "news", release, steps=5, optimizer=optimizer)
    shutil.rmtree(loop.train(short))
    longer = dataclasses.replace(short, steps=8)
    resumed = loop.train(longer, allow=["config.steps"])
    assert "resumed at step 5" in caplog.messages
    curve = learning_rate(optimizer, 5)
    assert [line["lr"] for line in metrics_of(longer)] == [pytest.approx(float(curve(n)), rel=1e-6) for n in range(8)]
    whole = expert_run(tmp_path / "b", "news", release, steps=8)
    whole = dataclasses.replace(whole, optimizer=dataclasses.replace(optimizer, schedule_steps=5))
    assert read_manifest(resumed).content == read_manifest(loop.train(whole)).content
    assert metrics_of(longer) == metrics_of(whole)


def test_the_schedule_changes_only_where_that_is_given_and_allowed(release, tmp_path, caplog):
    caplog.set_level("INFO", "flexmoe_jax")
    run = expert_run(tmp_path, "news", release, steps=4)
    shutil.rmtree(loop.train(run))
    told = dataclasses.replace(run, steps=6, optimizer=dataclasses.replace(run.optimizer, schedule_steps=6))
    with pytest.raises(FlexMoEError, match=r"config\.optimizer\.schedule_steps: 4 != 6"):
        loop.train(told, allow=["config.steps"])
    shutil.rmtree(loop.train(dataclasses.replace(run, steps=5), allow=["config.steps"]))
    assert any("from step 4 on" in line and "schedule_steps=5" in line for line in caplog.messages)
    loop.train(told, allow=["config.steps", "config.optimizer.schedule_steps"])
    last = metrics_of(told)[5]
    assert last["lr"] == pytest.approx(float(learning_rate(run.optimizer, 6)(5)), rel=1e-6)


def test_a_run_from_before_schedules_had_a_length_resumes_with_that_of_its_steps(release, tmp_path):
    run = expert_run(tmp_path, "news", release, steps=4)
    shutil.rmtree(loop.train(run))
    path = pathlib.Path(run.out, "run.json")
    identity = json.loads(path.read_text(encoding="utf-8"))
    assert identity["config"]["optimizer"].pop("schedule_steps") == 4
    path.write_text(json.dumps(identity), encoding="utf-8")
    longer = dataclasses.replace(run, steps=5)
    loop.train(longer, allow=["config.steps"])
    assert metrics_of(longer)[4]["lr"] == pytest.approx(float(learning_rate(run.optimizer, 4)(4)), rel=1e-6)


def test_a_new_experts_bias_starts_where_it_is_told_and_groups_are_said(release, tmp_path, caplog):
    caplog.set_level("INFO", "flexmoe_jax")
    groups = OptimizerConfig(lr=1e-2, groups="experts/.*/bias lr=0; experts/.*/router lr=3")
    package = loop.train(expert_run(tmp_path, "news", release, bias_init=-0.5, optimizer=groups, steps=2))
    np.testing.assert_array_equal(load_package(package)["bias"], np.full(2, -0.5, np.float32))
    said = [line.split() for line in caplog.messages if line.startswith("rate x")]
    assert [(line[2], line[5], line[6]) for line in said] == [
        ("0,", "0", "experts/.*/bias"),
        ("3,", "0", "experts/.*/router"),
        ("1,", "1", ".*"),
    ]


def test_a_run_resumes_with_other_groups_where_that_is_allowed(release, tmp_path):
    """From its checkpoint on, the leaves of the new group stay what they were."""
    run = expert_run(tmp_path, "news", release, steps=2)
    first = load_package(loop.train(run))
    shutil.rmtree(pathlib.Path(run.out, "package"))
    frozen = dataclasses.replace(run.optimizer, groups="experts/news/w_up lr=0")
    longer = dataclasses.replace(run, steps=4, optimizer=frozen)
    with pytest.raises(FlexMoEError, match=r"config\.optimizer\.groups: "):
        loop.train(longer, allow=["config.steps"])
    second = load_package(loop.train(longer, allow=["config.steps", "config.optimizer.groups"]))
    np.testing.assert_array_equal(second["w_up"], first["w_up"])
    assert not np.array_equal(second["w_down"], first["w_down"])


def test_a_group_that_decides_nothing_is_refused_before_data_is_read(release, tmp_path):
    groups = OptimizerConfig(groups="experts/news/rooter lr=3")
    run = expert_run(tmp_path, "news", release, optimizer=groups)
    with pytest.raises(ConfigError, match=r"'experts/news/rooter' .* decides no trained parameter"):
        loop.train(run)
    assert not pathlib.Path(run.out).exists()
