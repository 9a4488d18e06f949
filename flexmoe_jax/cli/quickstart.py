"""`flexmoe quickstart`: the whole life of a FlexMoE model on one machine, on real text.

Every party's work is done by the command a person would type, which is printed when it runs. Each owner's commands run
in processes of their own, in a folder that holds the owner's data and a copy of the public release (the public model
and public documents), and nothing else.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import LocalPath, add_json, emit, parser, table
from flexmoe_jax.errors import ArtifactError, ConfigError, FlexMoEError
from flexmoe_jax.files import new_directory
from flexmoe_jax.ranges import COUNT, SEED

if TYPE_CHECKING:
    from flexmoe_jax.api import Model

OWNERS = ("code", "math", "news")
LEAVER = "news"
TOP_K = "2"
_TEXT = """Does everything once on one machine, on real text, in about ten minutes on two cores: builds the data, trains
a public model and three owners' experts, merges them, evaluates, removes an expert, and proves that the rest equals a
model that never had it. The commands are printed as they run; the results are also written to OUT/results.json, and
as a page with pictures to OUT/report.html."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A quickstart in the folder `root`, and the commands that it showed."""

    root: pathlib.Path
    embed_count: int
    overrides: list[str]
    commands: list[str] = dataclasses.field(default_factory=list)

    def here(self, *argv: str, makes: pathlib.Path | None = None) -> None:
        """Shows a command and runs it in this process, unless what it `makes` is there."""
        from flexmoe_jax.cli.main import main

        if self._shown(f"flexmoe {' '.join(argv)}", makes):
            code = main(list(argv))
            if code:
                raise FlexMoEError(f"flexmoe {argv[0]} ended with exit code {code}", "see its message above")

    def party(self, home: pathlib.Path, *argv: str, makes: pathlib.Path | None = None) -> None:
        """Shows a command and runs it in a process of its own inside `home`, unless what it `makes` is there."""
        if self._shown(f"(cd {home} && flexmoe {' '.join(argv)})", makes):
            command = [sys.executable, "-m", "flexmoe_jax.cli.main", *argv]
            to = sys.stderr if sys.stdout is sys.stderr else None  # with --json
            code = subprocess.run(command, cwd=home, stdout=to, check=False).returncode
            if code:
                raise FlexMoEError(f"flexmoe {argv[0]} in {home} ended with exit code {code}", "see its message above")

    def _shown(self, command: str, makes: pathlib.Path | None) -> bool:
        """Whether to run the command, which is printed."""
        self.commands.append(command)
        print(f"$ {command}", flush=True)
        there = makes is not None and makes.exists()
        if there:
            print(f"{makes} exists: nothing to do", flush=True)
        return not there


