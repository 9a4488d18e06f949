"""Launch scripts are short, print their commands with DRY_RUN=1, and run them, here with stand-ins for schedulers."""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SKYPILOT = LAUNCH / "skypilot.yaml"
ARGUMENTS = ["train", "--config=experiments/quickstart_expert.py:news", "--config.licence=two words"]
FLEXMOE = ["flexmoe", *ARGUMENTS]
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
# Variables that scripts read: removed from the tests' environment, so that they do not change the output.
FOREIGN = re.compile("FLEXMOE|SLURM|SRUN|XLA|JAX|NCCL|PROCESSES|PORT|DRY_RUN")


def environment(**variables: str) -> dict[str, str]:
    """The tests' environment without variables that launch scripts read, and with `variables`."""
    return {k: v for k, v in os.environ.items() if not FOREIGN.match(k)} | variables


def dry_run(script: str, **variables: str) -> list[list[str]]:
    """The commands that the script would run, split into words."""
    printed = subprocess.run(
        [LAUNCH / script, *ARGUMENTS],
        env=environment(DRY_RUN="1", PATH="/usr/bin:/bin", **variables),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [shlex.split(line) for line in printed.splitlines()]


def stand_in(folder: pathlib.Path, **programs: str) -> dict[str, str]:
    """An environment in which these shell programs come first on the PATH."""
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    return environment(PATH=f"{folder}:{os.environ['PATH']}", SLURM_JOB_ID="17")


@contextlib.contextmanager
def started(script: str, *arguments: str, **options):
    """The running script; it and its children are killed at the end, even if the test fails."""
    # Tests started in the background ignore Ctrl-C, and their children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([LAUNCH / script, *arguments], start_new_session=True, **options)
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_files(process: subprocess.Popen, *files: pathlib.Path) -> None:
    """Returns when all files exist; fails if the process ends before."""
    while not all(file.exists() for file in files):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("script", [*SCRIPTS, SKYPILOT], ids=lambda path: path.name)
def test_scripts_are_short_and_strict(script):
    text = script.read_text()
    assert len(text.splitlines()) < 80
    assert "set -euo pipefail" in text
    assert script.suffix == ".yaml" or os.access(script, os.X_OK)


def test_shellcheck_finds_nothing(tmp_path):
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    run = tmp_path / "skypilot_run.sh"
    run.write_text("#!/bin/bash\n" + yaml.safe_load(SKYPILOT.read_text())["run"])
    found = subprocess.run([shellcheck, *SCRIPTS, run], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_xla_knows_every_flag():
    """XLA aborts on an unknown flag of any platform; on a CPU it parses GPU flags too."""
    flags = {flag for script in [*SCRIPTS, SKYPILOT] for flag in re.findall(r"--xla_\w+=\w+", script.read_text())}
    assert flags == {OVERLAP}
    code = "import jax; jax.devices()"
    for flag, knows in {" ".join(sorted(flags)): True, "--xla_gpu_no_such_flag=true": False}.items():
        variables = environment(XLA_FLAGS=flag, JAX_PLATFORMS="cpu")
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == knows, done.stderr


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_local_prints_one_command_per_process():
    assert dry_run("local.sh") == [FLEXMOE]
    assert dry_run("local.sh", PROCESSES="2", PORT="1234") == [
        [
            "env",
            "FLEXMOE_PROCESSES=2",
            f"FLEXMOE_PROCESS_ID={i}",
            "FLEXMOE_COORDINATOR=127.0.0.1:1234",
            f"JAX_LOCAL_DEVICE_IDS={i}",
            *FLEXMOE,
        ]
        for i in range(2)
    ]


def test_slurm_prints_one_srun_command():
    step = ["srun", "--kill-on-bad-exit=0", "--wait=600", "env"]
    settings = ["JAX_PLATFORMS=cuda,cpu", "XLA_CLIENT_MEM_FRACTION=.9"]
    assert dry_run("slurm.sh") == [[*step, *settings, *FLEXMOE]]
    assert dry_run("slurm.sh", SLURM_NTASKS="32", XLA_FLAGS="--mine", JAX_PLATFORMS="rocm") == [
        [
            *step,
            "JAX_PLATFORMS=rocm",
            "XLA_CLIENT_MEM_FRACTION=.9",
            "FLEXMOE_PROCESSES=auto",
            "NCCL_DEBUG=WARN",
            f"XLA_FLAGS={OVERLAP} --mine",
            *FLEXMOE,
        ]
    ]


def test_tpu_pod_prints_one_command_for_all_workers():
    [command] = dry_run("tpu_pod.sh", TPU="pod", ZONE="us-central2-b", PROJECT="mine", FOLDER="a folder")
    *ssh, remote = command
    assert ssh == [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-central2-b", "--project=mine"],
        "--worker=all",
    ]
    settings = ["FLEXMOE_PROCESSES=auto", "JAX_PLATFORMS=tpu,cpu"]
    there = ["cd", "a folder", "&&", "exec", "env", *settings, ".venv/bin/flexmoe", *ARGUMENTS]
    assert shlex.split(remote.removeprefix("--command=")) == there


JOB = {"CLUSTER": "c", "WORKLOAD": "news-1", "IMAGE": "registry/flexmoe", "ZONE": "z"}


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        (
            {"DEVICE": "v5litepod-16", "SLICES": "2"},
            [
                "--device-type=v5litepod-16",
                "--num-slices=2",
                "--env=FLEXMOE_PROCESSES=auto",
                "--env=JAX_PLATFORMS=tpu,cpu",
            ],
        ),
        (
            {"DEVICE": "h100-80gb-8", "NODES": "4"},
            [
                "--device-type=h100-80gb-8",
                "--num-nodes=4",
                "--env=FLEXMOE_PROCESSES=4",
                "--env=FLEXMOE_PROCESS_ID=$(NODE_RANK)",
                "--env=FLEXMOE_COORDINATOR=$(JAX_COORDINATOR_ADDRESS):$(JAX_COORDINATOR_PORT)",
                "--env=JAX_PLATFORMS=cuda,cpu",
                "--env=XLA_CLIENT_MEM_FRACTION=.9",
                "--env=NCCL_DEBUG=WARN",
                f"--env=XLA_FLAGS={OVERLAP}",
            ],
        ),
    ],
    ids=["TPU", "GPU"],
)
def test_gke_prints_one_xpk_workload(variables, device):
    [[*command, remote]] = dry_run("gke_jobset.sh", **JOB, **variables)
    assert command == [
        *["xpk", "workload", "create", "--cluster=c", "--workload=news-1", "--docker-image=registry/flexmoe"],
        *device,
        "--zone=z",
        "--restart-on-exit-codes=75",
        "--max-restarts=100",
        "--termination-grace-period-seconds=300",
    ]
    assert shlex.split(remote.removeprefix("--command=")) == ["exec", *FLEXMOE]
    # XPK puts the command in a double-quoted YAML string, where a backslash starts an escape.
    assert not {"\\", '"'} & set(remote)


