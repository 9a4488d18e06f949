"""Every experiment file gives a valid run; the 7B models have the paper's size, and their training steps lower."""

import contextlib
import io
import math
import os
import pathlib
import shlex
import subprocess

import jax
import pytest

from flexmoe_jax.cli.main import main
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.experiment import load_experiment, read_config
from flexmoe_jax.flexmix.build import DOMAINS
from flexmoe_jax.hf import anchors
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.chips import CHIPS, parse_topology
from flexmoe_jax.parallel.mesh import check_mesh
from flexmoe_jax.params import count_parameters
from flexmoe_jax.plan.costs import estimate
from flexmoe_jax.plan.work import Work
from flexmoe_jax.plan.work import leaves as work_leaves
from flexmoe_jax.study.config import ABLATIONS, StudyConfig
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import state_shapes
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC, TRUNK, canonical_order

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
RUNS = sorted({*EXPERIMENTS.glob("*.py")} - {EXPERIMENTS / "reproduction.py"})


def load(name: str, *overrides: str) -> RunConfig:
    """The run of an experiment file, completed with the keys that it leaves to the command line."""
    open_keys = ["data=data", *(["public_data=sample"] if "7b_expert" in name or "anchor" in name else [])]
    if "dense" not in name:  # that run trains an existing model further, which has router rows
        open_keys.append("domain_vector=domain.json")
    return read_config(RunConfig, f"{EXPERIMENTS / name}", [*open_keys, *overrides])


@pytest.mark.parametrize("size", ["tiny", "small", "full", "smollm2"])
def test_the_reproduction_names_real_domains_at_every_size(size):
    spec = f"{EXPERIMENTS / 'reproduction.py'}:{size}"
    study = read_config(StudyConfig, spec, ["seeds=2"])
    assert study.seeds == 2
    assert {*study.owners, *study.public_sources} <= set(DOMAINS)
    if size == "smollm2":
        assert study.public in anchors.ANCHORS
    else:
        assert study.seq_len <= study.model.max_seq_len
        assert study.chosen_ablations == ABLATIONS
    assert f"reproduction.py:{size}" in (EXPERIMENTS / "reproduction.py").read_text()


def test_what_is_trained_jointly_beside_smollm2_fits_a_machine_of_24_gb():
    """All five experts with their moments; a process took 2.5 GB more than the plan (docs/reference/study.md)."""
    study = read_config(StudyConfig, f"{EXPERIMENTS / 'reproduction.py'}:smollm2")
    shape = ModelConfig(
        vocab_size=49152,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_seq_len=8192,
        pre_norm=True,
        qk_norm=False,
        tie_embeddings=True,
        norm_topk=True,
    )
    sizes = {key: getattr(study, key) for key in ("batch_size", "seq_len", "top_k", "compute_dtype")}
    run = RunConfig(owner=PUBLIC, data="-", out="-", public="-", steps=1, load_balance=0.01, **sizes)
    work = Work(shape, canonical_order((PUBLIC, *study.owners)), run)
    costs = estimate(work, parse_topology("h100:1"), check_mesh("data=1", 1))
    assert 9e9 < costs.total < 24e9 - 2 * 2.5e9


def model_7b() -> ModelConfig:
    model = load("olmo2_7b_public.py").model
    assert model is not None
    return model


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_experiment_is_a_valid_run_and_holds_its_command(path):
    needs_public = ["public=public"] if "_expert" in path.name else []
    arg = ":news" if needs_public else ""
    run = load(f"{path.name}{arg}", *needs_public)
    assert run.owner == ("news" if needs_public else PUBLIC)
    assert f"--config=experiments/{path.name}" in path.read_text()


