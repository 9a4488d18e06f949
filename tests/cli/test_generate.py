"""`flexmoe generate`: continuations keep their first space, and --chat answers the turns of a conversation."""

import io
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_dir import create_model
from flexmoe_jax.cli.main import main
from flexmoe_jax.data.chat import encode_prompt
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import flatten, unflatten
from tests.tiny import NO_RECORDS, random_params
from tests.tokenizers import CHATML, byte_level, sentencepiece

SENTENCE = ("\u2581the", "\u2581cat", "\u2581sat", "\u2581on", "\u2581mat", "</s>")


def parrot(folder, tokenizer, chain):
    """A model that says `chain`, token by token, whatever came before: only embedding and head do anything."""
    config = ModelConfig(
        vocab_size=320, num_layers=1, d_model=64, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8, max_seq_len=192
    )
    leaves = {path: np.array(leaf) for path, leaf in flatten(random_params(config)).items()}
    for path, leaf in leaves.items():
        if "/w_" in path:
            leaf[:] = 0
    embed = np.random.default_rng(1).standard_normal((320, 64)).astype(np.float32)
    leaves["trunk/embed"] = embed / np.linalg.norm(embed, axis=1, keepdims=True)
    leaves["trunk/final_norm"][:] = 1
    leaves["trunk/head"][:] = 0
    for first, second in itertools.pairwise(chain):
        leaves["trunk/head"][:, second] = leaves["trunk/embed"][first]
    params = unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    return create_model(folder, params, config, tokenizer, NO_RECORDS).path


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    vocab = json.loads((sentencepiece(folder / "t") / "tokenizer.json").read_text())["model"]["vocab"]
    return parrot(folder / "model", folder / "t", [vocab[token] for token in SENTENCE])


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Answers "so 👍" and ends its turn."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = load_tokenizer(byte_level(folder / "t"))
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "x"}])
    return parrot(folder / "model", folder / "t", [prompt[-1], *tokenizer.encode("so 👍"), 299])


def test_a_continuation_starts_with_its_space(sentences, capsys):
    assert main(["generate", str(sentences), "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out == "the cat sat on mat\n"
    model = fm.load(sentences)
    assert list(model.stream("the cat")) == [" sat", " on", " mat"]
    assert model.lm().continue_until(["the cat", "the"], ["on"], 8) == [" sat ", " cat sat "]


def test_a_prompt_is_read_after_the_token_that_begins_texts(sentences):
    model = fm.load(sentences)
    ids = [1, *model.tokenizer.encode("the cat")]
    assert model.lm().encode_pair("the cat", " sat") == (ids, model.tokenizer.encode("the cat sat")[len(ids) - 1 :])
    assert model.lm().encode_pair("", "the") == ([1], model.tokenizer.encode("the"))
    assert model.routing("the cat").weights_LTE.shape[1] == len(ids) - 1


def test_generated_tokens_follow_the_token_that_begins_texts(tmp_path):
    config = ModelConfig(
        vocab_size=320, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=8, max_seq_len=64
    )
    folder = create_model(tmp_path / "m", random_params(config), config, sentencepiece(tmp_path / "t"), NO_RECORDS).path
    model = fm.load(folder)
    ids = model.tokenizer.encode("the cat sat")
    row, without = [1, *ids], [*ids]
    for tokens in (row, without):
        for _ in range(8):
            tokens.append(int(np.argmax(model.logits(tokens)[-1])))
    assert model.generate("the cat sat", max_new_tokens=8) == model.tokenizer.continuation(row[-8:], ids)
    assert row[-8:] != without[-8:]


def test_a_conversation_goes_on_line_by_line(talker, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand?\n"))
    assert main(["generate", str(talker), "--chat"]) == 0
    assert capsys.readouterr().out == "so 👍\nso 👍\n"


def test_one_turn_and_the_result_for_programs(talker, capsys):
    assert main(["generate", str(talker), "--chat", "--prompt", "hello", "--json"]) == 0
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "so 👍"}]
    assert json.loads(capsys.readouterr().out) == {"messages": turns}
    assert main(["generate", str(talker), "--chat", "--prompt", "hello", "--experts", "public"]) == 0


def test_an_emoji_of_several_tokens_streams_whole(talker):
    model = fm.load(talker)
    assert len(model.tokenizer.encode("👍")) > 1
    assert [*model.stream([{"role": "user", "content": "hello"}])][-1].endswith("👍")
    assert not any("\ufffd" in piece for piece in model.stream("so"))


def test_the_prompt_of_a_conversation_is_the_rendered_template(talker):
    """The model would not answer after a prompt without the template."""
    model = fm.load(talker)
    assert CHATML.encode() == model.tokenizer.files["chat_template.jinja"]
    assert model.generate([{"role": "user", "content": "hello"}]) == "so 👍"
    assert model.generate("hello") != "so 👍"


def test_chat_without_a_template_is_refused_and_a_prompt_is_needed_otherwise(world, capsys):
    assert main(["generate", str(world / "model"), "--chat", "--prompt", "x"]) == 1
    assert "no chat template" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(world / "model")])
    assert "--prompt (or --chat)" in capsys.readouterr().err