def test_skypilot_prints_one_managed_job():
    [command] = dry_run("skypilot.sh", BUCKET="b", NODES="2", GPUS="A100:4")
    assert command[:6] == ["sky", "jobs", "launch", "--yes", "--num-nodes=2", "--gpus=A100:4"]
    assert command[6] == "--env"
    assert shlex.split(command[7].removeprefix("FLEXMOE_COMMAND=")) == FLEXMOE
    assert command[8:] == ["--env", "BUCKET=b", str(SKYPILOT)]


# -- real runs with stand-ins ------------------------------------------------------------------------------------------

NOTES = 'env | grep -E "^(FLEXMOE|JAX)_" > "process${FLEXMOE_PROCESS_ID:-}"; printf "%s\\n" "$@" > "arguments"\n'


def test_local_gives_every_process_its_place(tmp_path):
    variables = stand_in(tmp_path, flexmoe=NOTES + "echo says ${FLEXMOE_PROCESS_ID:-alone}")
    script = LAUNCH / "local.sh"
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([script, *ARGUMENTS], env=variables, **run).stdout == "says alone\n"
    assert not (tmp_path / "process").read_text()
    printed = subprocess.run([script, *ARGUMENTS], env={**variables, "PROCESSES": "3"}, **run).stdout
    assert sorted(printed.splitlines()) == ["[1] says 1", "[2] says 2", "says 0"]
    assert (tmp_path / "arguments").read_text().splitlines() == ARGUMENTS
    places = [dict(line.split("=") for line in (tmp_path / f"process{i}").read_text().splitlines()) for i in range(3)]
    [coordinator] = {place.pop("FLEXMOE_COORDINATOR") for place in places}
    assert re.fullmatch(r"127\.0\.0\.1:\d{5}", coordinator)
    assert places == [
        {"FLEXMOE_PROCESSES": "3", "FLEXMOE_PROCESS_ID": str(i), "JAX_LOCAL_DEVICE_IDS": str(i)} for i in range(3)
    ]


