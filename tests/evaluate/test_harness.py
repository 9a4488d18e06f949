"""lm-evaluation-harness: our model equals the harness's `hf` model of the exported checkpoint, on local task files."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.hf.export import ExportOptions, export
from flexmoe_jax.tokenizer_files import read_files
from tests.hf.tiny import CONFIG, our_model
from tests.tokenizers import sentencepiece

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.torch

WORDS = ("the", "king", "of", "a", "river", "owner", "agreed", "to", "pay", "nine", "ships", "in", "1984", "corn")
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """
task: tiny_until
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["e"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks over one local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(WORDS, n))

    rows = [
        {"question": text(4), "choices": [" " + text(n) for n in (1, 2, 3)], "gold": i % 3, "text": text(8 + 8 * i)}
        for i in range(4)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    )
    for name, text_ in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(common + text_)
    return folder


def _bos(begins):
    """A tokenizer whose begin-of-text token is not its end: tokenizer.json puts it before texts, or does not."""
    return lambda folder: read_files(sentencepiece(folder, begins=begins))


TOKENIZERS = {"no bos": lambda folder: None, "bos": _bos(True), "bos that is only named": _bos(False)}


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    files = TOKENIZERS[getattr(request, "param", "no bos")](folder / "tokenizer-files")
    our_model(folder, top_k=2, files=files, config=CONFIG if files is None else replace(CONFIG, vocab_size=320))
    export(open_model(folder / "model"), folder / "hf", ExportOptions(experts=["public", "news"]))
    return folder


NAMES = ["tiny_choice", "tiny_rolling", "tiny_until"]


def answers(result):
    """{task: the model's raw answers per document}."""
    return {name: [[r[0] for r in s["resps"]] for s in result["samples"][name]] for name in NAMES}


@pytest.mark.parametrize("exported", TOKENIZERS, indirect=True)
def test_results_equal_those_of_the_hf_model(tasks, exported):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from flexmoe_jax.evaluate.harness import run_tasks

    lm = fm.load(exported / "model").select(["public", "news"]).lm(3)
    ours = run_tasks(lm, NAMES, include=str(tasks))
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={exported / 'hf'},dtype=float32",
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    for name in NAMES:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, abs=1e-3), (name, metric)
    mine, expected = answers(ours), answers(theirs)
    assert mine["tiny_until"] == expected["tiny_until"]
    assert all("e" not in text for (text,) in mine["tiny_until"])
    for name in NAMES[:2]:
        flat = [np.ravel([np.asarray(r, object) for r in doc]) for doc in mine[name]]
        theirs_flat = [np.ravel([np.asarray(r, object) for r in doc]) for doc in expected[name]]
        assert len(flat) == 4
        for a, b in zip(flat, theirs_flat, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1e-3)  # flags count as 0 and 1


def test_answers_are_cached(tasks, exported, tmp_path, monkeypatch):
    from flexmoe_jax.evaluate import harness

    lm = fm.load(exported / "model").select(["public", "news"]).lm(3)
    first = harness.run_tasks(lm, ["tiny_choice"], include=str(tasks), cache=str(tmp_path / "cache"), limit=2)
    assert len(first["samples"]["tiny_choice"]) == 2

    def fail(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(harness.HarnessLM, "_loglikelihood_tokens", fail)
    again = harness.run_tasks(lm, ["tiny_choice"], include=str(tasks), cache=str(tmp_path / "cache"), limit=2)
    assert again["results"] == first["results"]
    with pytest.raises(AssertionError, match="asked again"):
        harness.run_tasks(lm, ["tiny_choice"], include=str(tasks), cache=str(tmp_path / "cache"))


def test_an_unknown_task_is_refused(tasks, exported, monkeypatch):
    from flexmoe_jax.evaluate import harness

    own = harness.TaskManager  # without the harness's own tasks, whose files take 20 s to read
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: own(None, include_path, include_defaults=False)
    )
    with pytest.raises(ConfigError, match="no task 'tiny_nothing'"):
        harness.run_tasks(fm.load(exported / "model").lm(), ["tiny_choice", "tiny_nothing"], include=str(tasks))
