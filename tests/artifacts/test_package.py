"""A package returns every bit that was written, and any alteration of it is detected."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.package import load_package, read_manifest, verify_package, write_package
from flexmoe_jax.artifacts.sealed import json_bytes, seal, sha256_array
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.files import sha256_file
from flexmoe_jax.tree import flatten, unflatten
from tests.tiny import CONFIG, contents, flip_bit, random_part, same_tree

BASE = dict.fromkeys(("trunk", "public", "tokenizer"), "ab" * 32)
RECORD = {"licence": "Apache-2.0", "contact": "who@example.org", "training": {"steps": 3, "note": "é"}}


ROUTER = {"encoder": "x", "encoder_digest": "e" * 64, "scale": 1.0, "projection_seed": 0}


def write(path, owner="news", seed=0, **changes):
    params = changes.pop("params", random_part(owner, seed))
    base = BASE if owner not in ("trunk", "public") else {"tokenizer": BASE["tokenizer"]}
    arguments = {"params": params, "config": CONFIG, "base": base, "record": RECORD} | changes
    return write_package(path, owner=owner, **arguments)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "news"
    write(path)
    return path


@pytest.fixture
def package(original, tmp_path):
    return shutil.copytree(original, tmp_path / "news")


def problems(path):
    return [f.subject for f in verify_package(path) if not f.ok]


def reseal(package, change):
    """Applies `change` to the manifest and seals it consistently, as an attacker would."""
    fields = json.loads((package / "manifest.json").read_text())
    del fields["digest"]
    change(fields)
    fields["content"] = sealed.digest(fields["tensors"])
    (package / "manifest.json").write_bytes(json_bytes(seal(fields)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("owner", ["trunk", "public", "news"])
def test_parameters_are_loaded_bit_for_bit(tmp_path, owner, dtype):
    params = random_part(owner, 0, dtype)
    digest = write(tmp_path / "p", owner, params=params)
    assert same_tree(load_package(tmp_path / "p"), params)
    assert same_tree(load_package(tmp_path / "p", verify=False), params)
    assert same_tree(load_package(tmp_path / "p", mapped=True), params)
    manifest = read_manifest(tmp_path / "p", owner)
    assert (manifest.digest, manifest.config, manifest.record.fields) == (digest, CONFIG, RECORD)
    assert manifest.tensors.keys() == flatten(params).keys()
    assert problems(tmp_path / "p") == []


def test_a_relative_path_with_dots_is_written_and_read(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write("../p")
    assert same_tree(load_package("../p"), random_part("news", 0))


def test_jax_arrays_negative_zeros_and_subnormals_keep_their_bits(tmp_path):
    params = random_part("news", 0)
    params["w_up"].flat[:3] = [-0.0, 1e-42, np.finfo(np.float32).max]
    write(tmp_path / "p", params={name: jnp.asarray(leaf) for name, leaf in params.items()})
    assert same_tree(load_package(tmp_path / "p"), params)


def test_the_bytes_of_a_package_do_not_depend_on_time_or_place(original, tmp_path):
    write(tmp_path / "elsewhere" / "other")
    assert contents(tmp_path / "elsewhere" / "other") == contents(original)


def test_the_content_digest_identifies_the_parameters_not_the_record(original, tmp_path):
    write(tmp_path / "a", record={})
    write(tmp_path / "b", seed=1)
    first, same, other = (read_manifest(path) for path in (original, tmp_path / "a", tmp_path / "b"))
    assert first.content == same.content != other.content
    assert first.digest != same.digest


def test_orbax_reads_the_arrays_without_this_library(original):
    import orbax.checkpoint as ocp

    assert same_tree(ocp.PyTreeCheckpointer().restore(original / "arrays"), random_part("news", 0))


def test_a_tensors_sha256_is_the_sha256_of_its_file(original):
    params, manifest = random_part("news", 0), read_manifest(original)
    for name, tensor in manifest.tensors.items():
        (file,) = (f for f in (original / "arrays" / name).iterdir() if f.name != ".zarray")
        assert tensor.sha256 == sha256_array(params[name]) == sha256_file(file)
        assert file.read_bytes() == params[name].tobytes()


def test_the_digest_of_an_array_covers_its_little_endian_c_order_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    views = [np.asfortranarray(array), array.astype(">f4"), array[::1], jnp.asarray(array)]
    assert {sha256_array(np.asarray(view)) for view in views} == {sha256_array(array)}
    assert sha256_array(array.astype(ml_dtypes.bfloat16)) != sha256_array(array)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_bit_in_any_file_is_named(original, package, where):
    for name in contents(original):
        size = (package / name).stat().st_size
        flip_bit(package / name, round(where * (size - 1)), bit=size % 8)
        assert problems(package) == [name]
        for mapped in (False, True):
            with pytest.raises(FlexMoEError, match=name.split("/")[-1]):
                load_package(package, mapped=mapped)
        shutil.copy(original / name, package / name)
    assert problems(package) == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected(original, package):
    raw = (original / "manifest.json").read_bytes()
    for at in range(0, len(raw), 7):
        (package / "manifest.json").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(FlexMoEError):
            read_manifest(package)


def test_a_truncated_empty_or_missing_file_is_named(original, package):
    for name in contents(original):
        for damage in (
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            lambda f: f.write_bytes(b""),
            lambda f: f.unlink(),
        ):
            damage(package / name)
            assert problems(package) == [name]
            with pytest.raises(ArtifactError):
                load_package(package)
            shutil.copy(original / name, package / name)


@pytest.mark.parametrize("name", ["extra", "arrays/extra", "arrays/w_up/0.0.1", "arrays/.hidden"])
def test_an_extra_file_is_named(package, name):
    (package / name).write_bytes(b"")
    assert problems(package) == [name]
    with pytest.raises(ArtifactError, match="does not name"):
        load_package(package, verify=False)


def test_files_of_file_browsers_are_named_and_the_remedy_is_to_delete_them(package):
    surplus = [".DS_Store", "._manifest.json", "arrays/.DS_Store", "arrays/w_up/._0.0.0", "Thumbs.db"]
    for name in surplus:
        (package / name).write_bytes(b"Mac OS X")
    with pytest.raises(ArtifactError) as refusal:
        load_package(package)
    remedy = refusal.value.remedy.removeprefix("delete ").removesuffix(": a file browser made them")
    assert sorted(remedy.split(", ")) == sorted(str(package / name) for name in surplus)
    for path in remedy.split(", "):
        pathlib.Path(path).unlink()
    load_package(package)


def test_links_and_empty_directories_are_named(original, package):
    (package / "arrays/empty").mkdir()
    (package / "card.md").unlink()
    (package / "card.md").symlink_to(original / "card.md")
    assert problems(package) == ["arrays/empty", "card.md", "card.md"]
    (package / "manifest.json").unlink()
    (package / "manifest.json").symlink_to(original / "manifest.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(package)


def test_swapped_tensors_and_swapped_packages_are_detected(original, package, tmp_path):
    gate, up = package / "arrays/w_gate", package / "arrays/w_up"
    gate.rename(tmp_path / "t")
    up.rename(gate)
    (tmp_path / "t").rename(up)
    assert set(problems(package)) == {"arrays/w_gate/0.0.0", "arrays/w_up/0.0.0"}
    with pytest.raises(ArtifactError, match="'news', not of 'code'"):
        read_manifest(original, "code")


def test_arrays_of_another_package_are_detected(package, tmp_path):
    write(tmp_path / "other", seed=1)
    shutil.rmtree(package / "arrays")
    shutil.copytree(tmp_path / "other/arrays", package / "arrays")
    assert len(problems(package)) == len(random_part("news", 0))


def test_wrong_parameters_are_refused_by_name_and_nothing_is_written(tmp_path):
    good = flatten(random_part("news", 0))
    nan = good["w_up"].copy()
    nan[0, 1, 2] = np.nan
    cases = {
        "'w_up' is missing": {k: v for k, v in good.items() if k != "w_up"},
        "'extra' does not belong": good | {"extra": good["bias"]},
        r"'router' has shape \(2, 7\)": good | {"router": good["router"][:, :7]},
        "'bias' of 'news' has dtype float64": good | {"bias": good["bias"].astype(np.float64)},
        "'w_up' of 'news' has 1 values that are not finite": good | {"w_up": nan},
    }
    for message, flat in cases.items():
        with pytest.raises(ArtifactError, match=message):
            write(tmp_path / "p", params=unflatten(flat))
    for change in (
        {"base": {"tokenizer": "ab" * 32}},
        {"base": BASE | {"trunk": "x"}},
        {"record": {"x": float("nan")}},
    ):
        with pytest.raises(ArtifactError):
            write(tmp_path / "p", **change)
    for owner in ("Model", "model", "../x", ""):
        with pytest.raises(FlexMoEError, match="expert name"):
            write(tmp_path / "p", owner, params=random_part("news", 0))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused(package):
    before = contents(package)
    with pytest.raises(ArtifactError, match="already exists"):
        write(package)
    assert contents(package) == before


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe_jax.artifacts.package.write_sealed", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ArtifactError, match="could not be written: full"):
        write(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def set_fields(**values):
    return lambda fields: fields.update(values)


def first_tensor(**values):
    return lambda fields: fields["tensors"]["w_up"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_fields(format="flexmoe-package-9"), "flexmoe-package-9.*flexmoe-package-1"),
        (set_fields(owner="trunk"), "base of 'trunk'"),
        (set_fields(owner="model"), "reserved"),
        (set_fields(surprise=1), "'surprise' is not known"),
        (lambda f: f.pop("base"), "'base' is missing"),
        (set_fields(record=[]), "record is a list"),
        (set_fields(config_digest="0" * 64), "config_digest"),
        (lambda f: f["config"].update(d_model=9), "config_digest"),
        (lambda f: f["base"].update(trunk="short"), "base of 'news'"),
        (first_tensor(shape=[1 << 40]), "has shape"),
        (first_tensor(shape=[True, 8, 16]), "w_up"),
        (first_tensor(dtype="object"), "object"),
        (first_tensor(sha256="0" * 64), "its files disagree"),
        (lambda f: f["files"]["card.md"].update(size=-1), "card.md"),
        (lambda f: f["files"].update({"../out": {"size": 0, "sha256": "0" * 64}}), "is not a file of a package"),
        (lambda f: f["files"].update({"/etc/x": {"size": 0, "sha256": "0" * 64}}), "is not a file of a package"),
        (lambda f: f["files"].update({"arrays/../x": {"size": 0, "sha256": "0" * 64}}), "is not a file of a package"),
        (lambda f: f["tensors"].pop("w_up"), "'w_up' is missing"),
        (lambda f: f["record"].update(router=ROUTER | {"projection_seed": -1}), "projection_seed is -1"),
        (lambda f: f["config"].update(max_seq_len=2**36), "max_seq_len is 68719476736"),
    ],
)
def test_a_sealed_manifest_with_invalid_values_is_refused(package, change, message):
    reseal(package, change)
    with pytest.raises(FlexMoEError, match=f"(?s){message}"):
        load_package(package)
    assert problems(package) == ["manifest.json"]


def test_a_header_that_makes_orbax_allocate_more_is_refused(package):
    header = package / "arrays/w_up/.zarray"
    header.write_text(header.read_text().replace("[2,8,16]", "[1048576,1048576,16]"))

    def update(fields):
        fields["files"]["arrays/w_up/.zarray"] = {"size": header.stat().st_size, "sha256": sha256_file(header)}

    reseal(package, update)
    assert problems(package) == ["arrays/w_up/.zarray"]
    with pytest.raises(ArtifactError, match="1048576"):
        load_package(package, verify=False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 1}', "'a' is given twice"),
        (b"[]", "holds a list"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * ((2 << 20) + 1), "over 2097152 bytes"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
    ],
)
def test_malformed_json_is_refused(package, raw, message):
    (package / "manifest.json").write_bytes(raw)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(package)
