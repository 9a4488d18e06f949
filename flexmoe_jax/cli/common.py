"""What the verbs share: parsers with an example, JSON output, text tables."""

import argparse
import json


def parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser that refuses abbreviations and shows an example."""
    return argparse.ArgumentParser(
        prog=f"flexmoe {verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object for programs")


def emit(result: dict, lines: list[str], as_json: bool) -> None:
    """Prints `result` as JSON, or `lines` for people."""
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines))


def table(header: list[str], rows: list[list]) -> list[str]:
    """Aligned text lines: first column left, the others right; floats with three decimals."""
    cells = [header, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]  # fmt: skip
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def names(text: str | None) -> list[str] | None:
    """`public,news` -> ["public", "news"]."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
