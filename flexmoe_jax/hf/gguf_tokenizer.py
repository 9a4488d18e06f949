"""A tokenizer.json in the fields of a GGUF file: byte-level BPE, and the BPE of sentencepiece (Llama 2, Mistral)."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexmoe_jax.artifacts.model_dir import ModelDir
from flexmoe_jax.data.cl100k import SPLIT_PATTERN
from flexmoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, parsed

if TYPE_CHECKING:
    import gguf

_LETTERS: tuple = ("ByteLevel", False)
_GPT2: tuple = ("ByteLevel", True)
_ONE_DIGIT = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# {(how text is split, whether a piece that is a token is never merged): llama.cpp's name (llama-vocab.cpp)}.
_KNOWN: dict[tuple[tuple, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", SPLIT_PATTERN), _LETTERS), True): "llama-bpe",
    ((("Split", SPLIT_PATTERN), _LETTERS), False): "dbrx",
    ((("Split", _ONE_DIGIT), _LETTERS), False): "qwen2",
}
_SPACE = "\u2581"


def add_tokenizer(writer: "gguf.GGUFWriter", model: ModelDir) -> str:
    """Adds the tokenizer and the chat template of the model directory; returns llama.cpp's name of the pre-tokenizer.

    Rows of the embedding without a token are marked as unused. ArtifactError for a tokenizer that llama.cpp lacks.
    """
    files = model.tokenizer_files
    tokenizer = load_tokenizer(files).for_rows(model.config.vocab_size)
    content = json.loads(tokenizer.json_bytes)
    pre = _name(content)
    writer.add_tokenizer_model("llama" if pre == "default" else "gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(content, model.config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if pre == "default":
        # sentencepiece joins the pair whose token has the highest score: here the one that is merged first.
        ranks = {first + second: rank for rank, (first, second) in reversed([*enumerate(merges)])}
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(bool(_prefixed(content)))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _add_ids(writer, tokenizer, content["model"]["vocab"].get(content["model"].get("unk_token")))
    template = files[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in files else None
    if chat := template or parsed(files, TOKENIZER_CONFIG).get("chat_template"):
        writer.add_chat_template(chat)
    return pre


def _name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer, `default` for that of sentencepiece; ArtifactError if it has none."""
    bpe, normalizer = content["model"], content.get("normalizer")
    options = {name: bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    if bpe.get("type") == "BPE" and not any(options.values()):
        steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
        if bpe.get("byte_fallback"):
            if _prefixed(content) is not None:
                return "default"
        elif normalizer is None or normalizer == {"type": "NFC"}:
            split = tuple(map(_step, steps))
            if name := _KNOWN.get((split, bool(bpe.get("ignore_merges")))):
                return name
    parts = {name: content.get(name) for name in ("normalizer", "pre_tokenizer")}
    raise ArtifactError(
        f"llama.cpp does not know this tokenizer ({bpe.get('type')}, {json.dumps(parts, ensure_ascii=False)[:500]})",
        f"known are sentencepiece's BPE and, by their rules, {', '.join(_KNOWN.values())}; use `flexmoe export-hf`",
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [dict(part)]


def _step(step: Mapping[str, Any]) -> tuple:
    """What a step of a pre-tokenizer does, without what changes no token."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Split" and (step.get("behavior"), step.get("invert")) == ("Isolated", False):
        return kind, step["pattern"].get("Regex")
    return (kind, None)


def _prefixed(content: Mapping[str, Any]) -> bool | None:
    """Whether sentencepiece's tokenizer puts a space before a text; None if this is not such a tokenizer."""
    normalizers = _steps(content.get("normalizer"), "normalizers")
    splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not splits and replace in normalizers:
        others = [step for step in normalizers if step != replace]
        return bool(others) if others in ([], [{"type": "Prepend", "prepend": _SPACE}]) else None
    if not normalizers and [step["type"] for step in splits] == ["Metaspace"]:
        step = splits[0]
        whole = step.get("replacement") == _SPACE and not step.get("split")
        return step.get("prepend_scheme", "always") != "never" if whole else None
    return None


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of every row of the embedding."""
    import gguf

    kinds = gguf.TokenType
    found: dict[int, tuple[str, int]] = {}
    for token, i in content["model"]["vocab"].items():
        kind = kinds.NORMAL
        if content["model"].get("byte_fallback"):
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            kind = kinds.BYTE if byte else kinds.UNKNOWN if token == content["model"].get("unk_token") else kind
        found[i] = (token, kind)
    for entry in content.get("added_tokens") or []:
        if found.get(entry["id"], ("", None))[1] != kinds.UNKNOWN:
            found[entry["id"]] = (entry["content"], kinds.CONTROL if entry["special"] else kinds.USER_DEFINED)
    rows_of = [found.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(rows)]
    return [token for token, _ in rows_of], [int(kind) for _, kind in rows_of]


def _add_ids(writer: "gguf.GGUFWriter", tokenizer: Tokenizer, unknown: int | None) -> None:
    """The special tokens, and whether they are put around a text. ArtifactError for any other around it."""
    # In a chat model `eos_token` ends a turn, where `eos_id` ends a document.
    end_id = tokenizer.named.get("eos_token", tokenizer.eos_id)
    _, after = tokenizer.around
    if after not in ([], [end_id]):
        raise ArtifactError(
            f"this tokenizer puts the tokens {after} after a text",
            f"llama.cpp can put only {end_id} there: use `flexmoe export-hf`",
        )
    bos_id = tokenizer.named.get("bos_token") if tokenizer.bos_id is None else tokenizer.bos_id
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_eos_token_id(end_id)
    writer.add_add_eos_token(bool(after))
    writer.add_pad_token_id(tokenizer.pad_id)
    if unknown is not None:
        writer.add_unk_token_id(unknown)
