"""Checks of a machine for the usual mistakes, each with its remedy: functions of the machine's facts only."""

import re
from collections.abc import Iterator, Mapping

from flexmoe_jax.doctor.facts import PLUGINS, Facts
from flexmoe_jax.doctor.rendezvous import Rendezvous
from flexmoe_jax.errors import Check

GIB = 2**30


def check_machine(facts: Facts, rendezvous: Rendezvous | None = None) -> list[Check]:
    """All checks, in the order in which their remedies should be applied; `rendezvous` is None for a single process."""
    parts = (_versions, _gpus, _tpus, _job, _slurm, _gpu_memory, _cpu, _space)
    found = [_devices(facts), *(check for part in parts for check in part(facts))]
    return found + (list(_processes(rendezvous, facts)) if rendezvous is not None else [])


def _devices(facts: Facts) -> Check:
    if not facts.trouble:
        kinds = sorted({f"{facts.on(d.platform)} {d.platform} ({d.kind})" for d in facts.devices})
        return Check("devices", True, ", ".join(kinds) or "none")
    if re.search("[Uu]nknown .*flag", facts.trouble):
        remedy = "remove the flag from XLA_FLAGS or LIBTPU_INIT_ARGS: this version does not know it"
    elif "no answer" in facts.trouble and facts.tpu:
        remedy = "end the process that holds the TPU; on a pod, run this on all workers: they initialize together"
    elif "no answer" in facts.trouble:
        remedy = "check that `nvidia-smi` answers; if not, reload the driver or restart the machine"
    elif asked := facts.environment.get("JAX_PLATFORMS"):
        what = f"JAX_PLATFORMS is {asked!r}, and JAX cannot use it here: {facts.trouble}"
        remedy = "unset JAX_PLATFORMS, or install jax for these devices (pip install -e '.[cuda12]', cuda13 or tpu)"
        return Check("devices", False, what, remedy)
    else:
        remedy = 'run `python -c "import jax; jax.devices()"` for the whole error'
    return Check("devices", False, f"JAX could not list its devices: {facts.trouble}", remedy)


def _versions(facts: Facts) -> Iterator[Check]:
    old = [
        f"{name} is {facts.versions.get(name, 'missing')}, at least {least} is needed"
        for name, least in facts.needed.items()
        if _numbers(facts.versions.get(name, "0")) < _numbers(least)
    ]
    if old:
        yield Check("versions", False, "; ".join(old), "pip install --upgrade -e . (BUILD.md)")
    jaxlib = facts.versions.get("jaxlib", "")
    different = {name: facts.versions[name] for name in PLUGINS if facts.versions.get(name, jaxlib) != jaxlib}
    for name, version in different.items():
        what = f"{name} is {version}, jaxlib is {jaxlib}"
        yield Check("versions", False, what, f"install both together: pip install -e '.[{name.split('-')[1]}]'")
    if not old and not different:
        versions = f"jax {facts.versions.get('jax', '?')}, python {facts.versions.get('python', '?')}"
        yield Check("versions", True, versions)


def _gpus(facts: Facts) -> Iterator[Check]:
    """NVIDIA GPUs that JAX does not use."""
    if facts.on("gpu") or not (facts.nvidia or facts.nvidia_smi):
        return
    seen = f"there are {facts.nvidia} NVIDIA GPUs" if facts.nvidia else "there is nvidia-smi"
    asked, visible = facts.environment.get("JAX_PLATFORMS", ""), facts.environment.get("CUDA_VISIBLE_DEVICES")
    plugins = [name for name in PLUGINS if name in facts.versions]
    if asked and not {"cuda", "gpu"} & set(asked.split(",")):
        yield Check("GPU", True, f"{seen}, and JAX_PLATFORMS is {asked!r}", "unset JAX_PLATFORMS to use them")
    elif not plugins:
        remedy = "pip install -e '.[cuda12]' (or cuda13, with driver 580 or newer)"
        detail = f"{seen}, and the installed jax is for CPUs only"
        yield Check("GPU", not facts.nvidia, detail, remedy)  # a login node has nvidia-smi and no GPU
    elif visible in ("", "-1"):
        yield Check("GPU", False, f"{seen}, and CUDA_VISIBLE_DEVICES is {visible!r}", "unset CUDA_VISIBLE_DEVICES")
    elif facts.nvidia and not facts.trouble:
        remedy = "check that `nvidia-smi` lists them: the driver may be too old, or the container may have no access"
        yield Check("GPU", False, f"{seen} and {plugins[0]}, and JAX has no GPU", remedy)


