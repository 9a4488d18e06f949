"""Several processes on this machine give the results of one process (`make test-distributed`).

Tolerances as in test_mesh.py: sums in another order.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package, verify_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import MachineError
from flexmoe_jax.evaluate.perplexity import heldout_texts
from flexmoe_jax.parallel import processes
from flexmoe_jax.parallel.processes import Place, place_of
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, TRUNK, flatten
from tests.parallel.jobs import HERE, end, printed, start, start_training, start_verb, wait_for_step
from tests.tiny import expert_run, public_run, write_documents

STEPS = {"steps": 6, "batch_size": 8}


def hybrid_run(root: pathlib.Path, world: pathlib.Path, **changes) -> RunConfig:
    """An owner's run beside the release of `world`, half of its text public, with held-out text of both."""
    sample = write_documents(root / "sample", "public")
    for folder, domain in ((sample, "public"), (root / "news" / "data", "news")):
        write_documents(folder, domain, count=5, split="heldout")
    return expert_run(
        root,
        "news",
        world / "public" / "run" / "model",
        public_data=str(sample),
        public_fraction=0.5,
        router_contrast=0.1,
        **STEPS | {"eval_every": 3} | changes,
    )


def job(count: str, number: str, coordinator: str) -> dict[str, str]:
    """The variables of one process of a job."""
    return {processes.COUNT: count, processes.NUMBER: number, processes.COORDINATOR: coordinator}


def losses(run: RunConfig) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in lines_of(run) if "loss" in line]


def validations(run: RunConfig) -> list[list[float]]:
    """Held-out bits per byte of own and public text at every validation."""
    return [[*line["validation"].values()] for line in lines_of(run) if "validation" in line]


def lines_of(run: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_near(made, expected) -> None:
    for path, leaf in flatten(made).items():
        other = flatten(expected)[path]
        assert np.abs(leaf - other).max() <= 5e-4 * (np.abs(other).max() + 1e-6), path


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_trains(tmp_path, count):
    one, many = (public_run(tmp_path / name, **STEPS) for name in ("one", "many"))
    expected = load_params(open_model(train(one)))
    assert end(start_training(many, count)) == [0] * count
    check_near(load_params(open_model(pathlib.Path(many.out) / "model")), expected)
    np.testing.assert_allclose(losses(many), losses(one), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_the_expert_that_one_trains(world, tmp_path, count):
    """The release keeps every bit, and only process 0 writes the package, which is bound to the release."""
    release = world / "public" / "run" / "model"
    one, many = (hybrid_run(tmp_path / name, world) for name in ("one", "many"))
    expected, before = load_package(train(one)), contents(release)
    assert end(start_training(many, count)) == [0] * count
    package = pathlib.Path(many.out) / "package"
    check_near(load_package(package), expected)
    np.testing.assert_allclose(losses(many), losses(one), atol=1e-5)
    np.testing.assert_allclose(validations(many), validations(one), atol=1e-5)
    assert np.shape(validations(one)) == (2, 2)
    assert contents(release) == before
    assert (pathlib.Path(many.out) / "writers").read_text() == "True\n"
    assert all(finding.ok for finding in verify_package(package, "news"))
    parts = open_model(release).manifests
    assert {name: read_manifest(package).base[name] for name in (TRUNK, PUBLIC)} == {
        name: manifest.content for name, manifest in parts.items()
    }
    # The order of tokens is the same: another order has other losses from the first step.
    assert read_manifest(package).record.training["tokens"] == 6 * 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "then"), [("public", 2, 4), ("hybrid", 4, 2)])
def test_sigterm_to_one_process_stops_all_and_another_number_of_processes_resumes(world, tmp_path, kind, first, then):
    """SIGTERM to process 1; the losses are those of a run that is never stopped."""
    make = public_run if kind == "public" else lambda root, **changes: hybrid_run(root, world, **changes)
    run, reference = (make(tmp_path / name, batch_size=8, steps=3000, eval_every=None) for name in ("many", "one"))
    running = start_training(run, first)
    wait_for_step(run, 4)
    running[1].terminate()
    assert end(running) == [75] * first
    stopped = losses(run)
    assert 4 < len(stopped) < run.steps
    saved = max(int(path.name) for path in (pathlib.Path(run.out) / "checkpoints").iterdir())
    assert saved == len(stopped)
    running = start_training(run, then)
    wait_for_step(run, saved + 5)
    running[0].terminate()
    assert end(running) == [75] * then
    assert losses(run)[:saved] == stopped  # unchanged
    running = start_training(reference, 1)
    wait_for_step(reference, saved + 3)
    running[0].terminate()
    assert end(running) == [75]
    # float32 sums in another order, amplified by the steps of AdamW.
    np.testing.assert_allclose(losses(run)[: saved + 3], losses(reference)[: saved + 3], atol=1e-3)


