"""Merging: a public model and the experts of any number of owners become one model, without training.

A merge copies directories and compares digests: it costs copied bytes, not memory. The result depends only on the set
of packages and on top-k, not on the order of the experts (FlexOlmo, arXiv 2507.07024, section 3.1).
"""

import pathlib
from collections.abc import Iterable

from flexmoe_jax.artifacts.low_rank import check_sums
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, check_belongs, open_model
from flexmoe_jax.artifacts.package import (
    Manifest,
    check_files,
    check_own_files,
    load_package,
    raise_problems,
    read_manifest,
)
from flexmoe_jax.artifacts.signature import Trust, check_signature
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.params import ranks_of
from flexmoe_jax.tree import PUBLIC, canonical_order, check_owner_name


def merge(
    public: pathlib.Path | str,
    experts: Iterable[pathlib.Path | str],
    out: pathlib.Path | str,
    *,
    top_k: int | None = None,
    link: bool = False,
    trust: Trust | None = None,
) -> ModelDir:
    """Writes the model of the public release `public` and the packages `experts` to the new directory `out`.

    `top_k` is the number of experts active per token, 1 to the number of experts; None: all. `link` makes hard links
    instead of copies: then the bytes of an expert that opts out later stay on the disk as long as the package that they
    were linked from. `trust` holds the keys that signatures are checked against. ArtifactError for a package that was
    trained with another trunk, public expert, tokenizer or configuration, a name given twice, a signature that is not
    valid or not trusted, and damage; FlexMoEError for a reserved name.
    """
    release = open_release(public)
    for name, manifest in release.manifests.items():
        check_signature(release.package(name), name, manifest.digest, trust)
    packages: dict[str, tuple[pathlib.Path, Manifest]] = {PUBLIC: (release.package(PUBLIC), release.manifests[PUBLIC])}
    for path in map(pathlib.Path, experts):
        manifest = read_expert(path, release, link, trust)
        if manifest.owner in packages:
            raise ArtifactError(
                f"the expert name {manifest.owner!r} is given twice: {packages[manifest.owner][0]} and {path}",
                "give every expert a name of its own",
            )
        packages[manifest.owner] = (path, manifest)
    order = canonical_order(packages)
    if top_k is not None and not 1 <= top_k <= len(order):
        raise ArtifactError(
            f"top_k is {top_k}, the model has {len(order)} experts: {', '.join(order)}",
            f"give a number from 1 to {len(order)}",
        )
    contents = {name: packages[name][1].content for name in order}
    ordered = {name: packages[name] for name in order}
    return assemble(out, release, ordered, top_k, "merged", {"contents": contents, "top_k": top_k}, link)


def open_release(path: pathlib.Path | str) -> ModelDir:
    """The public release at `path`: a model whose only expert is `public`; ArtifactError for another model."""
    release = open_model(path)
    if release.experts != (PUBLIC,):
        raise ArtifactError(
            f"{path} is a model of the experts {', '.join(release.experts)}, not a public release",
            "give the published model whose only expert is `public`",
        )
    return release


def read_expert(path: pathlib.Path, model: ModelDir, link: bool = False, trust: Trust | None = None) -> Manifest:
    """The manifest of a data owner's package that may join `model`; FlexMoEError if it may not.

    The package may have hard links only if `link`. `trust` as in `merge`.
    """
    if not link:
        check_own_files(path)
    manifest = read_manifest(path)
    check_owner_name(manifest.owner)
    check_belongs(manifest, model, path)
    check_signature(path, manifest.owner, manifest.digest, trust)
    if ranks_of(manifest.tensors):
        raise_problems(path, check_files(path, manifest))
        parts = (load_package(part, verify=False, mapped=True) for part in (path, model.package(PUBLIC)))
        check_sums(manifest.owner, *parts)
    return manifest
