"""Tokenizers: a prefix of cl100k for small models, dolma2 for real checkpoints, or any `tokenizer.json`.

The first n ranks of a byte-level BPE are themselves a BPE, and no owner's private text trained those of cl100k, so
small models use the first n ranks of cl100k unchanged. Special tokens are never recognized inside text: the literal
string `<|endoftext|>` in a document is encoded as those thirteen characters and cannot forge a document boundary.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexmoe_jax.data.cl100k import RANKS, build
from flexmoe_jax.errors import DataError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.tokenizer_files import (
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    named_tokens,
    parsed,
    read_file,
    read_files,
)

DEFAULT_TOKENIZER = "cl100k:8192"
# The first end a document wherever they are known: the `eos_token` of a chat model ends a turn.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_EOS = ("</s>", "<eos>", "<|eos|>")
_PAD = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
DOLMA2_SPECIALS = {
    "<|endoftext|>": 100_257,
    "<|fim_prefix|>": 100_258,
    "<|fim_middle|>": 100_259,
    "<|fim_suffix|>": 100_260,
    "<|endofprompt|>": 100_276,
    "<|pad|>": 100_277,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids that mark where texts begin and end. Make one with `load_tokenizer`.

    `files` are {name: content} of its files: the canonical tokenizer.json, and those beside it (tokenizer_files.py).
    `eos_id` ends a document, `bos_id` begins every text (None: nothing does), `pad_id` fills rows. `named` are the ids
    of the tokens that tokenizer_config.json names (`eos_token`), `around` the ids that tokenizer.json puts before and
    after a text. `vocab_size` is the number of embedding rows that the model needs (largest id + 1), `digest` the
    sha256 (hex) of the canonical tokenizer.json.
    """

    files: Mapping[str, bytes]
    eos_id: int
    pad_id: int
    bos_id: int | None
    named: Mapping[str, int]
    around: tuple[list[int], list[int]]
    vocab_size: int
    digest: str
    _engine: Any = dataclasses.field(repr=False)
    _decoder: Any = dataclasses.field(repr=False)

    @property
    def json_bytes(self) -> bytes:
        """The canonical tokenizer.json."""
        return self.files[TOKENIZER]

    @property
    def start_id(self) -> int:
        """The id that a document is read after: `bos_id`, else the end of the document before it."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The names of all special tokens."""
        return tuple(token.content for token in self._marked.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids before which generated text ends: `eos_id`, `eos_token`, and those of generation_config.json.

        DataError where the latter are not ids.
        """
        ids = parsed(self.files, GENERATION_CONFIG).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"generation_config.json has the eos_token_id {ids}", "give an id or a list of ids")
        return frozenset({self.eos_id, self.named.get("eos_token", self.eos_id), *ids})

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens; errors as of `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens; uses all cores.

        DataError for text that is not Unicode, and for the rare tokenizer that cannot spell the name of the token at
        the end or start of documents in another way.
        """
        try:
            encoded = [e.ids for e in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise DataError(
                f"text that cannot be encoded: {_first_unencodable(texts)}", "repair the document"
            ) from error
        reserved = {self.eos_id, self.start_id}
        for text, ids in zip(texts, encoded, strict=True):
            if found := reserved.intersection(ids):
                token = self.decode([min(found)])
                raise DataError(
                    f"the document that starts {text[:60]!r} encodes to the id {min(found)} of {token!r}, which would "
                    "forge a document boundary",
                    f"write {token!r} in it with a space inside, or leave it out",
                )
        return encoded

    def encode_prompt(self, text: str) -> list[int]:
        """The ids after which a continuation of `text` is generated; at least one."""
        ids = self.encode(text)
        return ids if ids and self.bos_id is None else [self.start_id, *ids]

    def encode_marked(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, the character at which each starts) of a `text` in which special tokens are recognized by name.

        DataError for a token that the model has no row for.
        """
        encoded = self._marked.encode(text, add_special_tokens=False)
        if (largest := max(encoded.ids, default=0)) >= self.vocab_size:
            raise DataError(
                f"a text names {self.decode([largest])!r}, whose id {largest} is beyond the model's {self.vocab_size}",
                "leave it out of the text, or use a model that was trained with this token",
            )
        return encoded.ids, [start for start, _ in encoded.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens appear by name, bytes that are not UTF-8 as U+FFFD."""
        return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)

    def continuation(self, ids: Sequence[int], before: Sequence[int]) -> str:
        """The text of `ids` where they continue the text of `before`: a space between the two is kept."""
        tail = self._tail(before)
        return self.decode([*tail, *ids])[len(self.decode(tail)) :]

    def pieces(self, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """The text of `ids` as a stream: one piece per id, "" while bytes of a character are still missing.

        `before`: see `continuation`. Where the text ends within a character, one more piece follows.
        """
        read = self._tail(before)
        shown = whole = self.decode(read)
        for token in ids:
            read.append(token)
            whole = self.decode(read)
            text = shown if whole.endswith("\ufffd") else whole
            yield text[len(shown) :]
            shown = text
            if len(read) > 64 and shown is whole:  # decoding all of a long text for every token would take its square
                read = self._tail(read)
                shown = whole = self.decode(read)
        if whole != shown:
            yield whole[len(shown) :]

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The last of `ids`, which start with a whole character."""
        start = max(len(ids) - 8, 0)
        while start and self.decode(ids[start:]).startswith("\ufffd"):
            start -= 1
        return [*ids[start:]]

    def for_rows(self, rows: int) -> "Tokenizer":
        """This tokenizer beside an embedding of `rows` rows.

        Special tokens may have ids beyond the rows, such as padding that was added later: no text gives them. One that
        pads is replaced by the end-of-document token. DataError where a document could hold an id beyond the rows.
        """
        if self.vocab_size <= rows:
            return self
        special = {i for i, token in self._engine.get_added_tokens_decoder().items() if token.special}
        given = {*self._engine.get_vocab(with_added_tokens=True).values()} - special
        given |= {*self._engine.get_vocab(with_added_tokens=False).values(), self.eos_id}
        if max(given) >= rows:
            raise DataError(
                f"the tokenizer has {self.vocab_size} ids, the model {rows} rows, and text gives the id {max(given)}",
                "give the tokenizer of this model",
            )
        pad_id = self.pad_id if self.pad_id < rows else self.eos_id
        return dataclasses.replace(self, vocab_size=rows, pad_id=pad_id)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the tokenizer.json at `path` and the other files beside it, for Hugging Face and `load_tokenizer`.

        ArtifactError where they cannot be written.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_bytes(path if name == TOKENIZER else path.with_name(name), content)

    @functools.cached_property
    def _marked(self) -> Any:
        """The engine that recognizes special tokens in text."""
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(self.json_bytes.decode())
        engine.post_processor = None  # some move the places of tokens, to leave spaces out
        engine.no_truncation()
        return engine


def load_tokenizer(spec: str | pathlib.Path | Mapping[str, bytes] = DEFAULT_TOKENIZER) -> Tokenizer:
    """The tokenizer named by `spec`:

    - `cl100k:N`: ranks 0 to N-3 of cl100k, `<|endoftext|>` = N-2, `<|pad|>` = N-1; `vocab_size` is exactly N.
    - `dolma2`: all 100,256 ranks, `<|endoftext|>` 100257, `<|pad|>` 100277; `vocab_size` 100,278.
    - a path to a tokenizer.json or to the folder that holds it, with the files beside it; or {name: content} of them.

    `<|endoftext|>` or `<|end_of_text|>` ends a document where the tokenizer has it, else the `eos_token` of
    tokenizer_config.json, else a token with a usual name. Without a padding token the end-of-document id also pads.
    Texts begin with a token where tokenizer.json puts one before them, or tokenizer_config.json says `add_bos_token`.

    Raises DataError for an unknown spec, a broken file, or a tokenizer without an end-of-document token.
    """
    if isinstance(spec, Mapping):
        return _from_files(dict(spec))
    if str(spec) == "dolma2":
        return _from_files({TOKENIZER: build(RANKS, _dolma2_specials())})
    if str(spec).startswith("cl100k:"):
        size = _prefix_size(str(spec))
        return _from_files({TOKENIZER: build(size - 2, {"<|endoftext|>": size - 2, "<|pad|>": size - 1})})
    path = pathlib.Path(spec)
    if path.is_dir():
        path = path / TOKENIZER
    if not path.is_file():
        raise DataError(
            f"no tokenizer {str(spec)!r}: neither a known name nor a file",
            f"use {DEFAULT_TOKENIZER!r}, 'dolma2', or the path of a tokenizer.json",
        )
    return _from_files(read_files(path.parent) | {TOKENIZER: read_file(path, TOKENIZER)}, str(path))


def _prefix_size(spec: str) -> int:
    count = spec.partition(":")[2]
    if not count.isdecimal() or not 258 <= int(count) <= RANKS + 2:
        raise DataError(
            f"{spec!r}: the size must be a number from 258 (256 bytes, 2 specials) to {RANKS + 2}, got {count!r}",
            f"write for example {DEFAULT_TOKENIZER!r}",
        )
    return int(count)


def _dolma2_specials() -> dict[str, int]:
    """Ids 100256 to 100277 without a gap (an added token's id is its position); ids unused by cl100k are reserved."""
    names = {token_id: name for name, token_id in DOLMA2_SPECIALS.items()}
    return {names.get(i, f"<|reserved_{i}|>"): i for i in range(RANKS, RANKS + 22)}


def _from_files(files: dict[str, bytes], path: str = "tokenizer") -> Tokenizer:
    import tokenizers

    try:
        content = json.loads(files[TOKENIZER])
        canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        engine = tokenizers.Tokenizer.from_str(canonical.decode())
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise DataError(f"{path} is not a tokenizer.json: {error}", "give a file written by `tokenizers`") from error
    engine.no_padding()
    engine.no_truncation()
    names = named_tokens(files)
    eos_id = _first_id(engine, (*_DOCUMENT_ENDS, *([names["eos_token"]] if "eos_token" in names else _EOS)))
    if eos_id is None or ("eos_token" in names and _first_id(engine, [names["eos_token"]]) is None):
        raise DataError(
            f"{path} has no end-of-document token ({names.get('eos_token') or ', '.join((*_DOCUMENT_ENDS, *_EOS))})",
            'name it in a tokenizer_config.json beside it: {"eos_token": "..."}',
        )
    pad_id = _first_id(engine, [names["pad_token"]] if "pad_token" in names else _PAD)
    around = _around(engine, path)
    named = {key: engine.token_to_id(name) for key, name in names.items()}
    says_so = parsed(files, TOKENIZER_CONFIG).get("add_bos_token") is True
    bos_id = around[0][0] if around[0] else named.get("bos_token") if says_so else None
    text_engine = _text_engine(content, {eos_id, bos_id}) or engine
    text_engine.encode_special_tokens = True  # special tokens in text are encoded as text: documents cannot forge them
    return Tokenizer(
        files | {TOKENIZER: canonical},
        eos_id,
        eos_id if pad_id is None else pad_id,
        bos_id,
        {key: i for key, i in named.items() if i is not None},
        around,
        max(engine.get_vocab(with_added_tokens=True).values()) + 1,
        hashlib.sha256(canonical).hexdigest(),
        text_engine,
        engine,
    )


def _first_id(engine: Any, names: Iterable[str]) -> int | None:
    ids = (engine.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def _around(engine: Any, path: str) -> tuple[list[int], list[int]]:
    """The ids that tokenizer.json puts before and after a text."""
    inner, whole = (engine.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    if at > 1:
        raise DataError(f"{path} puts {at} tokens before every text: {whole[:at]}", "give a tokenizer that puts one")
    return whole[:at], whole[at + len(inner) :]


def _text_engine(content: Mapping[str, Any], reserved: set[int | None]) -> Any:
    """An engine that does not find special tokens in text; None where that of tokenizer.json does not either.

    The flag `encode_special_tokens` suffices for added tokens that are marked as special. The models Unigram,
    WordPiece and WordLevel find them in their vocabulary as well, from which they are hidden here.
    """
    import tokenizers

    added, model = content.get("added_tokens") or [], content["model"]
    special = {entry["content"]: entry["id"] for entry in added if entry["special"] or entry["id"] in reserved}
    vocab, hidden = model["vocab"], set[str]()
    if model.get("type", "BPE") != "BPE":
        tokens = enumerate(t for t, _ in vocab) if isinstance(vocab, list) else ((i, t) for t, i in vocab.items())
        hidden = {token for i, token in tokens if special.get(token) == i} - {model.get("unk_token")}
    kept = [{**e, "special": e["content"] in special} for e in added if e["content"] not in hidden]
    if kept == [dict(entry) for entry in added]:
        return None
    name = {token: f"\ufdd0{special[token]}" for token in hidden}  # starts with a code point that no text has
    if isinstance(vocab, list):
        vocab = [[name.get(token, token), score] for token, score in vocab]
    else:
        vocab = {name.get(token, token): i for token, i in vocab.items()}
    content = {**content, "added_tokens": kept, "model": {**model, "vocab": vocab}}
    engine = tokenizers.Tokenizer.from_str(json.dumps(content))
    engine.no_padding()
    engine.no_truncation()
    return engine


def _first_unencodable(texts: Iterable[object]) -> str:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {number} of the batch is a {type(text).__name__}, not a string"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"text {number} of the batch has a lone surrogate at character {error.start}"
    return "unknown"
