"""What the documentation names exists: links, files, commands, options, keys; and its evidence is that of results/."""

import contextlib
import functools
import io
import pathlib
import re
import runpy
from collections.abc import Iterator

import pytest

from flexmoe_jax.cli.keys import VERBS as CONFIGURED
from flexmoe_jax.cli.keys import configuration
from flexmoe_jax.cli.main import VERBS, main
from flexmoe_jax.experiment import keys_of

ROOT = pathlib.Path(__file__).parents[1]
WRITTEN = ("_build", "_generated", "api")  # folders that the build writes
PAGES = [ROOT / "README.md", ROOT / "BUILD.md"]
PAGES += sorted(page for page in ROOT.glob("docs/**/*.md") if not {*WRITTEN} & {*page.parts})
KEYS = {"config.md": "train", "study.md": "reproduce"}  # pages whose headings the build writes
CODE = re.compile(r"^```.*?^```|^(?: {4}[^\n]*\n)+|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)")
FILE = re.compile(r"(?<![\w./-])(?:benchmarks|docs|examples|experiments|flexmoe_jax|launch|results|tests)/[\w./-]*\w")
COMMAND = re.compile(r"\bflexmoe ([a-z][a-z-]+)([^\n`#|]*)")


def names(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    if page.name in KEYS:
        headings += keys_of(configuration(KEYS[page.name]))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: pathlib.Path) -> Iterator[str]:
    """Code spans and blocks, continued lines joined."""
    for match in CODE.finditer(page.read_text(encoding="utf-8")):
        yield match[0].replace("\\\n", " ")


@functools.cache
def help_of(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def strange_words(verb: str, rest: str) -> list[str]:
    """The options, keys and actions after `flexmoe VERB` that there are not."""
    if verb not in VERBS:
        return [verb]
    words = [verb]
    if verb == "data" and rest.split():
        words.append(rest.split()[0])
    known = {*re.findall(r"--[a-z-]+", help_of(*words)), "--help"}
    keys = keys_of(configuration(verb)) if verb in CONFIGURED else {}
    found = re.findall(r"(?<!\S)(--[a-z-]+)(?:\.([\w.]+))?", rest)
    return [
        f"{option}.{key}" if key else option for option, key in found if option not in known or key not in {"", *keys}
    ]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_are_named_exist(page):
    named = {name for name in FILE.findall(page.read_text(encoding="utf-8")) if not {*WRITTEN} & {*name.split("/")}}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_options_that_are_named_exist(page):
    every = {option for verb in VERBS for option in re.findall(r"--[a-z-]+", help_of(verb))}
    targets = " ".join(re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
    for text in code(page):
        for verb, rest in COMMAND.findall(text):
            assert strange_words(verb, rest) == [], f"flexmoe {verb}{rest}"
        if option := re.match(r"`(--[a-z-]+)", text):
            assert option[1] in every | {"--version", "--help"}, text
        for target in re.findall(r"(?<![\w-])make ([a-z][\w-]*)", text):
            assert target in targets, text


def test_a_renamed_verb_an_unknown_option_and_an_unknown_key_are_found():
    assert strange_words("classify", " data") == ["classify"]
    assert strange_words("merge", " --public a --expert b") == ["--expert"]
    assert strange_words("data", " build --out mix --shares 2") == ["--shares"]
    assert strange_words("train", " --config=x.py:news --config.lr=1 --config.optimizer.lr=2") == ["--config.lr"]


def test_tables_and_figures_are_those_of_the_results():
    pytest.importorskip("matplotlib")
    evidence = runpy.run_path(str(ROOT / "docs" / "evidence.py"))
    values = evidence["values"]()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert evidence["filled"](text, values) == text, f"{names(page)} is not up to date: run `make docs`"
    for name, svg in evidence["drawings"]().items():
        kept = (ROOT / "docs" / "evidence" / f"{name}.svg").read_text(encoding="utf-8")
        assert re.findall(r">([^<>]+)</text>", kept) == re.findall(r">([^<>]+)</text>", svg), name
