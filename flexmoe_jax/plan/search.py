"""Meshes, and slices, that a program fits on: all of them are tried, by arithmetic."""

import dataclasses
from collections.abc import Iterator

from flexmoe_jax.errors import ConfigError, MachineError
from flexmoe_jax.parallel.chips import Chip, Topology, meshes, slices_of
from flexmoe_jax.params import AXES
from flexmoe_jax.plan.costs import Costs, estimate
from flexmoe_jax.plan.work import Work


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh and a number of microbatches, with what they cost. Microbatches change no result, only memory and time."""

    work: Work
    topology: Topology
    costs: Costs

    @property
    def mesh(self) -> str:
        """As `config.mesh` takes it."""
        return mesh_text(self.costs.sizes)


def mesh_text(sizes) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "data=1"


def choices(work: Work, topology: Topology) -> list[Choice]:
    """One for each mesh that divides the model and the batch: those that fit first, the fastest first.

    Of each mesh the fewest microbatches that fit, or the most there can be. MachineError where no mesh divides.
    """
    found = [
        choice
        for parts in meshes(topology.count)
        if (choice := _fewest(work, topology, dict(zip(AXES, parts, strict=True)))) is not None
    ]
    if not found:
        raise MachineError(
            f"no mesh of {topology.count} devices divides the model and {work.run.batch_size} rows",
            "choose another topology or config.batch_size",
        )
    return sorted(found, key=lambda choice: (not choice.costs.fits, choice.costs.step_seconds))


def smallest(work: Work, chip: Chip) -> Choice | None:
    """The best choice on the chip's smallest slice that has one which fits."""
    for topology in slices_of(chip):
        try:
            best = choices(work, topology)[0]
        except MachineError:
            continue
        if best.costs.fits:
            return best
    return None


def _fewest(work: Work, topology: Topology, sizes: dict[str, int]) -> Choice | None:
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
    """The work in 1, 2, 4 .. microbatches, as far as the batch divides."""
    count = 1
    while work.run.batch_size % count == 0:
        yield dataclasses.replace(work, run=dataclasses.replace(work.run, accumulation=count))
        if work.kind != "train":
            return
        count *= 2
