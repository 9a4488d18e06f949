"""`flexmoe doctor` names the mistakes of every kind of machine, never hangs, and lets real processes meet."""

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
from flexmoe_jax.doctor.rendezvous import Rendezvous, meet
from flexmoe_jax.parallel.processes import Place

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


def faults(facts: Facts, rendezvous: Rendezvous | None = None) -> list:
    return [check for check in check_machine(facts, rendezvous) if check.level != "ok"]


@pytest.mark.parametrize("facts", [CPU, GPU, TPU], ids=["CPU", "GPU", "TPU"])
def test_good_machines_have_no_faults(facts):
    assert faults(facts) == []
    assert {check.level for check in check_machine(facts)} == {"ok"}


@pytest.mark.parametrize(
    ("machine", "changes", "level", "about", "what", "remedy"),
    [
        # Hardware that JAX does not use.
        (GPU, {**NO_GPU, "versions": VERSIONS}, "bad", "GPU", "the installed jax is for CPUs only", ".[cuda12]"),
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
        (TPU, {"devices": (), "trouble": "no answer in 60 seconds"}, "bad", "devices", "no answer", "on all workers"),
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
        (GPU, {"environment": TASK}, "bad", "Slurm", "each would train separately", "FLEXMOE_PROCESSES=auto"),
        (
            GPU,
            {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "8"}, "devices": (H100,)},
            "bad",
            "Slurm",
            "allocated 8 GPUs, this task sees 1",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            GPU,
            {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_PER_TASK": "gpu:h100:4"}, "devices": (H100,)},
            "bad",
            "Slurm",
            "allocated 4 GPUs, this task sees 1",
            "--gpu-bind",
        ),
        (CPU, {"environment": {"FLEXMOE_PROCESSES": "auto"}}, "bad", "processes", "no Slurm", "FLEXMOE_COORDINATOR"),
        # How JAX allocates GPU memory.
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
        (CPU, {"disk_free": GIB // 2}, "bad", "disk", "0.5 GiB are free", "free some"),
        (CPU, {"disk_free": 5 * GIB}, "warn", "disk", "5.0 GiB are free", "free some"),
        (CPU, {"memory_free": GIB}, "warn", "memory", "1.0 GiB", "end other programs"),
        (GPU, {"shared_memory": GIB // 16}, "warn", "shared memory", "0.1 GiB, and NCCL connects 8 GPUs", "--shm-size"),
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
        (GPU, {"environment": JOB}),  # one task per GPU, and each sees all GPUs
        (GPU, {"environment": {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "8"}}),
        (GPU, {"environment": {"JAX_PLATFORMS": "cuda,cpu", "XLA_CLIENT_MEM_FRACTION": ".9"}}),
        (TPU, {"environment": {"JAX_PLATFORMS": "tpu,cpu", "FLEXMOE_PROCESSES": "auto"}}),
        (CPU, {"environment": {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}),
        (CPU, {"shared_memory": GIB // 16}),
        (GPU, {"environment": {"GLIBC_TUNABLES": ""}, "huge_pages": "never"}),  # matters only where the CPU computes
        (TPU, {"environment": {"GLIBC_TUNABLES": ""}}),
        (CPU, {"environment": {"GLIBC_TUNABLES": ""}, "system": "Darwin"}),
        (CPU, {"cores": 4}),
        (CPU, {"cores": 1, "machine_cores": 1}),
        (CPU, {"environment": TASK | {"SLURM_NTASKS": "1"}}),
        (CPU, {"disk_free": None, "memory_free": None, "shared_memory": None, "system": "Darwin"}),
    ],
)
def test_correct_settings_raise_no_complaint(machine, changes):
    assert faults(dataclasses.replace(machine, **changes)) == []


def test_checks_that_pass_are_listed():
    assert [check.subject for check in check_machine(CPU)] == ["devices", "versions", "disk"]
    on_slurm = check_machine(dataclasses.replace(GPU, environment=JOB))
    assert [one.detail for one in on_slurm if one.subject == "Slurm"] == ["task 3 of 16 sees 8 GPUs"]


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
    ],
    ids=["blocks", "ignores SIGTERM", "has a child"],
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


def test_facts_of_this_machine_are_gathered_without_secrets(monkeypatch):
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet_all(numbers: list[int], count: int, wait_s: float = 10.0, first_comes_last: bool = False) -> list[Rendezvous]:
    """What each of these processes learns, in their order, over the loopback network."""
    coordinator, found = f"127.0.0.1:{free_port()}", {}

    def one(i: int, number: int) -> None:
        if first_comes_last and number == 0:
            time.sleep(0.5)
        about = {"host": f"host{i}", "jax": "0.11.2" if number else "0.10.2"}
        found[i] = meet(Place(count, number, coordinator), about, wait_s)

    threads = [threading.Thread(target=one, args=(i, number)) for i, number in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[i] for i in range(len(numbers))]


@pytest.mark.parametrize("first_comes_last", [False, True])
def test_processes_meet(first_comes_last):
    found = meet_all([0, 1, 2], 3, first_comes_last=first_comes_last)
    assert [each.trouble for each in found] == [""] * 3
    assert [each.seen for each in found] == [found[0].seen] * 3
    [different] = faults(CPU, found[1])
    assert different.level == "bad"
    assert different.detail == "jax differs: 0.10.2 on 0; 0.11.2 on 1, 2"
    alike = Rendezvous(found[0].place, tuple((n, {"host": f"host{n % 2}"}) for n in range(3)))
    assert check_machine(CPU, alike)[-1].detail == "all 3 met, on 2 machines"


def test_processes_that_do_not_come_are_named():
    found = meet_all([0, 2], 4, wait_s=1.0)
    for each in found:
        assert any("2 of 4 processes are missing: 1, 3" in fault.detail for fault in faults(CPU, each))


def test_a_process_number_used_twice_is_named():
    [lead, *_] = meet_all([0, 1, 1], 3)
    twice, missing, *_ = faults(CPU, lead)
    assert twice.detail.startswith("process number 1 is used on host")
    assert "1 of 3 processes are missing: 2" in missing.detail


def test_an_unreachable_coordinator_and_a_port_in_use_are_named():
    begin = time.monotonic()
    found = meet(Place(2, 1, f"127.0.0.1:{free_port()}"), {}, wait_s=0.5)
    assert "Connection refused" in found.trouble
    assert time.monotonic() - begin < 5
    [fault] = faults(CPU, found)
    assert "with its port open" in fault.remedy
    with socket.create_server(("", 0)) as taken:
        found = meet(Place(2, 0, f"127.0.0.1:{taken.getsockname()[1]}"), {}, wait_s=0.5)
    assert "in use" in found.trouble
    assert "another port" in faults(CPU, found)[0].remedy


def test_what_others_send_is_safe_to_print():
    port = free_port()
    lead = threading.Thread(target=meet, args=(Place(2, 0, f"127.0.0.1:{port}"), {}, 5.0))
    lead.start()
    found = meet(Place(2, 1, f"127.0.0.1:{port}"), {"host": "\x1b[2Jhost" + "x" * 500}, 5.0)
    lead.join(10)
    assert dict(found.seen)[1]["host"] == "?[2Jhost" + "x" * 192


@pytest.mark.parametrize("said", [b"", b"\n", b"[]\n", b'{"number": "x", "about": {}}\n', b"x" * 100_000])
def test_other_programs_that_connect_are_ignored(said):
    port = free_port()
    heard: list[Rendezvous] = []
    lead = threading.Thread(target=lambda: heard.append(meet(Place(2, 0, f"127.0.0.1:{port}"), {}, wait_s=1.5)))
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


def test_the_verb_prints_everything_and_fails_if_a_check_does(monkeypatch, capsys):
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
    assert {tuple(one) for one in found} == {("level", "subject", "ok", "detail", "remedy")}
    assert "are bad: GPU" in captured.err
    assert "remedy:" in captured.err


def test_the_verb_does_not_import_jax():
    """It says what is wrong with an installation whose JAX cannot be imported, in a job too."""
    code = "import os, sys; sys.modules['jax'] = None; from flexmoe_jax.cli import doctor as verb; "
    code += "print(verb.place_of(os.environ))"
    job = {"FLEXMOE_PROCESSES": "2", "FLEXMOE_PROCESS_ID": "1", "FLEXMOE_COORDINATOR": "host:1"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **job}, capture_output=True, text=True)
    assert done.stdout == "Place(count=2, number=1, coordinator='host:1')\n", done.stderr


def test_two_real_processes_meet():
    """The verb as a launcher starts it: each process prints that both met."""
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
