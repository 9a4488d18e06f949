"""Merging: a public model and the experts of any number of owners become one model, without training.

Only directories are copied and digests compared: the cost is in bytes moved, never in memory. The result is a function
of the set of packages and of top-k; the order in which experts are given does not matter (method: section 2.2).
"""

import pathlib
from collections.abc import Iterable

from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, check_belongs, open_model
from flexmoe_jax.artifacts.package import Manifest, check_own_files, read_manifest
from flexmoe_jax.artifacts.signature import Trust, check_signature
from flexmoe_jax.errors import ArtifactError
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
    """Writes the model of the public release `public` and the packages `experts` at the new directory `out`.

    `top_k` is how many experts are active per token, 1 to the number of experts; by default all of them. `link` makes
    hard links where copies would be made: as cheap as it gets, but the bytes of an expert opted out later stay on the
    disk as long as the package they were linked from does. `trust` holds the keys by which packages must be signed.
    Raises ArtifactError for a package that was trained with another trunk, public expert, tokenizer or configuration, a
    name that is reserved or given twice, a signature that is not good, and damage.
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
                "every expert needs a name of its own",
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
    """The public release at `path`: a model whose only expert is `public`."""
    release = open_model(path)
    if release.experts != (PUBLIC,):
        raise ArtifactError(
            f"{path} is a model of the experts {', '.join(release.experts)}, not a public release",
            "give the model that was published with the expert `public` alone",
        )
    return release


def read_expert(path: pathlib.Path, model: ModelDir, link: bool = False, trust: Trust | None = None) -> Manifest:
    """The manifest of a data owner's package that may join `model`; ArtifactError if it may not."""
    if not link:
        check_own_files(path)
    manifest = read_manifest(path)
    check_owner_name(manifest.owner)
    check_belongs(manifest, model, path)
    check_signature(path, manifest.owner, manifest.digest, trust)
    return manifest
