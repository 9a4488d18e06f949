"""What a run starts from: shape, initial parameters, tokenizer, and the digests that its product is bound to."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh

from flexmoe_jax.artifacts.model_dir import ModelDir, check_belongs, load_params, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.config import Kind, RunConfig
from flexmoe_jax.data.embedding import DomainVector, projection_record, router_row
from flexmoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.specs import place_at
from flexmoe_jax.params import HEAD, all_ranks, factors, owner_leaves, ranks_of, read_ranks
from flexmoe_jax.tree import PUBLIC, TRUNK, Params

PROJECTION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Start:
    """`params` is the whole initial tree, float32; `base` holds the content digests that the product is bound to.

    `router` records the origin of the router row (`data.embedding.projection_record`). `history` goes into the
    product's record: the package that is trained further and the owners whose data influenced it, or all owners of a
    model whose experts are trained together.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    base: dict[str, str]
    router: dict
    history: dict = dataclasses.field(default_factory=dict)


def prepare(run: RunConfig, mesh: Mesh) -> Start:
    """What `run` starts from, by its kind.

    No host holds all parameters: new ones are placed on the mesh as they are drawn, others are memory-mapped files.
    ConfigError, DataError or ArtifactError for a configuration, domain vector, model or package that does not fit.
    """
    if run.kind is Kind.JOINT:
        return _from_model(run)
    if run.kind is Kind.CONTINUED:
        return _from_package(run)
    vector = DomainVector.load(_given(run.domain_vector))
    return _fresh(run, vector, mesh) if run.kind is Kind.PUBLIC else _beside_public(run, vector)


def _given(path: str | pathlib.Path | None) -> pathlib.Path:
    """The value of a path that the run's kind needs."""
    assert path is not None  # RunConfig refuses the run without it
    return pathlib.Path(path)


def _fresh(run: RunConfig, vector: DomainVector, mesh: Mesh) -> Start:
    assert run.model is not None  # RunConfig refuses a public run without one
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {run.tokenizer!r} has {tokenizer.vocab_size} ids, config.model.vocab_size is "
            f"{run.model.vocab_size}",
            f"set config.model.vocab_size to at least {tokenizer.vocab_size}",
        )
    _check_length(run, run.model)
    params = init_params(run.model, jax.random.key(run.seed), place=functools.partial(place_at, mesh))
    router = projection_record(vector, run.model.d_model, run.router_scale, PROJECTION_SEED)
    public = {**params["experts"][PUBLIC], "router": _rows(vector, run.model, router)}
    return Start(run.model, {**params, "experts": {PUBLIC: public}}, tokenizer, {}, router)


def _from_model(run: RunConfig) -> Start:
    """All experts of an existing model, to be trained together."""
    model = open_model(_given(run.public))
    _check_length(run, model.config)
    if run.top_k is not None and run.top_k > len(model.experts):
        raise ConfigError(
            f"config.top_k is {run.top_k}, the model has {len(model.experts)} experts", "set config.top_k lower"
        )
    base = {name: manifest.content for name, manifest in model.manifests.items()}
    tokenizer = load_tokenizer(model.tokenizer_files).for_rows(model.config.vocab_size)
    router = model.manifests[PUBLIC].record.router or {}
    # The data of every owner in the model influences all parameters that are trained from it.
    parts = {*model.experts, *(name for m in model.manifests.values() for name in m.record.tuned_with)} - {PUBLIC}
    history = {"tuned": {"with": sorted(parts)}} if parts else {}
    base |= {"tokenizer": model.tokenizer_digest}
    return Start(model.config, load_params(model, mapped=True), tokenizer, base, router, history)


