"""Classifiers find documents like an owner's, state their accuracy, and contain no document."""

import dataclasses
import json

import numpy as np
import pytest

from flexmoe_jax.data import proxies
from flexmoe_jax.data.embedding import embed_documents
from flexmoe_jax.data.proxies import Classifier, find_proxies, train_classifier
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError

CODE = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(24)]
FOOD = [f"Fry {i} onions gently in butter, then add the rice and the stock." for i in range(24)]
SEA = [f"The ship with {i} sails left the harbour before the storm." for i in range(24)]

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(CODE, FOOD, count=24)


def test_a_classifier_separates_documents_that_it_never_saw(classifier):
    odds = classifier.log_odds(embed_documents(["class Tree:\n    def walk(self): ...", "Boil the potatoes in milk."]))
    assert odds[0] > 0 > odds[1]
    assert (classifier.accuracy, classifier.documents, classifier.held_out) == (1.0, 38, 10)


def test_a_classifier_file_holds_the_exact_numbers_and_no_text(classifier, tmp_path):
    path = tmp_path / "classifier.json"
    classifier.save(path)
    read = Classifier.load(path)
    assert np.array_equal(read.weights, classifier.weights)
    assert read.intercept == classifier.intercept
    assert not any(text in path.read_text() for text in CODE)
    for broken in ("{}", "[]", "x", path.read_text().replace("flexmoe-classifier-1", "y")):
        path.write_text(broken)
        with pytest.raises(DataError, match="is not a classifier"):
            Classifier.load(path)


def test_proxies_are_the_public_documents_most_like_the_owners(classifier, tmp_path):
    public = [*FOOD, *SEA, *CODE[:6]]
    odds = find_proxies({"code": classifier}, public, tmp_path / "proxies", count=6, of=1000)
    chosen = [document.text for document in read_documents(tmp_path / "proxies" / "code")]
    assert set(chosen) == set(CODE[:6])
    lines = [json.loads(line) for line in (tmp_path / "proxies" / "code" / "train.jsonl").open()]
    ranked = [line["log_odds"] for line in lines]
    assert ranked == sorted(ranked, reverse=True)
    assert odds["code"] == (ranked[0], ranked[-1])


def test_impossible_requests_are_refused_and_leave_nothing(classifier, tmp_path):
    with pytest.raises(DataError, match="3 different own documents"):
        train_classifier(CODE[:3], FOOD)
    with pytest.raises(DataError, match="50 proxies out of 24"):
        find_proxies({"code": classifier}, FOOD, tmp_path / "p", count=50, of=100)
    with pytest.raises(FlexMoEError, match="is not usable"):
        find_proxies({"../code": classifier}, FOOD, tmp_path / "p", count=5, of=100)
    other = Classifier(classifier.weights, 0.0, "another", "0" * 64, 1.0, 1, 1)
    with pytest.raises(DataError, match=r"reads embeddings of another \(000000000000\)"):
        find_proxies({"code": other}, FOOD, tmp_path / "p", count=5, of=100)
    narrow = dataclasses.replace(classifier, weights=classifier.weights[:5])
    with pytest.raises(DataError, match="has 5 weights, the encoder is 384 wide"):
        find_proxies({"code": narrow}, FOOD, tmp_path / "p", count=5, of=100)
    with pytest.raises(ArtifactError, match="cannot be written: No such file"):
        classifier.save(tmp_path / "nowhere" / "classifier.json")
    assert not (tmp_path / "p").exists()
    find_proxies({"code": classifier}, FOOD, tmp_path / "p", count=5, of=100)
    with pytest.raises(DataError, match="already exists"):
        find_proxies({"code": classifier}, FOOD, tmp_path / "p", count=5, of=100)


def test_the_stated_accuracy_is_that_on_held_out_documents(monkeypatch):
    """Every fifth document is held out. Here these look like the other kind, and the classifier gets them all wrong."""
    texts = [f"{n} {kind}" for kind in ("own", "public") for n in range(40)]

    def embedded(some, encoder):
        signs = [(1 if text.endswith("own") else -1) * (-1 if int(text.split()[0]) % 5 == 0 else 1) for text in some]
        return np.float32([[sign] for sign in signs])

    monkeypatch.setattr(proxies, "embed_documents", embedded)
    classifier = train_classifier(texts[:40], texts[40:], count=40)
    assert (classifier.accuracy, classifier.documents, classifier.held_out) == (0.0, 64, 16)


def test_log_odds_are_positive_where_a_document_is_likelier_the_owners(monkeypatch):
    """Between the two kinds they are 0, wherever these lie; three times as many documents of one change nothing."""
    monkeypatch.setattr(proxies, "embed_documents", lambda some, encoder: np.float32([[float(t[:2])] for t in some]))
    own, public = [f"07 {n}" for n in range(60)], [f"03 {n}" for n in range(20)]
    odds = train_classifier(own, public, count=100).log_odds(np.float32([[3], [5], [7]]))
    assert odds[0] < -1 < odds[1] < 1 < odds[2]
    assert abs(odds[1]) < 0.1 * odds[2]
