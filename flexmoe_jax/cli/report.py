"""`flexmoe report`: a study as one HTML page."""

import pathlib

from flexmoe_jax.cli.common import parser
from flexmoe_jax.errors import ArtifactError


def report(argv: list[str]) -> int:
    """Writes the page; it opens offline, on a phone as well, in light and dark."""
    p = parser("report", "One self-contained page about a study.", "flexmoe report runs/reproduction-small")
    p.add_argument("run", help="the folder of a finished `flexmoe reproduce`, or its results.json")
    p.add_argument("--out", help="the page; RUN/report.html by default")
    args = p.parse_args(argv)
    from flexmoe_jax.report.page import read_study, render

    run = pathlib.Path(args.run)
    out = pathlib.Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "report.html"
    page = render(*read_study(run))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}", "give a file in a folder that exists") from error
    print(out)
    return 0
