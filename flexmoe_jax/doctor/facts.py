"""What `flexmoe doctor` knows of a machine: facts, gathered without importing JAX and without waiting for long."""

import contextlib
import dataclasses
import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping

PACKAGES = ("flexmoe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
NEEDED = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
VARIABLES = re.compile(
    r"(FLEXMOE|JAX|XLA|LIBTPU|TPU|MEGASCALE|NCCL|CUDA|SKYPILOT_N|OMPI_COMM_W|SLURM_(JOB_ID|N|PROCID|LOCALID|GPUS|TASKS|STEP_N|CPUS))"
    r"|(GLIBC_TUNABLES|LD_LIBRARY_PATH|NVIDIA_VISIBLE_DEVICES|KUBERNETES_SERVICE_HOST|NODE_RANK)$"
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
DISCOVERY_S = 60  # a TPU takes half a minute to come up
LIST_DEVICES = """
import json, jax
def memory(device):
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        stats = {}
    return {"limit": stats.get("bytes_limit"), "used": stats.get("bytes_in_use")}
print(json.dumps([{"platform": d.platform, "kind": d.device_kind, **memory(d)} for d in jax.local_devices()]))
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX names it; bytes where it tells."""

    platform: str  # cpu, gpu, tpu
    kind: str
    limit: int | None = None
    used: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """A machine and how this process was started on it. Bytes throughout; `None` is unknown."""

    host: str = "host"
    system: str = "Linux"
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of installed packages, and of Python
    needed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the oldest that will do
    devices: tuple[Device, ...] = ()
    trouble: str = ""  # why JAX could not list its devices
    nvidia: int = 0  # GPUs of which there is a device file
    nvidia_smi: bool = False
    tpu: int = 0  # TPU chips of which there is a device file
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the variables that matter
    cores: int = 1  # that this process may use
    machine_cores: int = 1
    memory: int | None = None
    memory_free: int | None = None
    shared_memory: int | None = None
    disk_free: int | None = None  # in the current folder
    huge_pages: str = ""  # always, madvise or never

    def on(self, kind: str) -> int:
        """How many devices of a platform JAX has here."""
        return sum(device.platform == kind for device in self.devices)


def gather() -> Facts:
    """The facts of this machine. Takes at most DISCOVERY_S seconds and a little, whatever state its devices are in."""
    devices, trouble = discover()
    memory = _meminfo()
    environment = {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k) and not SECRET.search(k)}
    on_tpu_machine = any(name.startswith("TPU_") for name in os.environ)
    return Facts(
        host=socket.gethostname(),
        system=platform.system(),
        versions={"python": platform.python_version(), **_versions()},
        needed=_needed(),
        devices=devices,
        trouble=trouble,
        nvidia=len(glob.glob("/dev/nvidia[0-9]*")),
        nvidia_smi=shutil.which("nvidia-smi") is not None,
        # Newer chips are handed over by vfio, as are things that are no TPU on other machines.
        tpu=len(glob.glob("/dev/accel[0-9]*")) or (len(glob.glob("/dev/vfio/[0-9]*")) if on_tpu_machine else 0),
        environment=environment,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        machine_cores=os.cpu_count() or 1,
        memory=memory.get("MemTotal"),
        memory_free=memory.get("MemAvailable"),
        shared_memory=_total("/dev/shm"),
        disk_free=shutil.disk_usage(".").free,
        huge_pages=_huge_pages(),
    )


def discover(program: str = LIST_DEVICES, timeout_s: float = DISCOVERY_S) -> tuple[tuple[Device, ...], str]:
    """The devices JAX has in a process of its own, or why it has none: a broken driver can block a process or end it.

    Takes no memory of a GPU that trains beside it. Its output goes to files, since a pipe may be held open by what a
    killed process began; and a process that cannot even be killed is left alone.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            return (), f"no answer in {timeout_s:g} seconds"
        out.seek(0)
        err.seek(0)
        printed, errors = out.read(), err.read()
    if code:
        return (), _reason(errors) or f"the process ended with code {code}"
    return tuple(Device(**device) for device in json.loads(printed.splitlines()[-1])), ""


def _reason(errors: str) -> str:
    """The line of an error output that tells most: XLA's own last word, or the exception's."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    fatal = [line.partition("] ")[2] or line for line in lines if re.match(r"F\d{4} |E\w*:", line)]
    return (fatal or lines or [""])[-1][:300]


def _versions() -> dict[str, str]:
    found = {}
    for package in (*PACKAGES, *PLUGINS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _needed() -> dict[str, str]:
    """The oldest versions that our own package asks for; none where it was not installed by a package manager."""
    needed = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("flexmoe_jax") or ():
            match = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
            if match and match[1] in NEEDED:
                needed[match[1]] = match[2]
    return needed


def _meminfo() -> dict[str, int]:
    """Bytes by name; nothing where there is no /proc."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return {}


def _total(path: str) -> int | None:
    return shutil.disk_usage(path).total if os.path.isdir(path) else None


def _huge_pages() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"\[(\w+)\]", pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
        return match[1] if match else ""
    return ""
