"""Tiny models for tests and benchmarks: shapes, random parameters, packages, documents, and runs of a few seconds."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from flexmoe_jax.artifacts.model_dir import ModelDir, create_model, open_model
from flexmoe_jax.artifacts.package import load_package, write_package
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.embedding import DomainVector, projection_record, router_row
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.files import list_files
from flexmoe_jax.model.decoder import Decoder, Output, decode, forward, logits
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.parallel.specs import place
from flexmoe_jax.parallel.stacked import stack_weights
from flexmoe_jax.params import model_leaves, owner_leaves
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, flatten, unflatten, union

TINY = ModelConfig(
    vocab_size=24, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12, max_seq_len=32
)

_forward = jax.jit(forward, static_argnums=0)


def jit_forward(
    config: ModelConfig, params: Params, tokens_BT, *, segments_BT=None, positions_BT=None, **how
) -> Output:
    """Compiled `forward` of the `Decoder` with the fields `how`."""
    arrays = {"segments_BT": segments_BT, "positions_BT": positions_BT}
    return _forward(Decoder(config, **how), params, tokens_BT, **arrays)


@functools.partial(jax.jit, static_argnums=0)
def jit_decode(run: Decoder, params: Params, tokens_BT, positions_BT, kv_cache):
    """(logits [B, T, V], cache) after the tokens are written at `positions_BT` of the cache."""
    x_BTD, kv_cache = decode(run, params, tokens_BT, positions_BT, kv_cache)
    return logits(run, params, x_BTD), kv_cache


def stacked(params: Params) -> Params:
    """Named parameters in the form in which models run: on one device, experts stacked."""
    return place(mesh_of_one(), {**params, "experts": stack_weights(params["experts"])})


def random_params(config: ModelConfig, experts: tuple[str, ...] = (PUBLIC,), seed: int = 0) -> Params:
    """Named parameters of ordinary scale in which nothing is neutral: norms away from 1, owners' biases below 0.

    A leaf's values depend only on its path and `seed`, so a model of fewer experts holds the same ones.
    """

    def draw(path: str, shape: tuple[int, ...]):
        normal = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(shape)
        leaf = path.rpartition("/")[2]
        if leaf == "bias":
            values = 0 * normal if path == f"experts/{PUBLIC}/bias" else -0.1 - np.abs(normal)
        elif leaf.endswith("norm"):
            values = 1 + 0.3 * normal
        else:
            fan_in = {"w_o": math.prod(shape[1:-1]), "w_down": config.d_ff, "embed": 1}.get(leaf, config.d_model)
            values = normal / math.sqrt(fan_in)
        return jnp.asarray(values, jnp.float32)

    return unflatten({path: draw(path, leaf.shape) for path, leaf in model_leaves(config, experts).items()})


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0):
    """int32 [batch, length], deterministic."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)), jnp.int32)


def max_difference(ours, theirs) -> float:
    """Largest absolute difference; shapes must agree and NaN counts as infinite."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max(initial=0.0))


# Packages and models on disk, with random parameters: incompressible, and no two leaves are equal.
CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_seq_len=16
)
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "é": 1}}}).encode()


def random_part(owner: str, seed: int, dtype="float32", config: ModelConfig = CONFIG):
    """The owner's subtree with every leaf normal: incompressible, and no two leaves are equal."""
    rng = np.random.default_rng([seed, *owner.encode()])
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return unflatten(
        {path: rng.normal(size=leaf.shape).astype(kind) for path, leaf in owner_leaves(config, owner).items()}
    )


RECORDS = {name: {"licence": "Apache-2.0"} for name in (TRUNK, PUBLIC)}
NO_RECORDS: dict[str, dict] = {TRUNK: {}, PUBLIC: {}}


def release_params(seed: int = 0):
    """The whole tree of a public release."""
    return union({owner: random_part(owner, seed) for owner in (TRUNK, PUBLIC)})


