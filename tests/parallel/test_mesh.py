"""Meshes of eight devices train and score what one device does, and the sharding rules cover every leaf.

Tolerance: float32 sums in another order change values by about 1e-7 relative; ten steps of AdamW, whose first updates
are the signs of gradients, amplify that to about 1e-4 of the largest value. Losses differ only by rounding.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import ConfigError, FlexMoEError
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.parallel.mesh import parse_mesh, platform
from flexmoe_jax.parallel.specs import RULES, spec_of
from flexmoe_jax.parallel.stacked import restack_weights, stack_weights, unstack_weights, with_stacked_rows
from flexmoe_jax.params import AXES, model_leaves, read_ranks
from flexmoe_jax.tree import flatten, match_rules
from tests.model.test_equal_experts import ANCHORS
from tests.tiny import TINY, random_params

PARAMETERS, LOSSES = 5e-4, 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("eight")
    command = [sys.executable, "-m", "tests.parallel.on_eight_devices", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["public", "hybrid", "low rank", "quantized", "joint", "three"])
def test_ten_steps_on_a_mesh_equal_ten_steps_on_one_device(found, kind):
    """Joint runs of four experts, two active: their experts are split over the `expert` axis. After an opt-out, three
    of them are split over expert=4, too: one slot is empty."""
    assert len(found[kind]) == (2 if kind in ("three", "low rank", "quantized") else 3)
    for mesh, (parameters, losses) in found[kind].items():
        assert parameters < PARAMETERS, mesh
        assert losses < LOSSES, mesh


@pytest.mark.parametrize("top_k", ["2", "4"])
def test_a_model_split_over_a_mesh_scores_what_one_device_scores(found, top_k):
    """Four experts, two active or all. A token's loss is about 6 nats in float32: sums in another order change its
    last digits."""
    scores = found["scores"][top_k]
    assert len(scores) == 2
    for mesh, (expected, bits, token, share) in scores.items():
        assert bits == pytest.approx(expected, rel=1e-6), mesh
        assert token < 1e-5, mesh
        assert share < 1e-6, mesh
    assert found["scores"]["logits"] < 1e-5
    assert found["scores"]["held"] == 1 / 8  # share of the experts' weights on each of 4 x 2 devices


@pytest.mark.parametrize("top_k", ["2", "3"])
def test_three_experts_on_a_mesh_that_splits_four_score_and_generate_what_one_device_does(found, top_k):
    """Tolerances as above. Each device of expert=4,fsdp=2 holds an eighth of the four slots."""
    scores = found["three scores"][top_k]
    assert list(scores) == ["fsdp=8", "expert=4,fsdp=2"]
    for mesh, (expected, bits, token, share) in scores.items():
        assert bits == pytest.approx(expected, rel=1e-6), mesh
        assert token < 1e-5, mesh
        assert share < 1e-6, mesh
    assert found["three scores"]["logits"] < 1e-5
    one, many = found["three scores"]["texts"]
    assert one == many != ""
    assert found["three scores"]["held"] == 1 / 8


def test_a_checkpoint_of_any_mesh_is_restored_bit_for_bit_on_any_other(found):
    """Parameters and moments of three experts, saved on fsdp=8 and on expert=4,fsdp=2 (with an empty slot)."""
    for restored in found["resumed"]:
        assert {*restored} == {"saved", "", "fsdp=8", "expert=2,fsdp=4", "expert=8"}
        assert len({*restored.values()}) == 1
    assert found["resumed"][0]["saved"] != found["resumed"][1]["saved"]  # sums in another order


def test_a_seed_gives_the_same_initial_bits_on_every_mesh(found):
    assert {*found["initial"]} == {"one", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=8"}
    assert len({*found["initial"].values()}) == 1


def test_copies_of_an_expert_on_a_mesh_are_that_expert(found):
    """Logits are of order 1, and weights that add up to 1 leave float32 rounding."""
    assert len(found["equal experts"]) == 2
    for mesh, differences in found["equal experts"].items():
        assert len(differences) == 6
        assert max(differences.values()) < 2e-4, mesh


def test_meshes_that_do_not_fit_are_refused_with_both_numbers(found):
    assert found["refused"] == {
        "fsdp=3": "the mesh 'fsdp=3' takes 3 devices, there are 8",
        "fsdp=16": "the mesh 'fsdp=16' takes 16 devices, there are 8",
        "pipe=8": "mesh 'pipe=8': there is no axis 'pipe'",
    }


def test_every_leaf_has_a_sharding_rule_and_every_rule_a_leaf():
    paths: set[str] = set()
    for config in ANCHORS.values():  # which have every leaf that a model can have
        params = init_params(config, jax.random.key(0), ("public", "news"))
        paths |= {*flatten(params), *flatten({**params, "experts": stack_weights(params["experts"])})}
        paths |= {
            *model_leaves(config, ("public", "news"), {"news": read_ranks("w_gate=2,w_up=2,w_down=2,head=2", config)})
        }
    numbered = [(pattern, number) for number, (pattern, _) in enumerate(RULES)]
    assert set(match_rules(paths, numbered).values()) == set(range(len(RULES)))
    assert spec_of("opt_state/1/0/mu/trunk/embed") == spec_of("trunk/embed")
    assert spec_of("opt_state/1/0/count") == jax.sharding.PartitionSpec()
    with pytest.raises(FlexMoEError, match="no rule covers"):
        spec_of("trunk/blocks/w_new")


def test_stacked_weights_are_the_named_weights_in_canonical_order():
    experts = random_params(TINY, ("news", "public", "code"))["experts"]
    stacked = stack_weights(experts)
    whole = with_stacked_rows({**stacked, "stacked": {n: leaf[:, :] for n, leaf in stacked["stacked"].items()}})
    expected = {leaf: np.stack([experts[n][leaf] for n in ("public", "code", "news")], 1) for leaf in experts["news"]}
    assert {*whole} == {*expected}
    for name, leaf in expected.items():
        np.testing.assert_array_equal(whole[name], leaf)
    # Slices of the stacked leaf, as devices ask for them; slots behind the experts hold zeros.
    np.testing.assert_array_equal(stacked["stacked"]["w_up"][0:1, 1:3, 2:5, :], expected["w_up"][0:1, 1:3, 2:5])
    uneven = stack_weights(experts, 4)["stacked"]["w_up"]
    assert uneven.shape[1] == 4
    np.testing.assert_array_equal(uneven[:, 2:4], np.pad(expected["w_up"][:, 2:], ((0, 0), (0, 1), (0, 0), (0, 0))))
    assert not uneven[:, 3:4].any()
    # As a checkpoint holds it, and back: an optimizer's state has the same form, and place-holders of one axis.
    held = {**stack_weights(experts, 4), "stacked": {"w_up": jnp.asarray(uneven[:, :]), "w_down": jnp.zeros(1)}}
    named = unstack_weights(held, experts)
    assert named["news"]["w_down"].shape == (1,)
    np.testing.assert_array_equal(named["news"]["w_up"], experts["news"]["w_up"])
    for path, leaf in flatten(restack_weights(named, held)).items():
        np.testing.assert_array_equal(leaf, flatten(held)[path])
    back = unstack_weights({**stacked, "stacked": {n: leaf[:, :] for n, leaf in stacked["stacked"].items()}}, experts)
    for path, leaf in flatten(back).items():
        np.testing.assert_array_equal(leaf, flatten(experts)[path])


@pytest.mark.parametrize("text", ["data", "data=0", "data=-1", "data=x", "dta=2"])
def test_malformed_meshes_are_refused(text):
    with pytest.raises(ConfigError, match="mesh"):
        parse_mesh(text)


def test_axes_that_are_not_named_have_size_one():
    assert parse_mesh("fsdp=4,expert=2") == {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}
    assert set(parse_mesh("").values()) == {1}


def test_a_program_is_traced_for_the_platform_of_the_mesh_not_of_this_machine():
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), AXES, abstract_device=device)
    assert platform() == jax.default_backend() != "tpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"
