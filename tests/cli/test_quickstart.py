"""The quickstart, at a few steps: every artifact, the opt-out proof, and that no owner's process leaves its folder."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.cli.quickstart import _write_page
from flexmoe_jax.files import list_files, sha256_file

pytestmark = pytest.mark.torch
OWNERS = ("code", "math", "news")
OVERRIDES = ("steps=4", "batch_size=4", "seq_len=64", "save_every=2")

# Python runs `sitecustomize` before anything else: every process of the quickstart then notes each file it opens.
AUDIT = """
import os, sys
_log = os.open(os.environ["FLEXMOE_TEST_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_home, _busy = os.getcwd(), []
def _note(event, args):
    if event == "open" and not _busy and isinstance(args[0], (str, bytes)):
        _busy.append(1)
        os.write(_log, (_home + "\\t" + os.path.realpath(os.fsdecode(args[0])) + "\\n").encode())
        _busy.clear()
sys.addaudithook(_note)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> pathlib.Path:
    """A finished quickstart of four steps per training, with its audit log beside it."""
    pytest.importorskip("sentence_transformers")
    root = tmp_path_factory.mktemp("quickstart")
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(AUDIT)
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "quickstart", "--out", "out", "--eval-bytes", "3000"]
    command += ["--embed-count", "16"]
    command += [part for override in OVERRIDES for part in ("--override", override)]
    environment = {**os.environ, "PYTHONPATH": str(root / "hook"), "FLEXMOE_TEST_AUDIT": str(root / "audit.log")}
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (root / "stdout.txt").write_text(finished.stdout)
    return root


def opened_by(root: pathlib.Path) -> dict[pathlib.Path, set[pathlib.Path]]:
    """{working directory of a process: files it opened}."""
    opened = collections.defaultdict(set)
    for line in (root / "audit.log").read_text().splitlines():
        home, path = line.split("\t")
        opened[pathlib.Path(home)].add(pathlib.Path(path))
    return opened


def test_no_owner_process_opens_a_file_of_another_party(done):
    out = (done / "out").resolve()
    opened = opened_by(done)
    for owner in OWNERS:
        home = out / "owners" / owner
        mine = opened[home]
        assert home / "data" / "train.jsonl" in mine  # the hook works, and the owner's processes did run here
        assert home / "release" / "model" / "model.json" in mine
        outside = {path for path in mine if path.is_relative_to(out) and not path.is_relative_to(home)}
        assert not outside, owner


def test_no_process_but_the_owners_opens_private_training_text(done):
    """The coordinator makes the mix, so it writes and copies the text; the public trainer must not see it at all."""
    out = (done / "out").resolve()
    seen = opened_by(done)[out / "public"]
    assert out / "public" / "data" / "train.jsonl" in seen
    assert not {path for path in seen if path.is_relative_to(out) and not path.is_relative_to(out / "public")}


def test_results_have_every_row_and_column(done):
    results = json.loads((done / "out" / "results.json").read_text())
    bits = results["bits_per_byte"]
    assert set(bits) == {
        "public alone",
        "hybrid code",
        "hybrid math",
        "hybrid news",
        "merged",
        "uniform mixing",
        "merged without news",
    }
    for row in bits.values():
        assert set(row) == {"public", *OWNERS, "mean"}
        assert all(0 < value < 20 for value in row.values())
        assert row["mean"] == pytest.approx(np.mean([row[domain] for domain in ("public", *OWNERS)]))
    for domain in results["routed_share"].values():
        for layer in (domain["share"], *domain["layers"]):
            assert set(layer) == {"public", *OWNERS}
            assert sum(layer.values()) == pytest.approx(1, abs=1e-5)
    assert set(results["samples"]) == {"public", *OWNERS}


def test_the_page_holds_the_results_and_is_named_last(done):
    page, results = ((done / "out" / name).read_text() for name in ("report.html", "results.json"))
    for name, row in json.loads(results)["bits_per_byte"].items():
        cells = "".join(f"<td>{row[column]:.3f}</td>" for column in ("public", *OWNERS, "mean"))
        assert f"<td>{name}</td>{cells}</tr>" in page
    for owner in OWNERS:
        assert f"<td>out/owners/{owner}</td>" in page
    assert "<strong>different digests" not in page
    assert (done / "stdout.txt").read_text().splitlines()[-1] == "Page: out/report.html"


def test_without_the_extra_it_says_how_to_get_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    line = _write_page(tmp_path / "report.html", {}, [])
    assert line.startswith("No page: the report needs jinja2. pip install 'flexmoe_jax[report]'")
    assert not [*tmp_path.iterdir()]


def test_without_news_equals_a_model_that_never_had_it(done):
    """Files outside the journal, and logits, byte for byte."""
    out = done / "out"
    without, never = out / "model_without_news", out / "model_never_news"
    files = {path for path in list_files(without)[0] if path != "journal.jsonl"}
    assert files == {path for path in list_files(never)[0] if path != "journal.jsonl"}
    assert all(sha256_file(without / path) == sha256_file(never / path) for path in files)
    tokens = np.arange(200).reshape(2, 100)
    full = fm.load(out / "model")
    expected = np.asarray(fm.load(never).logits(tokens))
    assert np.array_equal(full.without("news").logits(tokens), expected)
    assert np.array_equal(fm.load(without).logits(tokens), expected)
    assert not np.array_equal(full.logits(tokens), expected)


def test_the_library_example_of_the_readme(done):
    model = fm.load(done / "out" / "model")
    assert model.experts == ("public", *OWNERS)
    text = model.generate("The answer is", experts=("public", "math"), max_new_tokens=8)
    assert text == model.select(("math", "public")).generate("The answer is", max_new_tokens=8)
    assert model.logits([1, 2, 3]).shape == (3, 8192)


def test_private_text_is_not_in_what_travels(done):
    """No 13-token window of an owner's documents in its package, nor in its metrics: text, token ids or their bytes."""
    from flexmoe_jax.data.sources import read_documents

    home = done / "out" / "owners" / "news"
    travels = b"".join(path.read_bytes() for path in sorted((home / "run" / "package").rglob("*")) if path.is_file())
    travels += (home / "run" / "metrics.jsonl").read_bytes() + (home / "domain.json").read_bytes()
    tokenizer = fm.load(done / "out" / "model").tokenizer
    for document in list(read_documents(home / "data"))[:50]:
        ids = tokenizer.encode(document.text)
        for begin in range(0, len(ids) - 13, 13):
            window = ids[begin : begin + 13]
            assert tokenizer.decode(window).encode() not in travels
            for dtype in ("<u2", "<i4", "<i8"):
                assert np.array(window, dtype).tobytes() not in travels


def test_every_step_is_shown_as_a_command(done):
    shown = [line for line in (done / "stdout.txt").read_text().splitlines() if line.startswith("$ ")]
    verbs = [line.split("flexmoe ")[1].split()[0] for line in shown]
    assert verbs == ["data", "embed", "pretrain", *["embed", "train"] * 3, "merge", "merge", "optout"]


def test_the_merge_says_what_joining_gives_and_costs_as_the_table_does(done):
    bits = json.loads((done / "out" / "results.json").read_text())["bits_per_byte"]
    shown = (done / "stdout.txt").read_text().partition("own hybrid")[2].splitlines()
    rows = {line.split()[0]: line.split() for line in shown[2:6]}
    assert list(rows) == ["public", *OWNERS]
    for name, row in rows.items():
        hybrid = "public alone" if name == "public" else f"hybrid {name}"
        public, own, merged = (bits[model][name] for model in ("public alone", hybrid, "merged"))
        assert row[2:6] == [f"{public:.3f}", f"{own:.3f}", f"{merged:.3f}", f"{public - merged:+.3f}"]
        assert row[7] == f"{merged - own:+.3f}"


def test_as_json_the_results_are_all_that_stdout_holds(done):
    """A second run, which trains nothing; the commands it shows go to stderr."""
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "quickstart", "--out", "out", "--eval-bytes", "3000"]
    command += [part for override in OVERRIDES for part in ("--override", override)]
    finished = subprocess.run([*command, "--json"], cwd=done, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout) == json.loads((done / "out" / "results.json").read_text())
    assert "$ flexmoe merge --public" in finished.stderr


def test_running_again_keeps_what_is_trained(done):
    package = done / "out" / "owners" / "math" / "run" / "package" / "manifest.json"
    before = package.stat().st_mtime_ns
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "quickstart", "--out", "out", "--eval-bytes", "3000"]
    command += ["--override", "steps=5"]
    finished = subprocess.run(command, cwd=done, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "config.steps: 4 != 5" in finished.stderr
    assert package.stat().st_mtime_ns == before
