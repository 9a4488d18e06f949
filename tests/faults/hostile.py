"""Hostile packages: each attack alters a good package; the attacker can seal a manifest consistently.

`ATTACKS` maps a name to (a function that alters the package, words of which the refusal must contain one, as w|w).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.manifest import MAX_HEADER_BYTES
from flexmoe_jax.artifacts.sealed import json_bytes, seal
from flexmoe_jax.files import digest_files

MANIFEST, TENSOR, HEADER = "manifest.json", "arrays/w_up/0.0.0", "arrays/w_up/.zarray"
LIMIT_SECONDS, LIMIT_BYTES = 5, 500 << 20
TERABYTES = 1 << 42


def reseal(package: pathlib.Path, change: Callable[[dict], object] = lambda fields: None, files: bool = False) -> None:
    """Applies `change` to the manifest and recomputes its digests, with `files` also those of the files."""
    fields = json.loads((package / MANIFEST).read_bytes())
    del fields["digest"]
    if files:
        fields["files"] = {name: row for name, row in digest_files(package).items() if name != MANIFEST}
    change(fields)
    fields["content"], fields["config_digest"] = sealed.digest(fields["tensors"]), sealed.digest(fields["config"])
    (package / MANIFEST).write_bytes(json_bytes(seal(fields)))


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pathlib.Path], None]:
    """An attack that alters the numbers of `w_up` and states their true digests."""

    def attack(package):
        array = change(np.fromfile(package / TENSOR, "<f4").reshape(2, 8, 16))
        (package / TENSOR).write_bytes(array.tobytes())
        sha256 = hashlib.sha256(array.tobytes()).hexdigest()
        values = {"sha256": sha256, "shape": list(array.shape), "dtype": array.dtype.name}
        if array.dtype.name == "bfloat16":
            (package / HEADER).write_text((package / HEADER).read_text().replace("<f4", "bfloat16"))
        reseal(package, lambda f: f["tensors"]["w_up"].update(values), files=True)

    return attack


def written(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[pathlib.Path], None]:
    """An attack that writes a file of the package and seals its digest."""

    def attack(package):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
        reseal(package, files=True)

    return attack


def manifest(change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    return lambda package: reseal(package, change)


def raw(name: str, content: bytes) -> Callable[[pathlib.Path], object]:
    return lambda package: (package / name).write_bytes(content)


def instead(name: str, make: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], None]:
    """An attack that replaces the file `name` by something else."""

    def attack(package):
        (package / name).rename(package.parent / "elsewhere")
        make(package / name)

    return attack


def name_file(name: str) -> Callable[[pathlib.Path], None]:
    return manifest(lambda f: f["files"].update({name: {"size": 1, "sha256": "0" * 64}}))


def _terabytes(package: pathlib.Path) -> None:
    """Configuration, shapes, headers and (sparse) files that agree on tensors of terabytes."""
    fields = json.loads((package / MANIFEST).read_bytes())
    width = TERABYTES // (4 * 2 * 16)
    for name, tensor in fields["tensors"].items():
        tensor["shape"] = [width if size == 8 else size for size in tensor["shape"]]
        (old,) = (p for p in (package / "arrays" / name).iterdir() if p.name != ".zarray")
        os.truncate(old, int(np.prod(tensor["shape"], dtype=object)) * 4)
        fields["files"][f"arrays/{name}/{old.name}"]["size"] = old.stat().st_size
        header = json.loads((package / f"arrays/{name}/.zarray").read_bytes())
        header["shape"] = header["chunks"] = tensor["shape"]
        text = json.dumps(header, separators=(",", ":")).encode()
        (package / f"arrays/{name}/.zarray").write_bytes(text)
        sealed = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        fields["files"][f"arrays/{name}/.zarray"] = sealed
    fields["config"]["d_model"] = width
    del fields["digest"]
    reseal(package, lambda f: f.update(fields))


def _socket(path: pathlib.Path) -> None:
    there = os.getcwd()
    os.chdir(path.parent)  # socket names are short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)
    os.chdir(there)


def _header(**changes) -> Callable[[pathlib.Path], None]:
    return written(HEADER, lambda text: json.dumps({**json.loads(text), **changes}, separators=(",", ":")).encode())


def _double_key(text: bytes) -> bytes:
    return text.replace(b'{"chunks"', b'{"order":"C","chunks"', 1)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
PICKLE = pickle.dumps({"a": [1, 2, 3]})

ATTACKS: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "parent path": (name_file("../outside"), "../outside"),
    "parent path inside": (name_file("arrays/../../outside"), "arrays/../../outside"),
    "absolute path": (name_file("/tmp/outside"), "/tmp/outside"),
    "backslash path": (name_file("arrays\\..\\outside"), "outside"),
    "zero byte in a path": (name_file("arrays/x\0y"), "is not a file of a package"),
    "owner that is a path": (manifest(lambda f: f.update(owner="../outside")), "../outside"),
    "owner that is reserved": (manifest(lambda f: f.update(owner="journal")), "journal"),
    "symbolic link, file": (instead(TENSOR, lambda p: p.symlink_to(p.parents[3] / "elsewhere")), TENSOR),
    "symbolic link, manifest": (instead(MANIFEST, lambda p: p.symlink_to(p.parents[1] / "elsewhere")), MANIFEST),
    "symbolic link, folder": (instead("arrays", lambda p: p.symlink_to(p.parents[1] / "elsewhere")), "arrays"),
    "symbolic link, extra": (lambda package: (package / "arrays/x").symlink_to("/etc/passwd"), "arrays/x"),
    "hard link": (instead(TENSOR, lambda p: os.link(p.parents[3] / "elsewhere", p)), TENSOR),
    "named pipe": (instead(TENSOR, os.mkfifo), TENSOR),
    "named pipe, manifest": (instead(MANIFEST, os.mkfifo), MANIFEST),
    "socket": (instead("card.md", _socket), "card.md"),
    "names that differ in case": (written("arrays/W_UP/0.0.0", b"x"), "arrays/W_UP/0.0.0"),
    "a folder where a file belongs": (instead("card.md", lambda p: p.mkdir()), "card.md"),
    "manifest of blanks": (raw(MANIFEST, b" " * (100 << 20)), MANIFEST),
    "manifest of tiny lists": (raw(MANIFEST, b"[" + b"[]," * (690_000) + b"[]]"), MANIFEST),
    "manifest nested deeply": (raw(MANIFEST, DEEP), MANIFEST),
    "manifest nested a little too deep": (
        manifest(lambda f: f.update(record=json.loads('{"a":' * 60 + "1" + "}" * 60))),
        "nested",
    ),
    "a number of a million digits": (raw(MANIFEST, b'{"a":' + b"9" * 1_000_000 + b"}"), MANIFEST),
    "a key twice, manifest": (raw(MANIFEST, b'{"owner":"a","owner":"b"}'), "'owner' is given twice"),
    "a key twice, header": (written(HEADER, _double_key), HEADER),
    "header of blanks": (written(HEADER, lambda text: text + b" " * MAX_HEADER_BYTES), HEADER),
    "header nested deeply": (written(HEADER, DEEP[:30_000]), HEADER),
    "header of terabytes": (_header(shape=[TERABYTES, 8, 16], chunks=[TERABYTES, 8, 16]), HEADER),
    "header with another dtype": (_header(dtype="|O"), HEADER),
    "header with a filter": (_header(filters=[{"id": "pickle"}]), HEADER),
    "header with a compressor": (_header(compressor={"id": "blosc"}), HEADER),
    "shape of terabytes": (manifest(lambda f: f["tensors"]["w_up"].update(shape=[TERABYTES, 8, 16])), "w_up"),
    "everything of terabytes": (_terabytes, "d_model|arrays/w_up/0.0.0 has"),
    "shape below zero": (manifest(lambda f: f["tensors"]["w_up"].update(shape=[-2, -8, 16])), "w_up"),
    "another shape": (weights(lambda a: a[:, :7]), "w_up"),
    "another dtype": (weights(lambda a: a.astype(np.float64)), "w_up"),
    "NaN": (weights(lambda a: np.where(a == a[0, 0, 0], np.float32("nan"), a)), "w_up"),
    "infinity": (weights(lambda a: np.where(a == a[1, 7, 15], -np.float32("inf"), a)), "w_up"),
    "NaN in bfloat16": (weights(lambda a: (a * np.nan).astype(ml_dtypes.bfloat16)), "w_up"),
    "another vocabulary": (manifest(lambda f: f["base"].update(tokenizer="a" * 64)), "tokenizer"),
    "another vocabulary size": (manifest(lambda f: f["config"].update(vocab_size=33)), "vocab_size"),
    "another trunk": (manifest(lambda f: f["base"].update(trunk="a" * 64)), "trunk"),
    "another public expert": (manifest(lambda f: f["base"].update(public="a" * 64)), "public expert"),
    "pickle beside the tensors": (written("arrays/w_up/data.pkl", PICKLE), "arrays/w_up/data.pkl"),
    "pickle, not named": (raw("weights.pt", PICKLE), "weights.pt"),
    "pickle in a tensor's place": (written(TENSOR, PICKLE), "w_up"),
    "pickle in a header's place": (written(HEADER, PICKLE), HEADER),
    "pickle in the metadata's place": (written("arrays/_METADATA", PICKLE), "arrays/_METADATA"),
    "metadata too large": (written("arrays/_METADATA", b"{}" + b" " * MAX_HEADER_BYTES), "arrays/_METADATA"),
    "card too large": (written("card.md", b"x" * (5 << 20)), "card.md"),
    "a tensor less": (manifest(lambda f: f["tensors"].pop("w_up")), "w_up"),
    "a tensor more": (manifest(lambda f: f["tensors"].update(extra=f["tensors"]["w_up"])), "extra"),
    "a tensor whose name is a path": (manifest(lambda f: f["tensors"].update({"../x": f["tensors"]["w_up"]})), "../x"),
    "a manifest that is not sealed": (
        lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes().replace(b"news", b"nwes")),
        "was altered",
    ),
    "another format": (manifest(lambda f: f.update(format="flexmoe-package-0")), "flexmoe-package-0"),
}
if os.geteuid() == 0:
    ATTACKS["device"] = (instead(TENSOR, lambda p: os.mknod(p, 0o20644, os.makedev(1, 5))), TENSOR)
    ATTACKS["device, manifest"] = (instead(MANIFEST, lambda p: os.mknod(p, 0o20644, os.makedev(1, 5))), MANIFEST)


ODD = (
    None,
    True,
    False,
    -1,
    0,
    0.5,
    1 << 40,
    1 << 70,
    "",
    "..",
    "../x",
    "/x",
    "x\0",
    "y" * 1000,
    [],
    [[]],
    {},
    {"a": 1},
)


def places(fields: dict) -> list[tuple]:
    """(object or list, key) of every value in a manifest, except the owner's record and recomputed digests."""
    found: list[tuple] = []

    def visit(node):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for name, child in items:
            if node is not fields or name not in ("record", "digest", "content", "config_digest"):
                found.append((node, name))
                visit(child)

    visit(fields)
    return found


def alter_manifest(package: pathlib.Path, rng: random.Random) -> str:
    """Sets, removes or adds one value somewhere in the manifest and seals it; returns a description."""
    fields = json.loads((package / MANIFEST).read_bytes())
    node, name = rng.choice(places(fields))
    kind = rng.choice(("set", "set", "remove", "add"))
    if kind == "remove":
        del node[name]
    elif kind == "add" and isinstance(node, dict):
        node["odd"] = rng.choice(ODD)
    else:
        node[name] = rng.choice([value for value in ODD if json.dumps(value) != json.dumps(node[name])])
    fields.setdefault("tensors", {})
    fields.setdefault("config", {})
    del fields["digest"]
    reseal(package, lambda f: (f.clear(), f.update(fields)))
    return f"{kind} {name!r}"


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """The block may allocate 500 MiB (MemoryError otherwise) and compute for 5 seconds (AssertionError otherwise)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, before[1]))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - started < LIMIT_SECONDS


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of the last change)} of everything under `folder`."""
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}