def make_release(path: pathlib.Path, seed: int = 0) -> ModelDir:
    """A public model directory."""
    return create_model(path, release_params(seed), CONFIG, TOKENIZER, RECORDS)


def base_of(release: ModelDir) -> dict[str, str]:
    """The digests that an expert trained beside `release` is bound to."""
    contents = {name: release.manifests[name].content for name in (TRUNK, PUBLIC)}
    return contents | {"tokenizer": release.tokenizer_digest}


def make_expert(path: pathlib.Path, owner: str, release: ModelDir, seed: int = 1) -> pathlib.Path:
    """The package of a data owner, as if trained beside `release`."""
    params = random_part(owner, seed)
    write_package(path, owner=owner, params=params, config=CONFIG, base=base_of(release), record={"contact": owner})
    return path


def contents(folder: pathlib.Path, leave_out: tuple[str, ...] = ("journal.jsonl",)) -> dict[str, bytes]:
    """{relative path: bytes} of a directory, which must hold only files and directories."""
    files, others = list_files(folder)
    assert not others
    return {name: (folder / name).read_bytes() for name in files if name not in leave_out}


def same_tree(a, b) -> bool:
    """Whether two parameter trees are equal bit for bit, dtypes included."""
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((np.asarray(a[path]), np.asarray(b[path])) for path in a)
    )


def flip_bit(path: pathlib.Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


class Crash(BaseException):
    """Stands for the end of the process: no handler catches it."""


def crash_at(monkeypatch, number: int) -> None:
    """Makes call `number` (from 0) of the functions that change directory entries raise Crash instead."""
    calls = iter(range(10**6))
    for target in ("os.rename", "os.replace", "os.rmdir", "os.unlink", "os.link"):
        module, name = target.split(".")
        original = getattr(__import__(module), name)

        def wrapped(*args, original=original, **kwargs):
            if next(calls) == number:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(target, wrapped)


# Documents, a domain vector, and runs that train in seconds.
MODEL = ModelConfig(
    vocab_size=512, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, max_seq_len=32
)
WORDS = {
    "public": ("the", "a", "of", "and", "river", "mountain", "king", "city", "year", "people", "water", "stone"),
    "news": ("minister", "said", "police", "election", "vote", "market", "shares", "rose", "fell", "today", "court"),
    "math": (
        "sum",
        "product",
        "prime",
        "root",
        "angle",
        "circle",
        "equals",
        "divided",
        "by",
        "area",
        "solve",
        "integer",
    ),
    "code": ("def", "return", "self", "import", "class", "for", "in", "range", "if", "else", "lambda", "print"),
}


def write_documents(folder: pathlib.Path, domain: str, count: int = 60, split: str = "train") -> pathlib.Path:
    """A domain folder with `count` documents of that domain's words."""
    rng = np.random.default_rng(len(domain))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(rng.choice(WORDS[domain], 40))}) + "\n")
    return folder


def write_vector(path: pathlib.Path, seed: int, encoder_digest: str = "e" * 64) -> pathlib.Path:
    """A random domain vector in the form that `flexmoe embed` writes."""
    vector = np.random.default_rng(seed).normal(size=12).astype(np.float32)
    DomainVector(vector, "random", encoder_digest, 16, seed, 60).save(path)
    return path


def public_run(root: pathlib.Path, **changes) -> RunConfig:
    """A run that trains the public model in `root/public`."""
    run = RunConfig(
        owner="public",
        data=str(write_documents(root / "public" / "data", "public")),
        domain_vector=str(write_vector(root / "public" / "domain.json", 1)),
        out=str(root / "public" / "run"),
        tokenizer="cl100k:512",
        model=MODEL,
        steps=4,
        batch_size=4,
        seq_len=32,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1),
        router_z_loss=0.0,
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(run, **changes)