def _beside_public(run: RunConfig, vector: DomainVector) -> Start:
    """A copy of the public feed-forward network, with the router row of `vector`."""
    public = open_model(_given(run.public))
    theirs = public.manifests[PUBLIC].record.router
    if theirs is None:
        raise ArtifactError(
            f"the public model {run.public} records no domain vector for its router row",
            "import it again with --domain, the domain vector of its public data",
        )
    if vector.encoder_digest != theirs["encoder_digest"]:
        raise ArtifactError(
            f"the domain vector {run.domain_vector} was made by the encoder {vector.encoder} "
            f"({vector.encoder_digest[:12]}), the public model's by {theirs['encoder']} "
            f"({theirs['encoder_digest'][:12]})",
            "run `flexmoe embed` again with the public model's encoder: router rows must come from the same one",
        )
    # Scale and projection are the public model's: all router rows must be in the same space.
    router = projection_record(vector, public.config.d_model, theirs["scale"], theirs["projection_seed"])
    expert = {
        "router": _rows(vector, public.config, router),
        "bias": np.full(public.config.num_layers, run.bias_init, np.float32),
    }
    if run.rank is not None:
        ranks = read_ranks(run.rank, public.config)
        leaves = owner_leaves(public.config, run.owner, ranks)
        for n, path in enumerate(leaf for name in ranks for leaf in factors(name)):
            expert[path] = np.zeros(leaves[path].shape, np.float32)
            if std := leaves[path].std:  # another draw for every owner
                source = np.random.default_rng((run.seed, n, *run.owner.encode()))
                expert[path] += np.float32(std) * source.standard_normal(leaves[path].shape, np.float32)
        if HEAD in ranks:
            expert["head_bias"] = np.zeros(public.config.vocab_size, np.float32)
    return _expert(run, public, expert, router)


def _from_package(run: RunConfig) -> Start:
    """The owner's package, beside the public model that it was trained beside."""
    public, path = open_model(_given(run.public)), _given(run.expert)
    manifest = read_manifest(path, run.owner)
    check_belongs(manifest, public, path)
    expert = load_package(path, digest=manifest.digest, mapped=True)
    tuned = {"tuned": {"with": list(manifest.record.tuned_with)}} if manifest.record.tuned_with else {}
    return _expert(run, public, expert, manifest.record.router or {}, {"start": manifest.digest} | tuned)


def _expert(run: RunConfig, public: ModelDir, expert: Params, router: dict, history: dict | None = None) -> Start:
    """The pair {public, owner}; matrices that `expert` holds neither whole nor as a change are copies of public's."""
    if run.model not in (None, public.config):
        lines = differences(to_mapping(run.model), to_mapping(public.config))
        raise ConfigError(
            f"config.model is not the shape of the model {run.public} (here != there):\n    " + "\n    ".join(lines),
            "give another config.public: an owner's expert has the shape of the public expert",
        )
    _check_length(run, public.config)
    if all_ranks(expert) and not run.coordinate:
        what = f"config.coordinate is False, and {run.expert} holds low-rank changes of the public expert"
        raise ConfigError(what, "train it beside the public expert")
    params = load_params(public, (PUBLIC,), mapped=True)
    beside = {PUBLIC: params["experts"][PUBLIC]} if run.coordinate else {}
    own = params["experts"][PUBLIC] | expert
    for name in ranks_of(expert):
        del own[name]
    params = {**params, "experts": {**beside, run.owner: own}}
    tokenizer = load_tokenizer(public.tokenizer_files).for_rows(public.config.vocab_size)
    base = {name: public.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": public.tokenizer_digest}
    return Start(public.config, params, tokenizer, base, router, history or {})


def _rows(vector: DomainVector, model: ModelConfig, router: dict) -> np.ndarray:
    """The same router row for every layer, float32 [L, D]."""
    row = router_row(vector.vector, model.d_model, scale=router["scale"], seed=router["projection_seed"])
    return np.tile(row, (model.num_layers, 1))


def _check_length(run: RunConfig, model: ModelConfig) -> None:
    if run.seq_len > model.max_seq_len:
        raise ConfigError(
            f"config.seq_len is {run.seq_len}, the model's max_seq_len is {model.max_seq_len}",
            f"set config.seq_len to at most {model.max_seq_len}",
        )
