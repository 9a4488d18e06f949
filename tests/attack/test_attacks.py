"""Extraction and membership: of a model that knows its text by heart, of one that never saw it, and their formulas."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import flexmoe_jax
from flexmoe_jax.attack.extraction import PREFIX, SAMPLING, SUFFIX, Extraction, Share, extract, passages
from flexmoe_jax.attack.membership import blind_separation, member_scores, separation, shared
from flexmoe_jax.cli.main import main
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.generate import Sampling, sample
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training.loop import train
from tests.tiny import public_run

MODEL = ModelConfig(
    vocab_size=512, num_layers=2, d_model=96, num_heads=2, num_kv_heads=2, head_dim=48, d_ff=192, max_seq_len=256
)
COUNT = 20


WORDS = ["".join(np.random.default_rng(n).choice(list("abcdefghij"), 2 + n % 4)) for n in range(80)]


def texts(seed: int) -> list[str]:
    """Documents in which a word decides the next one, by a cycle of the `seed`'s own through the same words."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(len(WORDS))
    starts = rng.permutation(len(WORDS))[:COUNT]
    return [" ".join(WORDS[cycle[(start + n) % len(WORDS)]] for n in range(78)) for start in starts]


def write(folder, name: str, some: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of members and others, a model that learned the members by heart, one that has hardly begun)."""
    root = tmp_path_factory.mktemp("attacks")
    write(root / "data", "train", texts(1))
    write(root / "data", "heldout", texts(2))
    run = public_run(root / "fresh", model=MODEL, seq_len=256, data=str(root / "data"), steps=1, eval_every=None)
    fresh = flexmoe_jax.load(train(run))
    optimizer = OptimizerConfig(lr=4e-3, warmup_steps=20, weight_decay=0.0)
    how = {"steps": 200, "optimizer": optimizer, "save_every": None, "eval_every": None}
    run = public_run(root / "fit", model=MODEL, seq_len=256, data=str(root / "data"), **how)
    return root, flexmoe_jax.load(train(run)), fresh


def test_a_text_known_by_heart_is_extracted_and_one_never_seen_is_not(world):
    _, fit, fresh = world
    found = {}
    for name, model in (("fit", fit), ("fresh", fresh)):
        for seed in (1, 2):
            rows = passages(texts(seed), model.tokenizer, 256, 8, seed=0)
            shares = extract(model, rows, samples=2).shares()
            found[name, seed] = {key: share.value for key, share in shares.items()}
    assert found["fit", 1]["10 draws"] > 0.8
    assert found["fit", 1]["paper"] > 0.5
    assert found["fit", 1]["continuation"] > 0.5
    for key in (("fit", 2), ("fresh", 1), ("fresh", 2)):
        assert set(found[key].values()) == {0.0}, key


def test_members_are_told_from_others_only_by_the_model_that_learned_them(world):
    _, fit, fresh = world
    members, others = texts(1), texts(2)
    for model, expected in ((fit, 1.0), (fresh, 0.5)):
        scores = [member_scores(model, some, member_scores(fresh, some)) for some in (members, others)]
        for name in ("loss", "zlib", "min-k", "min-k++"):
            auc = separation(scores[0][name], scores[1][name]).auc
            assert abs(auc - expected) < (0.05 if expected == 1 else 0.35), name
        reference = [part["reference"] for part in scores]
        if model is fit:
            assert separation(*reference).auc > 0.95
        else:
            assert not np.concatenate(reference).any()  # the same model twice


def test_the_verbs_say_what_the_functions_find(world, capsys):
    root = world[0]
    model = str(root / "fit" / "public" / "run" / "model")
    data = str(root / "data")
    options = ["--documents", "8", "--samples", "0", "--json"]
    assert main(["attack-extract", model, "--data", data, "--control", data, *options]) == 0
    found = json.loads(capsys.readouterr().out)["experts"]["public"]
    assert found["data"]["10 draws"]["share"] > 0.8 > 0.1 > found["control"]["10 draws"]["share"]
    assert "paper" not in found["data"]
    assert main(["attack-membership", model, "--members", data, "--others", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["members"], found["others"], found["shared"]) == (COUNT, COUNT, 0)
    assert found["experts"]["public"]["loss"]["auc"] > 0.95
    assert main(["attack-membership", model, "--members", data, "--others", data, "--others-split", "train"]) == 1
    assert "20 of the 20 other documents are members, too" in capsys.readouterr().err
    assert found["evidence"] is True  # both have the same words
    write(root / "later", "heldout", [f"{text} 2026" for text in texts(2)])
    assert main(["attack-membership", model, "--members", data, "--others", str(root / "later")]) == 0
    assert "words alone tell members from others" in capsys.readouterr().out


def test_statistics_are_those_of_the_whole_distribution(world):
    _, fit, _ = world
    rows = [fit.tokenizer.encode(text)[:n] for text, n in zip(texts(2), (90, 5, 30), strict=False)]
    for row, found in zip(rows, fit.statistics(rows, SAMPLING), strict=True):
        log_p_TV = np.asarray(jax.nn.log_softmax(fit.logits(np.array(row[:-1])), axis=-1))
        p_TV = np.exp(np.asarray(log_p_TV, np.float64))
        mean_T = (p_TV * log_p_TV).sum(-1)
        deviation_T = np.sqrt((p_TV * (log_p_TV - mean_T[:, None]) ** 2).sum(-1))
        at = np.arange(len(row) - 1), np.array(row[1:])
        assert found.log_p == pytest.approx(log_p_TV[at], abs=1e-4)  # float32 sums of 512 terms
        assert found.mean == pytest.approx(mean_T, abs=1e-4)
        assert found.deviation == pytest.approx(deviation_T, abs=1e-3)


def test_the_probability_of_a_draw_is_its_frequency(world):
    _, _, fresh = world
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.8)
    row = fresh.tokenizer.encode(texts(1)[0])[:4]
    logits_V = fresh.logits(np.array(row))[-1]
    drawn = np.asarray(sample(jax.random.key(0), jnp.broadcast_to(logits_V, (4000, len(logits_V))), sampling))
    for token in {*drawn.tolist(), int(jnp.argmin(logits_V))}:
        (found,) = fresh.statistics([[*row, token]], sampling)
        share = float((drawn == token).mean())
        assert math.exp(found.drawn[-1]) == pytest.approx(share, abs=0.04)  # 5 deviations of a share of 4000
    assert found.drawn[-1] == -np.inf or share > 0


def test_n_draws_and_their_intervals():
    """z of a half comes back in one draw of two; 10 draws of z = 0.067 have a probability of a half."""
    log_z = np.log([0.5, 0.068, 0.066, 1e-5, 0.0], where=[True] * 4 + [False], out=np.full(5, -np.inf))
    shares = Extraction(np.array([0.95, 0.2]), np.array([0.89, 0.2]), log_z).shares()
    assert {name: share.count for name, share in shares.items()} == {
        "paper": 1,
        "continuation": 0,
        "10 draws": 2,
        "1,000 draws": 3,
        "1,000,000 draws": 4,
    }
    low, high = Share(0, 100).interval
    assert (low, high) == (0.0, pytest.approx(1 - 0.025**0.01))  # Clopper and Pearson's bound for none of 100


def test_passages_are_random_places_of_long_documents(world):
    _, fit, _ = world
    long = [" ".join(texts(seed)) for seed in (3, 4)]
    rows = passages([*long, "short"], fit.tokenizer, 256, 5, seed=0)
    assert [len(row) for row in rows] == [256, 256]
    encoded = [fit.tokenizer.encode(text) for text in long]
    starts = [n for row in rows for ids in encoded for n in range(len(ids)) if ids[n : n + 256] == row]
    assert len(starts) == 2
    assert max(starts) > 0
    assert passages(long, fit.tokenizer, 256, 5, seed=0) != passages(long, fit.tokenizer, 256, 5, seed=1)
    with pytest.raises(DataError, match="no document of 1 has 128 tokens"):
        passages(["short"], fit.tokenizer, 256, 5, seed=0)
    with pytest.raises(DataError, match="reads 81 tokens, and a prompt of 32 with the next 50"):
        passages(long, fit.tokenizer, 81, 5, seed=0)
    assert PREFIX + SUFFIX < 128


def test_the_auc_and_its_interval():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 300).round(1), rng.normal(0, 1, 200).round(1)  # ties count one half
    found = separation(members, others)
    expected = roc_auc_score([1] * 300 + [0] * 200, np.concatenate([members, others]))
    assert found.auc == pytest.approx(expected)
    draws = [separation(rng.normal(0.5, 1, 300), rng.normal(0, 1, 200)) for _ in range(200)]
    true = 0.5 * math.erfc(-0.5 / 2)  # P(member > other) of two normal scores half a deviation apart
    assert np.mean([one.low <= true <= one.high for one in draws]) > 0.9
    assert set(found.found) == {0.01}  # 200 others cannot show a thousandth
    share, low, high = found.found[0.01]
    threshold = np.sort(others)[::-1][2]
    assert share == pytest.approx((members > threshold).mean())
    assert low < share < high
    with pytest.raises(DataError, match="1 members and 200 other documents, 0 of"):
        separation(members[:1], others)
    with pytest.raises(DataError, match="1 of whose scores are not finite"):
        separation(np.array([0.0, np.nan]), others)


def test_words_alone_tell_parts_that_are_not_random():
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(200)]
    some, more = ([" ".join(rng.choice(words, 30)) for _ in range(80)] for _ in range(2))
    assert blind_separation(some, more).is_chance
    later = [f"{text} 2026" for text in more]
    assert not blind_separation(some, later).is_chance
    assert shared(some, [some[3] + " and more", more[0]]) == 1
