"""What is wrong with a machine, as a function of its facts alone: the usual mistakes, each with what to do about it."""

import re
from collections.abc import Iterator

from flexmoe_jax.doctor.facts import PLUGINS, Facts
from flexmoe_jax.doctor.rendezvous import Roll
from flexmoe_jax.errors import Check

GIB = 2**30


def check_machine(facts: Facts, roll: Roll | None = None) -> list[Check]:
    """Everything looked at, in the order in which it should be mended."""
    looks = (_versions, _gpus, _tpus, _job, _slurm, _gpu_memory, _cpu, _space)
    found = [_devices(facts), *(check for look in looks for check in look(facts))]
    return found + (list(_processes(roll, facts)) if roll is not None else [])


def _devices(facts: Facts) -> Check:
    if not facts.trouble:
        kinds = sorted({f"{facts.on(d.platform)} {d.platform} ({d.kind})" for d in facts.devices})
        return Check("devices", True, ", ".join(kinds) or "none")
    if re.search("[Uu]nknown .*flag", facts.trouble):
        remedy = "take the flag out of XLA_FLAGS or LIBTPU_INIT_ARGS: this version does not have it"
    elif "no answer" in facts.trouble and facts.tpu:
        remedy = (
            "end the process that holds the TPU; the workers of a pod come up only together: run this on all of them"
        )
    elif "no answer" in facts.trouble:
        remedy = "see whether `nvidia-smi` answers; the driver may need a restart of the machine"
    else:
        remedy = 'run `python -c "import jax; jax.devices()"` to see all of it'
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
    apart = {name: facts.versions[name] for name in PLUGINS if facts.versions.get(name, jaxlib) != jaxlib}
    for name, version in apart.items():
        what = f"{name} is {version}, jaxlib is {jaxlib}"
        yield Check("versions", False, what, f"install both at once: pip install -e '.[{name.split('-')[1]}]'")
    if not old and not apart:
        yield Check(
            "versions", True, f"jax {facts.versions.get('jax', '?')}, python {facts.versions.get('python', '?')}"
        )


def _gpus(facts: Facts) -> Iterator[Check]:
    """An NVIDIA machine on which JAX has no GPU."""
    if facts.on("gpu") or not (facts.nvidia or facts.nvidia_smi):
        return
    seen = f"there are {facts.nvidia} NVIDIA GPUs" if facts.nvidia else "there is nvidia-smi"
    asked, visible = facts.environment.get("JAX_PLATFORMS", ""), facts.environment.get("CUDA_VISIBLE_DEVICES")
    plugins = [name for name in PLUGINS if name in facts.versions]
    if asked and not {"cuda", "gpu"} & set(asked.split(",")):
        yield Check("GPU", True, f"{seen}, JAX_PLATFORMS is {asked!r}", "unset JAX_PLATFORMS to use them")
    elif not plugins:
        remedy = "pip install -e '.[cuda12]' (or cuda13, for drivers from 580 on)"
        detail = f"{seen}, and the jax that is installed is for CPUs only"
        yield Check("GPU", not facts.nvidia, detail, remedy)  # a login node has nvidia-smi and no GPU
    elif visible in ("", "-1"):
        yield Check("GPU", False, f"{seen}, CUDA_VISIBLE_DEVICES is {visible!r}", "unset CUDA_VISIBLE_DEVICES")
    elif facts.nvidia and not facts.trouble:
        remedy = "see whether `nvidia-smi` lists them: the driver may be too old, or the container has no access"
        yield Check("GPU", False, f"{seen} and {plugins[0]}, and JAX has no GPU", remedy)


