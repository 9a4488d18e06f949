"""A tiny configuration, random parameters, and packages on disk."""

import json
import pathlib

import ml_dtypes
import numpy as np

from flexmoe_jax.artifacts.model_dir import ModelDir, create_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.files import list_files
from flexmoe_jax.params import owner_leaves
from flexmoe_jax.tree import PUBLIC, TRUNK, flatten, unflatten, union

CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_seq_len=16
)
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "é": 1}}}).encode()


def random_params(owner: str, seed: int, dtype="float32", config: ModelConfig = CONFIG):
    """The owner's subtree with every leaf normal: incompressible, no two alike."""
    rng = np.random.default_rng([seed, *owner.encode()])
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return unflatten(
        {path: rng.normal(size=leaf.shape).astype(kind) for path, leaf in owner_leaves(config, owner).items()}
    )


RECORDS = {name: {"licence": "Apache-2.0"} for name in (TRUNK, PUBLIC)}
NO_RECORDS: dict[str, dict] = {TRUNK: {}, PUBLIC: {}}


def release_params(seed: int = 0):
    """The whole tree of a public release."""
    return union({owner: random_params(owner, seed) for owner in (TRUNK, PUBLIC)})


def make_release(path: pathlib.Path, seed: int = 0) -> ModelDir:
    """A public model directory."""
    return create_model(path, release_params(seed), CONFIG, TOKENIZER, RECORDS)


def base_of(release: ModelDir) -> dict[str, str]:
    """What an expert trained beside `release` is bound to."""
    contents = {name: release.manifests[name].content for name in (TRUNK, PUBLIC)}
    return contents | {"tokenizer": release.tokenizer_digest}


def make_expert(path: pathlib.Path, owner: str, release: ModelDir, seed: int = 1) -> pathlib.Path:
    """The package of a data owner, as if trained beside `release`."""
    params = random_params(owner, seed)
    write_package(path, owner=owner, params=params, config=CONFIG, base=base_of(release), record={"contact": owner})
    return path


def contents(folder: pathlib.Path, leave_out: tuple[str, ...] = ("journal.jsonl",)) -> dict[str, bytes]:
    """{relative path: bytes} of a directory; there must be nothing but files in it."""
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
    """What no handler catches: stands for the process ending."""


def crash_at(monkeypatch, number: int) -> None:
    """The call `number` (from 0) of any function that makes a change to a directory visible raises Crash instead."""
    calls = iter(range(10**6))
    for target in ("os.rename", "os.replace", "shutil.rmtree", "os.unlink", "os.link"):
        module, name = target.split(".")
        original = getattr(__import__(module), name)

        def wrapped(*args, original=original, **kwargs):
            if next(calls) == number:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(target, wrapped)
