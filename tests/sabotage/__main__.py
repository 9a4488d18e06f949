"""Breaks promises of the package, one at a time, and prints which test noticed: `make sabotage`.

    python -m tests.sabotage [WORDS ..]    only the faults whose names hold one of these words

Exit code 1 if a fault survives or does not apply, or if its test fails without it.
"""

import sys
import time

from tests.sabotage.faults import FAULTS
from tests.sabotage.runner import CAUGHT, run


def main(words: list[str]) -> int:
    started = time.monotonic()
    chosen = [fault for fault in FAULTS if not words or any(word in fault.what for word in words)]
    caught = 0
    print("| fault | | by | seconds |\n|---|---|---|---|")
    for verdict in run(chosen):
        caught += verdict.outcome == CAUGHT
        fault = verdict.fault
        print(f"| {fault.what} | {verdict.outcome} | {fault.test} | {verdict.seconds:.0f} |", flush=True)
    print(f"\n{caught} of {len(chosen)} faults are caught; {time.monotonic() - started:.0f} seconds")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
