"""Tables of scores whose answers are known, and the texts on which systems are scored."""

import dataclasses
import json
import math

import numpy as np
import pytest

from flexmoe_jax.api import Model
from flexmoe_jax.study.results import Kind
from flexmoe_jax.study.scoring import Bench, SystemScore, Texts, _interleave, make_texts, with_router
from flexmoe_jax.study.systems import METHOD
from flexmoe_jax.study.tables import tabulate
from flexmoe_jax.study.workshop import Artifacts
from tests.study.tiny import CONFIG, MODEL

TEXTS = Texts({"public": ["abcd", "ab"], "news": ["abcdefgh"]}, {"public": ["x"] * 8, "news": ["x"] * 4})


def score(bits: float, right: bool) -> SystemScore:
    """Every text costs `bits` bits per byte; the true continuation is the likeliest or the least likely."""
    nats = {
        (d, "heldout"): [np.array([bits * len(text) * math.log(2)]) for text in some]
        for d, some in TEXTS.heldout.items()
    }
    order = [1.0, 2.0, 3.0, 4.0] if right else [4.0, 3.0, 2.0, 1.0]
    nats |= {(d, "choice"): [np.array([n]) for n in order * (len(some) // 4)] for d, some in TEXTS.choice.items()}
    return SystemScore(nats, {"public": np.ones((1, 2)) / 2})


def test_the_tables_hold_means_paired_differences_and_accuracies():
    scores = [
        {METHOD: score(2.0, True), "public": score(3.0, False)},
        {METHOD: score(2.5, True), "public": score(3.5, False)},
    ]
    rows = {row.name: row for row in tabulate(CONFIG, TEXTS, scores)}
    assert set(rows) == {METHOD, "public"}
    assert rows[METHOD].mean.value == pytest.approx(2.25)
    assert rows["public"].bits_per_byte["news"].value == pytest.approx(3.25)
    against = rows["public"].against_method["mean"]
    assert dataclasses.astuple(against) == pytest.approx((1.0, 1.0, 1.0))  # one worse in every resample
    assert rows[METHOD].against_method == {}
    assert rows[METHOD].choice["mean"].value == 1
    assert rows["public"].choice["mean"].value == 0
    assert (rows[METHOD].kind, rows["public"].kind) == (Kind.METHOD, Kind.BASELINE)


def test_scores_are_read_back_as_they_were_written(tmp_path):
    """Token by token: mixtures are made of them."""
    nats = {("code + math", "heldout"): [np.float32([1, 2]), np.float32([3])], ("news", "choice"): [np.float32([4])]}
    bench = Bench(CONFIG, Artifacts({}), TEXTS, tmp_path, tmp_path)
    calls = []
    for _ in range(2):  # the second time from the disk
        read = bench.kept("rows / 2", lambda bench: calls.append(1) or SystemScore(nats, {"news": np.ones((2, 3))}))
        assert read.nats.keys() == nats.keys()
        for key, docs in nats.items():
            assert all(np.array_equal(a, b) for a, b in zip(read.nats[key], docs, strict=True))
        assert np.array_equal(read.share["news"], np.ones((2, 3)))
    assert calls == [1]
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["rows___2.npz"]


def test_calibrations_scale_odds_and_shift_owners_biases_only():
    biases = {"public": 0, "news": -1}
    experts = {name: {"router": np.float32([[1, 2]]), "bias": np.float32([bias])} for name, bias in biases.items()}
    model = Model(MODEL, {"trunk": {}, "experts": experts}, None)
    shifted = with_router(1.0, -math.log(3))(model).params["experts"]
    assert shifted["public"]["bias"] == 0
    assert shifted["news"]["bias"] == pytest.approx(-1 - math.log(3))
    doubled = with_router(2.0, 0.0)(model).params["experts"]
    assert doubled["news"]["bias"] == -2
    assert (doubled["public"]["router"] == [[2, 4]]).all()
    assert (experts["news"]["router"] == [[1, 2]]).all()  # the model itself stays


def test_documents_of_two_domains_take_turns():
    text = _interleave("a" * 900, "b" * 500)
    assert [piece[0] + str(len(piece)) for piece in text.split("\n\n")] == ["a400", "b400", "a400", "b100"]


def test_held_out_text_is_the_start_of_each_document_and_the_task_uses_all_of_it(tmp_path):
    for name in ("public", "math", "news"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": f"{name} {n:04d} " * 300}) for n in range(30)]
        (tmp_path / name / "heldout.jsonl").write_text("\n".join(rows))
    config = dataclasses.replace(CONFIG, domains="math,news", heldout_bytes=8000, document_chars=500, choice_items=5)
    texts = make_texts(config, tmp_path)
    assert {name: len(some) for name, some in texts.heldout.items()} == {
        "public": 16,
        "math": 16,
        "news": 16,
        "math + news": 8,
    }
    assert {len(text) for text in texts.heldout["math"]} == {500}
    assert not set(texts.heldout["math + news"][0].split()) & set(" ".join(texts.heldout["math"]).split()) - {"math"}
    assert {name: len(some) for name, some in texts.choice.items()} == dict(
        zip(texts.choice, (20, 20, 20, 0), strict=True)
    )
    longer = make_texts(dataclasses.replace(config, document_chars=4000, heldout_bytes=40_000), tmp_path)
    assert longer.choice == texts.choice
