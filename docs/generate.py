"""What the reference takes from the code: keys of configurations, help of the commands, the library's front door."""

import contextlib
import inspect
import io
import json
import os
import pathlib
from collections.abc import Iterator

from autodoc2.render.myst_ import MystRenderer
from autodoc2.utils import ItemData

import flexmoe_jax
from flexmoe_jax.cli import keys
from flexmoe_jax.cli.main import ROLES, main

ACTIONS = {"data": ("build", "info", "tokenize")}  # verbs of several actions, each with options of its own


class ApiPages(MystRenderer):
    """autodoc2's pages: rooms in alphabetical order, and values where MyST reads them as options."""

    def get_children(self, item: ItemData, types: set[str] | None = None, **options: bool) -> Iterator[ItemData]:
        found = super().get_children(item, types, **options)
        yield from sorted(found, key=lambda i: i["full_name"]) if types in ({"package"}, {"module"}) else found

    def render_data(self, item: ItemData) -> Iterator[str]:
        lines = iter(super().render_data(item))
        for line in lines:
            if line != ":value: >":
                yield line
            elif (value := next(lines).strip()) != "None":  # a field without a default
                yield f":value: {json.dumps(value)}"


def write_all(folder: pathlib.Path) -> None:
    """Writes the parts that pages include into `folder`."""
    parts = {verb: keys.markdown(keys.configuration(verb)) for verb in ("train", "reproduce")}
    parts |= {"commands": commands(), "front-door": front_door()}
    folder.mkdir(exist_ok=True)
    for name, text in parts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def commands() -> str:
    """The help of every verb, by role."""
    parts = []
    for role, verbs in ROLES.items():
        parts.append(f"## For {role.partition(' (')[0]}\n")
        for verb in verbs:
            for words in [(verb,), *((verb, action) for action in ACTIONS.get(verb, ()))]:
                parts.append(f"### flexmoe {' '.join(words)}\n\n```text\n{help_of(*words)}\n```\n")
    return "\n".join(parts)


def help_of(*words: str) -> str:
    """What `flexmoe WORDS --help` prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue().strip()


def front_door() -> str:
    """A row for each name that `import flexmoe_jax as fm` gives, with the first line of its documentation."""
    rows = ["| `fm.` | does | documented as |", "|---|---|---|"]
    for name in flexmoe_jax.__all__:
        thing = getattr(flexmoe_jax, name)
        first = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{name}` | {first} | {{py:obj}}`{thing.__module__}.{name}` |")
    return "\n".join(rows) + "\n"
