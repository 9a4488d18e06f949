"""From pieces to splits: every text once, every group in one place."""

import pytest

from flexmoe_jax.flexmix import splits
from flexmoe_jax.flexmix.recipes import Piece, Recipe


@pytest.fixture
def part(monkeypatch):
    """The documents of 60 pieces in 20 groups, every piece given twice, the second time in other spacing and case."""

    def extract(archives):
        for n in range(60):
            text = f"Piece {n:03d}: {n * 7919:09d} " * 15
            yield Piece(text, "s", "l", f"g{n % 20}")
            yield Piece(text.upper().replace(" ", "  "), "s", "l", f"g{n % 20}")

    monkeypatch.setitem(splits.RECIPES, "news", Recipe((), extract, 1))
    return splits.make_part("news", {}, set(), public_share=0.2, heldout_share=0.2)


def test_a_text_is_kept_once(part):
    assert len(part.train) + len(part.heldout) + len(part.given) == 60


def test_a_text_of_an_earlier_domain_is_dropped(part, monkeypatch):
    seen = {splits.fingerprint(part.train[0].text)}
    again = splits.make_part("news", {}, seen, public_share=0.2, heldout_share=0.2)
    assert part.train[0].id not in {document.id for document in again.train}


def test_a_group_is_in_one_place(part):
    places = [{document.group for document in some} for some in (part.train, part.heldout, part.given)]
    assert all(places)
    assert sum(map(len, places)) == len(set.union(*places)) == 20
