"""All files of a tokenizer come in and go out, are bound by digest and signature, and none can name code."""

import dataclasses
import json
import shutil

import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_changes import sign_release
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model, write_model_json
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.artifacts.signature import Trust, generate_key
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.export import ExportOptions, export
from flexmoe_jax.hf.gguf_file import open_gguf
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.model.generate import generate
from flexmoe_jax.tokenizer_files import LIMITS, limit_of, read_files
from tests.hf.test_gguf import write_gguf
from tests.hf.tiny import LLAMA, checkpoint, our_model
from tests.model.hf_oracle import make_model
from tests.tiny import base_of, random_params
from tests.tokenizers import CHATML, byte_level, sentencepiece

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on"},
]
BESIDE = {
    "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
    "generation_config.json": '{"eos_token_id": [299, 42], "do_sample": true, "temperature": 0.6}',
    "added_tokens.json": '{"<|im_end|>": 299}',
    "LICENSE": "community licence",
    "NOTICE.txt": "notice",
}
CODE = {
    "auto_map": {"AutoTokenizer": ["evil--tokenization.Evil", None]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A chat model's folder, with files that must not travel."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    checkpoint(folder, "llama")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][1]["content"] = "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | CODE))
    (folder / "chat_template.jinja").write_text(CHATML)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    for name in ("tokenization_evil.py", "LICENSE.py", "tokenizer.model", "pytorch_model.bin", "chat_template.py"):
        (folder / name).write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    return import_model(open_folder(source), tmp_path_factory.mktemp("imported") / "model")


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
    return export(imported, tmp_path_factory.mktemp("exported") / "hf", ExportOptions(dense=True)).path


def test_all_known_files_travel_and_nothing_else_does(imported, exported):
    known = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *BESIDE}
    assert set(imported.tokenizer) == known
    made = {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in exported.iterdir()} == known | made
    for name in ("LICENSE", "NOTICE.txt"):
        assert (exported / name).read_text() == BESIDE[name]
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert json.loads((exported / name).read_text()) == json.loads(BESIDE[name])
    assert (exported / "chat_template.jinja").read_text() == CHATML


def test_a_key_that_names_code_stays_behind_and_is_said(source, exported, caplog):
    assert "auto_map" not in json.loads((exported / "tokenizer_config.json").read_text())
    with caplog.at_level("INFO", "flexmoe_jax"):
        notes = open_folder(source).notes
    assert "left out auto_map" in caplog.text
    assert any("passed over" in note and "tokenizer.model" in note for note in notes)  # what does not travel is named


def test_a_key_that_names_code_is_left_out_of_an_older_model_too(source, tmp_path):
    files = read_files(source) | {"tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"} | CODE).encode()}
    model = our_model(tmp_path, (), files=files)
    export(model, tmp_path / "hf", ExportOptions())
    assert "auto_map" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()


def test_apply_chat_template_on_the_export_equals_that_on_the_source(source, exported):
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(str(folder)) for folder in (source, exported))
    for how in ({"tokenize": False}, {"tokenize": True, "return_dict": False}):
        expected = theirs.apply_chat_template(TURNS, add_generation_prompt=True, **how)
        assert ours.apply_chat_template(TURNS, add_generation_prompt=True, **how) == expected
        assert len(expected) > 20
    generation = transformers.GenerationConfig.from_pretrained(str(exported))
    assert generation.eos_token_id == [299, 42]
    assert "_from_model_config" not in (exported / "generation_config.json").read_text()


def test_exporting_and_importing_again_gives_the_same_digest(imported, exported, tmp_path):
    assert import_model(open_folder(exported), tmp_path / "again").digest == imported.digest


