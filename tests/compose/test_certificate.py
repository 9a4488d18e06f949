"""A certificate names the digest of a merge without the expert, and anything in it that is untrue is found."""

import json
import shutil

import numpy as np
import pytest

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model, staging_place
from flexmoe_jax.artifacts.sealed import json_bytes, seal
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose import certificate as certificates
from flexmoe_jax.compose.certificate import read_certificate, scan, verify_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out, replace
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from tests.tiny import Crash, contents, crash_at, flip_bit, make_expert, make_release, random_part


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "public")
    for name in ("code", "math", "news"):
        make_expert(root / name, name, release)
    make_expert(root / "code2", "code", release, seed=2)
    merge(root / "public", [root / n for n in ("code", "math", "news")], root / "model")
    merge(root / "public", [root / n for n in ("code", "math")], root / "never")
    return root


@pytest.fixture
def model(home, tmp_path):
    return shutil.copytree(home / "model", tmp_path / "model")


def bad(certificate, model):
    return {f.subject.removeprefix("certificate: ") for f in verify_certificate(certificate, model) if not f.ok}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_certificate_names_the_digest_of_a_model_that_never_had_the_expert(home, model, tmp_path, in_place):
    proof = tmp_path / "proof.json"
    news = open_model(model).manifests["news"]
    left = opt_out(model, "news", None if in_place else tmp_path / "out", certificate=proof)
    fields = read_certificate(proof)
    never = open_model(home / "never")
    assert fields["model"] == never.digest == left.digest
    assert fields["removed"] == {
        "name": "news",
        "manifest": news.digest,
        "content": news.content,
        "tensors": {path: tensor.sha256 for path, tensor in news.tensors.items()},
    }
    assert fields["remaining"] == {name: manifest.digest for name, manifest in never.manifests.items()}
    assert (fields["label"], fields["reason"], fields["scan"]["found"]) == ("exact", "", [])
    assert fields["scan"]["scanned_bytes"] == sum(
        len(raw) for name, raw in contents(home / "never").items() if name != "model.json"
    )
    assert bad(proof, left.path) == bad(proof, home / "never") == set()
    assert [p.name for p in tmp_path.iterdir() if "pending" in p.name] == []


def test_a_model_that_differs_from_the_certificate_is_found(home, model, tmp_path):
    proof = tmp_path / "proof.json"
    opt_out(model, "news", certificate=proof)
    assert bad(proof, home / "model") == {"model", "remaining", "removed", "tensors"}
    shutil.copytree(home / "news", model / "news")
    assert bad(proof, model) == {"removed", "tensors"}
    (model / "news").rename(model / "old")
    assert bad(proof, model) == {"tensors"}
    shutil.rmtree(model / "old")
    assert bad(proof, model) == set()
    other = shutil.copytree(model, tmp_path / "other")
    replace(other, home / "code2")
    assert bad(proof, other) == {"model", "remaining"}
    flip_bit(proof, proof.stat().st_size // 2)
    assert bad(proof, model) == {"certificate"}


def test_every_window_is_found_at_any_offset_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    own = {"w": rng.normal(size=(8, 16)).astype(np.float32), "zeros": np.zeros(64, np.float32)}
    initial = {"w": own["w"].copy(), "zeros": own["zeros"]}
    own["w"][2:] += 1  # the first two rows are not trained: they equal the public expert's
    raw = own["w"].tobytes()
    file = tmp_path / "file"

    def found(content):
        file.write_bytes(content)
        return scan(own, initial, [file], tmp_path)

    filler = rng.bytes(1000)
    for offset in range(128, len(raw) - 64, 5):  # every alignment
        for before in (0, 1, 7, 500):
            assert found(filler[:before] + raw[offset : offset + 64] + filler) == ["file holds bytes of w"]
    for innocent in (filler, raw[:128], bytes(5000), raw[128:159], b"", b"x"):
        assert found(innocent) == []
    big = rng.bytes(certificates.CHUNK_BYTES - 40)
    assert found(big + raw[200:264]) == ["file holds bytes of w"]  # across two chunks


@pytest.mark.parametrize(
    ("stolen", "failing"), [(slice(8, 24), {"scan"}), (slice(0, None), {"scan", "tensors"})], ids=["64 bytes", "tensor"]
)
def test_bytes_of_the_expert_that_remain_are_named_and_fail_the_certificate(home, tmp_path, stolen, failing):
    release = open_model(home / "public")
    thief = shutil.copytree(home / "code", tmp_path / "code")
    params = random_part("code", 1)
    bytes_of_news = random_part("news", 1)["w_down"].reshape(-1)[stolen]
    at = 3 if len(bytes_of_news) == 16 else 0
    params["w_down"].reshape(-1)[at : at + len(bytes_of_news)] = bytes_of_news
    from flexmoe_jax.artifacts.package import write_package
    from tests.tiny import CONFIG, base_of

    shutil.rmtree(thief)
    write_package(thief, owner="code", params=params, config=CONFIG, base=base_of(release), record={})
    model = merge(home / "public", [thief, home / "news"], tmp_path / "model").path
    opt_out(model, "news", certificate=tmp_path / "proof.json")
    assert read_certificate(tmp_path / "proof.json")["scan"]["found"] == [
        "code/arrays/w_down/0.0.0 holds bytes of w_down"
    ]
    assert bad(tmp_path / "proof.json", model) == failing


def test_a_crash_anywhere_leaves_no_certificate_or_a_true_one(home, tmp_path):
    never = contents(home / "never")
    for number in range(1000):
        model, proof = shutil.copytree(home / "model", tmp_path / f"m{number}"), tmp_path / f"{number}.json"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number)
            try:
                opt_out(model, "news", certificate=proof)
            except Crash:
                pass
            else:
                break
        if proof.exists():
            assert bad(proof, model) == set()
        else:
            opt_out(model, "news", certificate=proof)
        assert bad(proof, model) == set()
        assert contents(model) == never
        assert all(f.ok for f in verify_model(model))
    assert number >= 6