def test_local_refuses_zero_processes(tmp_path):
    done = subprocess.run([LAUNCH / "local.sh"], env=environment(PROCESSES="0"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "PROCESSES is '0'" in done.stderr


SAVES = "trap 'sleep 0.5; touch saved$FLEXMOE_PROCESS_ID; exit 75' TERM\n"
WAITS = "touch started$FLEXMOE_PROCESS_ID\nwhile :; do sleep 0.05; done"


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_local_forwards_a_stop_and_waits_for_all(tmp_path, signal_number):
    variables = stand_in(tmp_path, flexmoe=SAVES + WAITS) | {"PROCESSES": "2"}
    with started("local.sh", env=variables, cwd=tmp_path) as process:
        await_files(process, tmp_path / "started0", tmp_path / "started1")
        process.send_signal(signal_number)
        assert process.wait(timeout=10) == 75
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize(("end", "code"), [("exit 3", 3), ("kill -KILL $$", 137)], ids=["error", "killed"])
def test_local_ends_all_when_one_dies(tmp_path, dies, end, code):
    """The others ignore SIGTERM, like a process that blocks in an all-reduce with the one that died."""
    flexmoe = f"trap '' TERM\n[ $FLEXMOE_PROCESS_ID = {dies} ] && {end}\necho $$ > pid\nwhile :; do sleep 0.05; done"
    variables = stand_in(tmp_path, flexmoe=flexmoe) | {"PROCESSES": "2"}
    with started("local.sh", env=variables, cwd=tmp_path) as process:
        assert process.wait(timeout=10) == code
        if (tmp_path / "pid").exists():
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / "pid").read_text()), 0)


def test_local_reports_an_error_rather_than_a_stop(tmp_path):
    variables = stand_in(tmp_path, flexmoe="[ $FLEXMOE_PROCESS_ID = 1 ] && exit 75; sleep 1; exit 4")
    done = subprocess.run([LAUNCH / "local.sh"], env=variables | {"PROCESSES": "2"}, cwd=tmp_path, check=False)
    assert done.returncode == 4


# Like srun, runs two tasks and exits with the higher code, and kills them on SIGTERM; scancel only signals them.
SRUN = """
trap 'kill -KILL $(cat task*)' TERM
while [[ $1 != env ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i FLEXMOE_PROCESS_ID=$i "$@" & echo $! > task$i; done
code=0
for i in 0 1; do result=0; wait $(cat task$i) || result=$?; ((result > code)) && code=$result; done
exit $code"""
SLURM = {
    "srun": SRUN,
    "scancel": '[[ "$*" == "--signal=TERM 17" ]] && kill -TERM $(cat task*)',
    "scontrol": 'echo "$@" > requeued',
}


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_only_a_stopped_training(tmp_path, code):
    variables = stand_in(tmp_path, flexmoe=f"exit {code}", **SLURM)
    finished = subprocess.run([LAUNCH / "slurm.sh", *ARGUMENTS], env=variables, cwd=tmp_path, check=False)
    assert finished.returncode == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text().strip() if requeued.exists() else "") == ("requeue 17" if code == 75 else "")