def _tpus(facts: Facts) -> Iterator[Check]:
    """A TPU machine on which JAX has no TPU, or starts it slowly."""
    if not facts.tpu:
        return
    asked = facts.environment.get("JAX_PLATFORMS", "")
    if asked and "tpu" not in asked.split(","):
        what = f"there are {facts.tpu} TPU chips, JAX_PLATFORMS is {asked!r}"
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
    """A job that JAX cannot find out about by itself."""
    signs = ("SLURM_PROCID", "TPU_WORKER_ID", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST")
    auto = facts.environment.get("FLEXMOE_PROCESSES") == "auto"
    if auto and not facts.tpu and not any(map(facts.environment.get, signs)):
        what = "FLEXMOE_PROCESSES is 'auto', and there is no Slurm, TPU, MPI or Kubernetes to ask"
        remedy = "set it to the number of processes, with FLEXMOE_PROCESS_ID and FLEXMOE_COORDINATOR"
        yield Check("processes", False, what, remedy)


def _slurm(facts: Facts) -> Iterator[Check]:
    """A task's GPUs against what its job asked for, and against what JAX will make of it."""
    variables = facts.environment
    if "SLURM_PROCID" not in variables:
        return
    tasks, joins = _number(variables, "SLURM_NTASKS", 1), "FLEXMOE_PROCESSES" in variables
    if tasks > 1 and not joins:
        what = f"{tasks} Slurm tasks, and FLEXMOE_PROCESSES is not set: each would train on its own, in the same folder"
        yield Check("Slurm", False, what, "set FLEXMOE_PROCESSES=auto, or use launch/slurm.sh")
    if not facts.on("gpu"):
        return
    here, visible = _tasks_here(variables), facts.on("gpu")
    promised = _number(variables, "SLURM_GPUS_PER_TASK", 0) or _number(variables, "SLURM_GPUS_ON_NODE", 0)
    if joins and variables["FLEXMOE_PROCESSES"] == "auto" and visible < here:
        what = (
            f"{here} tasks on this node, of which each sees {visible} GPU: JAX gives each the one of its local number"
        )
        yield Check("Slurm", False, what, "ask for --gpus-per-node instead of --gpus-per-task or --gpu-bind")
    elif joins and variables["FLEXMOE_PROCESSES"] == "auto" and visible > here:
        what = f"{here} tasks on this node for {visible} GPUs: JAX gives each one, and {visible - here} stay idle"
        yield Check("Slurm", True, what, f"ask for --ntasks-per-node={visible}")
    elif visible < promised and (here == 1 or "SLURM_GPUS_PER_TASK" in variables):
        what = f"Slurm gave {promised} GPUs, this task sees {visible}"
        yield Check("Slurm", False, what, "unset CUDA_VISIBLE_DEVICES and --gpu-bind; see `scontrol show job`")
    else:
        yield Check("Slurm", True, f"task {variables['SLURM_PROCID']} of {tasks}, {visible} GPUs to be seen")


def _gpu_memory(facts: Facts) -> Iterator[Check]:
    """The variables that say how JAX takes memory of GPUs."""
    variables = facts.environment
    new, old = variables.get("XLA_CLIENT_MEM_FRACTION"), variables.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if new and old:
        what = f"XLA_CLIENT_MEM_FRACTION is {new} and XLA_PYTHON_CLIENT_MEM_FRACTION {old}: JAX refuses both"
        yield Check("GPU memory", False, what, "unset the second, which is the old name")
    elif fraction := new or old:
        value = float(fraction) if re.fullmatch(r"\d*\.?\d+|\d+\.", fraction) else None
        if value is None or value == 0:
            what = f"the fraction of memory is {fraction!r}"
            yield Check("GPU memory", False, what, "set XLA_CLIENT_MEM_FRACTION to a number such as .9")
        elif value > 1 or value < 0.3:
            why = "beyond 1 pages to the host, slowly" if value > 1 else "the rest stays unused"
            what = f"the fraction of memory is {fraction}: {why}"
            yield Check("GPU memory", True, what, "set XLA_CLIENT_MEM_FRACTION between .75 and .95")
    if not facts.on("gpu"):
        return
    if variables.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") in ("false", "False", "0"):
        what = "XLA_PYTHON_CLIENT_PREALLOCATE is off: memory comes apart, and a step may fail for lack of a whole piece"
        yield Check("GPU memory", True, what, "unset it on a GPU that only trains")
    if variables.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") == "platform":
        what = "XLA_PYTHON_CLIENT_ALLOCATOR is 'platform': every array is asked of the driver, which is very slow"
        yield Check("GPU memory", True, what, "unset it")
    if variables.get("LD_LIBRARY_PATH"):
        what = f"LD_LIBRARY_PATH is {variables['LD_LIBRARY_PATH']!r}: its CUDA may come before the one JAX brings along"
        yield Check("GPU", True, what, "unset it if JAX misses a library or a version")


def _cpu(facts: Facts) -> Iterator[Check]:
    """What makes a CPU slow."""
    if facts.cores < facts.machine_cores and facts.cores == 1:
        what = f"this process may use 1 of {facts.machine_cores} cores"
        yield Check("CPU", True, what, "ask Slurm for --cpus-per-task, the container for more, or taskset for all")
    if facts.on("gpu") or facts.on("tpu") or facts.system != "Linux":
        return
    tunables = facts.environment.get("GLIBC_TUNABLES")
    if tunables is not None and "glibc.malloc.hugetlb=1" not in tunables:
        what = f"GLIBC_TUNABLES is {tunables!r}: large arrays do not lie on huge pages"
        yield Check("CPU", True, what, "add glibc.malloc.hugetlb=1, or unset it: flexmoe then sets it")
    elif facts.huge_pages == "never":
        what = "huge pages are switched off: fresh arrays cost more page faults"
        yield Check("CPU", True, what, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")


def _space(facts: Facts) -> Iterator[Check]:
    """Memory of the host, the shared memory that NCCL uses, and disk for checkpoints."""
    if facts.memory_free is not None and facts.memory_free < 2 * GIB:
        what = f"{_gib(facts.memory_free)} of memory are free"
        yield Check("memory", True, what, "end other programs; arrays pass through the host's memory on their way")
    if facts.on("gpu") > 1 and facts.shared_memory is not None and facts.shared_memory < GIB:
        what = f"/dev/shm has {_gib(facts.shared_memory)}, and NCCL joins {facts.on('gpu')} GPUs through it"
        yield Check("shared memory", True, what, "docker run --shm-size=8g, or an emptyDir of Memory at /dev/shm")
    if facts.disk_free is not None:
        what = f"{_gib(facts.disk_free)} are free in this folder"
        remedy = (
            ""
            if facts.disk_free >= 10 * GIB
            else "make room, or run where there is more: a checkpoint holds what is trained three times over in float32"
        )
        yield Check("disk", facts.disk_free >= GIB, what, remedy)


def _processes(roll: Roll, facts: Facts) -> Iterator[Check]:
    """Whether the processes of the job reach one another, and are what they say."""
    place = roll.place
    if roll.trouble:
        what = f"process {place.number} of {place.count} on {facts.host}: {roll.trouble}"
        remedy = "start process 0 within half a minute, under a name all know; let its port through the firewall"
        remedy = "end what listens there, or take another port" if place.number == 0 else remedy
        yield Check("processes", False, what, remedy)
        return
    numbers = [number for number, _ in roll.seen]
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    missing = sorted(set(range(place.count)) - set(numbers))
    strange = sorted(set(numbers) - set(range(place.count)))
    hosts = {n: about.get("host", "?") for n, about in roll.seen}
    if twice:
        where = ", ".join(f"{n} on {' and '.join(a.get('host', '?') for m, a in roll.seen if m == n)}" for n in twice)
        yield Check("processes", False, f"numbers given twice: {where}", "give each its own FLEXMOE_PROCESS_ID")
    if missing or strange:
        what = f"of {place.count} processes {_list(missing)} did not come" if missing else f"{_list(strange)} came too"
        remedy = "start the same command everywhere with the same FLEXMOE_PROCESSES; let the port through the firewall"
        yield Check("processes", False, what, remedy)
    for key in ("python", "jax", "flexmoe_jax", "count", "devices"):
        values = {about.get(key, "?") for _, about in roll.seen}
        if len(values) > 1:
            which = "; ".join(
                f"{v} on {_list([n for n, about in roll.seen if about.get(key, '?') == v])}" for v in sorted(values)
            )
            remedy = "make all machines of the job alike"
            yield Check("processes", key == "python", f"{key} differs: {which}", remedy)
    if not (twice or missing or strange):
        machines = len(set(hosts.values()))
        yield Check("processes", True, f"all {place.count} met, on {machines} machine{'s' * (machines > 1)}")


def _tasks_here(variables) -> int:
    """Tasks on this node, where the job says it: `8`, or the first of `8(x4)` and `8,7`."""
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if match := re.match(r"\d+", variables.get(name, "")):
            return int(match[0])
    return 1


def _number(variables, name: str, default: int) -> int:
    """The last number of a variable: `4`, or `4` of `gpu:h100:4`."""
    found = re.findall(r"\d+", variables.get(name, ""))
    return int(found[-1]) if found else default


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
