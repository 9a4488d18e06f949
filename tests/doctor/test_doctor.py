"""`flexmoe doctor`: what it says of machines that are not here, that it never hangs, and that processes really meet."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from flexmoe_jax.cli import doctor as verb
from flexmoe_jax.cli.main import main
from flexmoe_jax.doctor.checks import check_machine
from flexmoe_jax.doctor.facts import Device, Facts, discover, gather
from flexmoe_jax.doctor.rendezvous import Place, Roll, call, place_of
from flexmoe_jax.errors import MachineError

GIB = 2**30
VERSIONS = {"python": "3.12.3", "jax": "0.11.2", "jaxlib": "0.11.2"}
CPU = Facts(
    versions=VERSIONS,
    needed={"jax": "0.10.2"},
    devices=(Device("cpu", "cpu"),),
    cores=16,
    machine_cores=16,
    memory=64 * GIB,
    memory_free=60 * GIB,
    shared_memory=32 * GIB,
    disk_free=500 * GIB,
    huge_pages="madvise",
)
H100 = Device("gpu", "NVIDIA H100", 60 * GIB, 0)
GPU = dataclasses.replace(
    CPU, versions={**VERSIONS, "jax-cuda12-plugin": "0.11.2"}, devices=(H100,) * 8, nvidia=8, nvidia_smi=True
)
TPU = dataclasses.replace(
    CPU,
    versions={**VERSIONS, "libtpu": "0.0.45"},
    devices=(Device("tpu", "TPU v5 lite"),) * 4,
    tpu=4,
    huge_pages="always",
)
NO_GPU = {"devices": CPU.devices}
TASK = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "3", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}
JOB = {**TASK, "FLEXMOE_PROCESSES": "auto"}


def faults(facts: Facts, roll: Roll | None = None) -> list:
    return [check for check in check_machine(facts, roll) if check.level != "ok"]


@pytest.mark.parametrize("facts", [CPU, GPU, TPU], ids=["CPU", "GPU", "TPU"])
def test_good_machines_have_no_faults(facts):
    assert faults(facts) == []
    assert {check.level for check in check_machine(facts)} == {"ok"}


@pytest.mark.parametrize(
    ("machine", "changes", "level", "about", "what", "remedy"),
    [
        # No device where there is hardware.
        (GPU, {**NO_GPU, "versions": VERSIONS}, "bad", "GPU", "jax that is installed is for CPUs", ".[cuda12]"),
        (GPU, {**NO_GPU, "versions": VERSIONS, "nvidia": 0}, "warn", "GPU", "there is nvidia-smi", ".[cuda12]"),
        (GPU, NO_GPU, "bad", "GPU", "8 NVIDIA GPUs and jax-cuda12-plugin, and JAX has no GPU", "nvidia-smi"),
        (GPU, {**NO_GPU, "environment": {"JAX_PLATFORMS": "cpu"}}, "warn", "GPU", "JAX_PLATFORMS is 'cpu'", "unset"),
        (GPU, {**NO_GPU, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "bad", "GPU", "CUDA_VISIBLE_DEVICES", "unset"),
        (TPU, {**NO_GPU, "versions": VERSIONS}, "bad", "TPU", "4 TPU chips, and libtpu is not installed", ".[tpu]"),
        (TPU, NO_GPU, "bad", "TPU", "JAX has no TPU", "lsof"),
        (TPU, {**NO_GPU, "environment": {"JAX_PLATFORMS": "cpu"}}, "warn", "TPU", "JAX_PLATFORMS is 'cpu'", "unset"),
        (TPU, {"huge_pages": "madvise"}, "warn", "TPU", "starts and stops slowly", "transparent_hugepage"),
        # Devices that JAX cannot list.
        (CPU, {"devices": (), "trouble": "Unknown flag in XLA_FLAGS: --x"}, "bad", "devices", "--x", "XLA_FLAGS"),
        (TPU, {"devices": (), "trouble": "ERROR: Unknown command line flag 'x'"}, "bad", "devices", "'x'", "LIBTPU"),
        (GPU, {"devices": (), "trouble": "no answer in 60 seconds"}, "bad", "devices", "no answer", "nvidia-smi"),
        (TPU, {"devices": (), "trouble": "no answer in 60 seconds"}, "bad", "devices", "no answer", "all of them"),
        (CPU, {"devices": (), "trouble": "ImportError: x"}, "bad", "devices", "ImportError: x", "jax.devices()"),
        # Versions.
        (CPU, {"versions": {**VERSIONS, "jax": "0.9.9"}}, "bad", "versions", "0.9.9, at least 0.10.2", "pip install"),
        (CPU, {"versions": {"python": "3.12.3"}}, "bad", "versions", "jax is missing", "pip install"),
        (
            GPU,
            {"versions": {**GPU.versions, "jax-cuda12-plugin": "0.10.2"}},
            "bad",
            "versions",
            "jax-cuda12-plugin is 0.10.2, jaxlib is 0.11.2",
            ".[cuda12]",
        ),
        # Slurm.
        (GPU, {"environment": JOB, "devices": (H100,)}, "bad", "Slurm", "8 tasks", "--gpus-per-node instead"),
        (
            GPU,
            {"environment": {**JOB, "SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "8(x2)"}, "devices": (H100,)},
            "bad",
            "Slurm",
            "8 tasks",
            "--gpus-per-node instead",
        ),
        (GPU, {"environment": {**JOB, "SLURM_NTASKS_PER_NODE": "1"}}, "warn", "Slurm", "7 stay idle", "per-node=8"),
        (GPU, {"environment": TASK}, "bad", "Slurm", "each would train on its own", "FLEXMOE_PROCESSES=auto"),
        (
            GPU,
            {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "8"}, "devices": (H100,)},
            "bad",
            "Slurm",
            "gave 8 GPUs, this task sees 1",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            GPU,
            {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_PER_TASK": "gpu:h100:4"}, "devices": (H100,)},
            "bad",
            "Slurm",
            "gave 4 GPUs, this task sees 1",
            "--gpu-bind",
        ),
        (CPU, {"environment": {"FLEXMOE_PROCESSES": "auto"}}, "bad", "processes", "no Slurm", "FLEXMOE_COORDINATOR"),
        # How JAX takes memory of GPUs.
        (
            GPU,
            {"environment": {"XLA_CLIENT_MEM_FRACTION": ".9", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".8"}},
            "bad",
            "GPU memory",
            "JAX refuses both",
            "old name",
        ),
        (GPU, {"environment": {"XLA_CLIENT_MEM_FRACTION": "90%"}}, "bad", "GPU memory", "'90%'", ".9"),
        (GPU, {"environment": {"XLA_CLIENT_MEM_FRACTION": ".1"}}, "warn", "GPU memory", "stays unused", ".75"),
        (GPU, {"environment": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.5"}}, "warn", "GPU memory", "pages to", ".75"),
        (GPU, {"environment": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}, "warn", "GPU memory", "PREALLOC", "unset"),
        (GPU, {"environment": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}}, "warn", "GPU memory", "slow", "unset"),
        (GPU, {"environment": {"LD_LIBRARY_PATH": "/usr/lib/cuda"}}, "warn", "GPU", "/usr/lib/cuda", "unset"),
        # Space and cores.
        (CPU, {"disk_free": GIB // 2}, "bad", "disk", "0.5 GiB are free", "make room"),
        (CPU, {"disk_free": 5 * GIB}, "warn", "disk", "5.0 GiB are free", "make room"),
        (CPU, {"memory_free": GIB}, "warn", "memory", "1.0 GiB", "end other programs"),
        (GPU, {"shared_memory": GIB // 16}, "warn", "shared memory", "0.1 GiB, and NCCL joins 8 GPUs", "--shm-size"),
        (CPU, {"cores": 1}, "warn", "CPU", "1 of 16 cores", "--cpus-per-task"),
        (CPU, {"environment": {"GLIBC_TUNABLES": ""}}, "warn", "CPU", "GLIBC_TUNABLES is ''", "hugetlb=1"),
        (CPU, {"huge_pages": "never"}, "warn", "CPU", "huge pages are switched off", "madvise"),
    ],
)
def test_each_mistake_is_named_with_its_remedy(machine, changes, level, about, what, remedy):
    [fault] = faults(dataclasses.replace(machine, **changes))
    assert (fault.level, fault.subject) == (level, about)
    assert what in fault.detail
    assert remedy in fault.remedy


@pytest.mark.parametrize(
    ("machine", "changes"),
    [
        (GPU, {"environment": JOB}),  # one task for each GPU, all to be seen by each
        (GPU, {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "8"}}),
        (GPU, {"environment": {"JAX_PLATFORMS": "cuda,cpu", "XLA_CLIENT_MEM_FRACTION": ".9"}}),
        (TPU, {"environment": {"JAX_PLATFORMS": "tpu,cpu", "FLEXMOE_PROCESSES": "auto"}}),
        (CPU, {"environment": {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}),
        (CPU, {"shared_memory": GIB // 16}),
        (GPU, {"environment": {"GLIBC_TUNABLES": ""}, "huge_pages": "never"}),  # matters where a CPU computes
        (TPU, {"environment": {"GLIBC_TUNABLES": ""}}),
        (CPU, {"environment": {"GLIBC_TUNABLES": ""}, "system": "Darwin"}),
        (CPU, {"cores": 4}),
        (CPU, {"cores": 1, "machine_cores": 1}),
        (CPU, {"environment": TASK | {"SLURM_NTASKS": "1"}}),
        (CPU, {"disk_free": None, "memory_free": None, "shared_memory": None, "system": "Darwin"}),
    ],
)
def test_what_is_right_is_not_complained_of(machine, changes):
    assert faults(dataclasses.replace(machine, **changes)) == []


def test_what_was_looked_at_is_said():
    assert [check.subject for check in check_machine(CPU)] == ["devices", "versions", "disk"]
    on_slurm = check_machine(dataclasses.replace(GPU, environment=JOB))
    assert [one.detail for one in on_slurm if one.subject == "Slurm"] == ["task 3 of 16, 8 GPUs to be seen"]


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
    ],
    ids=["blocks", "ignores SIGTERM", "began another"],
)
def test_a_driver_that_blocks_does_not_block_us(program):
    begin = time.monotonic()
    assert discover(program, timeout_s=1) == ((), "no answer in 1 seconds")
    assert time.monotonic() - begin < 5


def test_a_driver_that_ends_the_process_is_quoted():
    assert discover("import os; os.abort()") == ((), "the process ended with code -6")
    fatal = "F1125 04:27:23.733045    7303 parse.cc:234] Check failed: driver\\n*** stack trace ***\\n@ 0x7f"
    assert discover(f"import os, sys; print('{fatal}', file=sys.stderr, flush=True); os.abort()") == (
        (),
        "Check failed: driver",
    )
    assert discover("raise RuntimeError('no such device')") == ((), "RuntimeError: no such device")


def test_an_unknown_flag_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_no_such_flag=1")
    devices, trouble = discover()
    assert devices == ()
    assert "nknown flag" in trouble
    assert "--xla_gpu_no_such_flag" in trouble


def test_this_machine(monkeypatch):
    monkeypatch.setenv("FLEXMOE_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    facts = gather()
    assert facts.trouble == ""
    assert facts.devices
    assert facts.versions["jax"] == __import__("jax").__version__
    assert facts.memory
    assert facts.disk_free
    assert facts.environment["NCCL_DEBUG"] == "WARN"
    assert "FLEXMOE_API_KEY" not in facts.environment


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (
            {"FLEXMOE_PROCESSES": "4", "FLEXMOE_PROCESS_ID": "3", "FLEXMOE_COORDINATOR": "a:1"},
            Place(4, 3, "a:1"),
        ),
        ({**JOB, "SLURM_STEP_NODELIST": "gpu[007-009,011],b"}, Place(16, 3, "gpu007:61457")),
        ({**JOB, "SLURM_STEP_NODELIST": "one,two"}, Place(16, 3, "one:61457")),
        (
            {"FLEXMOE_PROCESSES": "auto", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"},
            Place(2, 1, "a:8482"),
        ),
        ({"FLEXMOE_PROCESSES": "auto"}, None),
    ],
)
def test_the_place_of_a_process(environment, place):
    assert place_of(environment) == place


def test_slurm_meets_where_jax_meets(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    variables = {**JOB, "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[007-009]"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of(variables).coordinator == SlurmCluster.get_coordinator_address(None, None)


@pytest.mark.parametrize(("count", "number", "coordinator"), [("x", "0", "a:1"), ("2", "2", "a:1"), ("2", "0", "a")])
def test_a_place_that_is_none_is_refused(count, number, coordinator):
    variables = {
        "FLEXMOE_PROCESSES": count,
        "FLEXMOE_PROCESS_ID": number,
        "FLEXMOE_COORDINATOR": coordinator,
    }
    with pytest.raises(MachineError, match=f"FLEXMOE_PROCESSES is {count!r}"):
        place_of(variables)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(numbers: list[int], count: int, wait_s: float = 10.0, first_comes_last: bool = False) -> list[Roll]:
    """What each of these processes hears, in their order, met over this machine's own network."""
    coordinator, rolls = f"127.0.0.1:{free_port()}", {}

    def one(i: int, number: int) -> None:
        if first_comes_last and number == 0:
            time.sleep(0.5)
        about = {"host": f"host{i}", "jax": "0.11.2" if number else "0.10.2"}
        rolls[i] = call(Place(count, number, coordinator), about, wait_s)

    threads = [threading.Thread(target=one, args=(i, number)) for i, number in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [rolls[i] for i in range(len(numbers))]


@pytest.mark.parametrize("first_comes_last", [False, True])
def test_processes_meet(first_comes_last):
    rolls = meet([0, 1, 2], 3, first_comes_last=first_comes_last)
    assert [roll.trouble for roll in rolls] == [""] * 3
    assert {roll.seen for roll in map(_hashable, rolls)} == {_hashable(rolls[0]).seen}
    [different] = faults(CPU, rolls[1])
    assert different.level == "bad"
    assert different.detail == "jax differs: 0.10.2 on 0; 0.11.2 on 1, 2"
    alike = Roll(rolls[0].place, tuple((n, {"host": f"host{n % 2}"}) for n in range(3)))
    assert check_machine(CPU, alike)[-1].detail == "all 3 met, on 2 machines"


def _hashable(roll: Roll) -> Roll:
    return dataclasses.replace(roll, seen=tuple((n, tuple(sorted(about.items()))) for n, about in roll.seen))


def test_who_does_not_come_is_missed():
    rolls = meet([0, 2], 4, wait_s=1.0)
    for roll in rolls:
        assert any("of 4 processes 1, 3 did not come" in fault.detail for fault in faults(CPU, roll))


def test_a_number_given_twice_is_named():
    [lead, *_] = meet([0, 1, 1], 3)
    twice, missing, *_ = faults(CPU, lead)
    assert twice.detail.startswith("numbers given twice: 1 on host")
    assert "2 did not come" in missing.detail


def test_a_coordinator_out_of_reach_and_a_port_that_is_taken():
    begin = time.monotonic()
    roll = call(Place(2, 1, f"127.0.0.1:{free_port()}"), {}, wait_s=0.5)
    assert "Connection refused" in roll.trouble
    assert time.monotonic() - begin < 5
    [fault] = faults(CPU, roll)
    assert "firewall" in fault.remedy
    with socket.create_server(("", 0)) as taken:
        roll = call(Place(2, 0, f"127.0.0.1:{taken.getsockname()[1]}"), {}, wait_s=0.5)
    assert "in use" in roll.trouble
    assert "another port" in faults(CPU, roll)[0].remedy


def test_what_others_say_does_nothing_to_a_terminal():
    port = free_port()
    lead = threading.Thread(target=call, args=(Place(2, 0, f"127.0.0.1:{port}"), {}, 5.0))
    lead.start()
    roll = call(Place(2, 1, f"127.0.0.1:{port}"), {"host": "\x1b[2Jhost" + "x" * 500}, 5.0)
    lead.join(10)
    assert dict(roll.seen)[1]["host"] == "?[2Jhost" + "x" * 192


@pytest.mark.parametrize("said", [b"", b"\n", b"[]\n", b'{"number": "x", "about": {}}\n', b"x" * 100_000])
def test_strangers_are_not_listened_to(said):
    port = free_port()
    heard: list[Roll] = []
    lead = threading.Thread(target=lambda: heard.append(call(Place(2, 0, f"127.0.0.1:{port}"), {}, wait_s=1.5)))
    lead.start()
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                stranger.sendall(said)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    lead.join(20)
    assert [number for number, _ in heard[0].seen] == [0]
    assert heard[0].trouble == ""


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_the_verb_prints_and_its_code_tells(monkeypatch, capsys):
    for name in ("FLEXMOE_PROCESSES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verb, "gather", lambda: dataclasses.replace(GPU, environment={"NCCL_DEBUG": "WARN"}))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("NVIDIA H100, 0.0 of 60.0 GiB used", "jax 0.11.2", "NCCL_DEBUG=WARN", "16 of 16 cores"):
        assert text in printed
    monkeypatch.setattr(verb, "gather", lambda: dataclasses.replace(GPU, devices=CPU.devices, disk_free=5 * GIB))
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)["checks"]
    assert [one["subject"] for one in found if one["level"] == "bad"] == ["GPU"]
    assert [one["subject"] for one in found if one["level"] == "warn"] == ["disk"]
    assert "are bad: GPU" in captured.err
    assert "remedy:" in captured.err


def test_two_processes_of_a_job_for_real():
    """The verb itself, as a launcher starts it: each prints that both met."""
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "doctor", "--json"]
    job = {**os.environ, "FLEXMOE_PROCESSES": "2", "FLEXMOE_COORDINATOR": f"localhost:{free_port()}"}
    job["JAX_PLATFORMS"] = "cpu"
    processes = [
        subprocess.Popen(command, env={**job, "FLEXMOE_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for i, process in enumerate(processes):
        result = json.loads(process.communicate(timeout=100)[0])
        assert result["processes"]["place"]["number"] == i
        assert [number for number, _ in result["processes"]["seen"]] == [0, 1]
        assert "all 2 met, on 1 machine" in [check["detail"] for check in result["checks"]]
