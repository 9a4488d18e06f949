"""What the verbs share: parsers with an example, paths that are checked, JSON output, text tables."""

import argparse
import dataclasses
import json
import os
import re
import textwrap
from collections.abc import Collection, Container, Sequence
from typing import TYPE_CHECKING, Any

from flexmoe_jax.errors import ConfigError, did_you_mean, printable

if TYPE_CHECKING:
    from flexmoe_jax.data.records import Fields

# Words of earlier versions: "VERB" or "VERB --option", and what to write instead.
RENAMED = {
    "classify": "train-classifier",
    "proxies": "find-proxies",
    "merge --expert": "--package",
    "replace --expert": "--package",
    "eval --suite": "flexmoe eval-suite MODEL --tasks",
    "eval --list-suites": "flexmoe eval-suite --list",
    "eval --tasks": "flexmoe eval-harness MODEL --tasks",
}
# Keys of a configuration that are paths, and whether they must exist.
_PATH_KEYS = {"data": True, "public_data": True, "public": True, "domain_vector": True, "expert": True}
_PATH_KEYS |= {"tokenizer": False, "out": False}
_KEY_PREFIX = "--config."


def suggest(word: str, known: Collection[str], where: str = "") -> str:
    """A hint for an unknown verb, or option of the verb `where`: its new name, else the closest of `known`."""
    new = RENAMED.get(f"{where} {word}".strip())
    return f"did you mean {new!r}?" if new else did_you_mean(word, known)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and names unknown options before it misses others.

    With a configuration class, `config`, it also takes `--config=FILE[:ARG]` and `--config.KEY=VALUE`.
    """

    config: type | None = None

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; `overrides` are the `KEY=VALUE` of the configuration. Wrong usage exits with code 2."""
        overrides = [word for word in argv if self._is_key(word)]
        rest = [word for word in argv if not self._is_key(word)]
        self._refuse_unknown(rest)
        for word in overrides:
            if "=" not in word:
                self.error(f"{word} has no value: write {word}=VALUE")
        if self.config and sum(word.partition("=")[0] == "--config" for word in rest) > 1:
            self.error("--config is given more than once: give one experiment file")
        args = self.parse_args(rest)
        args.overrides = [word.removeprefix(_KEY_PREFIX) for word in overrides]
        return args

    def _is_key(self, word: str) -> bool:
        return self.config is not None and word.startswith(_KEY_PREFIX)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        verb, known = self.prog.removeprefix("flexmoe "), set(self._option_string_actions) - {"-h"}
        options = [word.partition("=")[0] for word in (words[: words.index("--")] if "--" in words else words)]
        unknown = [o for o in options if re.fullmatch(r"--?[a-zA-Z]\S*", o) and o not in self._option_string_actions]
        if not unknown:
            return
        option = min(unknown, key=lambda o: f"{verb} {o}" not in RENAMED)  # a renamed one explains the most
        ending = f".{option.lstrip('-')}"
        keys = [repr(f"{_KEY_PREFIX}{name}") for name in _leaves(self.config) if f".{name}".endswith(ending)]
        hint = f"did you mean {' or '.join(keys)}?" if keys else suggest(option, known, verb)
        self.error(f"unknown option {option}: {hint}")


def parser(verb: str, text: str, example: str, config: type | None = None) -> Parser:
    """A parser for `verb` with an `example`; `config` is the configuration class of its experiment file, if any."""
    epilog = f"example:\n  {example}"
    if config is not None:
        epilog = f"{_key_list(config, verb)}\n\n{epilog}"
    style = argparse.RawDescriptionHelpFormatter
    p = Parser(prog=f"flexmoe {verb}", description=text, epilog=epilog, formatter_class=style, allow_abbrev=False)
    if config is not None:
        p.config = config
        what = "experiment file, and the argument of its get_config"
        p.add_argument("--config", required=True, action=LocalPath, metavar="FILE[:ARG]", help=what)
        p.add_argument("--config.KEY=VALUE", action="store_true", help="override a key; several may be given")
    return p


class LocalPath(argparse.Action):
    """A path on this machine, which may be new. `many` collects the values of an option that is given repeatedly."""

    must_exist = False

    def __init__(self, option_strings: Sequence[str], dest: str, many: bool = False, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.many = many

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is not None:  # an optional positional that is not given
            check_path(values, option or self.dest, (self.help or "").partition(";")[0], self.must_exist)
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, values] if self.many else values)


class ExistingPath(LocalPath):
    """A path on this machine that must exist."""

    must_exist = True


