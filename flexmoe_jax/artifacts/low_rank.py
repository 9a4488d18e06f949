"""Experts that hold low-rank changes of the public expert's matrices, with these matrices made whole."""

from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.params import factors, ranks_of
from flexmoe_jax.tree import Params


class ChangedLeaf:
    """W_public + A B [L, in, out], float32, of leaves that may be memory-mapped: makes only the slices asked for.

    ArtifactError where the sum is not finite: A and B may be, and their product too large for float32.
    """

    def __init__(self, where: str, public: Any, a: Any, b: Any):
        self._where, self._leaves = where, (public, a, b)
        self.shape, self.dtype = public.shape, np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        layers, rows, columns = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))[:3]
        public, a, b = self._leaves
        with np.errstate(over="ignore", invalid="ignore"):
            whole = np.asarray(a[layers], np.float32)[..., rows, :] @ np.asarray(b[layers], np.float32)[..., columns]
            whole += np.asarray(public[layers, rows, columns], np.float32)
        if not np.isfinite(whole).all():
            count = int((~np.isfinite(whole)).sum())
            what = (
                f"{self._where}: the public expert's matrix and the change A B add up to {count} values of {whole.size}"
            )
            raise ArtifactError(f"{what} that are not finite", "do not use this package; its owner trains it again")
        return whole

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, dtype or self.dtype)
        for layer in range(len(whole)):
            whole[layer] = self[layer]
        return whole


def whole_expert(owner: str, expert: Params, public: Params, mapped: bool = False) -> Params:
    """The owner's leaves with every matrix [L, in, out] whole: arrays, or `ChangedLeaf` where they are `mapped`."""
    leaves = dict(expert)
    for name in ranks_of(expert):
        where = f"{name} of {owner!r}"
        changed = ChangedLeaf(where, public[name], *(leaves.pop(leaf) for leaf in factors(name)))
        leaves[name] = changed if mapped else np.asarray(changed)
    return leaves


def check_sums(owner: str, expert: Params, public: Params) -> None:
    """ArtifactError if a low-rank change and the public expert's matrix do not add up to finite values."""
    for leaf in whole_expert(owner, expert, public, mapped=True).values():
        if isinstance(leaf, ChangedLeaf):
            for layer in range(leaf.shape[0]):
                leaf[layer]
