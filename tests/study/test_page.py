"""The page shows every figure of a study, fetches nothing, and escapes markup."""

import dataclasses
import json
import re

from flexmoe_jax.cli.main import main
from flexmoe_jax.study.page import read_study, render, render_quickstart
from flexmoe_jax.study.results import Kind, write_results
from flexmoe_jax.study.systems import METHOD
from tests.study import tiny

SAMPLE = {
    "domain": "news",
    "experts": ["public", "code", "news"],
    "pieces": ["<b>", " rose", "\n"],
    "weights": [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]],
}


def row(page: str, system: str) -> str:
    return page[page.index(f"<td>{system}</td>") :].split("</tr>")[0]


def test_every_system_is_in_its_group_with_its_figures_the_best_first():
    page = render(tiny.results(), [])
    table = page[page.index("<tbody>") : page.index("</table>")]
    found = re.findall(r"<tr[^>]*><(?:td|th)>(.*?)</(?:td|th)>", table)
    groups = {
        Kind.METHOD: [METHOD],
        Kind.BASELINE: ["unrestricted 2x", "BTM \N{DAGGER}", "public"],
        Kind.ABLATION: ["no bias"],
        Kind.PART: ["frozen trunk code", "without news", "without code"],
    }
    assert found == [line for kind, names in groups.items() for line in (kind.heading, *names)]
    assert page[page.index('<tr class="method">') :].startswith(f'<tr class="method"><td>{METHOD}</td>')
    assert "1.500" in row(page, METHOD)
    assert "±0.015" in row(page, METHOD)  # half of the mean's interval
    assert "2.00x" in row(page, METHOD)
    assert "1e+09" in row(page, METHOD)
    assert "3e+09" in row(page, "frozen trunk code")
    assert "+0.500 <small>+0.490 to +0.520</small>" in row(page, "public")
    assert "code 97.5%" in page
    assert "flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=2" in page


def test_a_study_without_an_experiment_of_its_name_shows_no_command():
    assert "flexmoe reproduce" not in render(tiny.results("owner_steps-25"), [])


def test_an_opt_out_that_is_not_exact_is_named():
    results = tiny.results()
    assert "opting out is exact" in render(results, [])
    results.opting_out[0]["news"]["equal"] = False
    page = render(results, [])
    assert "opting out is exact" not in page
    assert "news, seed 0" in page


def test_curves_of_ablations_are_left_out():
    page = render(tiny.results(), [])
    curves = page[page.index("Learning curves") : page.index("Proxies")]
    assert "unrestricted 2x" in curves
    assert "no bias" not in curves
    assert "Learning curves" not in render(dataclasses.replace(tiny.results(), curves=[]), [])


def test_the_page_needs_nothing_from_anywhere():
    page = render(tiny.results(), [SAMPLE])
    assert page.count("<svg") == page.count("</svg>") == 5
    assert not re.search(r"<(script|link|img|iframe)|src=|@import|url\((?!#)", page)
    assert "currentColor" in page
    assert "#010203" not in page


def test_texts_are_shown_and_escaped():
    results = tiny.results()
    page = render(results, [SAMPLE])
    assert "&lt;b&gt;</span>" in page
    assert 'title="public 0.20, code 0.70, news 0.10"' in page
    results.config["<i>"] = "<script>"
    assert "<script>" not in render(results, [SAMPLE])


def test_the_command_takes_a_folder_or_a_file(tmp_path, capsys):
    write_results(tmp_path / "results.jsonl", [tiny.results()])
    (tmp_path / "samples.json").write_text(json.dumps([SAMPLE]))
    assert main(["report", str(tmp_path)]) == 0
    assert " rose</span>" in (tmp_path / "report.html").read_text()
    assert main(["report", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "p.html")]) == 0
    assert " rose</span>" not in (tmp_path / "p.html").read_text()  # published results hold no text
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "nowhere" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "samples.json").write_text("[")
    assert main(["report", str(tmp_path)]) == 1
    assert "samples.json is not valid JSON" in capsys.readouterr().err


def test_the_command_refuses_what_is_not_one_study(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
    write_results(tmp_path / "results.jsonl", [tiny.results("a-1"), tiny.results("a-2")])
    assert main(["report", str(tmp_path)]) == 1
    assert "holds 2 studies: a-1, a-2" in capsys.readouterr().err


def test_a_folder_without_samples_gives_none(tmp_path):
    write_results(tmp_path / "results.jsonl", [tiny.results()])
    assert read_study(tmp_path) == (tiny.results(), [])


EXPERTS = ("public", "code", "news")
QUICKSTART = {
    "bits_per_byte": {
        "public alone": {"public": 2.0, "code": 3.0, "news": 2.5, "mean": 2.5},
        "hybrid code": {"public": 2.0, "code": 2.75, "news": 2.5, "mean": 2.416},
        "merged": {"public": 2.01, "code": 2.76, "news": 2.4, "mean": 2.39},
        "merged without news": {"public": 2.0, "code": 2.75, "news": 2.5, "mean": 2.416},
    },
    "routed_share": {
        domain: {"share": dict.fromkeys(EXPERTS, 1 / 3), "layers": [dict.fromkeys(EXPERTS, 1 / 3)] * 2}
        for domain in EXPERTS
    },
    "samples": {domain: {"prompt": f"<{domain}>", "continuation": " & more"} for domain in EXPERTS},
    "opt_out": {"expert": "news", "left": "ab12", "never": "ab12", "tokens_compared": 256},
    "artefacts": {name: f"out/{name}" for name in ("model", "model_without_news", "model_never_news")},
    "scoring": {"seq_len": 256, "stride": 128, "top_k": 2},
    "scored_bytes": dict.fromkeys(EXPERTS, 24_000),
    "parties": {
        name: {"folder": f"out/{name}", "document_bytes": 9_900_000, "gives": "run/package", "given_bytes": 4_700_000}
        for name in EXPERTS
    },
    "out": "out",
    "commands": ["flexmoe data build --out out/mix", "(cd out/news && flexmoe embed data --out domain.json)"],
    "seed": 0,
    "seconds": 612,
}


def test_the_quickstarts_page_shows_table_routing_texts_samples_proof_folders_and_commands():
    page = render_quickstart(QUICKSTART, [SAMPLE])
    assert row(page, "merged").count("<td>") == 5
    assert "2.390" in row(page, "merged")
    assert "-0.110" in page  # the change against the public model, in the picture
    assert "&lt;b&gt;</span>" in page
    assert "&lt;code&gt;</span> &amp; more" in page
    assert "9.9 MB" in row(page, "out/news")
    assert "the same digest" in page
    assert "diff -r --exclude journal.jsonl out/model_without_news out/model_never_news" in page
    assert "(cd out/news &amp;&amp; flexmoe embed data --out domain.json)" in page
    assert page.count("<svg") == page.count("</svg>") == 2
    assert not re.search(r"<(script|link|img|iframe)|src=|@import|url\((?!#)", page)
    other = QUICKSTART | {"opt_out": QUICKSTART["opt_out"] | {"never": "cd34"}}
    assert "different digests" in render_quickstart(other, [])
