"""Renders chat templates. chat.py runs this file as a program of its own: a template is a stranger's.

It reads one JSON object from standard input: `template`, `names` (its variables, as `eos_token`), `requests`
({messages, add_generation_prompt}), and the limits `bytes`, `seconds` and `characters`. It writes {"texts": [..]}, or
{"error": .., "request": n}. The environment is that of `apply_chat_template` of transformers, without tools and
documents.
"""

import contextlib
import datetime
import json
import resource
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks an assistant's text: here its content, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements inside the block, as a scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that start with an underscore, by which objects of Python are reached."""

    def __init__(self, /, *args: Any, **names: Any) -> None:
        values = dict(*args, **names)
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} of a namespace")
        super().__setitem__(name, value)


def compiled(template: str) -> jinja2.Template:
    """The template in a sandbox that cannot change values nor reach Python's internals."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **items: dict(*args, **items)  # the class has methods that change it
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def main() -> None:
    """Answers the request on standard input."""
    asked = json.load(sys.stdin)
    for kind, most in (("AS", asked["bytes"]), ("CPU", asked["seconds"] + 1), ("CORE", 0), ("FSIZE", 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows some limits by name only
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    texts: list[str] = []
    answer: dict[str, Any] = {"texts": texts}
    try:
        template = compiled(asked["template"])
        for request in asked["requests"]:
            texts.append(template.render(**asked["names"], tools=None, documents=None, **request))
        if sum(map(len, texts)) > asked["characters"]:
            raise ValueError(f"over {asked['characters']} characters")
    except Exception as error:  # noqa: BLE001 - whatever a template raises is the answer
        answer = {"error": f"{type(error).__name__}: {error}"[:500], "request": len(texts)}
    json.dump(answer, sys.stdout)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
