"""Runs the benchmarks named on the command line, or all: `python -m benchmarks [train rank moe infer start data]`."""

import importlib
import sys

from benchmarks import harness

NAMES = ("train", "rank", "moe", "infer", "start", "data")


def main(argv: list[str]) -> int:
    names = argv or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = importlib.import_module(f"benchmarks.{name}").run()
        print(harness.table(found), file=sys.stderr, flush=True)
        rows += found
    print(harness.table(rows))
    if names == NAMES:
        print(harness.record("cpu", "make bench", rows), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