def quickstart(argv: list[str]) -> int:
    """Trains, merges, evaluates, opts out; prints the table and writes `results.json` and `report.html`."""
    p = parser("quickstart", _TEXT, "flexmoe quickstart --out runs/quickstart")
    what = "folder for everything this makes; resumed if it exists; runs/quickstart by default"
    p.add_argument("--out", default="runs/quickstart", action=LocalPath, help=what)
    p.add_argument("--seed", type=SEED, default=0, help="of initial weights and data order; 0 by default")
    what = "a configuration key for all trainings, for example steps=20; may be given several times"
    p.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help=what)
    what = "documents in each party's domain embedding; 64 by default"
    p.add_argument("--embed-count", type=COUNT, default=64, help=what)
    p.add_argument("--eval-bytes", type=COUNT, default=24_000, help="held-out text per domain; 24000 by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.artifacts.sealed import write_json

    start = time.monotonic()
    root = pathlib.Path(args.out)
    session = Session(root, args.embed_count, [f"--config.{o}" for o in (f"seed={args.seed}", *args.override)])
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        _prepare_data(session)
        release = _train_public(session, root / "public")
        packages = {owner: _train_owner(session, root / "owners" / owner, owner, release) for owner in OWNERS}
        heldout = [w for d in ("public", *OWNERS) for w in ("--heldout", f"{d}={root / 'mix' / d}")]
        models = _compose(session, release, packages, [*heldout, "--max-bytes", str(args.eval_bytes)])
        results, samples = _evaluate(root, models, args.eval_bytes)
    results |= {"parties": _parties(root, release, packages), "out": str(root), "commands": session.commands}
    results |= {"seed": args.seed, "overrides": args.override, "seconds": round(time.monotonic() - start)}
    page = _write_page(root / "report.html", results, samples)
    write_json(root / "results.json", results)
    emit(results, [*_lines(results, root), page], args.json)
    return 0


def _prepare_data(session: Session) -> None:
    """The mini-FlexMix, then each party's part in a folder of its own."""
    mix, domains = session.root / "mix", "public," + ",".join(OWNERS)
    session.here("data", "build", "--out", str(mix), "--domains", domains, makes=mix / "mix.json")
    parties = {"public": session.root / "public", **{owner: session.root / "owners" / owner for owner in OWNERS}}
    for domain, home in parties.items():
        _copy(mix / domain, home / "data")


def _train_public(session: Session, home: pathlib.Path) -> pathlib.Path:
    """The public release: the model, and the documents it was trained on."""
    _embed(session, home)
    session.party(home, "pretrain", f"--config={_experiment('quickstart_public.py')}", *session.overrides)
    release = home / "release"
    _copy(home / "run" / "model", release / "model")
    _copy(home / "data", release / "documents")
    return release


def _train_owner(session: Session, home: pathlib.Path, owner: str, release: pathlib.Path) -> pathlib.Path:
    """The public release is handed over as a copy: the owner's processes never look outside `home`."""
    _copy(release, home / "release")
    _embed(session, home)
    session.party(home, "train", f"--config={_experiment('quickstart_expert.py')}:{owner}", *session.overrides)
    return home / "run" / "package"


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder, whole or not at all; an existing one stays."""
    if not target.exists():
        with new_directory(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)


def _embed(session: Session, home: pathlib.Path) -> None:
    count = str(session.embed_count)
    session.party(home, "embed", "data", "--out", "domain.json", "--count", count, makes=home / "domain.json")


def _compose(
    session: Session, release: pathlib.Path, packages: dict[str, pathlib.Path], heldout: Sequence[str] = ()
) -> dict[str, pathlib.Path]:
    """Merges all, opts the leaver out into a second directory, and merges a model that never had the leaver.

    `heldout` are options of the first merge: the text on which it says what joining gives or costs.
    """
    models = {name: session.root / name for name in ("model", f"model_without_{LEAVER}", f"model_never_{LEAVER}")}
    for path in models.values():
        shutil.rmtree(path, ignore_errors=True)
    full, opted_out, never = map(str, models.values())

    for out, owners, also in ((full, OWNERS, heldout), (never, [name for name in OWNERS if name != LEAVER], ())):
        given = [part for owner in owners for part in ("--package", str(packages[owner]))]
        session.here("merge", "--public", str(release / "model"), *given, "--top-k", TOP_K, "--out", out, *also)
    session.here("optout", full, "--expert", LEAVER, "--out", opted_out)
    return models


def _evaluate(root: pathlib.Path, paths: dict[str, pathlib.Path], max_bytes: int) -> tuple[dict, list[dict]]:
    """Bits per byte of every row on every domain's held-out text, routed shares, samples, and the opt-out proof.

    Beside these results, the routed start of a document of every domain, for the page.
    """
    import numpy as np

    from flexmoe_jax import load
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.evaluate.perplexity import describe, heldout_texts
    from flexmoe_jax.study.tables import samples as routed_samples

    model, opted_out, never = (load(path) for path in paths.values())
    rows = {"public alone": (model.select(["public"]), False)}
    rows |= {f"hybrid {owner}": (model.select(["public", owner]), False) for owner in OWNERS}
    rows |= {"merged": (model, False), "uniform mixing": (model, True), f"merged without {LEAVER}": (opted_out, False)}
    texts = {d: heldout_texts(root / "mix" / d, max_bytes) for d in ("public", *OWNERS)}
    bits: dict = {}
    shares: dict = {}
    for name, (row, uniform) in rows.items():
        scores = {domain: describe(row.experts, row.score(t, uniform=uniform)) for domain, t in texts.items()}
        bits[name] = {domain: s["bits_per_byte"] for domain, s in scores.items()}
        bits[name]["mean"] = sum(bits[name].values()) / len(texts)
        if name == "merged":
            shares = {domain: {"share": s["share"], "layers": s["layers"]} for domain, s in scores.items()}
        print(f"evaluated {name}: mean {bits[name]['mean']:.3f} bits per byte", file=sys.stderr, flush=True)
    tokens = np.array(model.tokenizer.encode(texts[LEAVER][0])[: model.config.max_seq_len])
    if not np.array_equal(opted_out.logits(tokens), never.logits(tokens)):
        what = f"the logits without {LEAVER} differ from those of a model that never had it"
        raise ArtifactError(what, "report this as a bug")
    left, without = (open_model(path).digest for path in [*paths.values()][1:])
    samples = {domain: _sample(model, t[0]) for domain, t in texts.items()}
    results = {
        "bits_per_byte": bits,
        "routed_share": shares,
        "samples": samples,
        "opt_out": {
            "expert": LEAVER,
            "left": left,
            "never": without,
            "logits_bit_identical_to_never_merged": True,
            "tokens_compared": len(tokens),
        },
        "artefacts": {name: str(path) for name, path in paths.items()},
        "scoring": {"seq_len": model.config.max_seq_len, "stride": model.config.max_seq_len // 2, "top_k": model.top_k},
        "scored_bytes": {domain: sum(len(text.encode()) for text in t) for domain, t in texts.items()},
    }
    return results, routed_samples(model, texts)


def _sample(model: "Model", text: str) -> dict:
    prompt = model.tokenizer.decode(model.tokenizer.encode(text)[:24]).rstrip("\ufffd")  # part of a character
    return {"prompt": prompt, "continuation": model.generate(prompt, max_new_tokens=32, temperature=0.7, top_p=0.9)}


def _parties(root: pathlib.Path, release: pathlib.Path, packages: dict[str, pathlib.Path]) -> dict[str, dict]:
    """Each party's folder, the size of its documents there, and what it gives away."""
    gives = {"public": release, **packages}
    homes = {name: root / "public" if name == "public" else root / "owners" / name for name in gives}
    return {
        name: {
            "folder": str(home),
            "document_bytes": _size(home / "data"),
            "gives": str(gives[name].relative_to(home)),
            "given_bytes": _size(gives[name]),
        }
        for name, home in homes.items()
    }


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_page(path: pathlib.Path, results: dict, samples: list[dict]) -> str:
    """Writes the page with pictures where the extra `report` is installed; the line that says so, or how to get it."""
    from flexmoe_jax.files import write_bytes
    from flexmoe_jax.study.page import render_quickstart

    try:
        page = render_quickstart(results, samples)
    except ConfigError as error:
        return f"No page: {error.what}. {error.remedy}, then run the same command again, which trains nothing anew."
    write_bytes(path, page.encode())
    return f"Page: {path}"


def _lines(results: dict, root: pathlib.Path) -> list[str]:
    """The results for people."""
    bits, shares = results["bits_per_byte"], results["routed_share"]
    scoring = "windows of {seq_len} tokens with stride {stride}, top-{top_k}".format(**results["scoring"])
    lines = ["", f"Held-out bits per byte (lower is better); {scoring}", ""]
    lines += table(["", *bits["merged"]], [[row, *values.values()] for row, values in bits.items()])
    lines += ["", "Routed share of each expert in the merged model, by domain", ""]
    experts = list(shares["public"]["share"])
    lines += table(["domain", *experts], [[d, *s["share"].values()] for d, s in shares.items()])
    lines += ["", "... and by layer", ""]
    by_layer = [[f"{d}, layer {i}", *layer.values()] for d, s in shares.items() for i, layer in enumerate(s["layers"])]
    lines += table(["", *experts], by_layer)
    lines += ["", "Sample continuations of held-out text (temperature 0.7, top-p 0.9)", ""]
    for domain, sample in results["samples"].items():
        lines.append(f"[{domain}] {sample['prompt']!r} -> {sample['continuation']!r}")
    compared, places = results["opt_out"]["tokens_compared"], ", ".join(results["artefacts"].values())
    lines += ["", f"Without {LEAVER}: logits bit-identical to a model that never had it, on {compared} tokens."]
    lines.append(f"Models: {places}; the table as {root / 'results.json'}.")
    lines.append(f"Each party's folder: {root / 'public'}, {root / 'owners'}/NAME. The commands above do each step.")
    return [*lines, f"Took {results['seconds']} s."]


def _experiment(name: str) -> pathlib.Path:
    """An experiment file: beside the package in a checkout, inside it when installed from a wheel."""
    package = pathlib.Path(__file__).resolve().parents[1]
    places = (package.parent / "experiments" / name, package / "_experiments" / name)
    return next(place for place in places if place.exists())
