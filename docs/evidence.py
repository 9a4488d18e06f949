"""Figures and tables of the documentation, made from results/: `make docs` runs this before it builds the pages.

A page marks a place with `<!--NAME-->...<!--/-->`; what stands between is replaced by the value of that name, so that
the pages can be read without being built. The figures are docs/evidence/*.svg.
"""

import json
import pathlib
import re

from benchmarks import harness
from flexmoe_jax.study import claims, figures
from flexmoe_jax.study.intervals import Interval
from flexmoe_jax.study.page import joining
from flexmoe_jax.study.results import MARK_MEANS, MEAN, Kind, Regret, Results, SystemResult, read_results
from flexmoe_jax.tree import PUBLIC

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "results", ROOT / "docs" / "evidence"
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/*/*.md")})
PLACE = re.compile(r"<!--([a-z0-9-]+)-->.*?<!--/-->", re.DOTALL)
# The pictures choose their ink by the reader's color scheme.
INK = "<style>:root{color:#1f2328}@media (prefers-color-scheme:dark){:root{color:#e6edf3}}</style>"


def main() -> None:
    """Writes the figures, and the values into all pages that ask for them."""
    found = values()
    for name, svg in drawings().items():
        (FIGURES / f"{name}.svg").write_text(svg, encoding="utf-8")
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := filled(old, found)) != old:
            page.write_text(new, encoding="utf-8")


def filled(page: str, found: dict[str, str]) -> str:
    """The text of a page with every value in its place; KeyError for a name that has no value."""

    def put(match: re.Match[str]) -> str:
        value = found[match[1]]
        shown = f"\n\n{value}\n\n" if value.startswith(("|", "- ")) else value  # a table, a list
        return f"<!--{match[1]}-->{shown}<!--/-->"

    return PLACE.sub(put, page)


def values() -> dict[str, str]:
    """{name: table or number} for the places in the pages."""
    small, seven = study("reproduction-small"), study("seven_owners")
    found = {
        "baselines": systems_table(small, Kind.BASELINE),
        "ablations": systems_table(small, Kind.ABLATION),
        "parts": systems_table(small, Kind.PART),
        "headline": claims.headline(small),
        "mark": MARK_MEANS,
        "ablations-say": bullets(claims.differences(small, Kind.ABLATION)),
        "mixed-say": bullets(mixed_sentences(small)),
        "mixed": mixed_table(small),
        "regret": regret_table(small),
        "joining": joining_table(seven),
        "seven-say": claims.headline(seven),
        "gap": gap_table(small),
        "learning": learning_table(),
        "owners": owners_table(seven),
        "speed": harness.table(speed_rows()),
        "machine": machine(),
        "quickstart": quickstart_table(0, merged_in_bold=True),
        "training": training_table(),
    }
    return found | small_numbers(small) | seven_numbers(seven)


def drawings() -> dict[str, str]:
    """{name: SVG} of the figures of the paper's comparison."""
    results = study("reproduction-small")
    experts, share = [PUBLIC, *results.owners], results.method.share
    leaving = {owner: without(results, owner).against_method for owner in results.owners}
    groups = {kind: rows for kind, rows in results.grouped().items() if kind != Kind.PART}
    first = {kind: groups[kind] for kind in figures.COMPARED}
    found = {
        "ranking": figures.ranking(groups, results.method.name),
        "baselines": figures.ranking(first, results.method.name),
        "costs": figures.costs({k: [(row, results.relative_cost(row)) for row in rows] for k, rows in first.items()}),
        "routing": figures.routing({domain: share[domain] for domain in results.domains if domain in share}, experts),
        "leaving": figures.matrix(
            {f"without {o}": {d: row[d].value for d in experts} for o, row in leaving.items()},
            "Change in bits per byte when an owner leaves",
        ),
    }
    return {name: picture(svg) for name, svg in found.items()}


def picture(svg: str) -> str:
    """An inline figure as a file of its own."""
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    size = f'width="{float(width) * 4 / 3:.0f}" height="{float(height) * 4 / 3:.0f}"'
    return re.sub(r'style="width:[^"]*"', size, svg, count=1).replace("<metadata>", f"{INK}\n <metadata>", 1)


def study(name: str) -> Results:
    """The only study of a file in results/."""
    [results] = read_results(RESULTS / f"{name}.jsonl")
    return results


def without(results: Results, owner: str) -> SystemResult:
    """The merged model that an owner has left."""
    rest = {PUBLIC, *results.owners} - {owner}
    return next(row for row in results.systems if {*row.experts} == rest)


def bits(results: Results, name: str, domain: str = MEAN) -> float:
    return results.of(name).bits_per_byte[domain].value


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(value: float, than: float, digits: int = 1) -> str:
    """How much larger `value` is."""
    return f"{value / than - 1:.{digits}%}"


def interval(found: Interval) -> str:
    """A difference with its 95% interval."""
    return unbroken(f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})")


def could_be_seen(found: Interval | None) -> str:
    """The smallest difference that would have been found; nothing where files of before do not say."""
    return "" if found is None or found.smallest is None else f"{found.smallest:.3f}"


def bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def systems_table(results: Results, kind: Kind) -> str:
    """The method and the systems of a kind, the best mean first."""
    mixed = mixed_domains(results)
    domains = [*(domain for domain in results.domains if domain not in mixed), MEAN, *mixed]
    method, rows = results.method, []
    for row in sorted([method, *results.grouped()[kind]], key=lambda row: row.mean.value):
        difference = row.against_method.get(MEAN)
        cells = [f"**{row.name}**" if row is method else unbroken(row.label)]
        cells += [f"{row.bits_per_byte[domain].value:.3f}" for domain in domains]
        cells += [interval(difference) if difference else "", could_be_seen(difference)]
        cells += [f"{results.relative_cost(row):.2f}"]
        rows.append([*cells, f"{row.training_flops_after_public / method.training_flops_after_public:.2f}"])
    header = ["system", *domains, f"against {method.name} (95%)", "could be seen", "a token", "training"]
    return markdown(header, rows)


def mixed_domains(results: Results) -> list[str]:
    """The domains whose documents interleave two."""
    return [domain for domain in results.domains if " + " in domain]


def mixed_sentences(results: Results) -> list[str]:
    """What the method beats on documents that interleave two domains."""
    return [
        f"{domain}: {' '.join(claims.differences(results, Kind.BASELINE, domain))}" for domain in mixed_domains(results)
    ]


def regret_table(results: Results) -> str:
    """What joining gives each owner on its own text, and what the merge does to the public text."""
    rows = []
    for row in joining(results)[results.method.name]:
        pair = (row.against_hybrid, row.against_public)
        cells = [(interval(found) if found else "", could_be_seen(found)) for found in pair]
        rows.append([row.owner, *cells[0], *cells[1]])
    header = ["text of", "merged against its own hybrid (95%)", "could be seen"]
    return markdown([*header, "merged against the public model alone (95%)", "could be seen"], rows)


def joining_table(results: Results) -> str:
    """Against the public model alone, on each owner's own text, as owners join; in bold what is worse for sure."""
    texts, rows = [PUBLIC, *results.owners], []
    for model, found in joining(results).items():
        of = {row.owner: regret_cell(row) for row in found}
        rows.append([str(len(of) - 1), unbroken(model), *(of.get(name, "") for name in texts)])
    return markdown(["owners", "merged", *texts], rows)


def regret_cell(row: Regret) -> str:
    shown = f"{row.against_public.value:+.3f}"
    return f"**{shown}**" if claims.sign(row.against_public) > 0 else shown


def mixed_table(results: Results) -> str:
    """Systems against the method on documents that interleave two domains."""
    names = ("prompt routing", "causal BTM", "BTM", "soup", "weighted soup", "uniform mixing", "unrestricted 1x")
    domains, rows = mixed_domains(results), []
    for row in (results.of(name) for name in names):
        rows.append([unbroken(row.label), *(interval(row.against_method[domain]) for domain in domains)])
    return markdown([f"against {results.method.name} (95%)", *domains], rows)


def gap_table(results: Results) -> str:
    """Where the distance to the oracle comes from, by domain of an owner."""
    rows = []
    for owner in results.owners:
        merged, hybrid = bits(results, results.method.name, owner), bits(results, f"hybrid {owner}", owner)
        frozen, dense = bits(results, f"frozen trunk {owner}", owner), bits(results, f"dense {owner}", owner)
        oracle = bits(results, "oracle dense expert", owner)
        cells = [bits(results, PUBLIC, owner), merged, hybrid, frozen, dense]
        rows.append([owner, *map("{:.3f}".format, cells), percent(merged, oracle, 0), percent(merged, hybrid)])
    header = ["domain", "public model", "merged", "owner's hybrid", "dense, only the FFN trained"]
    return markdown([*header, "dense, all trained", "merged behind the oracle", "merged behind the hybrid"], rows)


def learning_table() -> str:
    """What a frozen trunk costs when owners train longer, and when the public model knows their domains better."""
    rows = []
    for name in ("owner_steps", "public_steps", "public_share"):
        for results in read_results(RESULTS / f"{name}.jsonl"):
            names = (
                PUBLIC,
                "uniform mixing",
                results.method.name,
                "oracle expert, frozen trunk",
                "oracle dense expert",
            )
            costs = [
                percent(bits(results, names[3], owner), bits(results, names[4], owner)) for owner in results.owners
            ]
            steps = [str(results.config[key]) for key in ("public_steps", "owner_steps")]
            label = results.study.replace("-", "=", 1)
            rows.append([label, *steps, *(f"{bits(results, n):.3f}" for n in names), ", ".join(costs)])
    header = ["study", "public steps", "owner steps", "public model", "uniform mixing", "FlexMoE"]
    return markdown([*header, "best with frozen trunk", "best dense", "a frozen trunk costs"], rows)


def owners_table(results: Results) -> str:
    """The merged model as owners join in alphabetical order, and with their biases shifted."""
    owners, method = results.owners, results.method.name
    names = {n: f"first {n} owners" for n in range(2, len(owners) - 1)}
    names |= {1: f"hybrid {owners[0]}", len(owners) - 1: f"without {owners[-1]}", len(owners): method}
    columns = [(str(n), names[n], n) for n in sorted(names)]
    columns.append((f"{len(owners)}, shifted by log {len(owners)}", f"{method}, shifted by log n", len(owners)))
    labels = (
        "public text",
        "public expert's share of it",
        "owners' domains, behind the hybrids",
        "mean of all domains",
    )
    rows: dict[str, list[str]] = {label: [] for label in labels}
    for _, name, n in columns:
        row = results.of(name)
        layers = [layer[0] for layer in row.share[PUBLIC]]
        merged, alone = (sum(bits(results, it or f"hybrid {o}", o) for o in owners[:n]) for it in (name, ""))
        found = f"{bits(results, name, PUBLIC):.3f}", f"{sum(layers) / len(layers):.0%}", percent(merged, alone)
        for cells, cell in zip(rows.values(), (*found, f"{row.mean.value:.3f}"), strict=True):
            cells.append(cell)
    return markdown(["owners", *(label for label, _, _ in columns)], [[name, *cells] for name, cells in rows.items()])


def small_numbers(results: Results) -> dict[str, str]:
    """Numbers in the text about the paper's comparison."""
    mean = {name: bits(results, name) for name in ("oracle dense expert", "oracle expert, frozen trunk")}
    frozen = mean["oracle expert, frozen trunk"] - mean["oracle dense expert"]
    return {
        "frozen-share": f"{frozen / (results.method.mean.value - mean['oracle dense expert']):.0%}",
        "public-steps": str(results.config["public_steps"]),
        "seeds": str(results.config["seeds"]),
    }


def seven_numbers(results: Results) -> dict[str, str]:
    """Numbers in the text about seven owners."""
    method, first = results.method.name, f"hybrid {results.owners[0]}"
    shifted, public = f"{method}, shifted by log n", bits(results, PUBLIC, PUBLIC)
    return {
        "public-model": f"{public:.3f}",
        "first-owner-costs": percent(bits(results, first, PUBLIC), public, 0),
        "seven-owners-cost": percent(bits(results, method, PUBLIC), public, 0),
        "shift-costs": percent(bits(results, shifted, PUBLIC), public),
        "shift-costs-mean": percent(bits(results, shifted), bits(results, method)),
    }


def speed_rows() -> list[harness.Row]:
    return [harness.Row(**row) for row in benchmark()["rows"]]


def benchmark() -> dict:
    return json.loads((RESULTS / "bench-cpu.json").read_bytes())


def machine() -> str:
    """What the figures of speed were measured on."""
    record = benchmark()
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']['processor']}, Python {record['device']['python']}, {versions}, {record['date'][:10]}"


def quickstart(run: int) -> dict:
    """A run of the quickstart: 0 as it is, 1 with the paper's training."""
    return json.loads((RESULTS / "quickstart.json").read_bytes())[run]


def quickstart_table(run: int, merged_in_bold: bool = False) -> str:
    found = quickstart(run)["bits_per_byte"]
    rows = [[name, *(f"{value:.3f}" for value in row.values())] for name, row in found.items()]
    for row in rows:
        row[0] = f"**{row[0]}**" if merged_in_bold and row[0] == "merged" else row[0]
    return markdown(["", *found["merged"]], rows)


def training_table() -> str:
    """The quickstart with its own training and with the paper's: means over the four domains."""
    names = ("public alone", "merged", "uniform mixing")
    rows = [
        [f"`{quickstart(run)['command']}`", *(f"{quickstart(run)['bits_per_byte'][n][MEAN]:.3f}" for n in names)]
        for run in (0, 1)
    ]
    return markdown(["mean bits per byte of the four domains", *names], rows)


if __name__ == "__main__":
    main()
