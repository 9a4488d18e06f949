"""The same training on one device and on meshes of eight; test_mesh.py runs it in a process with eight CPU devices.

python -m tests.parallel.on_eight_devices FOLDER     prints one JSON object
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import numpy as np

import flexmoe_jax as fm
from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import content_digest, load_package
from flexmoe_jax.cli.main import use_compilation_cache
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.parallel.mesh import make_mesh, mesh_of_one
from flexmoe_jax.parallel.specs import path_text, place_at
from flexmoe_jax.training import loop
from flexmoe_jax.training.loop import train
from flexmoe_jax.training.state import by_name
from flexmoe_jax.tree import flatten
from tests.model.test_equal_experts import ANCHORS, copies
from tests.tiny import MODEL, WORDS, expert_run, max_difference, public_run, random_tokens, write_documents

PUBLIC_MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2", "data=8")
EVALUATION_MESHES = ("data=2,fsdp=2,expert=2", "expert=4,fsdp=2")
JOINT_MESHES = ("data=2,fsdp=2,expert=2", "expert=4,fsdp=2", "fsdp=2,expert=2,tensor=2")
UNEVEN_MESHES = ("fsdp=8", "expert=4,fsdp=2")  # of three experts
RESUMING_MESHES = ("", "fsdp=8", "expert=2,fsdp=4", "expert=8")


def most(ours, theirs) -> float:
    """Largest difference of two trees, relative to each leaf's largest value."""
    pairs = [
        (np.asarray(a), np.asarray(b)) for a, b in zip(flatten(ours).values(), flatten(theirs).values(), strict=True)
    ]
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-6)) for a, b in pairs)


