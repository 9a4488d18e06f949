"""Every merge says what joining gives or costs; `flexmoe eval-joining` says the same with an owner's own text."""

import json
import pathlib
import subprocess
import sys

import pytest

import flexmoe_jax
from flexmoe_jax.cli.main import main
from tests.tiny import contents

OWNERS = ("code", "news")
LIMITS = ("--max-bytes", "900", "--seq-len", "16")


def run(capsys, *argv) -> dict:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def merge_words(world, out, order=OWNERS) -> list[str]:
    packages = [word for name in order for word in ("--package", str(world / name / "run" / "package"))]
    return ["merge", "--public", str(world / "public" / "run" / "model"), *packages, "--top-k", "2", "--out", str(out)]


def heldout(world, *names) -> list[str]:
    return [word for name in names for word in ("--heldout", f"{name}={world / name / 'data'}")]


@pytest.fixture(scope="module")
def merged(world, tmp_path_factory) -> pathlib.Path:
    """A merged model, with what its merge reported beside it."""
    out = tmp_path_factory.mktemp("merged") / "model"
    given = [*heldout(world, "public", "news"), *LIMITS, "--report", str(out.parent / "joining.json")]
    assert main([*merge_words(world, out), *given]) == 0
    return out


@pytest.fixture(scope="module")
def report(merged) -> dict:
    return json.loads((merged.parent / "joining.json").read_text())


@pytest.mark.parametrize(
    ("owner", "column", "experts"),
    [
        ("news", "public_alone", "public"),
        ("news", "own_hybrid", "public,news"),
        ("news", "merged", "public,code,news"),
        ("public", "public_alone", "public"),
        ("public", "own_hybrid", "public"),
        ("public", "merged", "public,code,news"),
    ],
)
def test_the_numbers_are_those_of_flexmoe_eval(world, merged, report, capsys, owner, column, experts):
    words = ["eval", merged, "--data", world / owner / "data", *LIMITS, "--experts", experts]
    [expected] = run(capsys, *words)["domains"].values()
    row = report["owners"][owner]
    assert row[column] == expected["bits_per_byte"]
    assert (row["documents"], row["bytes"]) == (expected["documents"], expected["bytes"])
    assert row["gain"]["value"] == row["public_alone"] - row["merged"]
    assert row["regret"]["value"] == row["merged"] - row["own_hybrid"]


def test_an_owner_without_text_is_not_measured_and_its_command_measures_it(world, merged, report, capsys):
    row = report["owners"]["code"]
    assert row == {"measured": False, "command": f"flexmoe eval-joining {merged} --heldout code=FOLDER"}
    words = row["command"].replace("FOLDER", str(world / "code" / "data")).split()[1:]
    measured = run(capsys, *words)["owners"]
    assert (list(measured), measured["code"]["measured"]) == (["code"], True)


def test_an_owner_measures_what_the_coordinator_would(world, merged, report, capsys, tmp_path):
    own = tmp_path / "own.json"
    printed = run(capsys, "eval-joining", merged, *heldout(world, "news"), *LIMITS, "--report", own)
    assert printed == {"model": str(merged), **json.loads(own.read_text())}
    assert list(printed["owners"]) == ["news"]
    assert printed["owners"]["news"] == report["owners"]["news"]
    words = {word for path in (world / "news" / "data").glob("*.jsonl") for word in path.read_text().split()}
    assert "minister" in words
    assert not words & {*own.read_text().replace('"', " ").split()}
    assert "/" not in own.read_text()  # nor where the owner keeps its text


