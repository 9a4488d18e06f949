"""Nothing that a stranger wrote acts in the terminal of whoever looks at it, or adds a line that looks like ours."""

import json
import unicodedata

import pytest

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.artifacts.sealed import seal
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import FlexMoEError, printable
from flexmoe_jax.files import json_bytes
from flexmoe_jax.json_files import canonical_json
from tests.tiny import CONFIG, base_of, make_release, random_part

CLEARS, TITLE, FORGED, RIGHT_TO_LEFT = (
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "\nok   signature.json  version 9",
    "\u202egpj",
)
HOSTILE = CLEARS + TITLE + FORGED + "\r\x08\x7f\x9b2J\u2028" + RIGHT_TO_LEFT


@pytest.fixture
def package(tmp_path):
    """An expert's package whose record holds terminal escapes, and the release it belongs to."""
    record = {"contact": HOSTILE, "licence": HOSTILE, "training": {HOSTILE: HOSTILE}}
    release = make_release(tmp_path / "release")
    params = random_part("news", 1)
    write_package(tmp_path / "news", owner="news", params=params, config=CONFIG, base=base_of(release), record=record)
    return tmp_path / "news"


def printed(argv: list[str], capsys) -> list[str]:
    """The lines on both streams; they hold nothing that acts."""
    main(argv)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Zl", "Zp")]
    assert "\u202e" not in text
    return text.split("\n")


def test_a_record_is_shown_as_text(package, capsys):
    lines = printed(["inspect", str(package)], capsys)
    assert any(r"\x1b[2J" in line and r"\nok   signature.json" in line and r"\u202egpj" in line for line in lines)
    assert not any(line.startswith("ok   signature.json") for line in lines)


def test_names_of_files_are_shown_as_text(package, capsys):
    (package / "arrays" / f"x{FORGED}{CLEARS}").write_bytes(b"")
    lines = printed(["verify", str(package)], capsys)
    assert any(r"\nok   signature.json" in line for line in lines)
    assert not any(line.startswith("ok   signature.json") for line in lines)


def test_a_journal_is_shown_as_text(package, capsys):
    model = merge(package.parent / "release", [package], package.parent / "model").path
    lines = (model / JOURNAL).read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    del last["digest"]
    (model / JOURNAL).write_bytes(b"".join(lines[:-1]) + canonical_json(seal(last | {"event": HOSTILE})) + b"\n")
    for argv in (["inspect", str(model)], ["inspect", str(model), "--journal"]):
        found = printed(argv, capsys)
        assert any(r"\x1b[2J" in line for line in found)
        assert not any(line.startswith("ok   signature.json") for line in found)


def test_a_refusal_quotes_a_stranger_as_text(package, capsys):
    manifest = json.loads((package / "manifest.json").read_bytes())
    (package / "manifest.json").write_bytes(json_bytes(manifest | {"format": HOSTILE}))
    assert any("flexmoe inspect" in line for line in printed(["inspect", str(package)], capsys))
    missing = str(package.parent / f"gone{CLEARS}{TITLE}")
    assert any("does not exist" in line for line in printed(["inspect", missing], capsys))


def test_escapes_are_visible_and_text_of_every_language_stays():
    assert printable("a\x1b[31mb\r\nc") == r"a\x1b[31mb\r\nc"
    assert printable("two\nlines\tand\x07", keep="\n\t") == "two\nlines\tand\\x07"
    for text in ("naïve — 東京　駅", "می‌خواهم", "👩‍👩‍👧", "\\x1b stays"):  # with joiners and a wide space
        assert printable(text) == text
    assert printable("\ud800") == r"\ud800"


def test_a_message_quotes_a_stranger_at_most_so_long():
    assert len(FlexMoEError("x" * 10_000_000).what) < 11_000