def _tpus(facts: Facts) -> Iterator[Check]:
    """TPUs that JAX does not use, or starts slowly."""
    if not facts.tpu:
        return
    asked = facts.environment.get("JAX_PLATFORMS", "")
    if asked and "tpu" not in asked.split(","):
        what = f"there are {facts.tpu} TPU chips, and JAX_PLATFORMS is {asked!r}"
        yield Check("TPU", True, what, "unset JAX_PLATFORMS to use them")
    elif "libtpu" not in facts.versions:
        what = f"there are {facts.tpu} TPU chips, and libtpu is not installed"
        yield Check("TPU", False, what, "pip install -e '.[tpu]'")
    elif not facts.on("tpu") and not facts.trouble:
        remedy = "end the process that holds them (`sudo lsof -w /dev/accel* /dev/vfio/*`)"
        yield Check("TPU", False, f"there are {facts.tpu} TPU chips and libtpu, and JAX has no TPU", remedy)
    if facts.huge_pages not in ("always", ""):
        remedy = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Check("TPU", True, f"huge pages are {facts.huge_pages!r}: the TPU starts and stops slowly", remedy)


def _job(facts: Facts) -> Iterator[Check]:
    """A job in which JAX cannot find the other processes by itself."""
    signs = ("SLURM_PROCID", "TPU_WORKER_ID", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST")
    auto = facts.environment.get("FLEXMOE_PROCESSES") == "auto"
    if auto and not facts.tpu and not any(map(facts.environment.get, signs)):
        what = "FLEXMOE_PROCESSES is 'auto', and there is no Slurm, TPU, MPI or Kubernetes that knows the processes"
        remedy = "set it to the number of processes, with FLEXMOE_PROCESS_ID and FLEXMOE_COORDINATOR"
        yield Check("processes", False, what, remedy)


def _slurm(facts: Facts) -> Iterator[Check]:
    """The GPUs that a task sees against those that its job requested and those that JAX will use."""
    variables = facts.environment
    if "SLURM_PROCID" not in variables:
        return
    tasks, joins = _last_number(variables, "SLURM_NTASKS", 1), "FLEXMOE_PROCESSES" in variables
    if tasks > 1 and not joins:
        what = f"{tasks} Slurm tasks, and FLEXMOE_PROCESSES is not set: each would train separately in the same folder"
        yield Check("Slurm", False, what, "set FLEXMOE_PROCESSES=auto, or use launch/slurm.sh")
    if not facts.on("gpu"):
        return
    here, visible = _tasks_here(variables), facts.on("gpu")
    promised = _last_number(variables, "SLURM_GPUS_PER_TASK", 0) or _last_number(variables, "SLURM_GPUS_ON_NODE", 0)
    if joins and variables["FLEXMOE_PROCESSES"] == "auto" and visible < here:
        what = f"{here} tasks on this node, each sees {visible} GPU: JAX gives each task the GPU of its local number"
        yield Check("Slurm", False, what, "request --gpus-per-node instead of --gpus-per-task or --gpu-bind")
    elif joins and variables["FLEXMOE_PROCESSES"] == "auto" and visible > here:
        what = f"{here} tasks on this node for {visible} GPUs: JAX gives each task one, {visible - here} stay idle"
        yield Check("Slurm", True, what, f"request --ntasks-per-node={visible}")
    elif visible < promised and (here == 1 or "SLURM_GPUS_PER_TASK" in variables):
        what = f"Slurm allocated {promised} GPUs, this task sees {visible}"
        yield Check("Slurm", False, what, "unset CUDA_VISIBLE_DEVICES and --gpu-bind; see `scontrol show job`")
    else:
        yield Check("Slurm", True, f"task {variables['SLURM_PROCID']} of {tasks} sees {visible} GPUs")


def _gpu_memory(facts: Facts) -> Iterator[Check]:
    """The variables that control how JAX allocates GPU memory."""
    variables = facts.environment
    new, old = variables.get("XLA_CLIENT_MEM_FRACTION"), variables.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if new and old:
        what = f"XLA_CLIENT_MEM_FRACTION is {new} and XLA_PYTHON_CLIENT_MEM_FRACTION {old}: JAX refuses both"
        yield Check("GPU memory", False, what, "unset XLA_PYTHON_CLIENT_MEM_FRACTION, the old name")
    elif fraction := new or old:
        value = float(fraction) if re.fullmatch(r"\d*\.?\d+|\d+\.", fraction) else None
        if value is None or value == 0:
            what = f"the memory fraction is {fraction!r}"
            yield Check("GPU memory", False, what, "set XLA_CLIENT_MEM_FRACTION to a number such as .9")
        elif value > 1 or value < 0.3:
            why = "what exceeds 1 pages to the host, slowly" if value > 1 else "the rest stays unused"
            what = f"the memory fraction is {fraction}: {why}"
            yield Check("GPU memory", True, what, "set XLA_CLIENT_MEM_FRACTION between .75 and .95")
    if not facts.on("gpu"):
        return
    if variables.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") in ("false", "False", "0"):
        what = "XLA_PYTHON_CLIENT_PREALLOCATE is off: memory fragments, and a step may fail for lack of one large block"
        yield Check("GPU memory", True, what, "unset it on a GPU that is used only for training")
    if variables.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") == "platform":
        what = "XLA_PYTHON_CLIENT_ALLOCATOR is 'platform': the driver allocates every array, which is very slow"
        yield Check("GPU memory", True, what, "unset it")
    if variables.get("LD_LIBRARY_PATH"):
        what = f"LD_LIBRARY_PATH is {variables['LD_LIBRARY_PATH']!r}: its CUDA may shadow the one that JAX brings"
        yield Check("GPU", True, what, "unset it if JAX misses a library or a version")


def _cpu(facts: Facts) -> Iterator[Check]:
    """What makes a CPU slow."""
    if facts.cores < facts.machine_cores and facts.cores == 1:
        what = f"this process may use 1 of {facts.machine_cores} cores"
        yield Check("CPU", True, what, "raise Slurm's --cpus-per-task, the container's CPUs, or the taskset")
    if facts.on("gpu") or facts.on("tpu") or facts.system != "Linux":
        return
    tunables = facts.environment.get("GLIBC_TUNABLES")
    if tunables is not None and "glibc.malloc.hugetlb=1" not in tunables:
        what = f"GLIBC_TUNABLES is {tunables!r}: large arrays are not on huge pages"
        yield Check("CPU", True, what, "add glibc.malloc.hugetlb=1, or unset it: flexmoe then sets it")
    elif facts.huge_pages == "never":
        what = "huge pages are switched off: new arrays cost more page faults"
        yield Check("CPU", True, what, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")


def _space(facts: Facts) -> Iterator[Check]:
    """Host memory, the shared memory that NCCL uses, and disk for checkpoints."""
    if facts.memory_free is not None and facts.memory_free < 2 * GIB:
        what = f"{_gib(facts.memory_free)} of host memory are free"
        yield Check("memory", True, what, "end other programs: arrays pass through host memory on the way to devices")
    if facts.on("gpu") > 1 and facts.shared_memory is not None and facts.shared_memory < GIB:
        what = f"/dev/shm has {_gib(facts.shared_memory)}, and NCCL connects {facts.on('gpu')} GPUs through it"
        yield Check("shared memory", True, what, "docker run --shm-size=8g, or an emptyDir of Memory at /dev/shm")
    if facts.disk_free is not None:
        what = f"{_gib(facts.disk_free)} are free in this folder"
        remedy = "free some, or use a larger disk: a checkpoint takes up to 12 bytes per trained parameter"
        yield Check("disk", facts.disk_free >= GIB, what, remedy if facts.disk_free < 10 * GIB else "")


def _processes(rendezvous: Rendezvous, facts: Facts) -> Iterator[Check]:
    """Whether the processes of the job reach one another, have distinct numbers, and run the same versions."""
    place = rendezvous.place
    if rendezvous.trouble:
        what = f"process {place.number} of {place.count} on {facts.host}: {rendezvous.trouble}"
        remedy = "start process 0 within half a minute, on a host that all can resolve, with its port open"
        remedy = "end the program that listens there, or choose another port" if place.number == 0 else remedy
        yield Check("processes", False, what, remedy)
        return
    numbers = [number for number, _ in rendezvous.seen]
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    missing = sorted(set(range(place.count)) - set(numbers))
    unknown = sorted(set(numbers) - set(range(place.count)))
    hosts = {n: about.get("host", "?") for n, about in rendezvous.seen}
    if twice:
        same = {n: [about.get("host", "?") for m, about in rendezvous.seen if m == n] for n in twice}
        what = "; ".join(f"process number {n} is used on {' and '.join(where)}" for n, where in same.items())
        yield Check("processes", False, what, "give each process its own FLEXMOE_PROCESS_ID")
    if missing or unknown:
        what = f"process numbers above {place.count - 1}: {_list(unknown)}"
        what = f"{len(missing)} of {place.count} processes are missing: {_list(missing)}" if missing else what
        remedy = "start the same command everywhere with the same FLEXMOE_PROCESSES, and open the coordinator's port"
        yield Check("processes", False, what, remedy)
    for key in ("python", "jax", "flexmoe_jax", "count", "devices"):
        values = {about.get(key, "?") for _, about in rendezvous.seen}
        if len(values) > 1:
            where = {v: _list([n for n, about in rendezvous.seen if about.get(key, "?") == v]) for v in sorted(values)}
            what = f"{key} differs: {'; '.join(f'{v} on {which}' for v, which in where.items())}"
            yield Check("processes", key == "python", what, "give all machines of the job the same")
    if not (twice or missing or unknown):
        machines = len(set(hosts.values()))
        yield Check("processes", True, f"all {place.count} met, on {machines} machine{'s' * (machines > 1)}")


def _tasks_here(variables: Mapping[str, str]) -> int:
    """Slurm tasks on this node: `8`, or the first number of `8(x4)` and of `8,7`; 1 where the job does not say."""
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if match := re.match(r"\d+", variables.get(name, "")):
            return int(match[0])
    return 1


def _last_number(variables: Mapping[str, str], name: str, default: int) -> int:
    """The last number in a variable: 4 in `4` and in `gpu:h100:4`."""
    found = re.findall(r"\d+", variables.get(name, ""))
    return int(found[-1]) if found else default


def _numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