def test_a_merge_that_measures_makes_the_same_bytes_and_order_does_not_matter(world, merged, report, capsys, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    said = run(capsys, *merge_words(world, plain))
    given = [*heldout(world, "news", "public"), *LIMITS, "--report", str(tmp_path / "joining.json")]
    again = run(capsys, *merge_words(world, other, OWNERS[::-1]), *given)
    assert contents(plain) == contents(other) == contents(merged)
    assert [row["measured"] for row in said["joining"]["owners"].values()] == [False] * 3
    assert again["digest"] == said["digest"] == report["digest"]
    text = (tmp_path / "joining.json").read_text()
    assert text.replace(str(other), str(merged)) == (merged.parent / "joining.json").read_text()
    assert again["joining"] == json.loads(text)


def test_a_merge_with_text_of_some_says_for_whom_it_was_not_measured(world, capsys, tmp_path):
    assert main([*merge_words(world, tmp_path / "model"), *heldout(world, "news"), *LIMITS]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{tmp_path / 'model'} is made; scoring held-out text of news\n"
    assert printed.out.splitlines()[-2:] == [
        "what joining gives or costs is not measured for public, code; each, with its own text:",
        f"  flexmoe eval-joining {tmp_path / 'model'} --heldout OWNER=FOLDER",
    ]


def test_every_merge_says_for_whom_it_was_not_measured(world, capsys, tmp_path):
    assert main(merge_words(world, tmp_path / "model")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{tmp_path / 'model'}: public, code, news; top-2",
        "what joining gives or costs is not measured for public, code, news; each, with its own text:",
        f"  flexmoe eval-joining {tmp_path / 'model'} --heldout OWNER=FOLDER",
    ]


def test_a_merge_without_text_computes_nothing(world, tmp_path):
    code = (
        "import sys; from flexmoe_jax.cli.main import main; code = main(sys.argv[1:]); assert 'jax' not in sys.modules"
    )
    words = [sys.executable, "-c", f"{code}; sys.exit(code)", *merge_words(world, tmp_path / "model")]
    subprocess.run(words, check=True, cwd=pathlib.Path(flexmoe_jax.__file__).parents[1])


def test_the_table_shows_signs_and_says_what_the_documents_do_not_tell(world, merged, report, capsys):
    assert main(["eval-joining", str(merged), *heldout(world, "news", "public"), *LIMITS]) == 0
    printed = capsys.readouterr().out
    for name in ("public", "news"):
        row = report["owners"][name]
        [cells] = [line.split() for line in printed.splitlines() if line.startswith(name)]
        numbers = [row[key] for key in ("public_alone", "own_hybrid", "merged")]
        numbers = [f"{value:.3f}" for value in numbers]
        for key in ("gain", "regret"):
            numbers += [f"{row[key]['value']:+.3f}", f"{row[key]['half_width']:.3f}"]
            listed = f"{key} of {name}" in printed.partition("not told from 0 by these documents: ")[2]
            assert listed == row[key]["includes_zero"]
        assert cells == [name, str(row["documents"]), *numbers]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heldout", "nwes={news}"], "did you mean 'news'"),
        (["--heldout", "news={news}", "--heldout", "news={code}"], "--heldout is given twice for 'news'"),
        (["--heldout", "{news}"], "names no owner"),
        (["--heldout", "news={empty}"], "no document of the split 'heldout'"),
        (["--heldout", "news={news}", "--seq-len", "33"], "the model's max_seq_len is 32"),
        (["--report", "{report}"], "already exists"),
        (["--report", "nowhere/joining.json"], "there is no folder nowhere"),
        (["--report", "{inside}/joining.json"], "is inside"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(world, merged, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    places = {name: world / name / "data" for name in OWNERS}
    places |= {"empty": tmp_path / "empty", "report": merged.parent / "joining.json"}
    places["empty"].mkdir()
    (places["empty"] / "train.jsonl").write_text('{"text": "a"}\n')
    before = sorted(tmp_path.rglob("*"))
    measured = ["eval-joining", str(merged), *heldout(world, "public")]
    for verb, inside in ((merge_words(world, "model"), world / "news" / "run" / "package"), (measured, merged)):
        assert main([*verb, *(word.format(inside=inside, **places) for word in words)]) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert "remedy: " in printed
        assert sorted(tmp_path.rglob("*")) == before
        assert not (inside / "joining.json").exists()
