"""Plans agree with what JAX places and compiles on eight CPU devices, and refuse what does not fit.

Tolerances. Bytes of arrays: none, plans are exact. Operations: 15%; norms, softmax, router and optimizer are not
counted, and short rows compute the whole square of scores. Communication: a factor of 1.5; the compiler turns some
reduce-scatters into all-reduces of twice the bytes, and saves some gathers of the recomputation.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flexmoe_jax.cli.main import main
from flexmoe_jax.errors import ConfigError, MachineError
from flexmoe_jax.model.flops import training_flops
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.chips import CHIPS, PEAK_FLOPS, Chip, Topology, meshes, parse_topology
from flexmoe_jax.parallel.mesh import parse_mesh
from flexmoe_jax.parallel.specs import RULES
from flexmoe_jax.plan.compiled import devices_of, read
from flexmoe_jax.plan.costs import estimate
from flexmoe_jax.plan.hlo import collectives
from flexmoe_jax.plan.search import choices, smallest
from flexmoe_jax.plan.work import Work, leaves
from tests.plan.on_eight_devices import MODEL, OWNER_RUN, WORKS

OPERATIONS, RECEIVED = 1.15, 1.5
EXPERT_7B = "--config=experiments/olmo2_7b_expert.py:news"


@pytest.fixture(scope="module")
def found() -> dict:
    command = [sys.executable, "-m", "tests.plan.on_eight_devices"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_planned_bytes_are_those_of_placed_arrays(found):
    assert len(found["placed"]) == 7
    for name, parts in found["placed"].items():
        for part, (placed, planned) in parts.items():
            assert placed == planned, (name, part)
        assert parts["frozen"][0] + parts["trained"][0] > 100_000, name


def test_planned_operations_agree_with_the_compiler(found):
    assert len(found["flops"]) == 2
    for name, (compiled, planned) in found["flops"].items():
        assert 1 / OPERATIONS < compiled / planned < OPERATIONS, name


def test_planned_communication_agrees_with_the_compiler(found):
    assert len(found["received"]) == 4
    for name, (compiled, planned) in found["received"].items():
        ratio = sum(planned.values()) / sum(compiled.values())
        assert 1 / RECEIVED < ratio < RECEIVED, (name, compiled, planned)


def test_planned_inference_gives_the_same_tokens_on_a_mesh(found):
    on_one, on_mesh = found["generated"]
    assert [len(row) for row in on_one] == [4] * 8
    assert on_one == on_mesh


@pytest.mark.parametrize(
    ("name", "groups"), [*((name, 1) for name in WORKS), ("joint", 4), ("router", 2), ("prefill", 4)]
)
def test_every_leaf_of_the_model_is_in_the_table_once(name, groups):
    work = WORKS[name]
    weights = [leaf for leaf in leaves(work, groups) if leaf.part in ("trained", "frozen")]
    weights = [leaf for leaf in weights if not leaf.path.endswith("/scale")]  # one more array of a quantized matrix
    count = sum(jnp.prod(jnp.array(leaf.shape)).item() for leaf in weights)
    expert = 3 * MODEL.num_layers * MODEL.d_model * MODEL.d_ff + MODEL.num_layers * (MODEL.d_model + 1)
    heads = (MODEL.num_heads + MODEL.num_kv_heads) * MODEL.head_dim
    attention = 2 * MODEL.d_model * heads + 2 * MODEL.d_model + heads
    trunk = 2 * MODEL.vocab_size * MODEL.d_model + MODEL.num_layers * attention + MODEL.d_model
    assert count == trunk + len(work.experts) * expert
    assert {leaf.spec for leaf in weights} <= {spec for _, spec in RULES}


def test_operations_are_those_of_the_models_formulas():
    """Needed operations are `training_flops` per token; computed ones include recomputation and inactive experts."""
    sizes, topology = parse_mesh("fsdp=8"), parse_topology("h100:8")
    tokens = OWNER_RUN.batch_size * OWNER_RUN.seq_len / 8
    for name, kind, active in (("public", "joint", 1), ("expert", "expert", 2), ("joint", "joint", 2)):
        costs = estimate(WORKS[name], topology, sizes)
        assert costs.needed_flops == pytest.approx(tokens * training_flops(MODEL, OWNER_RUN.seq_len, kind, active))
        assert costs.computed_flops > costs.needed_flops


HLO = """
HloModule step

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, attributes={chain_id="0"}
  %b = f32[8,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, attributes={chain_id="0"}
  %c = f32[8]{0} all-gather(%y), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = f32[8]{0} all-gather(%z), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %sum = bf16[16]{0} all-reduce(%y), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[2,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body
  %scattered = f32[2]{0} reduce-scatter(%z), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""


def test_collectives_are_read_with_their_loops_groups_and_channels():
    """Three iterations of: a gather of 128 bytes by 4 devices, named in two places; two gathers of 32 bytes by 2
    devices; an all-reduce of 32 bytes by 2. Once: a reduce-scatter to 8 bytes each by 4.
    """
    assert collectives(HLO) == {
        "all-gather": (9, 3 * (96 + 16 + 16)),
        "all-reduce": (3, 3 * 32),
        "reduce-scatter": (1, 24),
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("v9:2x2", "there is no chip 'v9'"),
        ("v5p:3x3x3", "v5p has no shape '3x3x3'"),
        ("v5e:2x2x2", "v5e has no shape '2x2x2'"),
        ("h100", "h100 has no shape ''"),
        ("h100:3", "h100 has no shape '3'"),
    ],
)
def test_unknown_topologies_are_refused(text, what):
    with pytest.raises(ConfigError, match=what):
        parse_topology(text)


def test_every_chip_that_can_be_planned_for_is_known_by_its_names_in_jax():
    for chip in CHIPS.values():
        assert [PEAK_FLOPS[kind] for kind in chip.device_kinds] == [chip.peak] * len(chip.device_kinds)
        assert min(chip.peak, chip.memory, chip.bandwidth) > 0
        assert chip.link > 0 or chip.slices == ("1",)  # a card without a link comes alone
    assert [name for name, chip in CHIPS.items() if chip.is_tpu] == ["v5e", "v5p", "v6e"]
    assert "NVIDIA H100 PCIe" in PEAK_FLOPS  # only its peak is known


def test_links_between_machines_are_slower():
    topology = parse_topology("h100:16")
    assert topology.speed(8) > topology.speed(16)
    assert parse_topology("v5p:4x4x4").speed(64) == CHIPS["v5p"].link


def test_meshes_are_all_factorizations():
    one_axis = [(4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (1, 1, 1, 4)]
    two_axes = [(2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2), (1, 2, 2, 1), (1, 2, 1, 2), (1, 1, 2, 2)]
    assert sorted(meshes(4)) == sorted([*one_axis, *two_axes])


def chip_of(memory: float) -> Chip:
    """Eight or sixteen small chips, as fast as an H100."""
    return dataclasses.replace(CHIPS["h100"], memory=memory, slices=("8", "16"))


def test_the_search_finds_a_mesh_where_data_parallelism_does_not_fit():
    work = WORKS["public"]
    copies = estimate(work, Topology(CHIPS["h100"], "8"), parse_mesh("data=8"))
    small = Topology(chip_of(0.7 * copies.total), "8")
    assert not estimate(work, small, parse_mesh("data=8")).fits
    best = choices(work, small)[0]
    assert best.costs.fits
    assert best.costs.sizes != parse_mesh("data=8")
    assert estimate(best.work, small, parse_mesh(best.mesh)) == best.costs


def test_what_fits_comes_first_even_where_it_is_slower():
    """On chips of several sizes; on some, the fastest mesh of all does not fit."""
    work, slower = WORKS["public"], 0
    whole = estimate(work, Topology(CHIPS["h100"], "8"), parse_mesh("data=8")).total
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0):
        found = [choice.costs for choice in choices(work, Topology(chip_of(share * whole), "8"))]
        fits = [costs.fits for costs in found]
        assert fits == sorted(fits, reverse=True)
        slower += fits[0] and found[0].step_seconds > min(costs.step_seconds for costs in found)
    assert slower


def test_the_smallest_slice_is_the_first_that_fits():
    work = WORKS["public"]
    needed = [choices(work, Topology(chip_of(1e-9), shape))[0].costs for shape in ("8", "16")]
    assert not any(costs.fits for costs in needed)
    lowest = min(choice.costs.total for choice in choices(work, Topology(chip_of(1e12), "8")))
    found = smallest(work, chip_of(1e12))
    assert found is not None
    assert found.topology.shape == "8"
    assert smallest(work, chip_of(lowest / 1e3)) is None


def test_a_shape_that_nothing_divides_is_refused():
    odd = dataclasses.replace(WORKS["public"], model=dataclasses.replace(MODEL, d_model=7, vocab_size=11, num_heads=2))
    odd = dataclasses.replace(odd, run=dataclasses.replace(odd.run, batch_size=3, accumulation=1))
    with pytest.raises(MachineError, match="no mesh of 8 devices divides the model and 3 rows"):
        choices(odd, parse_topology("h100:8"))


def test_plan_prints_costs_and_refuses_a_misfit_with_both_numbers(capsys):
    command = ["plan", EXPERT_7B, "--config.accumulation=256", "--json"]
    assert main([*command, "--topology", "v5p:2x2x1", "--mesh", "fsdp=4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"]
    assert result["total"] == pytest.approx(sum(result["memory"].values()))
    assert result["compiled"] is None
    assert main([*command, "--topology", "v5e:2x2", "--mesh", "fsdp=4"]) == 1
    printed = capsys.readouterr()
    need = json.loads(printed.out)["total"] / 1e9
    assert f"a device needs {need:.1f} GB, usable are 14.4 of 16.0 GB" in printed.err


def test_plan_without_a_topology_names_the_smallest_slices(capsys):
    assert main(["plan", EXPERT_7B, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["smallest"]
    assert set(found) == set(CHIPS)
    for name in ("v5e", "v5p", "v6e", "h100", "h200"):
        assert found[name]["fits"], name


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--topology", "v5p:2x2x1", "--mesh", "fsdp=8"], "the mesh 'fsdp=8' takes 8 devices, there are 4"),
        (["--topology", "v5p:2x2x1", "--mesh", "expert=4"], "two experts need no expert axis"),
        (["--topology", "v6e:16x16", "--mesh", "fsdp=256"], "a microbatch of 16 rows is split over 256 devices"),
        (["--compile"], "--compile was given without --topology"),
        (["--experts", "8"], "--experts 8 in the run of 'news'"),
        (["--topology", "h100:8", "--mesh", "fsdp=8", "--compile"], "h100:8: compiling for a GPU needs the GPU"),
    ],
)
def test_runs_that_cannot_be_planned_are_refused(arguments, what, capsys):
    assert main(["plan", EXPERT_7B, *arguments]) == 1
    assert what in capsys.readouterr().err


def test_running_out_of_memory_is_a_result_of_the_compiler():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: used 20G of 15.75G hbm.\n\nmore")

    assert read(Refused()).refused == "RESOURCE_EXHAUSTED: Ran out of memory: used 20G of 15.75G hbm."


def test_a_tpu_program_is_compiled_without_a_tpu():
    """A tiny owner's run on eight v5e chips: the compiler's arguments are the plan's plus padding to tiles (2%)."""
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e:2x4")
    assert {device.platform for device in devices_of(topology)} == {"tpu"}
    from flexmoe_jax.plan.compiled import compile_for

    model = ModelConfig(
        vocab_size=1024,
        num_layers=2,
        d_model=1024,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        d_ff=2048,
        max_seq_len=128,
    )
    work = Work(model, ("public", "news"), OWNER_RUN)
    compiled, costs = compile_for(work, topology, "fsdp=8"), estimate(work, topology, parse_mesh("fsdp=8"))
    held = sum(costs.memory[part] for part in ("trained", "moments", "frozen", "batch"))
    assert held <= compiled.arguments <= 1.02 * held
    assert compiled.peak > held
    assert compiled.collectives["all-gather"][1] > 0
