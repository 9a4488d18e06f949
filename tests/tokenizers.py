"""Small tokenizers of the kinds that checkpoints come with, and chat templates, on disk."""

import json
import pathlib

from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.tokenizer_files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Leaves the reasoning of a turn out once another follows, and begins a turn with it.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def special(token: str, token_id: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, **flags, "special": True}


def begins_with(token: str, token_id: int) -> dict:
    """A post-processor that puts a token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def write(folder: pathlib.Path, content: dict, config: dict | None = None, template: str | None = None) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(json.dumps(content))
    if config is not None:
        (folder / TOKENIZER_CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template)
    return folder


def byte_level(folder: pathlib.Path, template: str | None = CHATML, **config) -> pathlib.Path:
    """300 ids: cl100k's first, `<|endoftext|>` 296, `<|pad|>`, `<|im_start|>`, and `<|im_end|>`, which ends turns."""
    content = json.loads(load_tokenizer("cl100k:298").json_bytes)
    content["added_tokens"] += [special("<|im_start|>", 298), special("<|im_end|>", 299)]
    return write(folder, content, {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | config, template)


def sentencepiece(
    folder: pathlib.Path, template: str | None = INST, words=("the", "cat", "sat", "on", "mat"), *, begins: bool = True
) -> pathlib.Path:
    """A BPE of Llama 2's kind: `<s>` begins texts, `</s>` ends them, bytes for other letters, spaces as \u2581."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = "\u2581abcdefghijklmnopqrstuvwxyz.,[]/INST"
    vocab |= {letter: 259 + i for i, letter in enumerate(dict.fromkeys(letters))}
    merges = []
    for word in (f"\u2581{word}" for word in words):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(token, i) for i, token in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "pre_tokenizer": None,
        "post_processor": begins_with("<s>", 1) if begins else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, content, names | ({} if begins else {"add_bos_token": True}), template)


def unigram(folder: pathlib.Path) -> pathlib.Path:
    """A Unigram model whose vocabulary holds its special tokens, as those of XGLM and llm-jp do."""
    vocab = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["\u2581", -2.0]]
    vocab += [[letter, -5.0] for letter in "abcdefghijklmnopqrstuvwxyz<>/.,0123456789"]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(token, i) for i, token in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }
    return write(folder, content, {"eos_token": "</s>"})
