"""A hostile package is refused by name, quickly and in little memory, or holds the parameters that it states."""

import copy
import json
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import create_model, open_model
from flexmoe_jax.artifacts.package import load_package, verify_package, write_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.files import list_files
from flexmoe_jax.tree import union
from tests.artifacts.model_attacks import DEPTHS, deep
from tests.faults.hostile import ATTACKS, limits, places, reseal, snapshot
from tests.tiny import CONFIG, RECORDS, TOKENIZER, make_expert, make_release, random_part, same_tree

REFUSED_ONLY_BY_MERGE = {  # the package is sound, but does not belong here
    "hard link",
    "another vocabulary",
    "another vocabulary size",
    "another trunk",
    "another public expert",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    make_expert(root / "news", "news", make_release(root / "public"))
    return root


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name_and_nothing_is_written(home, tmp_path, attack):
    package = shutil.copytree(home / "news", tmp_path / "news")
    strike, words = ATTACKS[attack]
    strike(package)
    before = snapshot(tmp_path)
    with limits(), pytest.raises(FlexMoEError) as error:
        merge(home / "public", [package], tmp_path / "model")
    assert any(word in str(error.value) for word in words.split("|"))
    assert error.value.remedy
    assert snapshot(tmp_path) == before
    if attack not in REFUSED_ONLY_BY_MERGE:
        with limits():
            bad = [f"{f.subject} {f.detail}" for f in verify_package(package) if not f.ok]
        assert any(word in text for text in bad for word in words.split("|"))
        with limits(), pytest.raises(FlexMoEError):
            load_package(package)


def test_a_trunk_altered_by_one_unit_in_the_last_place_is_another_trunk(home, tmp_path):
    trunk, public = random_part("trunk", 0), random_part("public", 0)
    trunk["embed"][3, 5] = np.nextafter(trunk["embed"][3, 5], np.float32(np.inf))
    params = union({"trunk": trunk, "public": public})
    create_model(tmp_path / "public", params, CONFIG, TOKENIZER, RECORDS)
    with limits(), pytest.raises(FlexMoEError, match=r"'news' .* was trained with the trunk"):
        merge(tmp_path / "public", [home / "news"], tmp_path / "model")
    shutil.rmtree(tmp_path / "public" / "trunk")  # also if only the trunk of the release is another
    release = shutil.copytree(home / "public", tmp_path / "release")
    shutil.rmtree(release / "trunk")
    base = {"tokenizer": open_model(home / "public").tokenizer_digest}
    write_package(release / "trunk", owner="trunk", params=trunk, config=CONFIG, base=base, record={})
    with limits(), pytest.raises(FlexMoEError, match="the package 'trunk' has the manifest digest"):
        merge(release, [home / "news"], tmp_path / "model")


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_package_with_deep_directories_is_refused(home, tmp_path, depth):
    package = shutil.copytree(home / "news", tmp_path / "news")
    deep("arrays/deep", *DEPTHS[depth])(package)
    try:
        with limits():
            bad = [check.subject for check in verify_package(package) if not check.ok]
        assert [subject.startswith("arrays/deep/") for subject in bad] == [True]
        with limits(), pytest.raises(FlexMoEError, match="too deep"):
            load_package(package)
        with limits(), pytest.raises(FlexMoEError, match="too deep"):
            merge(home / "public", [package], tmp_path / "model")
        assert {path.name for path in tmp_path.iterdir()} == {"news"}
    finally:
        subprocess.run(["rm", "-rf", package], check=True)  # pytest cannot delete it


def test_a_linked_package_inside_a_model_is_refused(home, tmp_path):
    model = merge(home / "public", [home / "news"], tmp_path / "model").path
    (model / "news").rename(tmp_path / "elsewhere")
    (model / "news").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FlexMoEError, match="'news' is a symbolic link"):
        open_model(model)
    assert [f.ok for f in verify_model(model)] == [False]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutations(draw):
    """A function that alters a package: its manifest (and seals it again), or the bytes and kinds of its files."""
    kind = draw(st.sampled_from(("set", "set", "set", "remove", "add", "bytes", "cut", "append", "swap", "extra")))
    seed = draw(st.integers(0, 2**32 - 1))
    value, key = draw(JSON), draw(st.text(max_size=8))

    def mutate(package: pathlib.Path) -> None:
        rng = np.random.default_rng(seed)
        names = [*list_files(package)[0]]
        file = package / names[rng.integers(len(names))]
        if kind in ("set", "remove", "add"):
            reseal_or_leave(package, lambda fields: alter(fields, rng, kind, key, value))
        elif kind == "extra":
            (package / "arrays" / f"x{rng.integers(9)}").write_bytes(b"x")
        elif kind == "swap":
            other = package / names[rng.integers(len(names))]
            a, b = file.read_bytes(), other.read_bytes()
            file.write_bytes(b)
            other.write_bytes(a)
        else:
            content = bytearray(file.read_bytes())
            at = int(rng.integers(len(content)))
            if kind == "bytes":
                content[at] ^= int(rng.integers(1, 256))
            file.write_bytes(content[:at] if kind == "cut" else content + b"x" * (kind == "append"))

    return mutate


def alter(fields: dict, rng, kind: str, key: str, value) -> None:
    """Sets, removes or adds one value somewhere in a manifest."""
    found = places(fields)
    node, name = found[rng.integers(len(found))]
    if kind == "remove":
        del node[name]
    elif kind == "add" and isinstance(node, dict):
        node[key] = value
    else:
        node[name] = value


def reseal_or_leave(package: pathlib.Path, change) -> None:
    before = json.loads((package / "manifest.json").read_bytes())
    trial = copy.deepcopy(before)
    change(trial)
    trial.setdefault("tensors", {})
    trial.setdefault("config", {})
    trial.pop("digest", None)
    reseal(package, lambda fields: (fields.clear(), fields.update(trial)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutate=mutations())
def test_a_mutated_package_is_refused_or_holds_the_same_parameters(home, mutate):
    """Only the owner's `record` may change unnoticed: a seal is not a signature."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        package = shutil.copytree(home / "news", root / "news")
        mutate(package)
        before = snapshot(root)
        good = read_manifest(home / "news")
        with limits():
            checks = verify_package(package)
            try:
                model = merge(home / "public", [package], root / "model")
            except FlexMoEError:
                assert snapshot(root) == before
                return
        assert all(f.ok for f in checks)
        found = read_manifest(package)
        assert (found.content, found.base, found.config, found.tensors) == (
            good.content,
            good.base,
            good.config,
            good.tensors,
        )
        assert same_tree(load_package(model.package(found.owner)), random_part("news", 1))
