"""An owner's package in another form: as a low-rank change, in another dtype, or beside a public model that moved on.

Each writes a new package, whose record says what it was made from; the owner signs it again.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np

from flexmoe_jax.artifacts.arrays import NUMPY_DTYPES
from flexmoe_jax.artifacts.low_rank import check_sums, whole_expert
from flexmoe_jax.artifacts.manifest import Manifest, read_manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, check_belongs, open_model
from flexmoe_jax.artifacts.package import load_package, write_package
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.files import check_outside
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.params import FFN_WEIGHTS, HEAD, factors, is_matrix, ranks_of, read_ranks
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
    manifest, expert, theirs = _beside(package, model, out)
    made, kept = dict(expert), {}
    ranks = read_ranks(rank, model.config) if rank is not None else {}
    if HEAD in ranks:
        remedy = "leave it out: it stays as it was trained"
        raise ConfigError(f"the rank is {rank!r}, and a change of the output head is not made here", remedy)
    for name, r in ranks.items():
        a, b = factors(name)
        if a in expert and expert[a].shape[-1] <= r:
            what = f"the change of {name} has rank {expert[a].shape[-1]}, and {r} is asked for"
            raise ConfigError(what, "give a lower rank, or leave the matrix out")
        made.pop(name, None)
        made[a], made[b], kept[name] = _factored(name, expert, theirs, r)
    if dtype is not None:
        with np.errstate(over="ignore"):
            made = {path: leaf.astype(NUMPY_DTYPES[dtype]) if is_matrix(path) else leaf for path, leaf in made.items()}
        if wide := [path for path, leaf in made.items() if not np.isfinite(leaf).all()]:
            raise ConfigError(f"{', '.join(wide)} of {package} does not fit into {dtype}", "use another dtype")
    scores = (
        [None, None]
        if score is None
        else [score(whole_expert(manifest.owner, leaves, theirs)) for leaves in (expert, made)]
    )
    if not all(bits is None or math.isfinite(bits) for bits in scores):
        raise ArtifactError(f"held-out bits per byte are {scores[0]} before and {scores[1]} after", "do not use it")
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
    manifest, expert, theirs = _beside(package, before, out)
    if lines := differences(to_mapping(before.config), to_mapping(after.config)):
        what = f"{old} and {new} have other shapes: {'; '.join(lines)}"
        raise ArtifactError(what, "an expert can move only to a public model that was trained further from the old one")
    if before.tokenizer_digest != after.tokenizer_digest:
        raise ArtifactError(f"{old} and {new} have different tokenizers", "use models of one tokenizer")
    spaces = [(m.manifests[PUBLIC].record.router or {}) for m in (before, after)]
    for key in ("encoder_digest", "scale", "projection_seed"):
        if spaces[0].get(key) != spaces[1].get(key):
            what = (
                f"router rows of {old} and {new} are in other spaces: {key} {spaces[0].get(key)}, {spaces[1].get(key)}"
            )
            raise ArtifactError(what, f"train the expert again beside {new}")
    theirs_now = load_package(after.package(PUBLIC), digest=after.manifests[PUBLIC].digest)
    made, moved = dict(expert), {}
    for name in FFN_WEIGHTS:
        step = np.asarray(theirs_now[name], np.float32) - np.asarray(theirs[name], np.float32)
        length = float(np.linalg.norm(np.asarray(theirs[name], np.float32)))
        moved[name] = float(np.linalg.norm(step)) / max(length, 1e-30)
        if name in expert:
            made[name] = (np.asarray(expert[name], np.float32) + step).astype(expert[name].dtype)
    base = {name: after.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": after.tokenizer_digest}
    rebased = {"from": manifest.digest, "base": dict(manifest.base), "moved": moved}
    record = {**manifest.record.fields, "rebased": rebased}
    write_package(out, owner=manifest.owner, params=made, config=manifest.config, base=base, record=record)
    return moved


def _beside(package: pathlib.Path | str, public: ModelDir, out: pathlib.Path | str) -> tuple[Manifest, Params, Params]:
    """(manifest and leaves of an owner's package, leaves of the public expert that it was trained beside).

    Refuses an `out` that exists or lies in one of the two.
    """
    if os.path.lexists(out):
        raise ArtifactError(f"{out} already exists", "give another path, or remove it first")
    check_outside(pathlib.Path(out), [pathlib.Path(package), public.path])
    manifest = read_manifest(package)
    if manifest.owner in (TRUNK, PUBLIC):
        raise ArtifactError(f"{package} is {manifest.owner!r}, not a data owner's expert", "give an owner's package")
    check_belongs(manifest, public, package)
    expert = load_package(package, digest=manifest.digest)
    theirs = load_package(public.package(PUBLIC), digest=public.manifests[PUBLIC].digest)
    check_sums(manifest.owner, expert, theirs)
    return manifest, expert, theirs


def _factored(name: str, expert: Params, public: Params, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(A [L, in, r], B [L, r, out], float32, and the share of the squared norm of the change that A B has)."""
    layers, total, kept = [], 0.0, 0.0
    for layer in range(len(public[name])):
        if name in expert:
            change_IO = np.asarray(expert[name][layer], np.float64) - np.asarray(public[name][layer], np.float64)
        else:
            a_Ir, b_rO = (np.asarray(expert[leaf][layer], np.float64) for leaf in factors(name))
            change_IO = a_Ir @ b_rO
        u_Im, s_m, v_mO = np.linalg.svd(change_IO, full_matrices=False)
        root_r = np.sqrt(s_m[:rank])
        a_Ir = u_Im[:, :rank] * (root_r if s_m.any() else len(u_Im) ** -0.5)  # of no change A is not 0: B can leave it
        layers.append((a_Ir, v_mO[:rank] * root_r[:, None]))
        total, kept = total + float((s_m**2).sum()), kept + float((s_m[:rank] ** 2).sum())
    a, b = (np.stack(parts).astype(np.float32) for parts in zip(*layers, strict=True))
    return a, b, kept / total if total else 1.0
