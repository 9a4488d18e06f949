"""The role pages: their commands run, in the order of the pages, and print what the pages show.

A page shows what the quickstart's model gives; the test runs it on a tiny one. A line of the page is therefore compared
after numbers and digests are replaced; white space and empty lines do not count, and `...` stands for any number of
lines. All output of a command counts, stderr included. `|| echo "exit code $?"` shows the exit code of a command that
refuses; every other command must succeed. A `flexmoe` command runs in this process and gets the arguments of `FASTER`
besides (tests/tiny.py).
"""

import contextlib
import io
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from flexmoe_jax.cli.main import main
from tests.tiny import FASTER

pytestmark = pytest.mark.torch
REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = REPOSITORY / "docs" / "roles"
# Pages whose commands build on those of the page before.
SESSIONS = (("public",), ("owner", "coordinator", "auditor"), ("researcher",))
SHOWN_CODE = ' || echo "exit code $?"'


def steps(page: str) -> list[tuple[str, list[str]]]:
    """(command, lines below it) of the page's console blocks; a backslash at the end of a line continues a command."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                found.append((" ".join(line[2:].split()), []))
            else:
                found[-1][1].append(line)
    return found


def _same_version(match: re.Match[str]) -> str:
    return match[0].replace(" ", "_") if match[0].startswith("version") else "#"


def normal(line: str) -> str:
    """The line without what differs between two models: numbers, digests, the width of columns.

    Exit codes and the versions of signed packages stay.
    """
    if line.startswith("exit code "):
        return line
    line = re.sub(r"\bversion \d\b|\b[0-9a-f]{12,}\b|[-+]?\d[\d,.]*(e[-+]?\d+)?", _same_version, line)
    return " ".join(re.sub(r"-{3,}", "---", line).split())


def missing(shown: list[str], printed: list[str]) -> str | None:
    """The first line of the page that the output does not have in its place; None if there is none."""
    rest, skipping = [normal(line) for line in printed if line.strip()], False
    for line in filter(str.strip, shown):
        if line.strip() == "...":
            skipping = True
            continue
        at = rest.index(normal(line)) if normal(line) in rest else -1
        if at < 0 or (at > 0 and not skipping):
            return line
        rest, skipping = rest[at + 1 :], False
    return f"(the output goes on with) {rest[0]}" if rest and not skipping else None


def run(command: str) -> list[str]:
    """The lines that a command of a page prints."""
    bare, shows_code, _ = command.partition(SHOWN_CODE)
    verb, *argv = shlex.split(bare)
    if verb == "flexmoe":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main([*argv, *FASTER.get(argv[0], ())])
        output = printed.getvalue()
    else:
        finished = subprocess.run(["bash", "-c", bare], stdout=-1, stderr=subprocess.STDOUT, text=True, check=False)
        code, output = finished.returncode, finished.stdout
    assert bool(code) == bool(shows_code), f"$ {command}\nended with exit code {code}:\n{output}"
    return output.splitlines() + ([f"exit code {code}"] if shows_code else [])


@pytest.fixture
def clone(tiny_quickstart, tmp_path) -> pathlib.Path:
    """What a clone of the repository holds after `make quickstart`, of a tiny model."""
    shutil.copytree(tiny_quickstart, tmp_path, dirs_exist_ok=True)
    for name in ("experiments", "results"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("pages", SESSIONS, ids=" ".join)
def test_the_commands_of_a_page_print_what_it_shows(pages, clone, monkeypatch):
    for page in pages:
        monkeypatch.chdir(clone)
        for command, shown in steps((PAGES / f"{page}.md").read_text()):
            if command.startswith("cd "):
                monkeypatch.chdir(command.removeprefix("cd "))
                continue
            printed = run(command)
            wrong, output = missing(shown, printed), "\n".join(printed)
            assert wrong is None, f"{page}: $ {command}\ndoes not print in its place: {wrong}\nbut prints:\n{output}"


def test_every_page_is_run():
    assert {page for pages in SESSIONS for page in pages} == {path.stem for path in PAGES.glob("*.md")}


def test_the_rule_finds_lines_that_are_missing_changed_or_out_of_order():
    printed = ["merged: public, news; top-2", "domain  bits/byte", "-----------", "news        2.541", "", "done"]
    assert missing(printed, printed) is None
    assert missing(["merged: public, news; top-4", "...", "news 3.1", "", "done"], printed) is None
    assert missing(["..."], printed) is None
    assert missing([], printed) == "(the output goes on with) merged: public, news; top#"
    assert missing(["merged: public, math; top-2", "..."], printed) == "merged: public, math; top-2"
    assert missing(["domain  bits/byte", "..."], printed) == "domain  bits/byte"
    assert missing(["...", "done", "news 2.5"], printed) == "news 2.5"
    assert missing(["exit code 1"], ["exit code 7"]) == "exit code 1"
    assert missing(["signed as version 1"], ["signed as version 2"]) == "signed as version 1"
    assert steps("```console\n$ a \\\n    b\nc\n$ d\n```\n```\n$ e\n```\n") == [("a b", ["c"]), ("d", [])]


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_is_short_and_says_where_it_is_run(page):
    text = page.read_text()
    assert 60 <= len(text.splitlines()) <= 90
    assert "make quickstart" in text
