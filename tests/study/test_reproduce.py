"""A whole study on real text, at a size that says nothing about the methods: every system is made and scored."""

import dataclasses
import json
import logging
import math
import pathlib

import pytest

from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.cli.reproduce import varied_lines
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.page import read_study, render
from flexmoe_jax.study.reproduce import reproduce, vary
from flexmoe_jax.study.results import read_results
from flexmoe_jax.study.systems import METHOD

MODEL = ModelConfig(
    vocab_size=8192, num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, head_dim=32, d_ff=48, max_seq_len=64
)
SYSTEMS = {
    "public",
    METHOD,
    "FlexMoE, top-1",
    "uniform mixing",
    "hybrid math",
    "hybrid news",
    "without math",
    "without news",
    "dense math",
    "dense news",
    "soup",
    "weighted soup",
    "BTX",
    "unrestricted 1x",
    "unrestricted 2x",
    "BTM",
    "BTM, top-2",
    "causal BTM",
    "causal BTM, top-2",
    "prompt routing",
    "oracle dense expert",
    "no bias",
    "the paper's training",
    "FlexMoE, tuned alone",
    "FlexMoE, tuned together",
    "FlexMoE, biases fitted on public text",
    "FlexMoE, shifted by log n",
    "FlexMoE, rows x 2",
    "FlexMoE, rows / 2",
    "frozen trunk math",
    "frozen trunk news",
    "oracle expert, frozen trunk",
}


def trunk_of(run):
    return {name: tensor.sha256 for name, tensor in open_model(run / "model").manifests["trunk"].tensors.items()}


@pytest.mark.slow
@pytest.mark.torch
def test_a_study_makes_and_scores_every_system_and_resumes_where_it_stopped(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flexmoe_jax.study")
    config = StudyConfig(
        out=str(tmp_path),
        domains="math,news",
        model=MODEL,
        seeds=1,
        public_steps=8,
        owner_steps=6,
        mix_steps=2,
        seq_len=64,
        embed_count=16,
        classifier_documents=16,
        heldout_bytes=2000,
        ablations="no bias,the paper's training",
        rates="1e-3,2e-3",
        tune_steps=2,
        proxies=16,
        proxies_of=40,
    )
    results = reproduce(config)
    check_whole_study(results, tmp_path)
    check_rates(results, tmp_path)
    check_varied_studies(dataclasses.replace(config, rates="1e-3", out=str(tmp_path / "varied")), results)
    assert trunk_of(tmp_path / "seed-0" / "runs" / "frozen_trunk_math") == trunk_of(tmp_path / "runs" / "public")
    assert trunk_of(tmp_path / "seed-0" / "runs" / "dense_math") != trunk_of(tmp_path / "runs" / "public")
    caplog.clear()
    assert reproduce(config) == results
    assert not [line for line in caplog.messages if line.startswith("scored")]


def check_whole_study(results, folder):
    rows = {system.name: system for system in results.systems}
    assert set(rows) == SYSTEMS
    assert all(math.isfinite(cell.value) for row in rows.values() for cell in row.bits_per_byte.values())
    assert set(rows[METHOD].bits_per_byte) == {"public", "math", "news", "math + news", "mean"}
    # Models of the same experts are the same model: the opt-out of one owner is the other's hybrid.
    assert rows["without math"].bits_per_byte == rows["hybrid news"].bits_per_byte
    assert rows["oracle dense expert"].mean.value <= rows["dense math"].mean.value
    biases = open_model(folder / "seed-0" / "made" / "merged_no_bias")
    assert {biases.manifests[n].tensors["bias"].sha256 for n in biases.experts} == {
        biases.manifests["public"].tensors["bias"].sha256
    }
    assert all(row["equal"] for row in results.opting_out[0].values())
    assert set(results.classifiers) == {"math", "news"}
    assert len(results.curves) == 1 + 2 * 2 + 2 * 3 + 4  # public; dense, frozen; experts; joint runs
    assert read_results(folder / "results.jsonl") == [results]
    page = render(*read_study(folder))
    assert "Every system" in page
    assert page.count("<svg") == 5
    assert (folder / "samples.json").exists()


def check_rates(results, folder):
    kinds = {METHOD, "no bias", "the paper's training", "dense", "frozen trunk", "BTX", "unrestricted 1x"}
    kinds |= {"unrestricted 2x", *(f"{METHOD}, {how}" for how in ("tuned alone", "tuned together"))}
    assert set(results.rates) == {*kinds, f"{METHOD}, biases fitted on public text"}
    for search in results.rates.values():
        assert sorted(search.bits_per_byte) == ["0.001", "0.002"]
        assert search.bits_per_byte[f"{search.chosen:g}"] == min(search.bits_per_byte.values())
        assert search.at_end  # two rates have no middle
    assert not [*(folder / "rates").iterdir()]  # models of a search are not kept
    run = json.loads((folder / "seed-0" / "runs" / f"{METHOD}_news" / "run.json").read_text())
    assert run["config"]["optimizer"]["lr"] == results.rates[METHOD].chosen


def check_varied_studies(config, whole):
    folder = pathlib.Path(config.out)
    some = vary(config, "owner_steps", ["2", "3"])
    assert set(some) == {"2", "3"}
    assert some["2"].method.mean != some["3"].method.mean
    assert some["2"].public == dataclasses.replace(some["3"].public, against_method=some["2"].public.against_method)
    assert len(list(folder.glob("**/runs/public"))) == 1
    assert len(varied_lines("owner_steps", some)) == 6
    assert read_results(folder / "owner_steps.jsonl") == [*some.values()]
    assert "Every system" in render(*read_study(folder / "owner_steps-2"))
    shares = vary(config, "public_share", ["0.2"])["0.2"]
    assert shares.public.bits_per_byte != whole.public.bits_per_byte
    scales = vary(config, "router_scale", ["1.0"])["1.0"]
    assert all(row["equal"] for row in scales.opting_out[0].values())
    merged = open_model(folder / "router_scale-1.0" / "seed-0" / "made" / "merged_FlexMoE")
    assert merged.manifests["public"].record.router["scale"] == 1.0
