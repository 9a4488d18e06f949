"""What is verified follows from the directory itself, and something always is; failures have remedies that work."""

import shutil

import pytest

from flexmoe_jax.artifacts.checkpoints import RunCheckpoints
from flexmoe_jax.artifacts.package import sign_package
from flexmoe_jax.artifacts.signature import generate_key, read_trusted
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.verify import verify
from flexmoe_jax.errors import ArtifactError
from tests.artifacts.model_attacks import like_a_run
from tests.artifacts.test_checkpoints import save, start
from tests.tiny import flip_bit, make_expert, make_release


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A signed package, a model, and a run that made the package."""
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "release")
    make_expert(root / "news", "news", release)
    generate_key(root / "key", "news")
    sign_package(root / "news", root / "key", 1)
    merge(root / "release", [root / "news"], root / "model")
    with RunCheckpoints(root / "run") as checkpoints:
        save(checkpoints, 1, start())
    shutil.copytree(root / "news", root / "run" / "package")
    return root


def bad(path, **how):
    return {check.subject for check in verify(path, **how) if not check.ok}


@pytest.mark.parametrize("what", ["news", "model"])
def test_folders_of_a_run_do_not_switch_the_checks_off(home, tmp_path, what):
    path = shutil.copytree(home / what, tmp_path / what)
    flip_bit(path / ("" if what == "news" else "news") / "arrays/w_up/0.0.0", 10)
    like_a_run(path)
    trust = read_trusted(home / "key.pub", True)
    for how in ({}, {"trust": trust}):
        assert any(subject.endswith("arrays/w_up/0.0.0") or "checkpoints" in subject for subject in bad(path, **how))
    (path / "manifest.json" if what == "news" else path / "model.json").unlink()
    with pytest.raises(ArtifactError, match="is a run directory, which has no signature"):
        verify(path, trust=trust)
    assert bad(path) == {"checkpoints"}
    assert main(["verify", str(path), "--trusted", str(home / "key.pub"), "--require-signature"]) == 1
    assert main(["verify", str(path)]) == 1


def test_a_directory_that_is_none_of_these_is_refused(home, tmp_path):
    for path in (tmp_path, home, home / "news" / "arrays"):
        with pytest.raises(ArtifactError, match=r"has no model\.json, manifest\.json, checkpoints or index\.json"):
            verify(path)


def test_the_product_of_a_run_is_verified_with_it(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    subjects = {check.subject for check in verify(run)}
    assert bad(run) == set()
    assert {"package/manifest.json", "package/w_up", "checkpoints/1/_CHECKPOINT_METADATA"} <= subjects
    flip_bit(run / "package/arrays/w_up/0.0.0", 3)
    assert bad(run) == {"package/arrays/w_up/0.0.0"}
    shutil.rmtree(run / "package")
    shutil.copytree(home / "model", run / "model")
    flip_bit(run / "model/news/arrays/w_up/0.0.0", 3)
    assert bad(run) == {"model/news/arrays/w_up/0.0.0"}


def test_trust_is_checked_where_the_refusal_says(home):
    trust = read_trusted(home / "key.pub", True)
    with pytest.raises(ArtifactError) as refusal:
        verify(home / "run", trust=trust)
    assert str(home / "run" / "package") in refusal.value.remedy
    assert bad(home / "run" / "package", trust=trust) == set()


def test_the_command_gives_the_remedy_of_each_failure(home, tmp_path, capsys):
    model = shutil.copytree(home / "model", tmp_path / "model")
    (model / "notes.txt").write_text("mine")
    (model / ".journal.jsonl.partial-00000000").write_text("")
    assert main(["verify", str(model)]) == 1
    said = capsys.readouterr().err
    assert "remedy: run that command again; move it away" in said
    assert "restore" not in said
    for name in ("notes.txt", ".journal.jsonl.partial-00000000"):
        (model / name).rename(tmp_path / name)
    assert main(["verify", str(model)]) == 0
    flip_bit(model / "news/arrays/w_up/0.0.0", 3)
    assert main(["verify", str(model)]) == 1
    assert "remedy: restore it from its source" in capsys.readouterr().err
