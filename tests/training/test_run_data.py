"""What a run trains on: the owner's rows marked as such, no held-out text, an order that its seed decides."""

import dataclasses
import functools
import pathlib

import numpy as np
import pytest

from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.data.store import TokenStore
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training import loop
from flexmoe_jax.training.start import prepare
from flexmoe_jax.tree import PUBLIC
from tests.tiny import WORDS, expert_run, public_run, random_release, same_tree, write_documents

TOKENIZER = load_tokenizer("cl100k:512")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    return random_release(tmp_path_factory.mktemp("world"))[0]


def batches_of(run, monkeypatch) -> list[Batch]:
    """The batches that the steps of `run` get."""
    seen: list[Batch] = []

    def recording(step, *args):
        seen.extend(arg for arg in args if isinstance(arg, Batch))
        return step(*args)

    make = loop.make_train_step
    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_train_step", lambda *a, **k: functools.partial(recording, make(*a, **k)))
        loop.train(run)
    return seen


def words_of(tokens) -> set[str]:
    """The whole words in a row of tokens: without the first and the last, which a window may cut."""
    return {*TOKENIZER.decode(tokens).replace("<|endoftext|>", " ").split()[1:-1]}


def test_rows_of_the_owner_are_marked_as_such_in_the_promised_number(release, tmp_path, monkeypatch):
    public_data = write_documents(tmp_path / "data", PUBLIC)
    run = expert_run(tmp_path, "news", release, steps=2, public_data=str(public_data), public_fraction=0.25)
    for batch in batches_of(run, monkeypatch):
        own = np.asarray(batch.own)
        assert (own == own[:, :1]).all()
        assert sorted(own[:, 0]) == [0, 1, 1, 1]
        for tokens, marked in zip(np.asarray(batch.tokens), own[:, 0], strict=True):
            assert words_of(tokens) <= {*WORDS["news" if marked else PUBLIC]}


def test_a_run_trains_on_no_held_out_text(release, tmp_path):
    """Its tokens are those of the training documents, all of them, and of no other."""
    run = expert_run(tmp_path, "news", release, steps=1)
    write_documents(pathlib.Path(run.data), "code", count=6, split="heldout")
    loop.train(run)
    store = TokenStore.open(pathlib.Path(run.out) / "tokens", TOKENIZER)
    text = TOKENIZER.decode(np.concatenate(store.parts))
    assert store.documents == text.count("<|endoftext|>") == 60
    assert {*text.replace("<|endoftext|>", " ").split()} == {*WORDS["news"]}


def test_the_order_of_text_depends_on_the_seed(release, tmp_path, monkeypatch):
    runs = [expert_run(tmp_path / str(n), "news", release, steps=1, seed=seed) for n, seed in enumerate((0, 0, 1))]
    first, again, other = (np.asarray(batches_of(run, monkeypatch)[0].tokens) for run in runs)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_initial_weights_depend_on_the_seed(tmp_path):
    run = public_run(tmp_path)
    starts = [prepare(dataclasses.replace(run, seed=seed), mesh_of_one()).params for seed in (0, 0, 1)]
    assert same_tree(starts[0], starts[1])
    assert not np.array_equal(starts[0]["trunk"]["embed"], starts[2]["trunk"]["embed"])
