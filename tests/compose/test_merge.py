"""A merge depends only on the set of packages, changes none of them, and refuses packages that do not fit."""

import itertools
import shutil

import pytest

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package, write_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from tests.tiny import (
    CONFIG,
    Crash,
    base_of,
    contents,
    crash_at,
    flip_bit,
    make_expert,
    make_release,
    random_part,
    same_tree,
)

NAMES = ("code", "math", "news")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "public")
    for name in NAMES:
        make_expert(root / name, name, release)
    return root


def paths(home, names=NAMES):
    return [home / name for name in names]


def test_every_order_gives_the_same_bytes_and_changes_no_package(home, tmp_path):
    before = contents(home, leave_out=())
    merged = [
        contents(merge(home / "public", paths(home, order), tmp_path / "-".join(order), top_k=2).path)
        for order in itertools.permutations(NAMES)
    ]
    assert all(files == merged[0] for files in merged)
    assert contents(home, leave_out=()) == before
    assert len({p.stat().st_ino for p in home.rglob("*.json")} & {p.stat().st_ino for p in tmp_path.rglob("*")}) == 0


def test_the_merged_model_holds_every_part_bit_for_bit(home, tmp_path):
    model = merge(home / "public", paths(home), tmp_path / "model")
    assert model.experts == ("public", *NAMES)
    params = load_params(model)
    assert same_tree(params["experts"], {"public": random_part("public", 0)} | {n: random_part(n, 1) for n in NAMES})
    assert same_tree(params["trunk"], random_part("trunk", 0))
    for name in NAMES:
        assert contents(model.path / name) == contents(home / name)
    assert all(f.ok for f in verify_model(model.path))


def test_top_k_is_the_given_number_or_all_experts(home, tmp_path):
    assert merge(home / "public", paths(home), tmp_path / "a").top_k == 4
    assert merge(home / "public", paths(home), tmp_path / "b", top_k=3).top_k == 3
    assert merge(home / "public", [], tmp_path / "c").experts == ("public",)
    for wrong in (0, 5, -1):
        with pytest.raises(ArtifactError, match=f"top_k is {wrong}, the model has 4 experts"):
            merge(home / "public", paths(home), tmp_path / "d", top_k=wrong)


def test_links_share_the_files_and_give_the_same_bytes(home, tmp_path):
    copied = merge(home / "public", paths(home), tmp_path / "copied")
    mine = shutil.copytree(home, tmp_path / "mine")
    linked = merge(mine / "public", paths(mine), tmp_path / "linked", link=True)
    assert contents(copied.path) == contents(linked.path)
    file = next(iter(linked.manifests["news"].files))
    assert (linked.path / "news" / file).samefile(mine / "news" / file)
    with pytest.raises(ArtifactError, match=f"holds hard links: .*{file}"):  # others could alter the files
        merge(mine / "public", paths(mine), tmp_path / "again")
    assert contents(merge(mine / "public", paths(mine), tmp_path / "again", link=True).path) == contents(copied.path)


def test_an_expert_of_another_public_model_is_refused_with_both_digests(home, tmp_path):
    other = make_release(tmp_path / "other", seed=5)
    foreign = make_expert(tmp_path / "foreign", "foreign", other)
    ours = open_model(home / "public").manifests["trunk"].content
    with pytest.raises(ArtifactError) as error:
        merge(home / "public", [home / "news", foreign], tmp_path / "model")
    for part in ("'foreign'", "trunk", ours, other.manifests["trunk"].content, "remedy"):
        assert part in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("part", ["trunk", "public", "tokenizer"])
def test_a_package_trained_with_another_trunk_public_expert_or_tokenizer_is_refused(home, tmp_path, part):
    release = open_model(home / "public")
    base = base_of(release) | {part: "cd" * 32}
    write_package(tmp_path / "x", owner="x", params=random_part("x", 1), config=CONFIG, base=base, record={})
    words = {"public": "public expert"}
    with pytest.raises(
        ArtifactError, match=f"'x'.*{words.get(part, part)} {'cd' * 32}, this model's is {base_of(release)[part]}"
    ):
        merge(release.path, [tmp_path / "x"], tmp_path / "model")


def test_another_configuration_of_the_same_shapes_is_refused(home, tmp_path):
    import dataclasses

    config = dataclasses.replace(CONFIG, rope_theta=1e4)
    base = base_of(open_model(home / "public"))
    write_package(tmp_path / "x", owner="x", params=random_part("x", 1), config=config, base=base, record={})
    with pytest.raises(ArtifactError, match=r"rope_theta: 10000.0 != 500000.0"):
        merge(home / "public", [tmp_path / "x"], tmp_path / "model")


def test_repeated_and_reserved_names_are_refused(home, tmp_path):
    shutil.copytree(home / "news", tmp_path / "news2")
    with pytest.raises(ArtifactError, match=r"'news' is given twice: .*news and .*news2"):
        merge(home / "public", [*paths(home), tmp_path / "news2"], tmp_path / "model")
    for part in ("public", "trunk"):
        with pytest.raises(FlexMoEError, match=f"'{part}' is reserved"):
            merge(home / "public", [home / "public" / part], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_merged_model_as_public_release_and_an_existing_out_are_refused(home, tmp_path):
    merged = merge(home / "public", [home / "news"], tmp_path / "model").path
    with pytest.raises(ArtifactError, match="not a public release"):
        merge(merged, [home / "code"], tmp_path / "model2")
    before = contents(merged, leave_out=())
    with pytest.raises(ArtifactError, match="already exists"):
        merge(home / "public", [home / "code"], merged)
    assert contents(merged, leave_out=()) == before


def test_damage_in_any_file_of_an_expert_stops_the_merge(home, tmp_path):
    good = contents(home / "news")
    for name in good:
        damaged = shutil.copytree(home / "news", tmp_path / "news")
        flip_bit(damaged / name, len(good[name]) // 2)
        with pytest.raises(FlexMoEError, match=name):
            merge(home / "public", [damaged], tmp_path / "model")
        shutil.rmtree(damaged)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_merge_leaves_no_model_or_a_complete_one(home, tmp_path):
    expected = contents(merge(home / "public", paths(home), tmp_path / "expected").path)
    for number in itertools.count():
        out = tmp_path / f"out{number}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number)
            try:
                merge(home / "public", paths(home), out)
            except Crash:
                pass
            else:
                break
        if out.exists():
            assert contents(out) == expected
    assert contents(out) == expected
    assert number >= 5
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_merge_that_fails_while_copying_leaves_nothing(home, tmp_path, monkeypatch):
    from flexmoe_jax.artifacts import package

    original, calls = package.copy_file, []

    def copy_file(*args):
        calls.append(args)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(package, "copy_file", copy_file)
    with pytest.raises(ArtifactError, match=r"could not be written: .*No space left"):
        merge(home / "public", paths(home), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert same_tree(load_package(home / "news"), random_part("news", 1))


def test_a_merge_removes_the_remains_of_a_killed_one_but_not_the_files_of_a_running_one(home, tmp_path):
    from flexmoe_jax.files import new_directory

    left = tmp_path / ".model.partial-00000000"
    (left / "news").mkdir(parents=True)
    with new_directory(tmp_path / "model") as living:
        assert not left.exists()
        (living / "file").write_text("x")
        with new_directory(tmp_path / "model2"):
            pass
        shutil.rmtree(tmp_path / "model2")
        with new_directory(tmp_path / "model") as other:
            assert living.exists()
            (other / "file").write_text("y")
        shutil.rmtree(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/file").read_text() == "x"
