"""Tables from scores whose answers are known, and the texts they are made on."""

import dataclasses
import json
import math

import numpy as np
import pytest

from flexmoe_jax.api import Model
from flexmoe_jax.cli.reproduce import lines
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.study import reproduce as study
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.reproduce import check_same, vary
from flexmoe_jax.study.systems import SystemScore, Texts, _interleave, _load, _save, _with_router, make_texts
from flexmoe_jax.study.tables import tabulate
from flexmoe_jax.study.train import METHOD

MODEL = ModelConfig(
    vocab_size=512, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, max_seq_len=32
)
CONFIG = StudyConfig(out="", domains="news", model=MODEL, seeds=2)
TEXTS = Texts({"public": ["abcd", "ab"], "news": ["abcdefgh"]}, {"public": ["x"] * 8, "news": ["x"] * 4})


def score(bits: float, right: bool) -> SystemScore:
    """Every text costs `bits` bits per byte; the true continuation is the likeliest or the least likely."""
    nats = {
        (d, "heldout"): [np.array([bits * len(text) * math.log(2)]) for text in some]
        for d, some in TEXTS.heldout.items()
    }
    order = [1.0, 2.0, 3.0, 4.0] if right else [4.0, 3.0, 2.0, 1.0]
    nats |= {(d, "choice"): [np.array([n]) for n in order * (len(some) // 4)] for d, some in TEXTS.choice.items()}
    return SystemScore(nats, {"public": np.ones((1, 2)) / 2}, 10.0)


def test_the_tables_hold_means_differences_and_right_answers():
    scores = [
        {METHOD: score(2.0, True), "public": score(3.0, False)},
        {METHOD: score(2.5, True), "public": score(3.5, False)},
    ]
    results = tabulate(CONFIG, TEXTS, scores, {METHOD: 1e9})
    assert results["bits_per_byte"][METHOD]["mean"]["value"] == pytest.approx(2.25)
    assert results["bits_per_byte"]["public"]["news"]["value"] == pytest.approx(3.25)
    against = results["against_method"]["public"]["mean"]
    assert against == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})  # paired: one worse in every resample
    assert results["choice"][METHOD]["mean"]["value"] == 1
    assert results["choice"]["public"]["mean"]["value"] == 0
    assert set(results["against_method"]) == {"public"}
    table = lines(results)
    assert table[2].startswith(METHOD)  # the best mean is first
    assert "2.250" in table[2]


def test_scores_are_read_back_as_they_were_written(tmp_path):
    """Token by token: mixtures are made of them."""
    nats = {("code + math", "heldout"): [np.float32([1, 2]), np.float32([3])], ("news", "choice"): [np.float32([4])]}
    _save(tmp_path / "scores" / "x.npz", SystemScore(nats, {"news": np.ones((2, 3))}, 7.0))
    read = _load(tmp_path / "scores" / "x.npz")
    assert read.forward_flops == 7.0
    assert read.nats.keys() == nats.keys()
    for key, docs in nats.items():
        assert all(np.array_equal(a, b) for a, b in zip(read.nats[key], docs, strict=True))
    assert np.array_equal(read.share["news"], np.ones((2, 3)))


def test_calibrations_scale_odds_and_shift_owners_alone():
    biases = {"public": 0, "news": -1}
    experts = {name: {"router": np.float32([[1, 2]]), "bias": np.float32([bias])} for name, bias in biases.items()}
    model = Model(MODEL, {"trunk": {}, "experts": experts}, None)
    shifted = _with_router(lambda: model, 1.0, -math.log(3)).params["experts"]
    assert shifted["public"]["bias"] == 0
    assert shifted["news"]["bias"] == pytest.approx(-1 - math.log(3))
    doubled = _with_router(lambda: model, 2.0, 0.0).params["experts"]
    assert doubled["news"]["bias"] == -2
    assert (doubled["public"]["router"] == [[2, 4]]).all()
    assert (experts["news"]["router"] == [[1, 2]]).all()  # the model itself stays


def test_documents_of_two_domains_take_turns():
    text = _interleave("a" * 900, "b" * 500)
    assert [piece[0] + str(len(piece)) for piece in text.split("\n\n")] == ["a400", "b400", "a400", "b100"]


def test_no_document_gives_more_than_its_beginning_and_choices_see_all_of_it(tmp_path):
    for name in ("public", "math", "news"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": f"{name} {n:04d} " * 300}) for n in range(30)]
        (tmp_path / name / "heldout.jsonl").write_text("\n".join(rows))
    config = dataclasses.replace(CONFIG, domains="math,news", heldout_bytes=8000, document_chars=500, choice_items=5)
    texts = make_texts(config, tmp_path)
    assert {name: len(some) for name, some in texts.heldout.items()} == {
        "public": 16, "math": 16, "news": 16, "math + news": 8,
    }  # fmt: skip
    assert {len(text) for text in texts.heldout["math"]} == {500}
    assert not set(texts.heldout["math + news"][0].split()) & set(" ".join(texts.heldout["math"]).split()) - {"math"}
    assert {name: len(some) for name, some in texts.choice.items()} == dict(
        zip(texts.choice, (20, 20, 20, 0), strict=True)
    )
    longer = make_texts(dataclasses.replace(config, document_chars=4000, heldout_bytes=40_000), tmp_path)
    assert longer.choice == texts.choice


def test_a_folder_of_another_study_is_refused_and_more_seeds_are_not(tmp_path):
    check_same(CONFIG, tmp_path)
    check_same(dataclasses.replace(CONFIG, seeds=5, ablations=""), tmp_path)
    with pytest.raises(ArtifactError, match="heldout_bytes: 40000 != 7"):
        check_same(dataclasses.replace(CONFIG, heldout_bytes=7), tmp_path)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("domains", ["math"], "config.domains cannot be varied"),
        ("owner_stps", ["1"], "config.owner_stps cannot be varied"),
        ("owner_steps", ["1", "x"], "owner_steps is varied over 1, x"),
        ("owner_steps", ["0"], "config.owner_steps is 0"),
        ("public_steps", ["1"], "config.public is 'here' and config.public_steps is varied"),
        ("public_share", ["0.1"], "config.public is 'here' and config.public_share is varied"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_is_written(key, values, message, tmp_path):
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "out"), public="here")
    with pytest.raises(ConfigError, match=message):
        vary(config, key, values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "own"), [("public_share", True), ("embed_count", True), ("owner_steps", False)])
def test_a_varied_study_has_text_and_vectors_of_its_own_where_they_depend_on_the_number(
    key, own, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(study, "make_shared", lambda config, shared: None)
    monkeypatch.setattr(study, "train_public", lambda config, shared, home: shared / "public")
    monkeypatch.setattr(study, "reproduce", lambda config, shared: given.append((config.public, shared)))
    vary(dataclasses.replace(CONFIG, out=str(tmp_path)), key, ["0.2" if key == "public_share" else "5"])
    assert given == [("", None) if own else (str(tmp_path / "public"), tmp_path)]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 0},
        {"domains": "nws"},
        {"domains": "public"},
        {"top_k": 3},
        {"systems": "some"},
        {"public_share": 0.6},
        {"router_scale": 0.0},
    ],
)
def test_impossible_studies_are_refused(change):
    with pytest.raises(ConfigError, match=f"config.{next(iter(change))}"):
        dataclasses.replace(CONFIG, **change)