def test_slurm_passes_sigterm_to_the_tasks_and_waits(tmp_path):
    """The training needs a moment to save after SIGTERM; the script exits with its code."""
    variables = stand_in(tmp_path, flexmoe=SAVES + WAITS, **SLURM)
    with started("slurm.sh", *ARGUMENTS, env=variables, cwd=tmp_path) as process:
        await_files(process, tmp_path / "started0", tmp_path / "started1")
        process.terminate()
        assert process.wait(timeout=10) == 75
    assert (tmp_path / "saved1").exists()
    assert (tmp_path / "requeued").read_text().strip() == "requeue 17"


def test_slurm_passes_the_cores_of_a_task_to_srun(tmp_path):
    variables = stand_in(tmp_path, **{**SLURM, "srun": 'echo "$SRUN_CPUS_PER_TASK" > cores'})
    variables["SLURM_CPUS_PER_TASK"] = "14"
    subprocess.run([LAUNCH / "slurm.sh", *ARGUMENTS], env=variables, cwd=tmp_path, check=True)
    assert (tmp_path / "cores").read_text() == "14\n"


# Runs the remote command in its own folder, like the login shell of a single worker.
GCLOUD = 'mkdir -p home/flexmoe_jax; last="${@: -1}"; cd home; exec bash -c "${last#--command=}"'
POD = {"TPU": "pod", "ZONE": "z", "PAUSE": "0", "FLEXMOE": "flexmoe-stand-in"}


@pytest.mark.parametrize(("codes", "left"), [("75 75 0", 0), ("75 1 0", 1), ("255 0", 255)])
def test_tpu_pod_runs_again_only_after_a_stop(tmp_path, codes, left):
    flexmoe = 'cd ../..; printf "%s\\n" "$@" > arguments; read -r code rest < codes; echo "$rest" > codes; exit $code'
    variables = stand_in(tmp_path, gcloud=GCLOUD, **{POD["FLEXMOE"]: flexmoe}) | POD
    (tmp_path / "codes").write_text(codes + "\n")
    with started("tpu_pod.sh", *ARGUMENTS, env=variables, cwd=tmp_path) as process:
        assert process.wait(timeout=10) == left
    assert (tmp_path / "codes").read_text().split() == codes.split()[codes.split().index(str(left)) + 1 :]
    assert (tmp_path / "arguments").read_text().splitlines() == ARGUMENTS


def test_tpu_pod_stops_the_workers(tmp_path):
    """SIGTERM reaches the training on the workers through a separate command, and the training is not restarted."""
    flexmoe = "cd ../..\n" + SAVES + WAITS
    variables = stand_in(tmp_path, gcloud=GCLOUD, **{POD["FLEXMOE"]: flexmoe}) | POD
    with started("tpu_pod.sh", tmp_path.name, env=variables, cwd=tmp_path) as process:
        await_files(process, tmp_path / "started")
        process.terminate()
        assert process.wait(timeout=10) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_gives_every_node_its_place(tmp_path, nodes):
    """The commands of the task, with the variables that SkyPilot sets."""
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    variables = stand_in(tmp_path, flexmoe=NOTES + "exit 75") | {
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(nodes - 1),
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "FLEXMOE_COMMAND": shlex.join(FLEXMOE),
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=variables, cwd=tmp_path, check=False)
    assert done.returncode == 75
    assert (tmp_path / "arguments").read_text().splitlines() == ARGUMENTS
    place = (tmp_path / ("process" if nodes == 1 else "process1")).read_text().splitlines()
    job = ["FLEXMOE_COORDINATOR=10.0.0.7:8476", "FLEXMOE_PROCESSES=2", "FLEXMOE_PROCESS_ID=1"]
    expected = {"JAX_PLATFORMS=cuda,cpu", *(job if nodes == 2 else [])}
    assert {line for line in place if not line.startswith("FLEXMOE_COMMAND")} == expected
