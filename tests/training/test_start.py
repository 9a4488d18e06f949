"""What an owner's run starts from: the public feed-forward network, and a router row in the public row's space."""

import numpy as np
import pytest

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training.start import prepare
from flexmoe_jax.tree import PUBLIC
from tests.tiny import expert_run, make_expert, make_release, random_release, same_tree

SCALE, SEED = 0.37, 5  # neither is a default


@pytest.fixture
def release(tmp_path):
    return random_release(tmp_path, SCALE, SEED)


def test_an_owners_row_starts_in_the_space_of_the_public_one(release, tmp_path):
    """The same domain vector gives the same row, bit for bit: of the public model's norm and projection."""
    model, vector = release
    run = expert_run(tmp_path, "news", model, domain_vector=str(vector), router_scale=1.0)
    experts = prepare(run, mesh_of_one()).params["experts"]
    np.testing.assert_array_equal(experts["news"]["router"], experts[PUBLIC]["router"])
    np.testing.assert_allclose(np.linalg.norm(experts["news"]["router"], axis=1), SCALE, rtol=1e-6)  # float32


def test_an_owners_expert_starts_as_the_public_one_with_a_bias_of_0(release, tmp_path):
    model, _ = release
    experts = prepare(expert_run(tmp_path, "news", model), mesh_of_one()).params["experts"]
    ours, public = ({n: leaf for n, leaf in experts[name].items() if "w_" in n} for name in ("news", PUBLIC))
    assert same_tree(ours, public)
    assert (experts["news"]["bias"] == 0).all()
    assert not np.array_equal(experts["news"]["router"], experts[PUBLIC]["router"])


def test_a_package_is_trained_further_only_beside_its_public_model(tmp_path):
    ours, other = make_release(tmp_path / "ours"), make_release(tmp_path / "other", seed=9)
    package = make_expert(tmp_path / "news", "news", ours)
    run = RunConfig(owner="news", public=other.path, expert=package, data="", out="", steps=1, batch_size=1, seq_len=4)
    with pytest.raises(ArtifactError, match="was trained with the trunk"):
        prepare(run, mesh_of_one())