@pytest.mark.slow
def test_another_copy_of_the_data_on_one_host_is_refused_by_all_processes(tmp_path):
    """Each process has a folder of its own, like hosts with disks of their own; that of process 1 is stale."""
    run = public_run(tmp_path, **STEPS)
    for number, count in enumerate((60, 59)):
        write_documents(tmp_path / str(number) / "data", "public", count)
    run = dataclasses.replace(run, data="data", mesh="fsdp=2")
    here = f"import os; os.chdir(os.path.join({str(tmp_path)!r}, os.environ[{processes.NUMBER!r}])); {HERE}"
    running = start([sys.executable, "-c", f"{here}train_in_process({run!r})"], 2, stderr=subprocess.PIPE)
    said = [process.communicate(timeout=300)[1] for process in running]
    assert end(running) == [1, 1]
    for text in said:
        assert "DataError: documents " in text
        assert ": process 1 has 1 file(s) of " in text


@pytest.mark.slow
def test_when_one_process_dies_the_others_end_within_three_heartbeats(tmp_path):
    run = public_run(tmp_path, batch_size=8, steps=100_000)
    running = start_training(run, 2)
    wait_for_step(run, 4)
    running[1].kill()
    killed_at = time.monotonic()
    codes = end(running, 120)
    assert codes[0] != 0
    assert time.monotonic() - killed_at < 3 * processes.HEARTBEAT_S


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh", "experts"),
    [
        (2, "expert=2", "public,news"),
        (4, "fsdp=2,expert=2", "public,news"),
        (2, "", "public,code,news"),
    ],
)
def test_several_processes_score_what_one_scores(world, count, mesh, experts):
    """Only process 0 prints. Each token's loss differs by the rounding of float32 sums, 1e-6 of about 6 nats."""
    model = fm.load(world / "model").select(experts.split(","))
    expected = {d: model.score(heldout_texts(world / d / "data", 10_000)).bits_per_byte for d in ("news", "code")}
    folders = [f"--data={world / domain / 'data'}" for domain in expected]
    command = ["eval", world / "model", *folders, "--max-bytes=10000", f"--experts={experts}", "--json"]
    lead, *others = printed(start_verb([*command, *([f"--mesh={mesh}"] if mesh else [])], count))
    assert others == [""] * (count - 1)
    result = json.loads(lead)
    assert result["experts"] == experts.split(",")
    found = [domain["bits_per_byte"] for domain in result["domains"].values()]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


@pytest.mark.slow
def test_a_merge_by_several_processes_equals_that_of_one(world, tmp_path):
    """Only process 0 merges."""
    release, *packages = (world / name / "run" for name in ("public", "news", "code"))
    experts = [f"--package={path / 'package'}" for path in packages]
    running = start_verb(["merge", f"--public={release / 'model'}", *experts, f"--out={tmp_path / 'many'}"], 2)
    lead, other = printed(running)
    assert "many: public, code, news" in lead
    assert other == ""
    merge(release / "model", [path / "package" for path in packages], tmp_path / "one")
    many, one = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert all(finding.ok for finding in verify_model(tmp_path / "many"))
    assert {name: many[name] for name in many if name != "journal.jsonl"} == {
        name: one[name] for name in one if name != "journal.jsonl"
    }


SLURM = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "3", "SLURM_NTASKS": "16", "FLEXMOE_PROCESSES": "auto"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (job("4", "3", "a:1"), Place(4, 3, "a:1")),
        (job("2", "0", "[fd00::1]:8476"), Place(2, 0, "[fd00::1]:8476")),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[007-009,011],b"}, Place(16, 3, "gpu007:61457")),
        ({**SLURM, "SLURM_STEP_NODELIST": "one,two"}, Place(16, 3, "one:61457")),
        (
            {"FLEXMOE_PROCESSES": "auto", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"},
            Place(2, 1, "a:8482"),
        ),
        ({"FLEXMOE_PROCESSES": "auto"}, None),
    ],
)
def test_the_environment_gives_a_process_its_place(environment, place):
    assert place_of(environment) == place


@pytest.mark.parametrize("nodes", ["gpu[007-009]", "gpu[007,011-012],b", "one,two"])
def test_the_coordinator_of_a_slurm_job_is_the_one_that_jax_chooses(monkeypatch, nodes):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    variables = {**SLURM, "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": nodes}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = place_of(variables)
    assert place is not None
    assert place.coordinator == SlurmCluster.get_coordinator_address(None, None)


@pytest.mark.parametrize(
    "environment",
    [
        {processes.COUNT: "two"},
        {processes.COUNT: "2"},
        job("x", "0", "a:1"),
        job("2", "2", "a:1"),
        job("2", "0", "a"),
        job("2", "0", "a:"),
        job("2", "0", ":1"),
        job("2", "0", "fd00::1:8476"),
    ],
)
def test_malformed_job_variables_are_refused(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for read in (processes.join, lambda: place_of(environment)):
        with pytest.raises(MachineError, match=f"FLEXMOE_PROCESSES is {environment[processes.COUNT]!r}") as error:
            read()
        assert "host:port" in error.value.remedy


def test_given_places_disable_jaxs_cluster_detection(monkeypatch):
    """Inside Slurm, JAX's detection would give each process only the GPU of its local number."""
    given: dict = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(options))
    for name, value in job("2", "1", "host:1").items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert given["cluster_detection_method"] == "deactivate"
    assert (given["num_processes"], given["process_id"], given["coordinator_address"]) == (2, 1, "host:1")
    monkeypatch.setenv(processes.COUNT, "auto")
    given.clear()
    processes.join()
    assert "cluster_detection_method" not in given