def expert_run(root: pathlib.Path, owner: str, public: pathlib.Path, **changes) -> RunConfig:
    """A run that trains `owner`'s expert in `root/owner`."""
    run = RunConfig(
        owner=owner,
        data=str(write_documents(root / owner / "data", owner)),
        public=str(public),
        domain_vector=str(write_vector(root / owner / "domain.json", 2 + len(owner))),
        out=str(root / owner / "run"),
        steps=6,
        batch_size=4,
        seq_len=32,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1),
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(run, **changes)


def random_release(root: pathlib.Path, scale: float = 0.1, seed: int = 0) -> tuple[pathlib.Path, pathlib.Path]:
    """(a public model of random weights beside which owners can train, the file of its domain vector), in `root`.

    `scale` and `seed` are those of its router row.
    """
    vector = write_vector(root / "public.json", 1)
    domain, params = DomainVector.load(vector), random_params(MODEL)
    row = router_row(domain.vector, MODEL.d_model, scale, seed)
    params["experts"][PUBLIC]["router"] = np.tile(row, (MODEL.num_layers, 1))
    record = {"router": projection_record(domain, MODEL.d_model, scale, seed)}
    tokenizer = load_tokenizer("cl100k:512").files
    return create_model(root / "release", params, MODEL, tokenizer, {TRUNK: {}, PUBLIC: record}).path, vector


def public_of(release: pathlib.Path):
    """The leaves of the public expert of a release."""
    return load_package(open_model(release).package(PUBLIC))


def build_world(root: pathlib.Path) -> pathlib.Path:
    """Trains a public model and two owners' experts under `root`, merges them as `root/model`; returns `root`."""
    from flexmoe_jax.compose.merge import merge
    from flexmoe_jax.training.loop import train

    release = train(public_run(root))
    packages = [train(expert_run(root, owner, release)) for owner in ("news", "code")]
    merge(release, packages, root / "model")
    for domain in WORDS:
        write_documents(root / domain / "data", domain, count=6, split="heldout")
    return root


# What makes a verb take seconds, added to its arguments; `build_quickstart` trains with the first two.
FASTER = {
    "pretrain": (
        "--config.tokenizer=cl100k:512",
        *(f"--config.model.{key}={v}" for key, v in dataclasses.asdict(MODEL).items() if v is not None),
        *("--config.steps=4", "--config.batch_size=4", "--config.seq_len=32"),
    ),
    "train": ("--config.steps=4", "--config.batch_size=4", "--config.seq_len=32"),
    "data": ("--out=built",),  # the tiny quickstart's mix is not one that `flexmoe data build` makes
    "tune": ("--steps=2", "--batch-size=4"),
    "reproduce": ("--config.public_steps=2", "--config.owner_steps=2", "--config.embed_count=16"),
}


def build_quickstart(root: pathlib.Path) -> pathlib.Path:
    """Makes at `root` what `flexmoe quickstart` makes before it evaluates, of tiny documents and a tiny model.

    Needs the sentence encoder. Every command runs in this process.
    """
    from flexmoe_jax.cli import quickstart
    from flexmoe_jax.cli.main import main

    class Session(quickstart.Session):
        def party(self, home, *argv, makes=None):
            with contextlib.chdir(home):
                assert main([*argv]) == 0

    for domain in ("public", *quickstart.OWNERS):
        write_documents(root / "mix" / domain, domain)
        write_documents(root / "mix" / domain, domain, count=6, split="heldout")
    (root / "mix" / "mix.json").write_text("{}")
    session = Session(root, 64, [*FASTER["pretrain"]])
    quickstart._prepare_data(session)
    release = quickstart._train_public(session, root / "public")
    session = Session(root, 64, [*FASTER["train"]])
    homes = {owner: root / "owners" / owner for owner in quickstart.OWNERS}
    packages = {owner: quickstart._train_owner(session, home, owner, release) for owner, home in homes.items()}
    quickstart._compose(session, release, packages)
    return root