def test_one_end_of_document_through_both_doors_and_generation_stops_at_every_end(source, imported, tmp_path):
    pytest.importorskip("gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(source))
    content = json.loads((source / "tokenizer.json").read_text())
    tokens = [*content["model"]["vocab"], *(entry["content"] for entry in content["added_tokens"])]
    write_gguf(tmp_path / "x.gguf", model, tokens=tokens, eos=299, tokenizer__chat_template=CHATML)
    other = import_model(open_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    folder, gguf = (load_tokenizer(m.tokenizer_files) for m in (imported, other))
    assert folder.eos_id == gguf.eos_id == 298  # <|endoftext|>; <|im_end|> ends a turn
    assert folder.stop_ids == {298, 299, 42}
    assert gguf.stop_ids == {298, 299}
    assert (other.path / "chat_template.jinja").read_text() == CHATML


def test_generated_text_ends_before_an_end_of_generation_config(imported):
    model = fm.load(imported.path)
    run = dataclasses.replace(model.decoder(), dispatch="sparse")
    (ids,) = generate(run, model._stacked, [model.tokenizer.encode("the")], max_new_tokens=8, stop_ids=())
    files = model.tokenizer.files | {"generation_config.json": json.dumps({"eos_token_id": [ids[3]]}).encode()}
    stopping = dataclasses.replace(model, tokenizer=load_tokenizer(files))
    expected = model.tokenizer.decode(ids[: ids.index(ids[3])])
    assert stopping.generate("the", max_new_tokens=8) == expected
    assert len(model.generate("the", max_new_tokens=8)) > len(expected)


@pytest.mark.parametrize("ids", ["2", [1.5], [True], [-1], {"a": 1}])
def test_ends_of_generation_config_that_are_no_ids_are_refused(imported, ids):
    files = imported.tokenizer_files | {"generation_config.json": json.dumps({"eos_token_id": ids}).encode()}
    with pytest.raises(DataError, match="eos_token_id"):
        _ = load_tokenizer(files).stop_ids


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "LICENSE"])
def test_an_altered_file_is_detected_even_when_model_json_is_sealed_anew(imported, tmp_path, name):
    key = generate_key(tmp_path / "key", "public")
    model = shutil.copytree(imported.path, tmp_path / "model")
    sign_release(model, tmp_path / "key", 1)
    trust = Trust({("public", key.read_text().split()[1]): 1}, required=True)
    assert all(check.ok for check in verify_model(model, trust=trust))
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=name):
        open_model(model)
    write_model_json(model, ("public",), None)  # what a stranger can do without the key
    with pytest.raises(ArtifactError, match=f"trunk's record.*{name}|{name}.*trunk's record"):
        open_model(model)
    (model / name).unlink()
    write_model_json(model, ("public",), None)
    with pytest.raises(ArtifactError, match="trunk's record"):
        open_model(model)


def test_a_file_that_is_dropped_into_a_model_is_not_used(tmp_path):
    model = our_model(tmp_path, ("news",))
    (model.path / "chat_template.jinja").write_text(CHATML)
    assert "chat_template.jinja" not in fm.load(model.path).tokenizer.files
    assert any(not check.ok and check.subject == "chat_template.jinja" for check in verify_model(model.path))


def test_the_files_stay_through_merge_and_opt_out(imported, tmp_path):
    part = random_params(imported.config, ("public", "news"))["experts"]["news"]
    bound = {"config": imported.config, "base": base_of(imported)}
    write_package(tmp_path / "news", owner="news", params=part, **bound, record={})
    model = merge(imported.path, [tmp_path / "news"], tmp_path / "model")
    assert model.tokenizer == imported.tokenizer
    opt_out(tmp_path / "model", "news", tmp_path / "without")
    assert open_model(tmp_path / "without").tokenizer == imported.tokenizer


def test_a_model_without_such_files_has_no_trace_of_them(tmp_path):
    model = our_model(tmp_path, ())
    assert list(model.tokenizer) == ["tokenizer.json"]
    assert "tokenizer_files" not in model.manifests["trunk"].record.fields


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "chat_template.jinja",
            b"a" * (1 << 20) + b"a",
            "has 1048577 bytes",
        ),
        ("chat_template.jinja", b"\xff", "UTF-8"),
        ("tokenizer_config.json", b"[1]", "not a JSON object"),
        ("special_tokens_map.json", b"{", "not a JSON object"),
        ("added_tokens.json", b"[" * 10_000, "not a JSON object"),
        ("added_tokens.json", b"[" * 100_000, "holds some 100000 values"),
        ("generation_config.json", b'{"a": 1e999}', "not a JSON object"),
    ],
)
def test_files_that_are_too_long_or_no_text_are_refused(source, tmp_path, name, content, message):
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / name).write_bytes(content)
    with pytest.raises(FlexMoEError, match=message):
        open_folder(folder)


def test_only_harmless_names_travel():
    assert all(map(limit_of, (*LIMITS, "LICENSE.md", "LICENSE-CODE.txt", "NOTICE")))
    for name in ("LICENSE.py", "model.json", "trunk", "../LICENSE", "LICENSE/x", "tokenizer.py", "LICENSE.exe", ""):
        assert limit_of(name) is None


def test_a_text_begins_with_the_same_token_here_and_in_transformers(tmp_path):
    folder = tmp_path / "hf"
    sentencepiece(folder)
    make_model("llama", dataclasses.replace(LLAMA, vocab_size=320)).save_pretrained(folder)
    model = import_model(open_folder(folder), tmp_path / "model")
    mine = load_tokenizer(model.tokenizer_files)
    export(model, tmp_path / "out", ExportOptions(dense=True))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert theirs("the cat")["input_ids"] == mine.encode_prompt("the cat")
    assert mine.encode_prompt("the cat")[0] == mine.bos_id == 1


def test_a_given_tokenizer_brings_its_files(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    model = import_model(open_folder(folder), tmp_path / "model", tokenizer=str(byte_level(tmp_path / "t")))
    assert "chat_template.jinja" in model.tokenizer
