"""Conversations: turns of text as the tokens of a model's chat template, with a mark on the assistant's.

The template comes with the tokenizer. It is a program of a stranger's, so it is rendered in a sandbox of jinja2, in a
process of its own with limits on time and memory (render.py).
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, named_tokens, parsed

ASSISTANT = "assistant"
MEMORY_BYTES, SECONDS, SECONDS_PER_TEXT = 1 << 30, 10, 0.02
MAX_CHARACTERS = 64 << 20  # of all texts that are rendered together
Turn = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Marked:
    """Token ids, and for each whether it is a part of the assistant's turns."""

    ids: list[int]
    assistant: list[bool]


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of the tokenizer's files; DataError if there is none."""
    files = tokenizer.files
    found = files[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in files else None
    for name in (TOKENIZER_CONFIG, "chat_template.json"):
        found = found or parsed(files, name).get("chat_template")
    if isinstance(found, list):  # named templates
        found = {part.get("name"): part.get("template") for part in found if isinstance(part, dict)}.get("default")
    if not isinstance(found, str):
        raise DataError(
            "this model's tokenizer has no chat template",
            f"use a model that was trained for chat, or put its {CHAT_TEMPLATE} beside tokenizer.json before the model "
            'is imported or trained; or write the conversations out as texts (field "text")',
        )
    return found


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Turn]) -> list[int]:
    """The ids after which the assistant's next turn is generated; DataError for turns that cannot be rendered."""
    check_turns(messages, "the conversation", tokenizer)
    (text,) = render(tokenizer, [_request(messages, True)])
    ids, _ = tokenizer.encode_marked(text)
    if not ids:
        raise DataError("the chat template renders this conversation as nothing", "give a turn with text")
    return ids


def encode_conversations(tokenizer: Tokenizer, conversations: Sequence[tuple[str, Sequence[Turn]]]) -> list[Marked]:
    """The training documents of (place for messages, turns) of every conversation, ends of document included.

    A conversation is one document, up to its last assistant's turn. Where the template renders earlier turns in another
    way once a later one follows (reasoning left out), each turn after which it does ends a document of its own. The
    assistant's turns are what a rendered conversation has beyond its prompt. DataError for turns that a template cannot
    render or that do not come after a prompt, and for the name of a special token in a text.
    """
    requests: list[dict[str, Any]] = []
    for where, turns in conversations:
        check_turns(turns, where, tokenizer)
        ends = [i for i, turn in enumerate(turns) if turn["role"] == ASSISTANT]
        if not ends or ends[0] == 0:
            what = "begins with a turn of the assistant" if ends else "has no turn of the assistant"
            raise DataError(f"{where} {what}", f"begin it with another's turn, and let one of {ASSISTANT!r} follow")
        for i in ends:
            requests += [_request(turns[:i], False), _request(turns[:i], True), _request(turns[: i + 1], False)]
    places = [where for where, turns in conversations for turn in turns if turn["role"] == ASSISTANT for _ in range(3)]
    texts = render(tokenizer, requests, places)
    documents: list[Marked] = []
    first = 0
    for where, turns in conversations:
        count = 3 * sum(turn["role"] == ASSISTANT for turn in turns)
        rendered = texts[first : first + count]
        documents += [_encode(tokenizer, *part) for part in _documents(rendered, where)]
        first += count
    return documents


def render(tokenizer: Tokenizer, requests: Sequence[Mapping[str, Any]], places: Sequence[str] = ()) -> list[str]:
    """The text of each request: {"messages": turns, "add_generation_prompt": whether the assistant's turn is begun}.

    `places` name the requests in messages. DataError without a template, and where it fails or exceeds a limit.
    """
    seconds = SECONDS + int(SECONDS_PER_TEXT * len(requests))
    asked: dict[str, Any] = {"template": template_of(tokenizer), "requests": requests}
    asked |= {"names": named_tokens(tokenizer.files)}
    asked |= {"bytes": MEMORY_BYTES, "seconds": seconds, "characters": MAX_CHARACTERS}
    remedy = "use another model, or replace the chat template before it is imported"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-X", "utf8", str(pathlib.Path(__file__).with_name("render.py"))],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=seconds,
            check=True,
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"the chat template takes over {seconds} seconds", remedy) from error
    except (subprocess.CalledProcessError, ValueError) as error:
        said = getattr(error, "stderr", b"")[-200:].decode(errors="replace")
        raise DataError(f"the chat template cannot be rendered: {error} {said!r}", remedy) from error
    if "error" in answer:
        place = places[answer["request"]] if answer["request"] < len(places) else "a conversation"
        raise DataError(
            f"the chat template cannot render {place}: {answer['error']!r}",
            f"write its turns as the template wants them (roles, their order, text as a string); else {remedy}",
        )
    return answer["texts"]


def check_turns(turns: Sequence[Turn], where: str, tokenizer: Tokenizer | None = None) -> None:
    """DataError unless every turn has a `role` and a text as `content`, which names no special token of `tokenizer`."""
    special = [] if tokenizer is None else tokenizer.special_tokens
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{where}: turn {number} is {str(turn)[:100]!r}",
                'write each turn as {"role": "user", "content": "its text"}',
            )
        for token in special:
            if token in turn["content"]:
                raise DataError(
                    f"{where}: the text of turn {number} holds {token!r}, which the tokenizer reads as the end or the "
                    "start of a turn",
                    f"write {token!r} with a space inside, or leave the conversation out",
                )


def _request(turns: Sequence[Turn], begin: bool) -> dict[str, Any]:
    return {"messages": [_named_reasoning(turn) for turn in turns], "add_generation_prompt": begin}


def _named_reasoning(turn: Turn) -> dict[str, Any]:
    """The turn with its reasoning under the names that templates read, as in transformers."""
    names = ("reasoning_content", "thinking", "reasoning")
    given = next((turn[name] for name in names if turn.get(name) is not None), None)
    return dict(turn) if given is None else {"thinking": given, **turn, "reasoning_content": given}


def _documents(texts: Sequence[str], where: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """[(text, [(start, end) of the assistant's turns])]; `texts` are before, prompt and whole of every turn."""
    documents: list[tuple[str, list[tuple[int, int]]]] = []
    for before, prompt, whole in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        if not (prompt.startswith(before) and whole.startswith(before)):
            raise DataError(
                f"{where}: the chat template renders the turns before an assistant's turn in another way once it is "
                "there, so that its tokens cannot be told from theirs",
                "leave such conversations out (often it is a turn without text), or use another template",
            )
        spans = [(start, len(whole))]
        if documents and whole.startswith(documents[-1][0]):
            spans = documents.pop()[1] + spans
        documents.append((whole, spans))
    return documents


def _encode(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Marked:
    ids, starts = tokenizer.encode_marked(text)
    marks = [any(start <= at < end for start, end in spans) for at in starts]
    if ids[-1:] != [tokenizer.eos_id]:
        ids, marks = [*ids, tokenizer.eos_id], [*marks, False]
    return Marked(ids, marks)
