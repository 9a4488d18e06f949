"""The mesh of devices: always four axes, of size one where nothing is split; one device is a mesh of one.

    data     replicates the parameters and splits the batch
    fsdp     splits parameters, moments and the batch
    expert   splits experts and the batch
    tensor   splits heads, feed-forward width and vocabulary

Inside `jax.set_mesh(mesh)` the model finds the mesh by itself (`current_mesh`); outside it runs on one device.
"""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.params import AXES, DATA, EXPERT, FSDP

BATCH = (DATA, FSDP, EXPERT)  # axes that split the rows of a batch


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" -> {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}; axes that are not named have size 1.

    ConfigError for an unknown axis or a size that is not a positive integer.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in sizes:
            raise ConfigError(f"mesh {text!r}: there is no axis {name!r}", did_you_mean(name, AXES))
        if not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise ConfigError(f"mesh {text!r}: the size of {name} is {size!r}", "give a number of at least 1")
        sizes[name] = int(size)
    return sizes


def check_mesh(text: str, count: int) -> dict[str, int]:
    """`parse_mesh(text)`; ConfigError if the product of the sizes is not `count` devices."""
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

    Neighbors on the last axes are neighbors on the hardware: `tensor` communicates most, `data` least.
    """
    devices = jax.devices() if devices is None else devices
    sizes = check_mesh(text, len(devices))
    types = (AxisType.Auto,) * len(AXES)  # gradients per example do not work with explicit axes
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def mesh_of_all(text: str | None = None) -> Mesh:
    """The mesh of these axis sizes over all devices of all processes; without `text`, all on the `fsdp` axis.

    ConfigError if the sizes do not fit the devices.
    """
    return make_mesh(text or f"{FSDP}={jax.device_count()}")


def mesh_of_one() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh("", jax.local_devices()[:1])


def current_mesh() -> AbstractMesh | None:
    """The abstract mesh of the surrounding `jax.set_mesh`; None if there is none, or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.axis_names != AXES else mesh


def splits_work() -> bool:
    """Whether the surrounding mesh has several devices."""
    return current_mesh() is not None


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform a program is traced for.

    The surrounding mesh decides, even if this machine does not have its devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def split_batch(x: jax.Array) -> jax.Array:
    """`x` with its first axis split over the devices that split the batch; unchanged without a mesh."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, P(BATCH))


def everywhere(x: jax.Array) -> jax.Array:
    """`x` whole on every device; unchanged without a mesh."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, P())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())
