"""The files that make up a tokenizer: which names travel with a model, how long they may be, and in which bytes.

Only these names are read, stored and exported. None of them holds code, and the key `auto_map`, by which a
configuration names code to load, is left out.
"""

import json
import logging
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from flexmoe_jax.errors import DataError
from flexmoe_jax.foreign import check_count, read_bytes

log = logging.getLogger(__name__)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
_TEXT = 1 << 20
# {name: the most bytes}, several times the longest that are published.
LIMITS = {
    TOKENIZER: 64 << 20,
    "vocab.json": 32 << 20,
    "merges.txt": 32 << 20,
    TOKENIZER_CONFIG: 8 << 20,
    "added_tokens.json": _TEXT,
    "special_tokens_map.json": _TEXT,
    CHAT_TEMPLATE: _TEXT,
    "chat_template.json": _TEXT,
    GENERATION_CONFIG: _TEXT,
}
MAX_LICENSES = 8
_LICENSE = re.compile(r"(LICENSE|LICENCE|NOTICE)([-_][A-Za-z0-9_-]{1,40})?(\.(txt|md))?")
_CODE_KEYS = ("auto_map", "custom_pipelines")


def limit_of(name: str) -> int | None:
    """The most bytes that the file `name` of a tokenizer may have; None for a name that does not travel."""
    return _TEXT if _LICENSE.fullmatch(name) else LIMITS.get(name)


def travels(names: Collection[str]) -> bool:
    """Whether these are the files of one tokenizer: a tokenizer.json, other known names, and a few licenses."""
    licenses = sum(name not in LIMITS for name in names)
    return TOKENIZER in names and all(map(limit_of, names)) and licenses <= MAX_LICENSES


def read_files(folder: pathlib.Path) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files in `folder`, in the bytes in which they are stored; links are followed.

    DataError for a file that is too long, cannot be read, or is not what its name says.
    """
    names = sorted(path.name for path in folder.iterdir() if limit_of(path.name))
    licenses = [name for name in names if name not in LIMITS]
    if len(licenses) > MAX_LICENSES:
        raise DataError(f"{folder} has {len(licenses)} license files", f"keep at most {MAX_LICENSES} of them")
    return {name: stored(name, read_file(folder / name, name), folder / name) for name in names}


def stored(name: str, content: bytes, where: object = "") -> bytes:
    """The bytes in which the file `name` is stored and exported; storing them again changes nothing.

    JSON but for tokenizer.json is formatted anew, without keys that name code. DataError for content that is not JSON,
    or not UTF-8.
    """
    where = where or name
    if name == TOKENIZER:
        return content
    try:
        text = content.decode()
        if not name.endswith(".json"):
            return content
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        kept = {key: part for key, part in value.items() if key not in _CODE_KEYS}
        if len(kept) < len(value):
            log.info(f"{where}: left out {', '.join(value.keys() - kept.keys())}, which names code to load")
        return json.dumps(kept, indent=2, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object or not UTF-8: {error}", "repair or remove it") from error


def parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`, {} without it."""
    return json.loads(files[name]) if name in files else {}


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """{"eos_token": "</s>", ..}: the tokens that the configuration beside a tokenizer.json names."""
    fields = parsed(files, "special_tokens_map.json") | parsed(files, TOKENIZER_CONFIG)
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in fields.items()}
    return {key: name for key, name in names.items() if key.endswith("_token") and isinstance(name, str)}


def read_file(path: pathlib.Path, name: str) -> bytes:
    """The content of the file `path`, which may be as long as the file `name` of a tokenizer.

    A link is followed. DataError for anything but such a file, and for a pointer of Git LFS.
    """
    limit = limit_of(name) or 0
    content = read_bytes(path, limit, DataError)
    if name.endswith(".json"):
        check_count(content, path, limit, DataError)
    return content
