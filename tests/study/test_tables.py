"""Tables of scores whose answers are known, and the texts on which systems are scored."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from flexmoe_jax.api import Model
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.study import scoring
from flexmoe_jax.study.results import Kind
from flexmoe_jax.study.scoring import (
    Bench,
    SystemScore,
    Text,
    Texts,
    _interleave,
    _interleaved,
    make_texts,
    of_model,
    with_router,
)
from flexmoe_jax.study.systems import METHOD
from flexmoe_jax.study.tables import regret, tabulate
from flexmoe_jax.study.workshop import Artifacts
from flexmoe_jax.tree import PUBLIC
from tests.study.tiny import CONFIG, MODEL
from tests.tiny import TINY, random_params

TEXTS = {"public": [Text("abcd", "a"), Text("ab", "b")], "news": [Text("abcdefgh", "c")]}


def score(bits: float) -> SystemScore:
    """Every text costs `bits` bits per byte."""
    nats = {domain: [np.array([bits * len(t.text) * math.log(2)]) for t in some] for domain, some in TEXTS.items()}
    return SystemScore(nats, {"public": np.ones((1, 2)) / 2})


def test_the_tables_hold_means_and_paired_differences():
    scores = [{METHOD: score(2.0), "public": score(3.0)}, {METHOD: score(2.5), "public": score(3.5)}]
    rows = {row.name: row for row in tabulate(CONFIG, TEXTS, scores)}
    assert set(rows) == {METHOD, "public"}
    assert rows[METHOD].mean.value == pytest.approx(2.25)
    assert rows["public"].bits_per_byte["news"].value == pytest.approx(3.25)
    against = rows["public"].against_method["mean"]
    assert dataclasses.astuple(against) == pytest.approx((1.0, 1.0, 1.0, 0.0))  # one worse with every seed and text
    assert rows[METHOD].against_method == {}
    assert (rows[METHOD].kind, rows["public"].kind) == (Kind.METHOD, Kind.BASELINE)


def test_public_text_of_several_sources_counts_once_in_the_mean():
    config = dataclasses.replace(CONFIG, domains="news", public_domains="academic,code")
    texts = {domain: [Text("ab", "a"), Text("cd", "b")] for domain in ("public", "academic", "code", "news")}
    bits = {"public": 1.0, "academic": 2.0, "code": 6.0, "news": 9.0}
    one = SystemScore({d: [np.full(1, 2 * b * math.log(2))] * 2 for d, b in bits.items()}, {})
    [row] = tabulate(config, texts, [{METHOD: one}])
    found = {column: cell.value for column, cell in row.bits_per_byte.items()}
    assert found == pytest.approx({**bits, "public text": 3.0, "mean": 6.0})


def test_regret_is_the_merge_minus_what_each_owner_has_without_it_as_owners_join():
    config = dataclasses.replace(CONFIG, domains="code,math,news")
    texts = {domain: [Text("ab", "a"), Text("cd", "b")] for domain in (PUBLIC, *config.owners)}
    bits = {PUBLIC: 5.0, METHOD: 3.0, "without news": 3.5, "hybrid code": 1.0, "hybrid math": 2.0, "hybrid news": 4.0}
    scores = {
        name: SystemScore({domain: [np.full(1, 2 * value * math.log(2))] * 2 for domain in texts}, {})
        for name, value in bits.items()
    }
    rows = regret(config, texts, [scores, scores])
    assert [
        (row.model, row.owner, row.against_hybrid and round(row.against_hybrid.value, 6), row.against_public.value)
        for row in rows
    ] == [
        ("hybrid code", "public", None, pytest.approx(-4.0)),
        ("hybrid code", "code", 0.0, pytest.approx(-4.0)),
        ("without news", "public", None, pytest.approx(-1.5)),
        ("without news", "code", 2.5, pytest.approx(-1.5)),
        ("without news", "math", 1.5, pytest.approx(-1.5)),
        (METHOD, "public", None, pytest.approx(-2.0)),
        (METHOD, "code", 2.0, pytest.approx(-2.0)),
        (METHOD, "math", 1.0, pytest.approx(-2.0)),
        (METHOD, "news", -1.0, pytest.approx(-2.0)),
    ]


def test_scores_are_read_back_as_they_were_written(tmp_path):
    """Token by token: mixtures are made of them."""
    nats = {"code + math": [np.float32([1, 2]), np.float32([3])], "news": [np.float32([4])]}
    bench = Bench(CONFIG, Artifacts({}), TEXTS, tmp_path, tmp_path)
    calls = []
    for _ in range(2):  # the second time from the disk
        read = bench.kept("rows / 2", lambda bench: calls.append(1) or SystemScore(nats, {"news": np.ones((2, 3))}))
        assert read.nats.keys() == nats.keys()
        for key, docs in nats.items():
            assert all(np.array_equal(a, b) for a, b in zip(read.nats[key], docs, strict=True))
        assert np.array_equal(read.share["news"], np.ones((2, 3)))
    assert calls == [1]
    assert [path.name for path in (tmp_path / "scores").glob("*.npz")] == ["rows___2.npz"]


def test_a_text_that_is_cut_is_not_scored_on_an_end_of_text(tmp_path, monkeypatch):
    """Its tokens cost what they cost in the whole document; a text that ends also pays for its end."""
    config = dataclasses.replace(TINY, vocab_size=300, max_seq_len=64)
    model = Model(config, random_params(config), load_tokenizer("cl100k:300"))
    monkeypatch.setattr(scoring, "load", lambda path: model)
    whole, cut = Text("the king of the river", "1"), Text("the king", "2", ends=False)
    texts = Texts({"news": [whole, cut, dataclasses.replace(cut, ends=True)]}, {})
    study = dataclasses.replace(CONFIG, seq_len=64)
    bench = Bench(study, Artifacts({"public": tmp_path}), texts, tmp_path, tmp_path)
    all_of_it, start, ended = of_model("public")(bench).nats["news"]
    assert len(all_of_it) == len(model.tokenizer.encode(whole.text)) + 1
    np.testing.assert_allclose(start, all_of_it[: len(start)], rtol=1e-5)  # float32, in rows of another length
    assert len(ended) == len(start) + 1 == len(model.tokenizer.encode(cut.text)) + 1


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


def test_documents_of_two_domains_vary_together_where_either_domains_do():
    """Plays have three groups here and news one: all of these documents are of one day."""
    plays, news = [Text("a", f"play {n}") for n in range(3)], [Text("b", "day")] * 3
    for pair in ((plays, news), (news, plays)):
        assert [text.group for text in _interleaved(*pair)] == ["day"] * 3


def write_mix(tmp_path):
    """Forty documents a domain, ten of each group, long and short ones in turn, each of words of its own."""
    for name in ("public", "math", "news"):
        (tmp_path / name).mkdir()
        rows = [{"text": f"{name} {n:04d} " * (300 if n % 2 else 20), "group": f"day {n // 10}"} for n in range(40)]
        (tmp_path / name / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def numbers(texts: list[Text]) -> set[str]:
    """Which documents they are from."""
    return {number for text in texts for number in re.findall(r"\w+ \d{4}", text.text)}


def test_held_out_text_is_the_start_of_each_document(tmp_path):
    config = dataclasses.replace(CONFIG, domains="math,news", heldout_bytes=4000, document_chars=500)
    texts = make_texts(config, write_mix(tmp_path)).heldout
    counts = {name: len(some) for name, some in texts.items()}
    assert counts == {"public": 9, "math": 9, "news": 9, "math + news": 5}  # at most 4,000 bytes, 2,000 of a part
    assert {(len(text.text), text.ends) for text in texts["math"]} == {(200, True), (500, False)}
    assert [text.group for text in texts["math"][6:9]] == ["day 0", "day 1", "day 1"]  # the documents 9, 10, 11
    mixed = texts["math + news"]
    assert len(numbers(mixed)) == 10
    assert not numbers(mixed) & numbers(texts["math"] + texts["news"])
    assert not any(text.ends for text in mixed)
    assert mixed[0].group == "day 3"


def test_validation_text_is_of_other_documents(tmp_path):
    config = dataclasses.replace(CONFIG, domains="math,news", heldout_bytes=4000, document_chars=500)
    texts = make_texts(config, write_mix(tmp_path))
    assert texts.validation.keys() == texts.heldout.keys()
    for domain, some in texts.validation.items():
        assert numbers(some)
        assert not numbers(some) & {number for reported in texts.heldout.values() for number in numbers(reported)}, (
            domain
        )
