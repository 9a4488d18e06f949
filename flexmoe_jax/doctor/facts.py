"""Facts about a machine, gathered without importing JAX and with a limit on time, for `flexmoe doctor`."""

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
    r"(FLEXMOE|JAX|XLA|LIBTPU|TPU|MEGASCALE|NCCL|CUDA|SKYPILOT_N|OMPI_COMM_W)"
    r"|SLURM_(JOB_ID|N|PROCID|LOCALID|GPUS|TASKS|STEP_N|CPUS)"
    r"|(GLIBC_TUNABLES|LD_LIBRARY_PATH|NVIDIA_VISIBLE_DEVICES|KUBERNETES_SERVICE_HOST|NODE_RANK)$"
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
DISCOVERY_S = 60  # a TPU takes half a minute to initialize
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
    """One device of JAX; `limit` and `used` are bytes of its memory, None where JAX does not know them."""

    platform: str  # cpu, gpu, tpu
    kind: str
    limit: int | None = None
    used: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """A machine, and how this process was started on it. Sizes are bytes; None is unknown."""

    host: str = "host"
    system: str = "Linux"
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of Python and of installed packages
    needed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the oldest version of each package that works
    devices: tuple[Device, ...] = ()
    trouble: str = ""  # why JAX could not list its devices
    nvidia: int = 0  # GPUs with a device file
    nvidia_smi: bool = False
    tpu: int = 0  # TPU chips with a device file
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # only the variables that matter here
    cores: int = 1  # cores that this process may use
    machine_cores: int = 1
    memory: int | None = None
    memory_free: int | None = None
    shared_memory: int | None = None
    disk_free: int | None = None  # in the current folder
    huge_pages: str = ""  # always, madvise or never

    def on(self, kind: str) -> int:
        """The number of devices that JAX has on platform `kind`."""
        return sum(device.platform == kind for device in self.devices)


def gather() -> Facts:
    """The facts about this machine; takes little more than DISCOVERY_S seconds, even where a driver hangs."""
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
        # Newer TPUs appear as vfio devices; so does other hardware, on machines without TPUs.
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
    """(JAX's devices, why it has none), found by a separate process: a broken driver can block a process or end it.

    The process takes no memory of a GPU that another one trains on. Its output goes to files, because children of a
    killed process can hold a pipe open. A process that cannot be killed is left behind.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
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
    """The most informative line of an error output: XLA's last fatal one, or the last of the exception."""
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
    """The oldest versions that our package requires; {} where its metadata is not installed."""
    needed = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("flexmoe_jax") or ():
            match = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
            if match and match[1] in NEEDED:
                needed[match[1]] = match[2]
    return needed


def _meminfo() -> dict[str, int]:
    """{name: bytes} of /proc/meminfo; {} without it."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return {}


def _total(path: str) -> int | None:
    """Size of the file system at `path`."""
    return shutil.disk_usage(path).total if os.path.isdir(path) else None


def _huge_pages() -> str:
    """The kernel's setting: always, madvise or never; "" where it has none."""
    with contextlib.suppress(OSError):
        match = re.search(
            r"\[(\w+)\]", pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
        )
        return match[1] if match else ""
    return ""
