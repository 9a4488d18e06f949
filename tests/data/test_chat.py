"""Conversations are rendered as transformers renders them, only the assistant's tokens count, no template can act."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from flexmoe_jax.data import chat
from flexmoe_jax.data.chat import encode_conversations, encode_prompt, render
from flexmoe_jax.data.embedding import sample_documents
from flexmoe_jax.data.pipeline import make_batches
from flexmoe_jax.data.sources import content_digest, read_documents
from flexmoe_jax.data.store import TokenStore
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError
from flexmoe_jax.evaluate.perplexity import heldout_texts
from flexmoe_jax.model.generate import Sampling, generate
from flexmoe_jax.training import loop
from flexmoe_jax.training.step import make_train_step
from tests.tiny import MODEL, expert_run, public_run
from tests.tokenizers import CHATML, INST, REASONING, byte_level, sentencepiece
from tests.training.test_step import RUN, bits, hybrid, start

TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "naïve 日本\n"},
    {"role": "assistant", "content": "the mat 👍"},
]
KINDS = {"chatml": (byte_level, CHATML), "inst": (sentencepiece, INST), "reasoning": (byte_level, REASONING)}


def tokenizer_of(kind, folder):
    make, template = KINDS[kind]
    return load_tokenizer(make(folder, template))


def text_of(tokenizer, marked):
    return [tokenizer.decode([i]) for i, counts in zip(marked.ids, marked.assistant, strict=True) if counts]


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [False, True])
def test_text_and_ids_equal_those_of_apply_chat_template(tmp_path, kind, begin):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of(kind, tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    (text,) = render(ours, [{"messages": TURNS, "add_generation_prompt": begin}])
    assert text == theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=begin)
    ids = theirs.apply_chat_template(TURNS, tokenize=True, add_generation_prompt=begin, return_dict=False)
    assert ours.encode_marked(text)[0] == ids
    if begin:
        assert encode_prompt(ours, TURNS) == ids


@pytest.mark.torch
@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_beside_the_text_reaches_the_template_as_in_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    template = "{% set ns = namespace(n=0, a={}) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }} "
    template += "{{ m.reasoning_content }}|{{ m.thinking }}|{{ dict(a=m.content).a }}|{{ m | tojson }}{% endfor %}"
    turns = [TURNS[0], TURNS[1] | {name: "hm"}]
    theirs = transformers.AutoTokenizer.from_pretrained(str(byte_level(tmp_path, template)))
    (text,) = render(load_tokenizer(tmp_path), [chat._request(turns, False)])
    assert text == theirs.apply_chat_template(turns, tokenize=False)
    assert "hm|hm|sat" in text


@pytest.mark.torch
def test_the_assistants_tokens_are_those_that_the_template_marks_itself(tmp_path):
    """`{% generation %}` blocks, which transformers reads and this library does not need."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(sentencepiece(tmp_path)))
    expected = theirs.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (marked,) = encode_conversations(load_tokenizer(tmp_path), [("here", TURNS)])
    assert marked.ids == list(expected["input_ids"])
    assert marked.assistant == [bool(one) for one in expected["assistant_masks"]]
    assert any(marked.assistant)


def test_a_conversation_is_one_document_and_only_the_assistant_counts(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path))
    (marked,) = encode_conversations(tokenizer, [("here", TURNS)])
    assert tokenizer.decode(marked.ids).endswith("<|im_end|>\n<|endoftext|>")
    assert tokenizer.decode(marked.ids).startswith("<|im_start|>user\nthe cat<|im_end|>")
    counted = [i for i, counts in zip(marked.ids, marked.assistant, strict=True) if counts]
    assert tokenizer.decode(counted) == "sat on the mat<|im_end|>\nthe mat 👍<|im_end|>\n"


