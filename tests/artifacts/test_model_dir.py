"""A model directory opens only if all its parts belong together; errors name the part that does not."""

import hashlib
import json
import shutil

import pytest

from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import create_model, load_params, open_model
from flexmoe_jax.artifacts.sealed import json_bytes, seal
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.json_files import canonical_json
from tests.tiny import (
    CONFIG,
    NO_RECORDS,
    TOKENIZER,
    contents,
    flip_bit,
    make_expert,
    make_release,
    random_part,
    release_params,
    same_tree,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    release = make_release(root / "public")
    return merge(root / "public", [make_expert(root / n, n, release) for n in ("news", "code")], root / "model").path


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def problems(path):
    return {f.subject: f.detail for f in verify_model(path) if not f.ok}


def reseal(model, change):
    fields = json.loads((model / "model.json").read_text())
    del fields["digest"]
    change(fields)
    (model / "model.json").write_bytes(json_bytes(seal(fields)))


def test_the_public_release_is_a_model_of_one_expert(tmp_path):
    release = make_release(tmp_path / "public")
    assert (release.experts, release.top_k, release.wanted_top_k, release.config) == (("public",), 1, None, CONFIG)
    assert release.tokenizer_digest == hashlib.sha256(release.tokenizer_path.read_bytes()).hexdigest()
    params = load_params(release)
    assert same_tree(params["trunk"], random_part("trunk", 0))
    assert same_tree(params["experts"], {"public": random_part("public", 0)})
    assert problems(release.path) == {}
    assert [entry.event for entry in read_journal(release.path)] == ["created"]


def test_the_same_release_made_twice_is_byte_identical(tmp_path):
    a, b = (make_release(tmp_path / name).path for name in ("a", "b"))
    assert contents(a) == contents(b)


def test_the_tokenizer_may_be_bytes_a_file_or_a_folder_and_is_stored_in_canonical_form(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    params = release_params()
    for number, given in enumerate((TOKENIZER, folder / "tokenizer.json", folder)):
        model = create_model(tmp_path / str(number), params, CONFIG, given, NO_RECORDS)
        assert model.tokenizer_path.read_bytes() == canonical_json(json.loads(TOKENIZER))
        assert len(model.tokenizer) == 1 + (number > 0)
    assert json.loads((model.path / "tokenizer_config.json").read_text()) == {"eos_token": "a"}


def test_the_tokenizer_digest_equals_that_of_load_tokenizer(tmp_path):
    from flexmoe_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("cl100k:300")
    tokenizer.save(tmp_path / "tokenizer")
    model = create_model(tmp_path / "public", release_params(), CONFIG, tmp_path / "tokenizer", NO_RECORDS)
    again = load_tokenizer(str(model.tokenizer_path))
    assert model.tokenizer_digest == tokenizer.digest == again.digest
    assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_experts_are_loaded_by_name_in_canonical_order(model):
    opened = open_model(model)
    assert opened.experts == ("public", "code", "news")
    assert list(load_params(opened)["experts"]) == ["public", "code", "news"]
    chosen = load_params(opened, ["news", "public"])["experts"]
    assert same_tree(chosen, {"public": random_part("public", 0), "news": random_part("news", 1)})
    with pytest.raises(FlexMoEError, match="did you mean 'news'"):
        load_params(opened, ["nws"])


def test_a_flipped_bit_or_a_missing_file_anywhere_is_detected(original, model):
    for number, name in enumerate(contents(original, leave_out=())):
        size = (original / name).stat().st_size
        for damage in (lambda f, at=number * 37 % size: flip_bit(f, at, at % 8), lambda f: f.unlink()):
            damage(model / name)
            found = problems(model)
            assert name.rpartition("/")[2] in " ".join((*found, *found.values())), name
            shutil.copy(original / name, model / name)
    assert problems(model) == {}


@pytest.mark.parametrize("name", ["model.json", "tokenizer.json", "trunk/arrays/embed/0.0", "news/card.md"])
def test_altered_models_do_not_load(model, name):
    flip_bit(model / name, (model / name).stat().st_size // 2)
    with pytest.raises(FlexMoEError, match=name.rpartition("/")[2]):
        load_params(open_model(model))


def test_swapped_directories_are_detected(model, tmp_path):
    (model / "news").rename(tmp_path / "t")
    (model / "code").rename(model / "news")
    (tmp_path / "t").rename(model / "code")
    with pytest.raises(ArtifactError, match=r"is the package of 'news', not of 'code'"):
        open_model(model)


def test_another_package_of_the_same_owner_is_detected(model, tmp_path, original):
    shutil.rmtree(model / "news")
    make_expert(model / "news", "news", open_model(original.parent / "public"), seed=9)
    with pytest.raises(ArtifactError, match=r"'news' has the manifest digest \w{64}, model.json names \w{64}"):
        open_model(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format="flexmoe-model-3"), "flexmoe-model-3"),
        (lambda f: f.update(extra=1), "'extra' is not known"),
        (lambda f: f.update(top_k=4), "top_k is 4 with 3 experts"),
        (lambda f: f.update(top_k=0), "top_k is 0"),
        (lambda f: f.update(top_k=True), "top_k"),
        (lambda f: f["experts"].reverse(), "canonical order"),
        (lambda f: f["experts"].pop(0), "canonical order"),
        (lambda f: f["experts"].append(f["experts"][1]), "given twice"),
        (lambda f: f["experts"].append({"name": "../x", "manifest": "0" * 64}), "not usable"),
        (lambda f: f["experts"].append({"name": "x", "manifest": "0" * 64}), "x/manifest.json cannot be read"),
        (lambda f: f["experts"].append(1), "not an object"),
        (lambda f: f["tokenizer"].update({"../x": "0" * 64}), "tokenizer files"),
        (lambda f: f["tokenizer"].update({"tokenizer.json": "0" * 64}), "tokenizer.json has sha256"),
        (lambda f: f["config"].update(rope_theta=1.0), "rope_theta"),
    ],
)
def test_a_sealed_model_json_with_invalid_values_is_refused(model, change, message):
    reseal(model, change)
    with pytest.raises(FlexMoEError, match=message):
        open_model(model)
    assert message.replace("\\", "") in problems(model)["model"] or message == "top_k"


