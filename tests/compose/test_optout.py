"""An opt-out gives the model of a merge without the expert, byte for byte, and leaves no bytes of the expert."""

import itertools
import os
import shutil

import pytest

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_model, load_params, open_model, staging_place
from flexmoe_jax.artifacts.package import copy_package, load_package, read_manifest
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out, replace
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.tree import flatten
from tests.tiny import Crash, contents, crash_at, make_expert, make_release, random_part, same_tree

NAMES = ("code", "math", "zebrafish")
WINDOW = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "public")
    for name in NAMES:
        make_expert(root / name, name, release)
    make_expert(root / "code2", "code", release, seed=2)
    merged(root, NAMES, root / "model")
    return root


@pytest.fixture
def model(home, tmp_path):
    return shutil.copytree(home / "model", tmp_path / "model")


def merged(home, names, out, top_k=None):
    return merge(home / "public", [home / name for name in names], out, top_k=top_k).path


def problems(path):
    return {f.subject for f in verify_model(path) if not f.ok}


SUBSETS = [c for n in range(1, 4) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize(
    ("removed", "top_k"), [*((s, None) for s in SUBSETS), (NAMES[1:], 1), (NAMES[:1], 3), (NAMES[:2], 3), (NAMES, 4)]
)
def test_an_opt_out_is_byte_identical_to_a_merge_without_the_expert(home, tmp_path, removed, top_k):
    left = [name for name in NAMES if name not in removed]
    clamped = None if top_k is None else min(top_k, len(left) + 1)
    never = contents(merged(home, left, tmp_path / "never", clamped))
    model = merged(home, NAMES, tmp_path / "model", top_k)
    for name in reversed(removed[1:]):
        opt_out(model, name)
    before = contents(model, leave_out=())
    copy = opt_out(model, removed[0], tmp_path / "copy")
    assert contents(model, leave_out=()) == before
    opt_out(model, removed[0])
    assert contents(copy.path) == never
    assert contents(model) == never
    assert problems(model) == set()
    assert open_model(model).top_k == (clamped or len(left) + 1)


def windows(raw):
    return {raw[i : i + WINDOW] for i in range(max(len(raw) - WINDOW, 0) + 1)}


def test_no_byte_window_and_no_name_of_the_expert_remains(home, model):
    gone = flatten(random_part("zebrafish", 1))
    removed = {path: windows(leaf.tobytes()) for path, leaf in gone.items()}

    def hits(folder):
        """The expert's tensors of which a window is in any file, and "name" if the expert's name is."""
        found = set()
        for name, raw in contents(folder).items():
            present = windows(raw)
            found |= {path for path, w in removed.items() if present & w or (len(min(w)) < WINDOW and min(w) in raw)}
            found |= {"name"} if "zebrafish" in name or b"zebrafish" in raw else set()
        return found

    assert hits(model) == {*gone, "name"}
    opt_out(model, "zebrafish")
    assert hits(model) == set()
    assert not [p for p in model.rglob("*") if "zebrafish" in p.name]
    assert b"zebrafish" in (model / "journal.jsonl").read_bytes()


def test_a_reader_gets_the_model_before_or_after_a_change_that_happens_meanwhile(home, model, monkeypatch):
    """The change happens after the reader opens the model and before it reads the first, the second, ... package."""
    for change, at in itertools.product((lambda m: opt_out(m, "math"), lambda m: replace(m, home / "code2")), range(5)):
        path = shutil.copytree(home / "model", model.parent / f"m{at}{len(os.listdir(model.parent))}")
        calls = iter(range(100))

        def load(package, calls=calls, at=at, path=path, change=change, **kwargs):
            if next(calls) == at:
                change(path)
            return load_package(package, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("flexmoe_jax.artifacts.model_dir.load_package", load)
            opened, params = load_model(path)
        whole = open_model(path)
        assert opened.digest in (open_model(home / "model").digest, whole.digest)
        assert tuple(params["experts"]) == opened.experts
        code = random_part("code", 1 + (opened.manifests["code"] == read_manifest(home / "code2")))
        assert same_tree(params["experts"]["code"], code)
        if opened.digest == whole.digest and "math" not in whole.experts:
            assert "math" not in params["experts"]


def test_an_opt_out_does_not_touch_the_files_of_other_packages(model):
    inodes = {p: p.stat().st_ino for name in ("trunk", "public", "code") for p in (model / name).rglob("*")}
    opt_out(model, "math")
    assert inodes == {p: p.stat().st_ino for p in inodes}


def test_the_journal_records_the_opt_out(model):
    opt_out(model, "math")
    entry = read_journal(model)[-1]
    assert (entry.event, entry.experts, entry.model) == (
        "opted_out",
        ("public", "code", "zebrafish"),
        open_model(model).digest,
    )
    assert entry.details["expert"] == "math"


def test_opting_out_of_public_trunk_and_unknown_experts_is_refused(home, model, tmp_path):
    for name in ("public", "trunk"):
        with pytest.raises(ArtifactError, match=f"'{name}' cannot opt out"):
            opt_out(model, name)
    with pytest.raises(ArtifactError, match="cannot be used: No such file"):
        opt_out(tmp_path / "nowhere", "math")
    with pytest.raises(FlexMoEError, match=r"no expert '\.\./model'"):
        opt_out(model, "../model")
    with pytest.raises(FlexMoEError, match="did you mean 'zebrafish'"):
        opt_out(model, "zebrafsh")
    with pytest.raises(FlexMoEError, match="no expert 'news'"):
        opt_out(model, "news", tmp_path / "out")
    opt_out(model, "math")
    with pytest.raises(FlexMoEError, match="no expert 'math'"):
        opt_out(model, "math")
    with pytest.raises(ArtifactError, match="already exists"):
        opt_out(model, "code", home / "model")


def crashes(tmp_path, home, call, finish):
    """Runs `call` on copies of the model, crashing at its first, second, ... change; `finish` must complete each."""
    states = []
    for number in itertools.count():
        model = shutil.copytree(home / "model", tmp_path / f"model{number}")
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number)
            try:
                call(model)
            except Crash:
                pass
            else:
                return states, model
        opened = open_model(model)  # the old model or the new one
        load_params(opened)
        states.append((opened, problems(model)))
        finish(model, opened)


def test_an_opt_out_that_crashes_anywhere_is_completed_by_running_it_again(home, tmp_path):
    never = contents(merged(home, ("code", "zebrafish"), tmp_path / "never"))

    def finish(model, _):
        if problems(model) or "math" in open_model(model).experts:
            opt_out(model, "math")
        assert contents(model) == never
        assert problems(model) == set()

    states, model = crashes(tmp_path, home, lambda model: opt_out(model, "math"), finish)
    assert contents(model) == never
    assert len(states) >= 4
    assert any("math" in opened.experts for opened, _ in states)
    assert any("math" in left for _, left in states)
    assert all("journal.jsonl" in left for opened, left in states if "math" not in opened.experts)


def test_a_half_deleted_package_is_named_by_verify_and_deleted_by_running_again(home, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flexmoe_jax.compose.optout._erase", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            opt_out(model, "math")
    shutil.rmtree(model / "math/arrays/w_up")
    assert problems(model) == {"math", "journal.jsonl"}
    opt_out(model, "math")
    assert problems(model) == set()
    assert not (model / "math").exists()


def test_an_interrupted_opt_out_is_completed_by_any_next_change(home, tmp_path):
    for change, left in (
        (lambda model: opt_out(model, "code"), ("zebrafish",)),
        (lambda model: replace(model, home / "code2"), ("code2", "zebrafish")),
    ):
        model = shutil.copytree(home / "model", tmp_path / "-".join(left))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flexmoe_jax.compose.optout._erase", lambda *_: (_ for _ in ()).throw(Crash))
            with pytest.raises(Crash):
                opt_out(model, "math")
        change(model)
        assert contents(model) == contents(merged(home, left, tmp_path / f"expected-{left[0]}"))
        assert [e.details.get("finished") for e in read_journal(model)[2:]] == [["math"], None]
        assert problems(model) == set()


def test_a_replacement_is_byte_identical_to_a_merge_of_the_new_package(home, model, tmp_path):
    expected = contents(merged(home, ("code2", "math", "zebrafish"), tmp_path / "expected"))
    before = contents(home / "code2")
    replaced = replace(model, home / "code2")
    assert contents(model) == expected
    assert contents(home / "code2") == before
    assert same_tree(load_params(replaced)["experts"]["code"], random_part("code", 2))
    assert problems(model) == set()
    assert [e.event for e in read_journal(model)] == ["created", "merged", "replaced"]
    journal = (model / "journal.jsonl").read_bytes()
    replace(model, home / "code2")
    assert (model / "journal.jsonl").read_bytes() == journal
    assert contents(replace(model, home / "code").path) == contents(home / "model")


def test_a_replacement_that_a_merge_would_refuse_is_refused(home, model, tmp_path):
    other = make_release(tmp_path / "other", seed=5)
    make_expert(tmp_path / "code", "code", other)
    make_expert(tmp_path / "news", "news", open_model(home / "public"))
    with pytest.raises(ArtifactError, match=r"'code' .* was trained with the trunk"):
        replace(model, tmp_path / "code")
    with pytest.raises(FlexMoEError, match="no expert 'news'"):
        replace(model, tmp_path / "news")
    for part in ("public", "trunk"):
        with pytest.raises(FlexMoEError, match="reserved"):
            replace(model, home / "public" / part)
    assert contents(model, leave_out=()) == contents(home / "model", leave_out=())


def test_a_replacement_that_crashes_anywhere_leaves_the_old_or_new_model_and_is_completed_by_running_again(
    home, tmp_path
):
    expected = contents(merged(home, ("code2", "math", "zebrafish"), tmp_path / "expected"))

    def finish(model, _):
        replace(model, home / "code2")
        assert contents(model) == expected
        assert problems(model) == set()

    states, model = crashes(tmp_path, home, lambda model: replace(model, home / "code2"), finish)
    assert contents(model) == expected
    versions = [opened.manifests["code"].digest for opened, _ in states]
    old, new = (read_manifest(home / name).digest for name in ("code", "code2"))
    assert versions == [old] * versions.count(old) + [new] * versions.count(new)
    assert 0 < versions.count(old) < len(versions)
    assert any(name.startswith(".code-") for _, left in states for name in left)


def test_digests_whose_first_digits_agree_do_not_meet(home, tmp_path, monkeypatch):
    """An owner finds two manifests that agree in 48 bits within minutes: by the birthday paradox."""
    digest = sealed.digest
    monkeypatch.setattr(sealed, "digest", lambda value: "0" * 12 + digest(value)[12:])
    release = make_release(tmp_path / "public")
    packages = [make_expert(tmp_path / name, name, release) for name in ("code", "math")]
    newer = make_expert(tmp_path / "code2", "code", release, seed=2)
    model = merge(release.path, packages, tmp_path / "model").path
    assert read_manifest(newer).digest[:12] == read_manifest(packages[0]).digest[:12]
    replace(model, newer)
    assert contents(model) == contents(merge(release.path, [newer, packages[1]], tmp_path / "expected").path)
    opt_out(model, "code")
    assert problems(model) == set()


@pytest.mark.parametrize("change", ["replace", "opt_out", "opt_out of another"])
@pytest.mark.parametrize("state", ["before", "after"])
def test_a_change_that_an_earlier_version_left_under_short_names_is_completed(home, model, tmp_path, state, change):
    """It staged packages under the first 12 digits; `before` and `after` model.json was written."""
    old, new = (read_manifest(home / name) for name in ("code", "code2"))
    if state == "after":
        shutil.rmtree(model)
        shutil.copytree(merged(home, ("code2", "math", "zebrafish"), tmp_path / "replaced"), model)
    shutil.rmtree(model / "code")
    for name, manifest in (("code", old), ("code2", new)):
        copy_package(home / name, model / f".code-{manifest.digest[:12]}", manifest)
    used, unused = (old, new) if state == "before" else (new, old)
    assert open_model(model).manifests["code"].digest == used.digest
    assert problems(model) == {f".code-{unused.digest[:12]}"}
    left = {"replace": ("code2", "math", "zebrafish"), "opt_out": ("math", "zebrafish")}
    left["opt_out of another"] = ("code" if state == "before" else "code2", "math")
    if change == "replace":
        replace(model, home / "code2")
    else:
        opt_out(model, "code" if change == "opt_out" else "zebrafish")
    assert contents(model) == contents(merged(home, left[change], tmp_path / "expected"))
    assert problems(model) == set()


def test_an_opt_out_deletes_what_interrupted_changes_of_other_experts_left(home, model, tmp_path):
    """A leftover may hold any bytes, also those of the expert that leaves."""
    left = staging_place(model, "code", "0" * 64)
    left.mkdir()
    (left / "x").write_bytes(b"x" + (model / "math/arrays/w_up/0.0.0").read_bytes())
    opt_out(model, "math", certificate=tmp_path / "proof.json")
    assert contents(model) == contents(merged(home, ("code", "zebrafish"), tmp_path / "never"))


def test_an_output_inside_a_source_is_refused_and_nothing_changes(home, model):
    before = contents(model, leave_out=())
    (model.parent / "link").symlink_to(model)
    for out in (model / "inner", model / "math" / "a" / "b", model.parent / "link" / "inner"):
        with pytest.raises(ArtifactError, match=r"is inside .*model"):
            opt_out(model, "math", out, certificate=model.parent / "proof.json")
    assert contents(model, leave_out=()) == before
    assert {path.name for path in model.parent.iterdir()} == {"link", "model"}
    before = contents(home / "public", leave_out=())
    for out in (home / "public" / "inner", home / "public" / "trunk"):
        with pytest.raises(ArtifactError, match=r"is inside .*public"):
            merge(home / "public", [home / "code"], out)
    with pytest.raises(ArtifactError, match=r"is inside .*code"):
        merge(home / "public", [home / "code"], home / "code" / "inner")
    assert contents(home / "public", leave_out=()) == before


def test_a_package_whose_signature_is_not_valid_is_not_copied(home, tmp_path):
    package = shutil.copytree(home / "code", tmp_path / "code")
    (package / "signature.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"signature\.json has the format None"):
        copy_package(package, tmp_path / "copy", read_manifest(package))