def check_path(text: str, option: str, what: str, must_exist: bool) -> None:
    """Refuses a path that is not on this machine, or that must exist and does not; `what` describes it to the user."""
    if not text:
        raise ConfigError(f"{option} is empty", "give a path; a variable of the shell may be unset")
    if re.match(r"[a-zA-Z][\w+.-]*://", text):
        raise ConfigError(
            f"{option} is {text!r}, and only paths on this machine are read and written",
            "copy it to a local disk first, or mount it as a folder",
        )
    if text.startswith("~"):
        raise ConfigError(
            f"{option} is {text!r}: the shell did not expand the '~'",
            'write "$HOME" in its place (the shell expands ~ only at the start of a word that is not quoted)',
        )
    if must_exist and not _exists(text):
        remedy = f"{option}: {what or 'give a path'}; relative paths start at {os.getcwd()}"
        raise ConfigError(f"{text} does not exist", remedy)


def by_owner(option: str, items: Sequence[str], what: str) -> dict[str, str]:
    """`OWNER=PATH` of each item -> {owner: path}; refuses an owner given twice, and a path that does not exist."""
    paths: dict[str, str] = {}
    for item in items:
        owner, equals, path = item.partition("=")
        if not equals or not owner:
            raise ConfigError(f"{option} {item!r} names no owner", f"write {option} OWNER=PATH")
        if owner in paths:
            raise ConfigError(f"{option} is given twice for {owner!r}: {paths[owner]} and {path}", "give it once")
        check_path(path, option, what, must_exist=True)
        paths[owner] = path
    return paths


def check_paths(config: Any, known: Container[str] = ()) -> None:
    """Refuses a configuration whose paths are not on this machine, or whose inputs do not exist.

    Names that are `known` stand for inputs that are fetched.
    """
    from flexmoe_jax.mapping import field_docs

    docs = field_docs(type(config))
    for name, must_exist in _PATH_KEYS.items():
        value: Any = getattr(config, name, None)
        if value != getattr(type(config), name, None) and value not in known:  # the former is its default
            what = docs.get(name, "").partition(". ")[0].rstrip(".")
            sources = [source.path for source in getattr(config, "sources", {}).values() if source.key == name]
            for path in sources or [value]:
                check_path(path, f"config.{name}", what, must_exist)


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")


def add_fields(p: argparse.ArgumentParser) -> None:
    what = "field, or Parquet column, that holds a document's"
    p.add_argument("--text-field", default="text", metavar="NAME", help=f"{what} text; text by default")
    p.add_argument("--id-field", default="id", metavar="NAME", help=f"{what} identifier; id by default")


def fields_of(args: argparse.Namespace) -> "Fields":
    """The options of `add_fields`."""
    from flexmoe_jax.data.records import Fields

    return Fields(args.text_field, args.id_field)


def emit(result: Any, lines: Sequence[str], as_json: bool) -> None:
    """Prints `result` as JSON, or `lines` for people, in which nothing that a stranger wrote acts in the terminal.

    NaN and infinity, which JSON does not have, are null.
    """
    if as_json:
        print(json.dumps(json_values(result), indent=2, allow_nan=False))
    else:
        print("\n".join(map(printable, lines)))


def json_values(result: Any) -> Any:
    """`result` in JSON's types: dataclasses are objects, NaN and infinity are None."""
    return json.loads(json.dumps(result, default=dataclasses.asdict), parse_constant=lambda _: None)


def table(header: list[str], rows: list[list]) -> list[str]:
    """Aligned text lines: first column left, the others right; floats with three decimals."""
    cells = [header, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in cells]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def names(text: str | None) -> list[str] | None:
    """`public,news` -> ["public", "news"]."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def shown(value: object) -> str:
    """A key's value as it is written on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it may exist; whoever reads it says what is wrong
        return True
    return True


def _leaves(config: type | None) -> dict[str, Any]:
    """{dotted name: default} of the keys of a configuration class, without sections."""
    from flexmoe_jax.experiment import keys_of

    return {} if config is None else {n: key.default for n, key in keys_of(config).items() if not key.is_section}


def _key_list(config: type, verb: str) -> str:
    """The keys with their defaults, for a verb's help."""
    from flexmoe_jax.experiment import REQUIRED

    leaves = _leaves(config)
    words = {name: name if default is REQUIRED else f"{name}={shown(default)}" for name, default in leaves.items()}
    groups = [
        [words[name] for name in leaves if words[name] == name and "." not in name],
        [words[name] for name in leaves if words[name] != name and "." not in name],
        [words[name] for name in leaves if "." in name],  # of sections
    ]
    wrap = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    required, optional, nested = (wrap.fill("  ".join(group)) for group in groups)
    return (
        f"keys of the configuration, which `flexmoe keys {verb}` explains; without a default:\n{required}\n"
        f"with their defaults:\n{optional}\n{nested}"
    )
