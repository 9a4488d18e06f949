"""The page of a study whose figures are known: everything is there, nothing is fetched, nothing is taken for markup."""

import json
import re

import pytest

from flexmoe_jax.cli.main import main
from flexmoe_jax.study.page import read_study, render
from flexmoe_jax.study.train import METHOD

DOMAINS = ("public", "code", "news", "code + news")
SYSTEMS = {
    METHOD: 1.5,
    "public": 2.0,
    "without code": 1.75,
    "without news": 1.7,
    "BTM": 1.6,
    "unrestricted 2x": 1.4,
    "frozen trunk code": 1.65,
}


def cell(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.02}


@pytest.fixture
def results() -> dict:
    rows = {name: {d: cell(bits) for d in (*DOMAINS, "mean")} for name, bits in SYSTEMS.items()}
    curve = [[0, 5.0], [10, 4.0]]
    runs = ("public", f"{METHOD}_code", f"{METHOD}_news", "dense_code", "dense_news", "unrestricted_1x")
    return {
        "config": {"domains": "news,code", "seeds": 2, "out": "runs/reproduction-small", "model": {"d_model": 8}},
        "documents": {d: {"documents": 3, "bytes": 4321} for d in DOMAINS},
        "bits_per_byte": rows,
        "against_method": {
            name: {"mean": cell(bits - SYSTEMS[METHOD])} for name, bits in SYSTEMS.items() if name != METHOD
        },
        "choice": {name: {"mean": cell(0.5)} for name in SYSTEMS},
        "forward_flops_per_token": {name: 1e6 if name == "public" else 2e6 for name in SYSTEMS},
        "training_flops_after_public": {METHOD: 1e9, "dense": 2e9, "frozen trunk": 3e9},
        "share": {METHOD: {d: [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]] for d in DOMAINS}},
        "opting_out": [{"code": {"equal": True}, "news": {"equal": True}}],
        "curves": dict.fromkeys(runs, curve),
        "classifiers": {"code": 0.975, "news": 0.9},
    }


SAMPLE = {
    "domain": "news",
    "experts": ["public", "code", "news"],
    "pieces": ["<b>", " rose", "\n"],
    "weights": [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]],
}


def test_every_system_stands_with_its_figures_the_best_first(results):
    page = render(results, [])
    table = re.findall(r"<tr[^>]*><td>(.*?)</td>", page)
    assert table[: len(SYSTEMS)] == sorted(SYSTEMS, key=SYSTEMS.__getitem__)
    row = page[page.index('<tr class="method">') :].split("</tr>")[0]
    assert "1.500" in row
    assert "±0.015" in row  # half of the mean's interval
    assert "2.00x" in row
    assert "1e+09" in row
    assert "3e+09" in page[page.index("<td>frozen trunk code</td>") :].split("</tr>")[0]
    assert "+0.500 <small>+0.490 to +0.520</small>" in page  # public against the method
    assert "code 97.5%" in page
    assert "flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=2" in page


def test_the_page_needs_nothing_from_anywhere(results):
    page = render(results, [SAMPLE])
    assert page.count("<svg") == page.count("</svg>") == 4
    assert not re.search(r"<(script|link|img|iframe)|src=|@import|url\((?!#)", page)
    assert "currentColor" in page
    assert "#010203" not in page


def test_texts_are_shown_and_never_taken_for_markup(results):
    page = render(results, [SAMPLE])
    assert "&lt;b&gt;</span>" in page
    assert 'title="public 0.20, code 0.70, news 0.10"' in page
    results["config"]["<i>"] = "<script>"
    assert "<script>" not in render(results, [SAMPLE])


def test_by_command_from_a_folder_or_a_file(results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.json").write_text(json.dumps([SAMPLE]))
    assert main(["report", str(tmp_path)]) == 0
    assert " rose</span>" in (tmp_path / "report.html").read_text()
    assert main(["report", str(tmp_path / "results.json"), "--out", str(tmp_path / "p.html")]) == 0
    assert " rose</span>" not in (tmp_path / "p.html").read_text()  # published results hold no text
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "nowhere" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    older = json.dumps({key: value for key, value in results.items() if key != "curves"})
    for broken in ("[]", "{}", "x", older):
        (tmp_path / "results.json").write_text(broken)
        assert main(["report", str(tmp_path)]) == 1
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_read_study_gives_no_samples_where_there_are_none(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_study(tmp_path) == (results, [])
