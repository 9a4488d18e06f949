"""A whole study, on real text and at a size that says nothing about the methods: every system is made and scored."""

import dataclasses
import math

import pytest

from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.cli.reproduce import varied_lines
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.page import read_study, render
from flexmoe_jax.study.reproduce import reproduce, vary
from flexmoe_jax.study.train import ALONE, FITTED, METHOD, TOGETHER

MODEL = ModelConfig(
    vocab_size=8192, num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, head_dim=32, d_ff=48, max_seq_len=64
)
SYSTEMS = {
    "public", METHOD, "FlexMoE, top-1", "uniform mixing", "hybrid math", "hybrid news", "without math", "without news",
    "dense math", "dense news", "soup", "weighted soup", "BTX", "unrestricted 1x", "unrestricted 2x", "BTM",
    "BTM, top-2", "causal BTM", "causal BTM, top-2", "prompt routing", "oracle dense expert", "no bias",
    "the paper's training", ALONE, TOGETHER, FITTED, "FlexMoE, shifted by log n", "FlexMoE, rows x 2",
    "FlexMoE, rows / 2", "frozen trunk math", "frozen trunk news", "oracle expert, frozen trunk",
}  # fmt: skip


def trunk_of(run):
    return {name: tensor.sha256 for name, tensor in open_model(run / "model").manifests["trunk"].tensors.items()}


@pytest.mark.slow
@pytest.mark.torch
def test_a_study_makes_and_scores_every_system_and_goes_on_where_it_stopped(tmp_path):
    config = StudyConfig(
        out=str(tmp_path), domains="math,news", model=MODEL, seeds=1, public_steps=8, owner_steps=6, mix_steps=2,
        seq_len=64, embed_count=16, classifier_documents=16, heldout_bytes=2000, choice_items=6,
        ablations="no bias,the paper's training", tune_steps=2, proxies=16, proxies_of=40,
    )  # fmt: skip
    lines: list[str] = []
    results = reproduce(config, lines.append)
    bits = results["bits_per_byte"]
    assert set(bits) == SYSTEMS
    assert all(math.isfinite(cell["value"]) for row in bits.values() for cell in row.values())
    assert set(bits[METHOD]) == {"public", "math", "news", "math + news", "mean"}
    # Models of the same experts are the same model: the opt-out of one owner is the other's hybrid.
    assert bits["without math"] == bits["hybrid news"]
    assert bits["oracle dense expert"]["mean"]["value"] <= bits["dense math"]["mean"]["value"]
    biases = open_model(tmp_path / "seed-0" / "made" / "merged_no_bias")
    assert {biases.manifests[n].tensors["bias"].sha256 for n in biases.experts} == {
        biases.manifests["public"].tensors["bias"].sha256
    }
    assert all(row["equal"] for row in results["opting_out"][0].values())
    assert set(results["classifiers"]) == {"math", "news"}
    page = render(*read_study(tmp_path))
    assert "Every system" in page
    assert page.count("<svg") == 4
    assert (tmp_path / "samples.json").exists()
    varied = dataclasses.replace(config, out=str(tmp_path / "varied"))
    some = vary(varied, "owner_steps", ["2", "3"], lines.append)
    assert set(some) == {"2", "3"}
    assert some["2"]["bits_per_byte"][METHOD] != some["3"]["bits_per_byte"][METHOD]
    assert some["2"]["bits_per_byte"]["public"] == some["3"]["bits_per_byte"]["public"]  # the same model
    assert len(list((tmp_path / "varied").glob("**/runs/public"))) == 1
    assert len(varied_lines("owner_steps", some)) == 6
    assert "Every system" in render(*read_study(tmp_path / "varied" / "owner_steps-2"))
    shares = vary(varied, "public_share", ["0.2"], lines.append)["0.2"]
    assert shares["bits_per_byte"]["public"] != bits["public"]
    assert trunk_of(tmp_path / "seed-0" / "runs" / "frozen_trunk_math") == trunk_of(tmp_path / "runs" / "public")
    assert trunk_of(tmp_path / "seed-0" / "runs" / "dense_math") != trunk_of(tmp_path / "runs" / "public")
    scales = vary(varied, "router_scale", ["1.0"], lines.append)["1.0"]
    assert all(row["equal"] for row in scales["opting_out"][0].values())
    merged = open_model(tmp_path / "varied" / "router_scale-1.0" / "seed-0" / "made" / "merged_FlexMoE")
    assert merged.manifests["public"].record.router["scale"] == 1.0
    again: list[str] = []
    assert reproduce(dataclasses.replace(config), again.append) == results
    assert not [line for line in again if line.startswith("scored")]
