"""An owner's package in another form: as a low-rank change, in another dtype, or beside a public model that moved on.

Each writes a new package, whose record says what it was made from; the owner signs it again.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from flexmoe_jax.artifacts.arrays import NUMPY_DTYPES
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.manifest import Manifest, read_manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, check_belongs, open_model
from flexmoe_jax.artifacts.package import load_package, write_package
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.params import FFN_WEIGHTS, factors, is_matrix, ranks_of, read_ranks
from flexmoe_jax.tree import PUBLIC, TRUNK, Params


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What a package became."""

    ranks: dict[str, int]
    """Of the matrices that are held as low-rank changes."""

    kept: dict[str, float]
    """{matrix: share of the squared norm of its change that is left}, of all layers together."""

    bytes_before: int
    bytes_after: int

    bits_per_byte_before: float | None = None
    """Of the owner's held-out text, beside the public expert; None where it was not measured."""

    bits_per_byte_after: float | None = None


def compress(
    package: pathlib.Path | str,
    public: pathlib.Path | str,
    out: pathlib.Path | str,
    rank: str | None = None,
    dtype: str | None = None,
    score: Callable[[Params], float] | None = None,
) -> Compressed:
    """Writes the package `out`: `package` with changes of a low `rank` (`params.read_ranks`), or matrices of `dtype`.

    A change W - W_public of every layer becomes its best approximation of that rank (singular value decomposition;
    Eckart and Young, 1936). `dtype` (float32, bfloat16, float16) is that of matrices as they are stored. `score` gives
    the bits per byte of an expert of whole matrices on its owner's held-out text; the record has those before and
    after. ArtifactError for a package that was not made beside `public`, and as of `write_package`; ConfigError for
    another rank or dtype.
    """
    if dtype not in (None, *NUMPY_DTYPES):
        raise ConfigError(f"the dtype {dtype!r} is not one of packages", f"use one of: {', '.join(NUMPY_DTYPES)}")
    model = open_model(public)
    manifest, expert, theirs = _beside(package, model)
    made, kept = dict(expert), {}
    if rank is not None:
        whole = whole_expert(expert, theirs)
        for name, r in read_ranks(rank, model.config).items():
            a, b = factors(name)
            made.pop(name, None)
            change = np.asarray(whole[name], np.float64) - np.asarray(theirs[name], np.float64)
            made[a], made[b], kept[name] = _factored(change, r)
    if dtype is not None:
        made = {path: leaf.astype(NUMPY_DTYPES[dtype]) if is_matrix(path) else leaf for path, leaf in made.items()}
    scores = [None, None] if score is None else [score(whole_expert(leaves, theirs)) for leaves in (expert, made)]
    sizes = (sum(leaf.nbytes for leaf in leaves.values()) for leaves in (expert, made))
    result = Compressed(ranks_of(made), kept, *sizes, *scores)
    record = {**manifest.record.fields, "compressed": {"from": manifest.digest, **dataclasses.asdict(result)}}
    write_package(out, owner=manifest.owner, params=made, config=manifest.config, base=manifest.base, record=record)
    return result


def rebase(
    package: pathlib.Path | str, old: pathlib.Path | str, new: pathlib.Path | str, out: pathlib.Path | str
) -> dict[str, float]:
    """Writes the package `out`: `package`, which was trained beside the public model `old`, beside `new`.

    What the owner changed is added to the new public expert's matrices: W_new + (W - W_old); low-rank changes, rows and
    biases stay. Nothing is trained: `RunConfig.expert` goes on from `out`. Returns {matrix: |W_new - W_old| / |W_old|},
    how far the public expert moved. ArtifactError for a package that was not made beside `old`, and for models of
    another shape or tokenizer.
    """
    before, after = open_model(old), open_model(new)
    manifest, expert, theirs = _beside(package, before)
    if lines := differences(to_mapping(before.config), to_mapping(after.config)):
        what = f"{old} and {new} have other shapes: {'; '.join(lines)}"
        raise ArtifactError(what, "an expert can move only to a public model that was trained further from the old one")
    if before.tokenizer_digest != after.tokenizer_digest:
        raise ArtifactError(f"{old} and {new} have different tokenizers", "use models of one tokenizer")
    theirs_now = load_package(after.package(PUBLIC), digest=after.manifests[PUBLIC].digest)
    made, moved = dict(expert), {}
    for name in FFN_WEIGHTS:
        step = np.asarray(theirs_now[name], np.float32) - np.asarray(theirs[name], np.float32)
        moved[name] = float(np.linalg.norm(step) / np.linalg.norm(np.asarray(theirs[name], np.float32)))
        if name in expert:
            made[name] = (np.asarray(expert[name], np.float32) + step).astype(expert[name].dtype)
    base = {name: after.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": after.tokenizer_digest}
    rebased = {"from": manifest.digest, "base": dict(manifest.base), "moved": moved}
    record = {**manifest.record.fields, "rebased": rebased}
    write_package(out, owner=manifest.owner, params=made, config=manifest.config, base=base, record=record)
    return moved


def _beside(package: pathlib.Path | str, public: ModelDir) -> tuple[Manifest, Params, Params]:
    """(manifest and leaves of an owner's package, leaves of the public expert that it was trained beside)."""
    manifest = read_manifest(package)
    if manifest.owner in (TRUNK, PUBLIC):
        raise ArtifactError(f"{package} is {manifest.owner!r}, not a data owner's expert", "give an owner's package")
    check_belongs(manifest, public, package)
    expert = load_package(package, digest=manifest.digest)
    return manifest, expert, load_package(public.package(PUBLIC), digest=public.manifests[PUBLIC].digest)


def _factored(change_LIO: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(A [L, in, r], B [L, r, out], float32, and the share of the squared norm that A B has)."""
    u_LIm, s_Lm, v_LmO = np.linalg.svd(change_LIO, full_matrices=False)
    root_Lr = np.sqrt(s_Lm[:, :rank])
    total = float((s_Lm**2).sum())
    kept = float((s_Lm[:, :rank] ** 2).sum()) / total if total else 1.0
    a, b = u_LIm[:, :, :rank] * root_Lr[:, None], v_LmO[:, :rank] * root_Lr[:, :, None]
    return a.astype(np.float32), b.astype(np.float32), kept
