"""The owner algebra: split, union, select, rules, partition; and initialization by name."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flexmoe_jax import tree
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.params import count_parameters, model_leaves, owner_leaves
from tests.tiny import TINY, random_params

RESERVED = (
    "trunk",
    "public",
    "experts",
    "model",
    "all",
    "none",
    "uniform",
    "router",
    "journal",
    "tokenizer",
    "stacked",
)
owner_names = st.from_regex(r"[a-z][a-z0-9_-]{0,62}", fullmatch=True).filter(lambda name: name not in RESERVED)
owners = st.lists(owner_names, unique=True, max_size=6)


def labeled(names) -> tree.Params:
    """A tree whose leaves are their own paths, so that identity is visible."""
    leaf_names = ("w_up", "bias")
    experts = {name: {leaf: f"experts/{name}/{leaf}" for leaf in leaf_names} for name in names}
    return {"trunk": {"embed": "trunk/embed", "blocks": {"w_q": "trunk/blocks/w_q"}}, "experts": experts}


@given(names=owners, data=st.data())
def test_split_and_union_are_inverse_in_any_order_and_grouping(names, data):
    params = labeled(["public", *names])
    parts = data.draw(st.permutations(list(tree.split(params).items())))
    cut = data.draw(st.integers(0, len(parts)))
    joined = tree.union(dict(parts[:cut]), dict(parts[cut:]))
    assert joined == params
    assert tuple(joined["experts"]) == tree.canonical_order([*names, "public"])
    assert tuple(tree.split(joined)) == ("trunk", *joined["experts"])
    for path, leaf in tree.flatten(joined).items():
        assert path == leaf  # nothing was exchanged between owners


def test_union_copies_nothing():
    params = random_params(TINY, ("public", "news"))
    parts = tree.split(params)
    joined = tree.union(parts)
    assert all(joined["experts"][name] is parts[name] for name in ("public", "news"))
    assert joined["trunk"] is parts["trunk"]


@given(names=owners.filter(len), data=st.data())
def test_union_refuses_an_owner_given_twice(names, data):
    parts = tree.split(labeled(["public", *names]))
    doubled = data.draw(st.sampled_from(["public", *names]))
    with pytest.raises(FlexMoEError, match=f"{doubled!r} is given twice"):
        tree.union(parts, {doubled: {}})


def test_union_refuses_no_trunk_and_two_trunks():
    parts = tree.split(labeled(["public"]))
    with pytest.raises(FlexMoEError, match="0 trunks were given"):
        tree.union({"public": parts["public"]})
    with pytest.raises(FlexMoEError, match="2 trunks were given"):
        tree.union(parts, {"trunk": parts["trunk"]})


@given(names=owners, data=st.data())
def test_canonical_order_is_public_then_alphabetical(names, data):
    shuffled = data.draw(st.permutations(["public", *names]))
    order = tree.canonical_order(shuffled)
    assert order == ("public", *sorted(names))
    assert tree.canonical_order(names) == tuple(sorted(names))


def test_canonical_order_refuses_a_repeated_name():
    with pytest.raises(FlexMoEError, match="'news' is given twice"):
        tree.canonical_order(["news", "public", "news"])


@given(names=owners.filter(len), data=st.data())
def test_select_and_without_give_the_model_that_never_had_the_others(names, data):
    every = ["public", *names]
    params = labeled(every)
    kept = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    dropped = [name for name in every if name not in kept]
    never_had = labeled(tree.canonical_order(kept))
    assert tree.select(params, kept) == never_had
    assert list(tree.select(params, kept)["experts"]) == list(never_had["experts"])
    if dropped:
        assert tree.without(params, *dropped) == never_had
    assert params == labeled(every)  # the whole is untouched


def test_select_and_without_refuse_unknown_repeated_and_empty_choices():
    params = labeled(["public", "news"])
    with pytest.raises(FlexMoEError, match=r"no expert 'new'(.|\n)*did you mean 'news'"):
        tree.select(params, ["public", "new"])
    with pytest.raises(FlexMoEError, match="no expert 'code'"):
        tree.without(params, "code")
    with pytest.raises(FlexMoEError, match="given twice"):
        tree.select(params, ["news", "news"])
    with pytest.raises(FlexMoEError, match=r"no expert is left(.|\n)*public, news"):
        tree.select(params, [])
    with pytest.raises(FlexMoEError, match="no expert is left"):
        tree.without(params, "public", "news")


@given(name=owner_names)
def test_usable_names_are_accepted(name):
    assert tree.check_owner_name(name) == name


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_refused(name):
    with pytest.raises(FlexMoEError, match=f"{name!r} is reserved"):
        tree.check_owner_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "News", "1st", "-a", "_a", "a b", "a/b", "../a", "a.b", "a\n", "\u00e9t\u00e9", "a" * 64],
    ids=ascii,
)
def test_unusable_names_are_refused(name):
    with pytest.raises(FlexMoEError, match="is not usable"):
        tree.check_owner_name(name)


def test_flatten_gives_sorted_paths_and_unflatten_is_its_inverse():
    params = labeled(["public", "news"])
    flat = tree.flatten(params)
    assert list(flat) == sorted(flat)
    assert flat["trunk/blocks/w_q"] == "trunk/blocks/w_q"
    assert tree.unflatten(flat) == params


def test_the_first_rule_that_matches_the_whole_path_wins():
    paths = ["trunk/embed", "experts/public/bias", "experts/news/bias", "experts/news/w_up"]
    rules = [("experts/public/.*", "a"), (".*/bias", "b"), ("experts", "never: not a whole path"), (".*", "c")]
    assert tree.match_rules(paths, rules) == dict(zip(paths, ["c", "a", "b", "c"], strict=True))


def test_a_path_no_rule_covers_is_refused():
    with pytest.raises(FlexMoEError, match="no rule covers the parameter 'trunk/embed'"):
        tree.match_rules(["experts/news/bias", "trunk/embed"], [("experts/.*", True), ("trunk", False)])


@given(names=owners, data=st.data())
def test_partition_and_combine_are_inverse(names, data):
    params = labeled(["public", *names])
    paths = list(tree.flatten(params))
    mask = dict(zip(paths, data.draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths))), strict=True))
    chosen, others = tree.partition(params, mask)
    assert set(tree.flatten(chosen)) == {path for path in paths if mask[path]}
    assert set(tree.flatten(others)) == {path for path in paths if not mask[path]}
    assert tree.combine(chosen, others) == params == tree.combine(others, chosen)


@given(names=owners, data=st.data())
def test_combine_refuses_a_path_in_two_parts(names, data):
    params = labeled(["public", *names])
    path = data.draw(st.sampled_from(list(tree.flatten(params))))
    with pytest.raises(ArtifactError, match=f"two parts hold the parameter {path!r}"):
        tree.combine(params, tree.unflatten({path: 0}))


@given(names=owners)
def test_every_declared_leaf_belongs_to_one_owner(names):
    assume("experts" not in names)
    spec = model_leaves(TINY, ("public", *names))
    for path in spec:
        top, owner = path.split("/")[:2]
        assert top == "trunk" or (top == "experts" and owner in ("public", *names))


def test_initial_values_follow_the_declaration():
    params = init_params(TINY, jax.random.key(0), ("public", "news"))
    flat, spec = tree.flatten(params), model_leaves(TINY, ("public", "news"))
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in spec.items()}
    for path, leaf in spec.items():
        values = np.asarray(flat[path])
        assert values.dtype == np.float32
        if leaf.std:
            # the sampling error of a standard deviation over n values is 1/sqrt(2n): five of them
            assert abs(values.std() / leaf.std - 1) < 5 / np.sqrt(2 * values.size), path
        else:
            assert (values == leaf.value).all(), path
    for owner in ("trunk", "news"):
        assert count_parameters(TINY, owner) == sum(leaf.size for leaf in jax.tree.leaves(tree.split(params)[owner]))
        assert set(tree.flatten(tree.split(params)[owner])) == set(owner_leaves(TINY, owner))


def test_adding_an_expert_leaves_every_other_leaf_bit_identical():
    key = jax.random.key(7)
    small = tree.flatten(init_params(TINY, key, ("public", "news")))
    large = tree.flatten(init_params(TINY, key, ("a-first", "news", "public", "zoo")))
    for path, leaf in small.items():
        assert np.asarray(leaf).tobytes() == np.asarray(large[path]).tobytes(), path
    # Experts start with different values: the key is folded with the name.
    assert not np.array_equal(large["experts/news/w_up"], large["experts/zoo/w_up"])
    assert not np.array_equal(large["experts/news/w_up"], large["experts/news/w_gate"])
