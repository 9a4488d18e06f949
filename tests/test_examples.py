"""Every example runs on a tiny quickstart, prints what its first lines promise, and says how to run it."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.tiny import write_documents

pytestmark = pytest.mark.torch
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def clone(tiny_quickstart, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with a tiny runs/quickstart, in which the test runs."""
    shutil.copytree(tiny_quickstart, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *argv: str) -> list[str]:
    """The lines that the example prints, with the file's own folder on the path as Python puts it there."""
    finished = subprocess.run([sys.executable, EXAMPLES / name, *argv], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()


def promised(name: str) -> list[str]:
    """The lines that the example's docstring says it prints: the last block that is set off."""
    text = (EXAMPLES / name).read_text().split('"""')[1]
    assert f"python examples/{name}" in text
    return [line.strip() for line in text.rstrip().rpartition(":\n\n")[2].splitlines()]


def without_figures(lines: list[str]) -> list[str]:
    """Numbers replaced, and what a model wrote left out: it differs between the tiny model and the quickstart's."""
    return [re.sub(r"\d[\d.]*", "#", re.sub(r": (\.\.\.|['\"].*)$", ":", line)) for line in lines]


def test_every_example_is_tested_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', pathlib.Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_two_owners_are_trained_merged_and_asked(clone):
    lines = run("train_two_owners.py", "--steps", "3")
    assert without_figures(lines) == without_figures(promised("train_two_owners.py"))
    assert (clone / "runs" / "two_owners" / "news" / "run" / "package").is_dir()


def test_an_owner_leaves_and_every_check_passes(clone):
    lines = run("opt_out_and_verify.py")
    assert without_figures(lines) == without_figures(promised("opt_out_and_verify.py"))


def test_a_folder_of_ones_own_documents_becomes_an_expert(clone):
    write_documents(clone / "mine", "code", count=36, split="documents")
    (clone / "mine" / "LICENSE.txt").write_text("beside files of records, text is passed over")
    lines = run("your_own_documents.py", "mine", "--steps", "3")
    assert without_figures(lines) == without_figures(promised("your_own_documents.py"))
    assert lines[0] == "32 documents to train on, 4 held out"