@pytest.mark.parametrize(("gpu", "moment"), [("80gb", "factored"), ("141gb", "full")])
def test_the_7b_expert_has_a_form_for_one_gpu(gpu, moment):
    run = load(f"olmo2_7b_expert.py:news,gpu={gpu}", "public=public")
    assert (run.owner, run.optimizer.second_moment) == ("news", moment)
    assert run.steps * run.batch_size * run.seq_len > 1e9
    assert f"gpu={gpu}" in (EXPERIMENTS / "olmo2_7b_expert.py").read_text()
    with pytest.raises(ConfigError, match="no configuration for gpu=90gb"):
        load("olmo2_7b_expert.py:news,gpu=90gb")


@pytest.mark.parametrize(
    ("gpu", "topology", "rank"), [("12gb", "rtx4070:1", 64), ("24gb", "l4:1", 64), ("48gb", "l40s:1", 256)]
)
def test_a_7b_expert_that_is_a_low_rank_change_fits_one_card(gpu, topology, rank):
    """The frozen 7.3 B parameters take 14.6 GB in bfloat16, 5.3 in nf4; a whole expert would take 70."""
    run = load(f"olmo2_7b_expert.py:news,gpu={gpu}", "public=public")
    assert run.steps * run.batch_size * run.seq_len == pytest.approx(1e7, rel=0.1)
    work = Work(model_7b(), canonical_order((PUBLIC, "news")), run)
    costs = estimate(work, parse_topology(topology), check_mesh("data=1", 1))
    frozen = 5.29e9 if run.frozen_dtype else 14.6e9
    assert costs.memory["frozen"] == pytest.approx(frozen, rel=0.01)
    assert costs.total < 0.9 * CHIPS[topology.partition(":")[0]].memory
    trained = sum(math.prod(leaf.shape) for leaf in work_leaves(work, 1) if leaf.part == "trained")
    assert trained == 32 * (3 * rank * (4096 + 11008) + 4096 + 1)


def test_an_expert_run_without_an_owner_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="owner is empty") as error:
        load("quickstart_expert.py", "public=public")
    assert ":OWNER" in error.value.remedy


def test_the_7b_model_has_the_papers_size():
    """The paper's table: 7.30 B parameters with one expert, 4.33 B more for each further one, 33.27 B with seven."""
    model = model_7b()
    trunk, expert = count_parameters(model, TRUNK), count_parameters(model, "news")
    assert round((trunk + expert) / 1e9, 2) == 7.30
    assert round(expert / 1e9, 2) == 4.33
    assert round((trunk + 7 * expert) / 1e9, 2) == 33.27


ANCHORS = {"olmo2-1b": 1.48, "llama3.2-1b": 1.24, "qwen3-0.6b": 0.60}  # billions of parameters, as published


@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_anchor_has_its_published_size_and_is_named_in_the_file(anchor):
    run = load(f"anchor_expert.py:news,anchor={anchor}", "public=public")
    assert run.model is not None
    count = count_parameters(run.model, TRUNK) + count_parameters(run.model, run.owner)
    assert round(count / 1e9, 2) == ANCHORS[anchor]
    assert f"\n    {anchor} " in (EXPERIMENTS / "anchor_expert.py").read_text()
    with pytest.raises(ConfigError, match="no configuration for anchor=gpt"):
        load("anchor_expert.py:news,anchor=gpt", "public=public")


@pytest.mark.parametrize(
    "name", [path.name for path in RUNS if path.name.endswith("_expert.py")], ids=lambda name: name.removesuffix(".py")
)
def test_every_owners_experiment_carries_the_recipe_that_works(name):
    """Public text mixed in, and a router that learns to tell it from the owner's (docs/guide/router.md)."""
    run = load(f"{name}:news", "public=public")
    assert 0.2 <= run.public_sequences / run.batch_size <= 0.5
    assert run.router_contrast == 0.1
    if run.model is not None and run.model.d_model > 1000:  # rows' logits are sums over the width
        [rows, _] = run.optimizer.rules
        assert rows.lr * run.optimizer.lr * run.model.d_model == pytest.approx(1.5e-3 * 192, rel=0.05)