def test_a_certificate_over_an_existing_file_or_inside_the_model_is_refused(home, model, tmp_path):
    (tmp_path / "there.json").write_text("")
    before = contents(model, leave_out=())
    for place, message in ((tmp_path / "there.json", "already exists"), (model / "proof.json", f"is inside {model}")):
        with pytest.raises(ArtifactError, match=message):
            opt_out(model, "news", certificate=place)
    assert contents(model, leave_out=()) == before
    opt_out(model, "news")
    with pytest.raises(FlexMoEError, match="no expert 'news'"):
        opt_out(model, "news", certificate=tmp_path / "proof.json")


def interrupted(model, proof, monkeypatch):
    """An opt-out of news that ends after model.json is written."""
    with monkeypatch.context() as patch:
        patch.setattr("flexmoe_jax.compose.optout._erase", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            opt_out(model, "news", certificate=proof)


def test_a_finished_opt_out_does_not_overwrite_a_file_made_meanwhile(model, tmp_path, monkeypatch):
    proof = tmp_path / "proof.json"
    interrupted(model, proof, monkeypatch)
    proof.write_text("mine")
    with pytest.raises(ArtifactError, match="already exists") as refusal:
        opt_out(model, "news", certificate=proof)
    assert proof.read_text() == "mine"
    assert "move the file away" in refusal.value.remedy
    proof.rename(tmp_path / "mine")
    opt_out(model, "news", certificate=proof)
    assert bad(proof, model) == set()
    assert all(check.ok for check in verify_model(model))


def test_the_pending_certificate_of_another_model_is_not_published(home, model, tmp_path, monkeypatch):
    proof = tmp_path / "proof.json"
    other = merge(home / "public", [home / "code2", home / "news"], tmp_path / "other").path
    interrupted(other, proof, monkeypatch)  # leaves .proof.json.pending, about `news` and `other`
    with monkeypatch.context() as patch:
        patch.setattr("flexmoe_jax.compose.optout._erase", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            opt_out(model, "news")
    with pytest.raises(ArtifactError, match="without a certificate"):
        opt_out(model, "news", certificate=proof)
    assert not proof.exists()


@pytest.mark.parametrize("again", [False, True])
def test_no_certificate_is_published_while_anything_else_is_in_the_model(home, model, tmp_path, monkeypatch, again):
    """It would hold no matter what that holds."""
    proof = tmp_path / "proof.json"
    if again:
        interrupted(model, proof, monkeypatch)
    left = staging_place(model, "code", "0" * 64)
    left.mkdir()
    (left / "x").write_bytes(b"x" + (home / "news/arrays/w_up/0.0.0").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("flexmoe_jax.compose.optout.remove_leftovers", lambda path: None)
        with pytest.raises(ArtifactError, match=rf"{left} was left by an interrupted command"):
            opt_out(model, "news", certificate=proof)
    assert not proof.exists()
    opt_out(model, "news", certificate=proof)
    assert bad(proof, model) == set()
    assert contents(model) == contents(home / "never")


@pytest.mark.parametrize("where", ["code", "public", "news"])
def test_a_certificate_is_refused_while_a_package_holds_a_file_that_nobody_checks(model, tmp_path, where):
    (model / where / "x").write_bytes(b"x" + (model / "news/arrays/w_up/0.0.0").read_bytes())
    before = contents(model, leave_out=())
    with pytest.raises(ArtifactError, match="the manifest does not name this file"):
        opt_out(model, "news", certificate=tmp_path / "proof.json")
    assert contents(model, leave_out=()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_commands_write_and_check_certificates_and_show_the_journal(model, tmp_path, capsys):
    proof = str(tmp_path / "proof.json")
    assert main(["optout", str(model), "--expert", "news", "--certificate", proof]) == 0
    assert main(["verify", str(model), "--certificate", proof]) == 0
    assert "news (" in capsys.readouterr().out
    assert main(["inspect", str(model), "--journal", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [entry["event"] for entry in entries] == ["created", "merged", "opted_out"]
    assert main(["inspect", str(model), "--journal"]) == 0
    assert entries[-1]["sha256"] in capsys.readouterr().out
    fields = {**read_certificate(tmp_path / "proof.json"), "model": "0" * 64}
    del fields["digest"]
    (tmp_path / "proof.json").write_bytes(json_bytes(seal(fields)))
    assert main(["verify", str(model), "--certificate", proof]) == 1
    assert "certificate: model" in capsys.readouterr().err
    lines = (model / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (model / "journal.jsonl").write_bytes(lines[0] + lines[2])
    assert main(["inspect", str(model), "--journal"]) == 1
    assert "does not follow the line before it" in capsys.readouterr().err
