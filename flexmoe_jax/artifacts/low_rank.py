"""Experts that hold low-rank changes of the public expert's matrices, with these matrices made whole."""

from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.params import factors, ranks_of
from flexmoe_jax.tree import Params


class ChangedLeaf:
    """W_public + A B [L, in, out], float32, of leaves that may be memory-mapped: makes only the slices asked for."""

    def __init__(self, public: Any, a: Any, b: Any):
        self._leaves = public, a, b
        self.shape, self.dtype = public.shape, np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        layers, rows, columns = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))[:3]
        public, a, b = self._leaves
        change = np.asarray(a[layers], np.float32)[..., rows, :] @ np.asarray(b[layers], np.float32)[..., columns]
        return np.asarray(public[layers, rows, columns], np.float32) + change

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[slice(None)].astype(dtype or self.dtype, copy=False)


def whole_expert(expert: Params, public: Params, mapped: bool = False) -> Params:
    """The expert's leaves with every matrix [L, in, out] whole: arrays, or `ChangedLeaf` where they are `mapped`."""
    leaves = dict(expert)
    for name in ranks_of(expert):
        changed = ChangedLeaf(public[name], *(leaves.pop(leaf) for leaf in factors(name)))
        leaves[name] = changed if mapped else np.asarray(changed)
    return leaves
