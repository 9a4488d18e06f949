"""`flexmoe import-hf`, `export-hf`, `eval-suite` and `eval-harness`, as a user types them."""

import json
import pathlib

import pytest

from flexmoe_jax.cli.main import main
from tests.hf.tiny import our_model
from tests.tiny import write_documents

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biased")
    our_model(folder, biased=True)
    return folder


def run(capsys, *argv) -> dict:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_there_and_back(biased, tmp_path, capsys):
    model, out = biased / "model", tmp_path / "hf"
    assert main(["export-hf", str(model), "--out", str(out)]) == 1
    assert "code in layers 0, 1" in capsys.readouterr().err
    done = run(capsys, "export-hf", model, "--out", out, "--custom-code")
    assert done["architecture"] == "FlexMoEForCausalLM"
    assert done["logits_difference"] < 1e-3
    back = run(capsys, "import-hf", out, "--out", tmp_path / "model")
    assert back["digest"] == run(capsys, "inspect", model)["digest"]
    two = tmp_path / "two"
    run(capsys, "export-hf", model, "--out", two, "--experts", "public,news", "--custom-code", "--no-logits")
    public = biased / "release"
    package = run(capsys, "import-hf", two, "--public", public, "--expert", "news", "--out", tmp_path / "news")
    assert package["content"] == run(capsys, "inspect", biased / "news")["content"]
    assert main(["import-hf", str(two), "--public", str(public), "--out", str(tmp_path / "x")]) == 1


def test_leaving_the_bias_out_prints_what_it_costs(biased, tmp_path, capsys):
    data = write_documents(tmp_path / "data", "news", count=4, split="heldout")
    common = ("export-hf", biased / "model", "--out")
    done = run(capsys, *common, tmp_path / "hf", "--zero-bias", "--data", data)
    bias = done["bias"]
    assert bias["difference"] == pytest.approx(
        bias["bits_per_byte_without"] - bias["bits_per_byte_with_bias"], abs=1e-4
    )
    assert bias["difference"] != 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["flexmoe"]["bias_left_out"] == bias
    assert main([*map(str, common), str(tmp_path / "no"), "--zero-bias"]) == 1
    assert not (tmp_path / "no").exists()


def test_an_export_that_transformers_computes_otherwise_is_not_left_behind(biased, tmp_path, monkeypatch, capsys):
    from flexmoe_jax.hf import check

    monkeypatch.setattr(check, "TOLERANCE", 0.0)
    assert main(["export-hf", str(biased / "model"), "--out", str(tmp_path / "hf"), "--custom-code"]) == 1
    assert "differ from ours" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_suite_on_two_experts(biased, tmp_path, capsys):
    model = biased / "model"
    two = ("--experts", "public,news")
    result = run(capsys, "eval-suite", model, "--tasks", "boolq", "--form", "rc0", "--limit", 4, *two)
    assert (result["experts"], result["tasks"]["boolq"]["examples"]) == (["public", "news"], 4)
    assert result["tasks"]["boolq"]["score"] in (0, 0.25, 0.5, 0.75, 1)
    (tmp_path / "result.json").write_text(json.dumps(result))
    card = ("--evaluation", tmp_path / "result.json", "--no-logits", "--custom-code")
    run(capsys, "export-hf", model, "--out", tmp_path / "hf", *card)
    assert f"| boolq | acc_raw | {result['tasks']['boolq']['score']:.3f} | 4 |" in _card(tmp_path / "hf")


def test_tasks_that_run_programs_are_refused_before_the_first_task_starts(biased, capsys):
    assert main(["eval-suite", str(biased / "model"), "--tasks", "gsm8k,humaneval"]) == 1
    assert "--allow-code-execution" in capsys.readouterr().err


def test_the_suites_are_listed_with_what_the_others_need(capsys):
    groups = run(capsys, "eval-suite", "--list")["groups"]
    assert groups[0]["here"] == "9 of 9"
    assert (
        "flexmoe eval-harness --tasks mmlu_pro"
        in {group["group"]: group for group in groups}["mmlu_pro"]["the others need"]
    )


def test_a_harness_task_from_a_folder_on_two_experts(biased, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text('{"text": "the river and the stone"}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_text\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    asked = ("--tasks", "tiny_text", "--include", tmp_path, "--experts", "public,news", "--limit", 2)
    result = run(capsys, "eval-harness", biased / "model", *asked)
    assert (result["experts"], result["limit"]) == (["public", "news"], 2)
    assert result["tasks"]["tiny_text"]["metric"] == "bits_per_byte"


def _card(folder: pathlib.Path) -> str:
    return (folder / "README.md").read_text()