def test_entries_that_model_json_does_not_name_are_reported(model):
    (model / "old").mkdir()
    (model / ".news-0123456789ab").mkdir()
    (model / "notes.txt").write_text("")
    assert set(problems(model)) == {"old", ".news-0123456789ab", "notes.txt"}


def test_dropped_moved_or_truncated_lines_of_the_journal_are_detected(model):
    entries = read_journal(model)
    assert [(e.seq, e.event, e.experts) for e in entries] == [
        (0, "created", ("public",)),
        (1, "merged", ("public", "code", "news")),
    ]
    append_entry(model, "tested", entries[-1].manifests, entries[-1].model, note="é")
    lines = (model / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert problems(model) == {}
    for altered in ([*lines[:1], lines[2]], lines[1:], [lines[1], lines[0], lines[2]], [*lines[:2], lines[2][:-1]]):
        (model / "journal.jsonl").write_bytes(b"".join(altered))
        assert set(problems(model)) == {"journal.jsonl"}
    (model / "journal.jsonl").write_bytes(lines[0])
    assert "model.json has" in problems(model)["journal.jsonl"]


def test_a_second_writer_is_refused(model):
    from flexmoe_jax.compose.optout import opt_out
    from flexmoe_jax.files import lock_directory

    with lock_directory(model), pytest.raises(ArtifactError, match="in use by another process"):
        opt_out(model, "news")
    assert open_model(opt_out(model, "news").path).experts == ("public", "code")


def test_quick_verification_reads_only_headers_and_sizes(model):
    file = model / "news/arrays/w_up/0.0.0"
    flip_bit(file, 100)
    assert all(f.ok for f in verify_model(model, quick=True))
    assert problems(model).keys() == {"news/arrays/w_up/0.0.0"}
    file.write_bytes(file.read_bytes()[:-4])
    flip_bit(model / "code/arrays/w_up/.zarray", 20)
    bad = {f.subject for f in verify_model(model, quick=True) if not f.ok}
    assert bad == {"news/arrays/w_up/0.0.0", "code/arrays/w_up/.zarray"}