def test_a_space_of_the_prompt_does_not_count_where_tokenizer_json_leaves_spaces_out_of_places(tmp_path):
    """As Llama 3's does: a token that starts with the prompt's last space would count."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder = byte_level(tmp_path, template + "{% if add_generation_prompt %}assistant: {% endif %}")
    content = json.loads((folder / "tokenizer.json").read_text())
    trims = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": trims}))
    (marked,) = encode_conversations(load_tokenizer(folder), [("here", TURNS[:2])])
    assert "".join(text_of(load_tokenizer(folder), marked)) == "at on the mat\n"  # " s" is one token


def test_reasoning_that_the_template_leaves_out_later_is_learned_where_it_is_shown(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, REASONING))
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>\nhm</think>sat"
    turns[3]["content"] = "<think>\nso</think>mat"
    first, second = encode_conversations(tokenizer, [("here", turns)])
    counted = [
        tokenizer.decode([i for i, counts in zip(m.ids, m.assistant, strict=True) if counts]) for m in (first, second)
    ]
    assert counted == ["hm</think>sat<|im_end|>\n", "so</think>mat<|im_end|>\n"]  # the prompt has `<think>\n`
    assert "hm" not in tokenizer.decode(second.ids)


def test_a_token_that_reaches_from_the_prompt_into_the_answer_does_not_count(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: i{{ m.content }}\n{% endfor %}"
    tokenizer = load_tokenizer(byte_level(tmp_path, template + "{% if add_generation_prompt %}assistant: i{% endif %}"))
    turns = [{"role": "user", "content": "t"}, {"role": "assistant", "content": "n the mat"}]
    (marked,) = encode_conversations(tokenizer, [("here", turns)])
    at = marked.assistant.index(True)
    assert tokenizer.decode(marked.ids[:at]) == "user: it\nassistant: in"
    assert len(tokenizer.encode("in")) == 1  # one token, of both
    assert tokenizer.decode(marked.ids[at:]) == " the mat\n<|endoftext|>"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no turn of the assistant"),
        ([TURNS[0]], "no turn of the assistant"),
        ([TURNS[1]], "begins with a turn of the assistant"),
        ([{"role": "user"}, TURNS[1]], "turn 1 is"),
        ([TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "turn 2 is"),
        ([{"role": "system", "content": "x"}, TURNS[0], TURNS[1]], "only user and assistant"),
        ([{"role": "user", "content": "a</s>b"}, TURNS[1]], "holds '</s>'"),
    ],
)
def test_conversations_that_cannot_be_learned_are_refused_by_name(tmp_path, turns, message):
    with pytest.raises(DataError, match=f"(?s)line 7.*{message}|{message}.*line 7") as error:
        encode_conversations(load_tokenizer(sentencepiece(tmp_path)), [("a.jsonl, line 7", turns)])
    assert error.value.remedy


def test_following_the_remedy_for_a_special_token_works(tmp_path):
    turns = [{"role": "user", "content": "a</ s>b"}, TURNS[1]]
    assert encode_conversations(load_tokenizer(sentencepiece(tmp_path)), [("", turns)])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",  # hours
        "{% set ns = namespace(x='aaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a' * 9999999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}{{ ns._x }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ dict.__init__ }}{{ dict.fromkeys('a').update }}",
        "{% include 'x' %}",
        "{% if %}",
        "{{ messages[9].role.x }}",
    ],
)
def test_no_template_can_take_time_or_memory_or_reach_python(tmp_path, monkeypatch, template):
    monkeypatch.setattr(chat, "SECONDS", 2)
    tokenizer = load_tokenizer(byte_level(tmp_path, template))
    began = time.monotonic()
    with pytest.raises(DataError, match="chat template"):
        encode_prompt(tokenizer, TURNS)
    assert time.monotonic() - began < 30  # the limit is 2 seconds; the rest is for a machine with other work


def test_the_memory_of_a_template_is_limited(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, "{% set x = messages[0].role[0] * 1500000000 %}small"))
    with pytest.raises(DataError, match="MemoryError"):
        encode_prompt(tokenizer, TURNS)


def test_a_message_about_a_template_has_no_terminal_escapes(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, "{{ raise_exception('\x1b[31mred') }}"))
    with pytest.raises(DataError) as error:
        encode_prompt(tokenizer, TURNS)
    assert "red" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_tokenizer_without_template_is_refused_and_the_remedy_works(tmp_path):
    folder = byte_level(tmp_path, None)
    with pytest.raises(DataError, match=r"(?s)no chat template.*chat_template\.jinja"):
        encode_prompt(load_tokenizer(folder), TURNS)
    (folder / "chat_template.jinja").write_text(CHATML)
    assert encode_prompt(load_tokenizer(folder), TURNS)


@pytest.mark.parametrize("place", ["config", "named", "legacy"])
def test_the_template_is_found_in_every_file_that_holds_one(tmp_path, place):
    folder = byte_level(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "legacy":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        config["chat_template"] = CHATML if place == "config" else named
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat.template_of(load_tokenizer(folder)) == CHATML


def write_conversations(folder, count=40, ending="jsonl"):
    """Conversations whose prompts are of one kind of words and whose answers are of another."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for _ in range(count):
        said = [" ".join(rng.choice(words, 6)) for words in (("the", "cat"), ("sat", "mat"), ("the", "on"), ("mat",))]
        roles = ("user", "assistant") * 2
        rows.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]})
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    else:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def store(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    return write_store(read_documents(write_conversations(tmp_path / "data")), tokenizer, tmp_path / "store")


def test_jsonl_and_parquet_give_the_same_store(tmp_path, store):
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    folder = write_conversations(tmp_path / "other", ending="parquet")
    again = write_store(read_documents(folder), tokenizer, tmp_path / "again")
    assert again.digest == store.digest
    assert content_digest(folder) == content_digest(tmp_path / "data")


def test_a_batch_of_conversations_counts_only_the_assistant_and_separates_documents(tmp_path, store):
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    batch = make_batches(store, seq_len=store.num_tokens - 1, batch_size=1, seed=0)[0]
    counted = batch.targets[0][batch.weights[0] == 1]
    whole = [turn["content"] for document in read_documents(tmp_path / "data") for turn in document.messages[1::2]]
    assert tokenizer.decode(counted) == "".join(f"{text}<|im_end|>\n" for text in whole)
    assert len({*batch.segments[0].tolist()}) == 40
    begins = np.flatnonzero(np.diff(batch.segments[0])) + 1
    assert (batch.tokens[0][begins] == 298).all()  # <|im_start|>
    assert (batch.tokens[0][begins - 1] == tokenizer.eos_id).all()


def test_prompt_tokens_get_no_gradient(store):
    """What the prompts' targets are changes no bit of the trained parameters; what the answers' are does."""
    run, params = RUN, hybrid()
    real = make_batches(store, seq_len=16, batch_size=4, seed=0)[0]
    assert 0 < real.weights.sum() < real.weights.size
    other = np.random.default_rng(0).integers(0, MODEL.vocab_size, real.targets.shape)

    def trained(targets):
        state, frozen = start(run, params)
        batch = type(real)(real.tokens, targets.astype(np.int32), real.segments, real.weights)
        step = make_train_step(MODEL, run)
        for _ in range(2):  # the learning rate of the first is 0
            state, _ = step(state, frozen, batch)
        return bits(state.trainable)

    assert trained(np.where(real.weights == 0, other, real.targets)) == trained(real.targets)
    assert trained(np.where(real.weights == 1, other, real.targets)) != trained(real.targets)


def test_the_gradient_at_prompt_positions_is_zero_and_elsewhere_not(store):
    from flexmoe_jax.model.loss import next_token_loss

    batch = make_batches(store, seq_len=16, batch_size=4, seed=0)[0]
    x = jax.random.normal(jax.random.key(0), (*batch.targets.shape, 8))
    head = jax.random.normal(jax.random.key(1), (8, 300))
    gradient = jax.grad(lambda x: next_token_loss(x, (head,), batch.targets, batch.weights)[0])(x)
    sizes = np.abs(gradient).max(-1)
    assert (sizes[batch.weights == 0] == 0).all()
    assert (sizes[batch.weights == 1] > 0).all()


def test_altered_marks_are_detected_and_belong_to_the_digest(tmp_path, store):
    path = tmp_path / "store" / "part-00000.marks"
    assert path.stat().st_size == store.num_tokens
    assert set(np.unique(np.fromfile(path, np.uint8))) == {0, 1, 2}
    good = path.read_bytes()
    for bad, message in ((bytes([good[0] ^ 1]) + good[1:], "altered"), (good[:-1], "tokens")):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=message):
            TokenStore.open(tmp_path / "store")
    path.unlink()
    with pytest.raises(DataError, match="is not a file"):
        TokenStore.open(tmp_path / "store")


