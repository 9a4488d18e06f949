"""Opt-outs in every order, and merges of large experts."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import create_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import owner_leaves
from flexmoe_jax.tree import PUBLIC, TRUNK, unflatten, union
from tests.faults.kills import Fault
from tests.hf.tiny import tokenizer
from tests.tiny import base_of, contents, make_expert, make_release

NAMES = ("code", "law", "math", "news", "poems")
SUBSETS = (("news",), ("code", "math"), ("law", "poems"), ("code", "law", "news"), ("code", "law", "math", "poems"))


def every_order(folder: pathlib.Path, subsets=SUBSETS) -> Iterator[Fault]:
    """Each subset of five experts opts out in every order: byte-identical to a merge without them, and certified."""
    release = make_release(folder / "public")
    for name in NAMES:
        make_expert(folder / name, name, release)
    merge(folder / "public", [folder / name for name in NAMES], folder / "all", top_k=3)
    for subset in subsets:
        rest = [folder / name for name in NAMES if name not in subset]
        top_k = min(3, len(rest) + 1)
        never = contents(merge(folder / "public", rest, folder / f"never-{'-'.join(subset)}", top_k=top_k).path)
        for order in itertools.permutations(subset):
            model, proof = shutil.copytree(folder / "all", folder / "model"), folder / "proof.json"
            for name in order:
                proof.unlink(missing_ok=True)
                opt_out(model, name, certificate=proof)
            good = [*verify_model(model), *verify_certificate(proof, model)]
            yield Fault(f"opt-out of {len(subset)}", all(f.ok for f in good), contents(model) == never)
            shutil.rmtree(model)


def config_of(megabytes: int) -> ModelConfig:
    """A model with experts of about this size and a small trunk."""
    d_ff = megabytes * (1 << 20) // (4 * 3 * 256)
    return ModelConfig(
        vocab_size=300, num_layers=1, d_model=256, num_heads=2, num_kv_heads=2, head_dim=128, d_ff=d_ff, max_seq_len=16
    )


EXPORTING = """
import json, pathlib, resource, sys, time
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.hf.export import ExportOptions, export
# Private memory only: the packages' files are mapped, and the system can reclaim their pages.
used = int(pathlib.Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]),) * 2)
started = time.monotonic()
export(open_model(sys.argv[2]), sys.argv[3], ExportOptions(custom_code=True, max_shard_bytes=int(sys.argv[1]) // 2))
print(json.dumps({"seconds": time.monotonic() - started}))
"""

MERGING = """
import json, pathlib, resource, sys, time
from flexmoe_jax.compose.merge import merge
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
link, out, public, *experts = sys.argv[2:]
started, cpu = time.monotonic(), time.process_time()
merge(public, experts, out, link=link == "link")
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's
peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
print(json.dumps({"seconds": time.monotonic() - started, "cpu": time.process_time() - cpu, "peak": peak}))
"""


def merge_at_size(folder: pathlib.Path, megabytes: int, counts: tuple[int, ...]) -> list[dict]:
    """Merges `counts` random experts by copies and by links, and exports the copies in shards of one expert.

    Each runs in a process whose memory is limited to that of two experts.
    """
    config = config_of(megabytes)
    rng = np.random.default_rng(0)

    def write(path, owner, base):
        params = {
            name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in owner_leaves(config, owner).items()
        }
        return path, owner, unflatten(params), base

    trunk, public = (write(None, owner, None)[2] for owner in (TRUNK, PUBLIC))
    release = create_model(
        folder / "public",
        union({TRUNK: trunk, PUBLIC: public}),
        config,
        tokenizer(folder / "tokenizer"),
        {TRUNK: {}, PUBLIC: {}},
    )
    experts = []
    for number in range(max(counts)):
        path, owner, params, base = write(folder / f"e{number:02}", f"e{number:02}", base_of(release))
        write_package(path, owner=owner, params=params, config=config, base=base, record={})
        experts.append(path)
    rows = []
    for link, count in itertools.product(("copy", "link"), counts):
        out = folder / "model"
        limit = 2 * megabytes << 20
        command = [sys.executable, "-c", MERGING, str(limit), link, str(out), str(release.path)]
        done = subprocess.run([*command, *map(str, experts[:count])], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        shared = all(p.stat().st_nlink == 2 for p in (out / "e00").rglob("0.0.0"))
        rows.append({"how": link, "experts": count, "bytes": size, "shared": shared, **json.loads(done.stdout)})
        if link == "copy":
            exported = [sys.executable, "-c", EXPORTING, str(limit), str(out), str(folder / "hf")]
            done = subprocess.run(exported, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            written = sum(p.stat().st_size for p in (folder / "hf").rglob("*") if p.is_file())
            rows.append({"how": "export", "experts": count, "bytes": written, **json.loads(done.stdout)})
            shutil.rmtree(folder / "hf")
        shutil.rmtree(out)
    return rows
