"""The acceptance checks pass a good mix and find every fault in a bad one."""

import json
import shutil

import numpy as np
import pytest

from flexmoe_jax.errors import DataError
from flexmoe_jax.flexmix import checks as checks_module
from flexmoe_jax.flexmix.checks import Bigram, check

WORDS = {
    "public": "the town river was built",
    "news": "minister said today vote party",
    "math": "let sum equals n squared",
}


def tokenize(text):
    return list(text.encode())


def encode(texts):
    """Letter counts of each text."""
    return np.stack([np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256) for text in texts])


@pytest.fixture
def mix(tmp_path):
    """A tiny mix in which every domain has words of its own."""
    generator = np.random.default_rng(0)
    for name, words in WORDS.items():
        (tmp_path / name).mkdir()
        for split, count in {"train": 60, "heldout": 20}.items():
            texts = [" ".join(generator.choice(words.split(), 40)) for _ in range(count)]
            lines = [{"text": t, "group": f"{name}/{split}/{i}", "domain": name} for i, t in enumerate(texts)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mix.json").write_text(json.dumps({"domains": list(WORDS)}))
    return tmp_path


def failed(mix):
    return [result.subject for result in check(mix, tokenize, encode) if not result.ok]


def test_a_good_mix_passes_every_check(mix, monkeypatch):
    assert failed(mix) == [f"size of {name}" for name in WORDS]
    monkeypatch.setattr(checks_module, "MIN_DOMAIN_BYTES", 10_000)
    assert failed(mix) == []
    assert len(check(mix, tokenize)) == len(check(mix, tokenize, encode)) - 1


def test_shared_groups_duplicates_and_swapped_domains_are_found(mix, monkeypatch):
    monkeypatch.setattr(checks_module, "MIN_DOMAIN_BYTES", 10_000)
    line = json.loads((mix / "news" / "heldout.jsonl").read_text().splitlines()[0])
    with (mix / "public" / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({**line, "text": "another text"}))
    assert failed(mix) == ["groups in one place only"]
    with (mix / "math" / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": line["text"].upper() + "!"}))
    assert failed(mix) == ["groups in one place only", "no exact duplicates"]
    shutil.copy(mix / "math" / "train.jsonl", mix / "public" / "train.jsonl")
    text = (mix / "public" / "train.jsonl").read_text().replace('"math"', '"public"')
    (mix / "public" / "train.jsonl").write_text(text)
    assert {"own bigram model is best", "nearest-centroid accuracy"} < set(failed(mix))


def test_the_bigram_model_is_a_distribution_and_learns():
    tokens = np.random.default_rng(1).integers(0, 6, 200) // 2 * 2  # odd tokens are never seen
    model = Bigram(tokens, vocabulary=7)
    for before in range(7):
        chances = [2 ** (-model.bits(np.array([before, after])) - np.log2(model.unigram[before])) for after in range(7)]
        np.testing.assert_allclose(sum(chances), 1, rtol=1e-9)
    cycle = np.arange(1000) % 7
    assert Bigram(cycle, 7).bits(cycle) < 0.1 * Bigram(tokens, 7).bits(cycle)


def test_a_folder_without_a_mix_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a mix"):
        check(tmp_path, tokenize)
