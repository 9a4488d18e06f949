"""The mesh: four axes, always there, of size one where nothing is split; one device is a mesh of one.

    data     copies of the parameters, each with its part of the batch
    fsdp     parameters, moments and the batch in parts
    expert   experts in parts, and the batch
    tensor   heads, feed-forward width and vocabulary in parts

Inside `jax.set_mesh(mesh)` the model finds the mesh by itself (`current_mesh`); outside, everything is on one device.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.params import AXES, DATA, EXPERT, FSDP

BATCH = (DATA, FSDP, EXPERT)  # axes that split the rows of a batch


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" -> {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}; what is not named has size 1."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in sizes:
            raise ConfigError(f"mesh {text!r}: there is no axis {name!r}", did_you_mean(name, AXES))
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"mesh {text!r}: the size of {name} is {size!r}", "give a number of at least 1")
        sizes[name] = int(size)
    return sizes


def check_mesh(text: str, count: int) -> dict[str, int]:
    """`parse_mesh(text)`; ConfigError if the mesh does not take `count` devices."""
    sizes = parse_mesh(text)
    needed = math.prod(sizes.values())
    if needed != count:
        raise ConfigError(
            f"the mesh {text!r} takes {needed} devices, there are {count}",
            f"choose sizes of {', '.join(AXES)} whose product is {count}",
        )
    return sizes


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these axis sizes over all devices of all processes (or `devices`); ConfigError if they do not fit.

    Neighbours on the last axes are neighbours on the hardware: `tensor` communicates most, `data` least.
    """
    devices = jax.devices() if devices is None else devices
    sizes = check_mesh(text, len(devices))
    types = (AxisType.Auto,) * len(AXES)  # gradients per example do not work with explicit axes
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def mesh_of_all(text: str | None = None) -> Mesh:
    """The mesh of these axis sizes over all devices of all processes; by `fsdp` where nothing is said."""
    return make_mesh(text or f"{FSDP}={jax.device_count()}")


def mesh_of_one() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh("", jax.local_devices()[:1])


def current_mesh() -> AbstractMesh | None:
    """The abstract mesh of the surrounding `jax.set_mesh`, or None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.axis_names != AXES else mesh


def splits_work() -> bool:
    """Whether the surrounding mesh has several devices."""
    return current_mesh() is not None


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what a program is traced for. A mesh's devices decide, be they here or not."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def split_batch(x: jax.Array) -> jax.Array:
    """`x`, its first axis split over the devices that split the batch; as it is without a mesh."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, P(BATCH))


def everywhere(x: jax.Array) -> jax.Array:
    """`x`, whole on every device; as it is without a mesh."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, P())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
