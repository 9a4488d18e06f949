"""The meshes and the slices that a program fits on, by estimates of all of them."""

import dataclasses
from collections.abc import Iterator, Mapping

from flexmoe_jax.errors import ConfigError, MachineError
from flexmoe_jax.parallel.chips import Chip, Topology, meshes, slices_of
from flexmoe_jax.params import AXES, EXPERT
from flexmoe_jax.plan.costs import Costs, estimate
from flexmoe_jax.plan.work import Work


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh and a number of microbatches (`work.accumulation`) with their costs. Microbatches change no result."""

    work: Work
    topology: Topology
    costs: Costs

    @property
    def mesh(self) -> str:
        """As `config.mesh` takes it."""
        return mesh_text(self.costs.sizes)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes longer than 1, as `config.mesh` takes them."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "data=1"


def choices(work: Work, topology: Topology) -> list[Choice]:
    """One choice for each mesh that divides the model and the batch; those that fit come first, then the fastest.

    Each has the fewest microbatches that fit, or the most possible. An `expert` axis has no empty slot. Raises
    MachineError where no mesh divides.
    """
    tried = (dict(zip(AXES, parts, strict=True)) for parts in meshes(topology.count))
    found = [
        choice
        for sizes in tried
        if len(work.experts) % sizes[EXPERT] == 0 and (choice := _fewest(work, topology, sizes)) is not None
    ]
    if not found:
        raise MachineError(
            f"no mesh of {topology.count} devices divides the model and {work.run.batch_size} rows",
            "choose another topology or another config.batch_size",
        )
    return sorted(found, key=lambda choice: (not choice.costs.fits, choice.costs.step_seconds))


def smallest(work: Work, chip: Chip) -> Choice | None:
    """The best choice on the smallest slice of the chip on which one fits; None if no slice does."""
    for topology in slices_of(chip):
        try:
            best = choices(work, topology)[0]
        except MachineError:
            continue
        if best.costs.fits:
            return best
    return None


def _fewest(work: Work, topology: Topology, sizes: dict[str, int]) -> Choice | None:
    """The choice with the fewest microbatches that fit, else the most; None where the mesh divides nothing."""
    choice = None
    for tried in _accumulations(work):
        try:
            choice = Choice(tried, topology, estimate(tried, topology, sizes))
        except ConfigError:
            continue
        if choice.costs.fits:
            break
    return choice


def _accumulations(work: Work) -> Iterator[Work]:
    """The work in 1, 2, 4, ... microbatches that divide the batch; only training has more than one."""
    count = 1
    while work.run.batch_size % count == 0:
        yield dataclasses.replace(work, run=dataclasses.replace(work.run, accumulation=count))
        if work.kind != "train":
            return
        count *= 2
