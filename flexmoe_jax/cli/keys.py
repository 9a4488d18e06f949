"""`flexmoe keys`: every key of a configuration with its type, default and meaning."""

import textwrap

from flexmoe_jax.cli.common import add_json, emit, parser, shown
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import REQUIRED, Key, keys_of, suggest_key

VERBS = ("train", "pretrain", "lr-find", "plan", "reproduce")


def keys(argv: list[str]) -> int:
    """Prints all keys of a verb's configuration, one key, or one section."""
    p = parser("keys", "Explains the keys of a configuration.", "flexmoe keys train router_scale")
    p.add_argument(
        "verb", nargs="?", default="train", choices=VERBS, help="the verb that reads the keys; train by default"
    )
    p.add_argument("key", nargs="?", help="one key (optimizer.lr) or one section (optimizer); all by default")
    add_json(p)
    args = p.parse(argv)
    found = keys_of(configuration(args.verb))
    if args.key:
        chosen = {n: key for n, key in found.items() if n == args.key or n.startswith(f"{args.key}.")}
        if not chosen:
            raise ConfigError(f"flexmoe {args.verb} has no key {args.key!r}", suggest_key(args.key, found))
        found = chosen
    lines: list[str] = []
    for key in found.values():
        lines += [*([""] if lines else []), f"{key.name}  ({', '.join(_kind(key))})"]
        lines += textwrap.wrap(key.text, 110, initial_indent="    ", subsequent_indent="    ")
    emit({"verb": args.verb, "keys": [_values(key) for key in found.values()]}, lines, args.json)
    return 0


def configuration(verb: str) -> type:
    """The configuration class of a verb that is driven by an experiment file."""
    if verb != "reproduce":
        return RunConfig
    from flexmoe_jax.study.config import StudyConfig

    return StudyConfig


def markdown(config: type) -> str:
    """The keys of the configuration class `config` in Markdown, a heading for each, for the documentation."""
    parts = []
    for key in keys_of(config).values():
        parts.append(f"## `{key.name}`\n\n*{', '.join(_kind(key))}*\n\n{' '.join(key.text.split())}\n")
    return "\n".join(parts)


def _kind(key: Key) -> list[str]:
    """What to say of a key beside its meaning: its type, and its default or that it has none."""
    kind = "section" if key.is_section else f"{key.kind.__name__}{' or none' if key.optional else ''}"
    if key.default is REQUIRED:
        return [kind, "required"]
    return [kind] if key.is_section else [kind, f"default {shown(key.default)}"]


def _values(key: Key) -> dict:
    """A key as JSON values; a section has no default of its own."""
    required = key.default is REQUIRED
    default = None if required or key.is_section else key.default
    kind = "section" if key.is_section else key.kind.__name__
    values = {"key": key.name, "type": kind, "optional": key.optional, "required": required}
    return values | {"default": default, "text": " ".join(key.text.split())}