def test_texts_and_conversations_are_not_mixed(tmp_path):
    folder = write_conversations(tmp_path / "data", 3)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "the cat"}\n')
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match=r"train\.jsonl, line 4 is a text, others are not"):
        write_store(read_documents(folder), tokenizer, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_broken_turn_is_named_with_its_file_and_line(tmp_path):
    folder = write_conversations(tmp_path, 2)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "text": "a"}]}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: turn 1 is"):
        list(read_documents(folder))


def test_the_text_of_a_conversation_is_that_of_its_turns(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    (document,) = read_documents(tmp_path)
    assert document.text == "\n\n".join(turn["content"] for turn in TURNS)
    assert sample_documents(read_documents(tmp_path), 5, 0) == ([document.text], 1)  # what `flexmoe embed` reads
    (tmp_path / "a.jsonl").rename(tmp_path / "heldout.jsonl")
    with pytest.raises(DataError, match="only texts are scored"):
        heldout_texts(tmp_path, 1000)


def test_turns_may_be_in_a_named_field_and_a_text_beside_them_is_read_and_said(tmp_path, caplog):
    from flexmoe_jax.data.records import Fields

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS, "talk": TURNS[:2], "text": "plain"}) + "\n")
    (document,) = read_documents(tmp_path, fields=Fields("talk"))
    assert len(document.messages) == 2
    with caplog.at_level("INFO", "flexmoe_jax"):
        (document,) = read_documents(tmp_path)
    assert (document.text, document.messages) == ("plain", ())
    assert "the texts are read" in caplog.text


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A public model that was trained on conversations."""
    root = tmp_path_factory.mktemp("chat")
    data = write_conversations(root / "conversations")
    run = public_run(root, data=str(data), tokenizer=str(byte_level(root / "tokenizer")))
    return loop.train(run)


def test_a_model_trained_on_conversations_keeps_the_template_and_answers(release):
    import flexmoe_jax as fm

    model = fm.load(release)
    assert (release / "chat_template.jinja").read_text() == CHATML
    prompt = [{"role": "user", "content": "the"}]
    ids = encode_prompt(model.tokenizer, prompt)
    how = {"max_new_tokens": 6, "seed": 1}
    run, stop = dataclasses.replace(model.decoder(), dispatch="sparse"), model.tokenizer.stop_ids
    (answer,) = generate(run, model._stacked, [ids], stop_ids=stop, sampling=Sampling(1.0), **how)
    assert len(answer) == 6
    assert model.generate(prompt, temperature=1.0, **how) == model.tokenizer.decode(answer)


def test_an_owner_trains_on_conversations_beside_it(release, tmp_path):
    package = loop.train(expert_run(tmp_path, "news", release, data=str(write_conversations(tmp_path / "chat"))))
    assert package.name == "package"
    lines = [json.loads(line) for line in (tmp_path / "news" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["tokens"] < 4 * 32 for line in lines)  # of the batch's 4 x 32


def test_conversations_for_a_model_without_template_are_refused(world, tmp_path):
    run = expert_run(
        tmp_path, "news", world / "public" / "run" / "model", data=str(write_conversations(tmp_path / "c"))
    )
    with pytest.raises(DataError, match="no chat template"):
        loop.train(run)


def test_a_template_with_tokens_that_the_model_has_no_row_for_is_refused(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path)).for_rows(299)  # <|im_end|> is 299
    with pytest.raises(DataError, match=r"<\|im_end\|>.*299 is beyond the model's 299"):
        encode_prompt(tokenizer, TURNS)