@pytest.mark.parametrize(
    "name", ["olmo2_7b_public.py", "olmo2_7b_expert.py:news", *(f"anchor_expert.py:news,anchor={a}" for a in ANCHORS)]
)
def test_the_large_training_steps_lower(name):
    """Traced and lowered from shapes only: no array of the model is allocated."""
    beside = ["public=public"] if ":" in name else []
    run = load(name, *beside)
    model = run.model
    assert model is not None
    experts = canonical_order({PUBLIC, run.owner})
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), experts))
    optimizer = make_optimizer(run.optimizer, run.steps)
    state, frozen = state_shapes(params, run, optimizer)
    batch = Batch.shapes(run.batch_size, run.seq_len, own=run.public_sequences > 0)
    lowered = make_train_step(model, run).lower(state, frozen, batch)
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new_state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["share"].shape == (model.num_layers, len(experts))
    trained = sum(leaf.size for leaf in jax.tree.leaves(new_state.trainable))
    every = sum(leaf.size for leaf in jax.tree.leaves(params))
    expert = count_parameters(model, run.owner)
    held = model.num_layers * (model.d_model + 1)  # the public router row and bias
    assert trained == (every - held if run.is_public else expert)


@pytest.mark.parametrize("arg", ["", ":news", ":10:13"])
@pytest.mark.parametrize("folder", [".", "2026-11-25T20:20", "a b,c#?%20", "größe東京"])
def test_a_path_may_hold_colons_and_so_may_the_argument(folder, arg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "exp.py").write_text("def get_config(arg):\n    return {'arg': arg}\n")
    for path in (f"{folder}/exp.py", str(tmp_path / folder / "exp.py")):
        assert load_experiment(f"{path}{arg}") == {"arg": arg[1:]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "the experiment file exp.py does not exist"),
        ("def get_config(arg):\n    return {'news': 1}[arg]\n", "exp.py, line 2: KeyError: 'nws'"),
        ("import json\njson.loads('')\n", "exp.py, line 2: JSONDecodeError"),
        ("def get_config(arg)\n", "exp.py: SyntaxError"),
        ("get_configs = None\n", "exp.py defines no get_config"),
    ],
)
def test_an_experiment_file_that_fails_names_file_line_and_error(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source is not None:
        (tmp_path / "exp.py").write_text(source)
    with pytest.raises(ConfigError) as refusal:
        load_experiment("exp.py:nws")
    assert message in refusal.value.what
    assert refusal.value.remedy


@pytest.mark.parametrize("part", ["smollm2", "smollm2-scores", "smollm2-expert"])
def test_the_commands_of_smollm2_have_options_that_exist(part, tmp_path):
    printed = subprocess.run(
        [EXPERIMENTS / "smollm2.sh", part],
        env=os.environ | {"DRY_RUN": "1", "ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("$ flexmoe ")]
    assert len(commands) > 3
    for _, verb, *words in commands:
        action = words[:1] if verb == "data" else []
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            main([verb, *action, "--help"])
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert {o for o in options if not o.startswith("--config.")} <= {*out.getvalue().replace("[", " ").split()}


def test_an_optional_section_can_be_left_out_by_the_command_line():
    scaled = ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"]
    assert load("quickstart_public.py", *scaled).model.rope_scaling.factor == 2
    assert load("quickstart_public.py", *scaled, "model.rope_scaling=none").model.rope_scaling is None
    with pytest.raises(ConfigError, match=r"config\.model\.rope_scaling is 'linear'") as refusal:
        load("quickstart_public.py", "model.rope_scaling=linear")
    assert "give none, or its keys (config.model.rope_scaling.KEY)" in refusal.value.remedy
    with pytest.raises(ConfigError, match=r"unknown key config\.optimizer"):  # it is not optional
        load("quickstart_public.py", "optimizer=none")
