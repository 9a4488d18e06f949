"""The four-way task: the texts of an item share context and length, and only the likeliest true text counts."""

import numpy as np

from flexmoe_jax.study.continuation import CHOICES, CONTEXT, CONTINUATION, correct, make_items


def texts(count: int) -> list[str]:
    return [f"{n:03d} " * 200 for n in range(count)] + ["too short"]


def test_an_items_texts_have_one_context_and_four_endings_and_the_first_is_true():
    documents = texts(6)
    items = make_items(documents, 6)
    assert len(items) == 6 * CHOICES
    for n in range(6):
        item = items[n * CHOICES : (n + 1) * CHOICES]
        assert {len(text) for text in item} == {CONTEXT + CONTINUATION}
        assert {text[:CONTEXT] for text in item} == {item[0][:CONTEXT]}
        assert len(set(item)) == CHOICES
        assert item[0] in documents[n]
        assert not any(text in document for text in item[1:] for document in documents)


def test_items_are_the_same_every_time_and_none_is_made_of_too_few_documents():
    assert make_items(texts(5), 5) == make_items(texts(5), 5)
    assert make_items(texts(3), 3) == []


def test_right_only_where_the_true_text_is_strictly_likeliest():
    nats = [1.0, 2, 3, 4, 2.0, 1, 3, 4, 1.0, 1, 3, 4]
    np.testing.assert_array_equal(correct(np.array(nats)), [1, 0, 0])