def losses(run) -> list[float]:
    lines = (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@contextlib.contextmanager
def one_device():
    """JAX finds only the first device."""
    import jax

    devices, count = jax.devices, jax.device_count
    jax.devices, jax.device_count = lambda *a: devices(*a)[:1], lambda *a: 1
    try:
        yield
    finally:
        jax.devices, jax.device_count = devices, count


def compare(make, meshes, read) -> dict:
    """{mesh: (largest difference of parameters, of losses)} between the run on the mesh and on one device."""
    reference = make("one")
    with one_device():
        expected = read(train(reference))
    found = {}
    for mesh in meshes:
        run = dataclasses.replace(make(mesh.replace(",", "_")), mesh=mesh)
        parameters = most(read(train(run)), expected)
        found[mesh] = (parameters, float(np.abs(np.subtract(losses(run), losses(reference))).max()))
    return found


class Restored(FlexMoEError):
    """A run was stopped as soon as its state was restored."""


def resumed(run, monitored) -> dict[str, str]:
    """{mesh ("saved": as it was saved): digest of parameters and moments} of the last checkpoint of the ended `run`.

    Each mesh restores a copy of the run directory, and stops before its first step. `monitored` is the digest of what
    was given to be saved.
    """
    found, restore = {"saved": monitored}, loop._restore

    def stop(job, state, iterator):
        state, _ = restore(job, state, iterator)
        assert int(state.step) == run.steps
        found[mesh] = bits(by_name((state.trainable, state.opt_state), job.experts))
        raise Restored("restored", "")

    loop._restore = stop
    for mesh in RESUMING_MESHES:
        copy = pathlib.Path(f"{run.out}-{mesh}")
        shutil.copytree(run.out, copy)
        shutil.rmtree(copy / "model")
        with contextlib.suppress(Restored), contextlib.nullcontext() if mesh else one_device():
            train(dataclasses.replace(run, mesh=mesh or None, out=str(copy)))
    loop._restore = restore
    return found


def bits(tree) -> str:
    """A digest of every leaf's path, dtype, shape and bytes."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{path_text(path)} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def scores(path: pathlib.Path, meshes=EVALUATION_MESHES, top_ks=(2, 4)) -> dict:
    """{top-k: {mesh: (bits per byte on one device, on the mesh, largest difference of a token, of a share)}}."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 40)) for words in WORDS.values()]
    found: dict = {}
    for top_k in top_ks:
        one = dataclasses.replace(fm.load(path), wanted_top_k=top_k)
        expected = one.score(texts)
        for text in meshes:
            many = dataclasses.replace(fm.load(path, make_mesh(text)), wanted_top_k=top_k)
            score = many.score(texts)
            token = max(float(np.abs(a - b).max()) for a, b in zip(score.token_nats, expected.token_nats, strict=True))
            share = float(np.abs(score.share_LE - expected.share_LE).max())
            found.setdefault(top_k, {})[text] = (expected.bits_per_byte, score.bits_per_byte, token, share)
    tokens = np.arange(20) + 97
    found["logits"] = float(np.abs(np.asarray(many.logits(tokens)) - np.asarray(one.logits(tokens))).max())
    found["texts"] = [model.generate("the king", max_new_tokens=12) for model in (one, many)]
    weights = many._stacked["experts"]["stacked"]["w_up"]
    found["held"] = weights.addressable_shards[0].data.nbytes / weights.nbytes
    return found


def initial() -> dict[str, str]:
    """{mesh: digest of a new public model's parameters, placed on it as they are drawn}."""
    import jax

    config, key = dataclasses.replace(MODEL, num_kv_heads=2), jax.random.key(3)
    found = {"one": content_digest(init_params(config, key))}
    for text in PUBLIC_MESHES:
        params = init_params(config, key, place=functools.partial(place_at, make_mesh(text)))
        assert len(params["trunk"]["embed"].sharding.device_set) == 8
        found[text] = content_digest(params)
    return found


def equal_experts() -> dict[str, dict[str, float]]:
    """{mesh: {anchor: largest difference of logits}} between four copies of an expert, two active, and that expert."""
    found: dict = {}
    for anchor, config in ANCHORS.items():
        dense, mixture = copies(config, 4)
        tokens = np.asarray(random_tokens(config, 2, 9))
        expected = fm.Model(config, dense, load_tokenizer("cl100k:300"), None, mesh_of_one()).logits(tokens)
        for text in EVALUATION_MESHES:
            many = fm.Model(config, mixture, load_tokenizer("cl100k:300"), 2, make_mesh(text))
            found.setdefault(text, {})[anchor] = max_difference(many.logits(tokens), expected)
    return found


def main(root: pathlib.Path) -> dict:
    steps = {"steps": 10, "batch_size": 8, "save_every": 100}
    result = {}

    model = dataclasses.replace(MODEL, num_kv_heads=2)  # enough heads for two devices

    def public(tag):
        return public_run(root / "p" / tag, model=model, **steps)

    result["public"] = compare(public, PUBLIC_MESHES, lambda path: load_params(open_model(path)))
    release = root / "p" / "one" / "public" / "run" / "model"
    sample = write_documents(root / "sample", "public")

    def hybrid(tag):
        return expert_run(
            root / "h" / tag,
            "news",
            release,
            public_data=str(sample),
            public_fraction=0.5,
            router_contrast=0.1,
            **steps,
        )

    result["hybrid"] = compare(hybrid, PUBLIC_MESHES, load_package)

    def low_rank(tag):
        return dataclasses.replace(hybrid(f"rank-{tag}"), rank="w_gate=4,w_up=4,head=4")

    def quantized(tag):
        return dataclasses.replace(hybrid(f"int8-{tag}"), rank="4", frozen_dtype="int8")

    result["low rank"] = compare(low_rank, PUBLIC_MESHES[:2], load_package)
    result["quantized"] = compare(quantized, PUBLIC_MESHES[:2], load_package)
    packages = [root / "h" / "one" / "news" / "run" / "package"]
    packages += [train(expert_run(root / "e", owner, release, mesh="data=8", **steps)) for owner in ("code",)]
    third = write_documents(root / "third" / "sea" / "data", "public")
    run = expert_run(root / "e", "code", release, mesh="data=8", **steps)
    packages.append(train(dataclasses.replace(run, owner="sea", data=str(third), out=str(root / "e" / "sea"))))
    merge(release, packages, root / "model", top_k=2)

    def joint(tag, model="model"):
        return dataclasses.replace(
            public_run(root / "j" / tag, **steps), model=None, public=str(root / model), domain_vector=None, top_k=2
        )

    result["joint"] = compare(joint, JOINT_MESHES, lambda path: load_params(open_model(path)))
    result["scores"] = scores(root / "model")
    shutil.copytree(root / "model", root / "three")
    opt_out(root / "three", "sea", certificate=root / "left.json")

    saved, save = [], RunCheckpoints.save

    def noted(checkpoints, step, trainable, opt_state, *rest):
        saved.append(bits((trainable, opt_state)))
        save(checkpoints, step, trainable, opt_state, *rest)

    RunCheckpoints.save = noted
    three = functools.partial(joint, model="three")
    result["three"] = compare(lambda tag: three(f"3-{tag}"), UNEVEN_MESHES, lambda path: load_params(open_model(path)))
    result["three scores"] = scores(root / "three", UNEVEN_MESHES, (2, 3))
    runs = [three(f"3-{mesh.replace(',', '_')}") for mesh in UNEVEN_MESHES]
    result["resumed"] = [resumed(run, digest) for run, digest in zip(runs, saved[1:], strict=True)]
    result["initial"] = initial()
    result["equal experts"] = equal_experts()
    result["refused"] = {}
    for mesh in ("fsdp=3", "fsdp=16", "pipe=8"):
        try:
            train(dataclasses.replace(joint(f"refused-{mesh}"), mesh=mesh))
        except FlexMoEError as error:
            result["refused"][mesh] = error.what
    return result


if __name__ == "__main__":
    use_compilation_cache()
    sys.stdout.write(json.dumps(main(pathlib.Path(sys.argv[1]))) + "\n")
