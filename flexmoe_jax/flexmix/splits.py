"""From the pieces of a recipe to documents in splits: cut, deduplicate, cap, and assign each group to one place."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from flexmoe_jax.data.sources import Document, document_id
from flexmoe_jax.flexmix.recipes import RECIPES, Archives, Piece, fingerprint

MIN_CHARACTERS = 200
MAX_CHARACTERS = 20_000


@dataclasses.dataclass(frozen=True)
class Part:
    """A domain's documents: the owner's, the held-out ones, and those given to the public training split."""

    train: list[Document]
    heldout: list[Document]
    given: list[Document]


def make_part(name: str, archives: Archives, seen: set[str], public_share: float, heldout_share: float) -> Part:
    """The documents of domain `name`, each list ordered by hash.

    `seen` holds the fingerprints of the preceding domains, whose duplicates are dropped; this domain's are added.
    `public_share` and `heldout_share` are shares of the domain's bytes.
    """
    recipe = RECIPES[name]
    whole_when_marked = recipe.heldout == "marked"
    pieces = _capped(_clean(recipe.extract(archives), seen, whole_when_marked), recipe.max_mb * 1e6)
    heldout, given = _choose_groups(pieces, recipe.heldout, public_share, heldout_share)
    part = Part([], [], [])
    for piece in pieces:
        if piece.group in heldout:
            # Unmarked pieces of these groups are dropped: training on them would leak what is held out.
            if piece.marked or not recipe.heldout.startswith("marked"):
                part.heldout.append(_document(name, piece, "heldout"))
        elif not piece.marked:
            (part.given if piece.group in given else part.train).append(_document(name, piece, "train"))
    return part


def cut(text: str) -> Iterator[str]:
    """`text` in parts of at most MAX_CHARACTERS, cut at the last blank line that fits, else line break, else space."""
    while len(text) > MAX_CHARACTERS:
        places = (text.rfind(separator, MAX_CHARACTERS // 2, MAX_CHARACTERS) for separator in ("\n\n", "\n", " "))
        at = next((place for place in places if place > 0), MAX_CHARACTERS)
        yield text[:at]
        text = text[at:].strip("\n")
    yield text


def _clean(pieces: Iterable[Piece], seen: set[str], whole_when_marked: bool) -> list[Piece]:
    """Pieces cut to size, without short ones and duplicates; an official held-out part stays unchanged."""
    kept = []
    for piece in pieces:
        whole = piece.marked and whole_when_marked
        text = piece.text.encode(errors="ignore").decode().replace("\r\n", "\n").strip()
        for part in [text] if whole else cut(text):
            mark = fingerprint(part)
            if whole or (len(part) >= MIN_CHARACTERS and mark not in seen):
                kept.append(piece._replace(text=part))
            seen.add(mark)
    return kept


def _capped(pieces: Iterable[Piece], max_bytes: float) -> list[Piece]:
    """All marked pieces, and the others up to `max_bytes`, in the order of their hashes."""
    kept, size = [], 0
    for piece in sorted(pieces, key=lambda piece: document_id(piece.text)):
        size += 0 if piece.marked else _bytes(piece)
        if piece.marked or size <= max_bytes:
            kept.append(piece)
    return kept


def _choose_groups(
    pieces: Iterable[Piece], rule: str, public_share: float, heldout_share: float
) -> tuple[set[str], set[str]]:
    """The groups held out and the groups given to the public split; see `Recipe` for the rules."""
    sizes: collections.Counter[str] = collections.Counter()  # bytes by group
    marked: collections.Counter[str] = collections.Counter()
    for piece in pieces:
        (marked if piece.marked else sizes)[piece.group] += _bytes(piece)
    total = sizes.total()
    if rule == "marked":
        heldout = set(marked)
    elif rule == "marked share":
        heldout = _take(_by_hash(marked.keys() - sizes.keys()), marked, heldout_share * total)
    elif rule == "latest":
        heldout = _take(sorted(sizes, reverse=True), sizes, heldout_share * total)
    else:
        heldout = _take(_by_hash(sizes), sizes, heldout_share * total)
    # In the same order for every share, so that a larger public share contains a smaller one.
    return heldout, _take(_by_hash(sizes.keys() - heldout), sizes, public_share * total)


def _by_hash(groups: Iterable[str]) -> list[str]:
    return sorted(groups, key=document_id)


def _take(groups: Iterable[str], sizes: Mapping[str, int], wanted: float) -> set[str]:
    """The first of `groups` that together have at least `wanted` bytes."""
    taken, size = set(), 0
    for group in groups:
        if size >= wanted:
            break
        taken.add(group)
        size += sizes[group]
    return taken


def _bytes(piece: Piece) -> int:
    return len(piece.text.encode())


def _document(domain: str, piece: Piece, split: str) -> Document:
    return Document(
        text=piece.text,
        source=piece.source,
        license=piece.license,
        group=f"{domain}/{piece.group}",
        split=split,
        id=document_id(piece.text),
        domain=domain,
    )
