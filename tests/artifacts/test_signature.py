"""Signatures: valid ones pass; stripped, altered, foreign and replayed ones do not."""

import json
import shutil
import stat

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.model_changes import sign_release
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import load_package, sign_package, verify_package
from flexmoe_jax.artifacts.sealed import json_bytes
from flexmoe_jax.artifacts.signature import FILE, generate_key, read_signature, read_trusted
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out, replace
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.json_files import canonical_json
from tests.tiny import contents, flip_bit, make_expert, make_release


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Keys, a signed release, signed versions 1 and 2 of `news`, and an unsigned `code`."""
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "public")
    lines = [generate_key(root / f"{owner}.key", owner).read_text() for owner in ("public", "news", "code")]
    generate_key(root / "stranger.key", "news")
    (root / "trusted").write_text("# of the consortium\n\n" + "".join(lines))
    for version in (1, 2):
        make_expert(root / f"news{version}", "news", release, seed=version)
        sign_package(root / f"news{version}", root / "news.key", version)
    make_expert(root / "code", "code", release)
    sign_release(root / "public", root / "public.key", 1)
    return root


@pytest.fixture
def package(home, tmp_path):
    return shutil.copytree(home / "news1", tmp_path / "news")


def trust(home, required=True):
    return read_trusted(home / "trusted", required)


def problems(path, trusted=None):
    return {f.subject: f.detail for f in verify_package(path, trust=trusted) if not f.ok}


def test_a_signed_package_passes_and_signing_again_gives_the_same_bytes(home, package):
    assert problems(package) == problems(package, trust(home)) == {}
    before = (package / FILE).read_bytes()
    sign_package(package, home / "news.key", 1)
    assert (package / FILE).read_bytes() == before
    load_package(package)
    assert b"PRIVATE KEY" in (home / "news.key").read_bytes()


def test_only_its_owner_can_read_a_private_key(tmp_path):
    generate_key(tmp_path / "news.key", "news")
    assert stat.S_IMODE((tmp_path / "news.key").stat().st_mode) == 0o600


def test_a_missing_signature_is_refused_if_one_is_required(home, package):
    (package / FILE).unlink()
    assert problems(package) == problems(package, trust(home, required=False)) == {}
    assert "is not signed" in problems(package, trust(home))[FILE]
    with pytest.raises(ArtifactError, match="is not signed"):
        merge(home / "public", [package], package.parent / "model", trust=trust(home))


def test_every_altered_bit_of_a_signature_is_detected_without_trusted_keys(package):
    raw = (package / FILE).read_bytes()
    for at in range(len(raw)):
        flip_bit(package / FILE, at, at % 8)
        assert set(problems(package)) == {FILE}
        (package / FILE).write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not a valid signature"),
        ({"owner": "code"}, "not a valid signature"),
        ({"public_key": "0" * 64}, "not a valid signature"),
        ({"public_key": "00"}, "not a valid signature"),
        ({"signature": "zz"}, "not a valid signature"),
        ({"manifest": "0" * 64}, "signs the manifest 0000"),
        ({"extra": 1}, "'extra' is not known"),
        ({"format": "flexmoe-signature-9"}, "flexmoe-signature-9"),
        ({"version": "1"}, "version is a str"),
    ],
)
def test_a_signature_with_an_altered_field_is_refused(package, change, message):
    fields = json.loads((package / FILE).read_bytes())
    (package / FILE).write_bytes(json_bytes(fields | change))
    assert message in problems(package)[FILE]


def test_a_valid_signature_of_another_package_or_owner_is_refused(home, package):
    """Both are signed with a key that is trusted for somebody."""
    (package / FILE).write_bytes((home / "news2" / FILE).read_bytes())
    assert "signs the manifest" in problems(package, trust(home))[FILE]
    fields = json.loads((home / "news1" / FILE).read_bytes()) | {"owner": "code"}
    key = load_pem_private_key((home / "code.key").read_bytes(), None)
    fields["public_key"] = key.public_key().public_bytes_raw().hex()
    del fields["signature"]
    (package / FILE).write_bytes(json_bytes({**fields, "signature": key.sign(canonical_json(fields)).hex()}))
    assert read_signature(package, fields["manifest"]).owner == "code"
    for trusted in (None, trust(home)):
        assert "is signed as 'code', not 'news'" in problems(package, trusted)[FILE]


def test_a_key_that_is_not_trusted_for_the_owner_is_refused(home, package, tmp_path):
    sign_package(package, home / "stranger.key", 1)
    assert problems(package) == {}
    assert "a key not trusted for 'news'" in problems(package, trust(home))[FILE]
    sign_package(package, home / "code.key", 1)  # trusted, but for another owner
    assert "a key not trusted for 'news'" in problems(package, trust(home, required=False))[FILE]
    with pytest.raises(ArtifactError, match="a key not trusted for 'news'"):
        merge(home / "public", [package], tmp_path / "model", trust=trust(home))


def test_an_older_version_is_refused_once_the_lowest_version_is_raised(home, package):
    newer = home / "news2"
    assert problems(newer, trust(home)) == problems(package, trust(home)) == {}
    raised = package.parent / "trusted"
    line = (home / "news.key.pub").read_text().split()
    raised.write_text(f"{line[0]} {line[1]} 2\n")
    assert problems(newer, read_trusted(raised, True)) == {}
    assert "version 1 of 'news', the lowest that may be used is 2" in problems(package, read_trusted(raised))[FILE]
    shutil.copy(newer / FILE, package / FILE)  # the new signature on the old package
    assert "signs the manifest" in problems(package)[FILE]


def test_a_model_holds_the_signatures_of_its_packages_and_detects_changed_ones(home, tmp_path):
    model = merge(home / "public", [home / "news1", home / "code"], tmp_path / "model").path
    assert {f.subject for f in verify_model(model) if f.subject.endswith(FILE)} == {
        f"{name}/{FILE}" for name in ("trunk", "public", "news")
    }
    assert all(f.ok for f in verify_model(model))
    bad = [f.subject for f in verify_model(model, trust=trust(home)) if not f.ok]
    assert bad == [f"code/{FILE}"]
    raw = (model / "news" / FILE).read_bytes()
    (model / "news" / FILE).unlink()
    with pytest.raises(ArtifactError, match=r"signatures found != those of model\.json: news: None"):
        open_model(model)
    (model / "news" / FILE).write_bytes(raw)
    shutil.copy(model / "news" / FILE, model / "code" / FILE)
    with pytest.raises(ArtifactError, match=r"model\.json: code: "):
        open_model(model)
    (model / "code" / FILE).unlink()
    (model / "news" / FILE).unlink()
    (model / "news" / FILE).symlink_to(home / "news1" / FILE)
    with pytest.raises(ArtifactError, match=r"signature.json cannot be read"):
        open_model(model)


def test_opting_out_of_a_signed_model_equals_never_having_merged(home, tmp_path):
    model = merge(home / "public", [home / "news1", home / "code"], tmp_path / "model").path
    opt_out(model, "news", certificate=tmp_path / "proof.json")
    assert contents(model) == contents(merge(home / "public", [home / "code"], tmp_path / "never").path)


def test_a_signed_package_is_replaced_only_by_a_newer_one_of_the_same_key(home, tmp_path):
    model = merge(home / "public", [home / "news2"], tmp_path / "model").path
    before = contents(model, leave_out=())
    release = open_model(home / "public")
    unsigned = make_expert(tmp_path / "unsigned", "news", release, seed=3)
    foreign = make_expert(tmp_path / "foreign", "news", release, seed=4)
    sign_package(foreign, home / "stranger.key", 3)
    for package, message in (
        (home / "news1", "is version 1, the package in its place is version 2"),
        (unsigned, "is not signed, the package in its place is version 2"),
        (foreign, "is signed with"),
    ):
        with pytest.raises(ArtifactError, match=message):
            replace(model, package)
        assert contents(model, leave_out=()) == before
    with pytest.raises(ArtifactError, match="a key not trusted"):
        replace(model, foreign, trust=trust(home))
    same = make_expert(tmp_path / "same", "news", release, seed=5)
    sign_package(same, home / "news.key", 2)
    with pytest.raises(ArtifactError, match="is version 2, the package in its place is version 2"):
        replace(model, same, trust=trust(home))
    assert contents(model, leave_out=()) == before
    sign_package(unsigned, home / "news.key", 3)
    replace(model, unsigned, trust=trust(home))
    assert contents(model) == contents(merge(home / "public", [unsigned], tmp_path / "expected").path)
    assert all(f.ok for f in verify_model(model, trust=trust(home)))


def test_a_release_is_signed_as_a_whole_and_signing_again_repairs_a_crash(home, tmp_path):
    release = make_release(tmp_path / "public")
    with pytest.raises(ArtifactError, match="is in a model"):
        sign_package(release.path / "trunk", home / "public.key", 1)
    shutil.copy(home / "public/trunk" / FILE, release.path / "trunk" / FILE)  # the state after the crash
    with pytest.raises(ArtifactError, match="signatures found"):
        open_model(release.path)
    sign_release(release.path, home / "public.key", 1)
    assert contents(release.path) == contents(home / "public")
    assert [e.event for e in read_journal(release.path)] == ["created", "signed"]
    model = merge(home / "public", [home / "news1"], tmp_path / "model").path
    with pytest.raises(ArtifactError, match="several owners"):
        sign_release(model, home / "public.key", 1)


def test_malformed_keys_versions_and_owners_are_refused(home, package, tmp_path):
    with pytest.raises(ArtifactError, match="already exists"):
        generate_key(home / "news.key", "news")
    with pytest.raises(FlexMoEError, match="not usable"):
        generate_key(tmp_path / "x", "No Name")
    (tmp_path / "open.key").write_bytes((home / "news.key").read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    with pytest.raises(ArtifactError, match="can be read by others"):
        sign_package(package, tmp_path / "open.key", 1)
    (tmp_path / "junk.key").write_bytes(b"junk")
    (tmp_path / "junk.key").chmod(0o600)
    with pytest.raises(ArtifactError, match="is not a private key"):
        sign_package(package, tmp_path / "junk.key", 1)
    for version in (0, -1):
        with pytest.raises(ArtifactError, match="count versions from 1"):
            sign_package(package, home / "news.key", version)
    sign_package(package, home / "news.key", 5)
    with pytest.raises(ArtifactError, match="is signed as version 5, which is higher than 4"):
        sign_package(package, home / "news.key", 4)
    for line in ("news", "news xyz", f"news {'0' * 64} 1 2", f"news {'0' * 64} -1"):
        (tmp_path / "trusted").write_text(f"\n{line}\n")
        with pytest.raises(ArtifactError, match="line 2"):
            read_trusted(tmp_path / "trusted")


def test_the_commands_make_require_and_check_signatures(home, tmp_path, capsys):
    package = shutil.copytree(home / "code", tmp_path / "code")
    assert main(["keygen", str(tmp_path / "code.key"), "--owner", "code"]) == 0
    assert main(["sign", str(package), "--key", str(tmp_path / "code.key"), "--version", "1"]) == 0
    trusted = ["--trusted", str(tmp_path / "code.key.pub"), "--require-signature"]
    assert main(["verify", str(package), *trusted]) == 0
    assert "version 1, signed with" in capsys.readouterr().out
    assert main(["verify", str(home / "code"), *trusted]) == 1
    assert "is not signed" in capsys.readouterr().err
    assert main(["verify", str(package), "--require-signature"]) == 1
    assert "without --trusted" in capsys.readouterr().err
    merge_it = ["merge", "--public", str(home / "public"), "--package", str(package), "--out", str(tmp_path / "model")]
    assert main([*merge_it, *trusted]) == 1  # the release is signed by a key that this file does not trust
    assert "a key not trusted for 'trunk'" in capsys.readouterr().err
    (tmp_path / "both").write_text((home / "public.key.pub").read_text() + (tmp_path / "code.key.pub").read_text())
    assert main([*merge_it, "--trusted", str(tmp_path / "both"), "--require-signature"]) == 0
    assert main(["verify", str(tmp_path / "model"), "--trusted", str(tmp_path / "both"), "--require-signature"]) == 0


def swap_trunk(release, tmp_path):
    other = make_release(tmp_path / "other", seed=7).path
    shutil.rmtree(release / "trunk")
    shutil.copytree(other / "trunk", release / "trunk")


def flip(place):
    return lambda path, _: flip_bit(path / place, 10)


@pytest.mark.parametrize(
    "damage",
    [
        swap_trunk,
        flip("trunk/arrays/embed/0.0"),
        flip("public/arrays/w_up/0.0.0"),
        lambda path, _: (path / "public/x").touch(),
        lambda path, _: (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes() + b" "),
        lambda path, _: ((path / "trunk").rename(path / f".trunk-{'0' * 64}"), swap_trunk_beside(path)),
    ],
)
def test_a_damaged_release_is_not_signed(home, tmp_path, damage):
    release = make_release(tmp_path / "public").path
    damage(release, tmp_path)
    assert not all(check.ok for check in verify_model(release))
    before = contents(release, leave_out=())
    with pytest.raises(FlexMoEError):
        sign_release(release, home / "public.key", 1)
    assert contents(release, leave_out=()) == before


def swap_trunk_beside(path):
    make_release(path.parent / "beside", seed=7)
    shutil.copytree(path.parent / "beside" / "trunk", path / "trunk")


@pytest.mark.parametrize("file", ["arrays/w_up/0.0.0", "card.md"])
def test_a_damaged_package_is_not_signed(home, tmp_path, file):
    package = shutil.copytree(home / "code", tmp_path / "code")
    flip_bit(package / file, 10)
    with pytest.raises(ArtifactError, match=f"is damaged:\n    {file}"):
        sign_package(package, home / "code.key", 1)
    assert not (package / FILE).exists()


def test_signing_again_repairs_a_killed_signing(home, tmp_path):
    package = shutil.copytree(home / "code", tmp_path / "code")
    release = make_release(tmp_path / "public").path
    for folder in (package, release / "trunk", release):
        (folder / f".{FILE}.partial-01234567").write_text("")
    (release / f".{FILE}.partial-01234567").rename(release / ".model.json.partial-01234567")
    assert not all(check.ok for check in verify_model(release))
    sign_package(package, home / "code.key", 1)
    sign_release(release, home / "public.key", 1)
    assert problems(package, trust(home)) == {}
    assert all(check.ok for check in verify_model(release, trust=trust(home)))
    merge(release, [package], tmp_path / "model", trust=trust(home))


def test_a_package_in_a_model_is_not_signed_however_its_path_is_spelled(home, tmp_path):
    model = merge(home / "public", [home / "code"], tmp_path / "model").path
    (tmp_path / "link").symlink_to(model / "code")
    before = contents(model, leave_out=())
    for path in (model / "code", tmp_path / "link", model / "code/arrays/..", tmp_path / "model/../link"):
        with pytest.raises(ArtifactError, match="is in a model"):
            sign_package(path, home / "code.key", 1)
    assert contents(model, leave_out=()) == before
