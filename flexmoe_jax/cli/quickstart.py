"""`flexmoe quickstart`: the whole life of a FlexMoE model on one machine, on real text.

Every party's work is done by the command a person would type, printed as it runs. Each owner's commands run in processes
of their own, in a folder that holds the owner's data and a copy of the public release, and nothing else.
"""

import pathlib
import shutil
import subprocess
import sys
import time

from flexmoe_jax.artifacts.digest import write_json
from flexmoe_jax.cli.common import parser, table
from flexmoe_jax.cli.evaluate import describe, heldout_texts
from flexmoe_jax.errors import ArtifactError, FlexMoEError

OWNERS = ("code", "math", "news")
LEAVER = "news"
EMBED_COUNT = "256"


def quickstart(argv: list[str]) -> int:
    """Trains, merges, evaluates, opts out; prints the table and writes `results.json`."""
    p = parser("quickstart", __doc__.split("\n\n")[0], "flexmoe quickstart --out runs/quickstart")
    p.add_argument(
        "--out", default="runs/quickstart", help="folder for everything this makes; a second run goes on in it"
    )
    p.add_argument("--seed", type=int, default=0, help="of initial weights and data order")
    p.add_argument("--override", action="append", default=[], metavar="KEY=VALUE",
                   help="a configuration key for all trainings, for example steps=20")  # fmt: skip
    p.add_argument("--eval-bytes", type=int, default=120_000, help="held-out text per domain")
    args = p.parse_args(argv)
    began = time.monotonic()
    root = pathlib.Path(args.out)
    overrides = [f"--config.{o}" for o in (f"seed={args.seed}", *args.override)]
    _prepare_data(root)
    release = _train_public(root / "public", overrides)
    packages = {owner: _train_owner(root / "owners" / owner, owner, release, overrides) for owner in OWNERS}
    models = _compose(root, release, packages)
    results = _evaluate(root, models, args.eval_bytes)
    results |= {"seed": args.seed, "overrides": args.override, "seconds": round(time.monotonic() - began)}
    write_json(root / "results.json", results)
    _show(results, root)
    return 0


def _prepare_data(root: pathlib.Path) -> None:
    """The mini-FlexMix, then each party's part in a folder of its own."""
    if not (root / "mix" / "mix.json").exists():
        _here("data", "build", "--out", str(root / "mix"), "--domains", "public," + ",".join(OWNERS))
    parties = {"public": root / "public", **{owner: root / "owners" / owner for owner in OWNERS}}
    for domain, home in parties.items():
        if not (home / "data").exists():
            home.mkdir(parents=True, exist_ok=True)
            shutil.copytree(root / "mix" / domain, home / "data.partial", dirs_exist_ok=True)
            (home / "data.partial").rename(home / "data")


def _train_public(home: pathlib.Path, overrides: list[str]) -> pathlib.Path:
    _embed(home)
    _party(home, "pretrain", f"--config={_experiment('quickstart_public.py')}", *overrides)
    return home / "run" / "model"


def _train_owner(home: pathlib.Path, owner: str, release: pathlib.Path, overrides: list[str]) -> pathlib.Path:
    """The hand-over of the public release is a copy: the owner's processes never look outside `home`."""
    if not (home / "public").exists():
        shutil.copytree(release, home / "public.partial", dirs_exist_ok=True)
        (home / "public.partial").rename(home / "public")
    _embed(home)
    _party(home, "train", f"--config={_experiment('quickstart_expert.py')}:{owner}", *overrides)
    return home / "run" / "package"


def _embed(home: pathlib.Path) -> None:
    if not (home / "domain.json").exists():
        _party(home, "embed", "data", "--out", "domain.json", "--count", EMBED_COUNT)


def _compose(root: pathlib.Path, release: pathlib.Path, packages: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    """Merges all, opts the leaver out into a second directory, and merges a model that never had the leaver."""
    models = {name: root / name for name in ("model", f"model_without_{LEAVER}", f"model_never_{LEAVER}")}
    for path in models.values():
        shutil.rmtree(path, ignore_errors=True)
    full, opted_out, never = map(str, models.values())

    def merge(out: str, owners):
        experts = [part for owner in owners for part in ("--expert", str(packages[owner]))]
        _here("merge", "--public", str(release), *experts, "--out", out)

    merge(full, OWNERS)
    merge(never, [owner for owner in OWNERS if owner != LEAVER])
    _here("optout", full, "--expert", LEAVER, "--out", opted_out)
    return models


def _evaluate(root: pathlib.Path, paths: dict[str, pathlib.Path], max_bytes: int) -> dict:
    """Bits per byte of every row on every domain's held-out documents, routed shares, samples, and the opt-out proof."""
    import numpy as np

    from flexmoe_jax import load

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
        raise ArtifactError(
            f"the logits without {LEAVER} differ from a model that never had it", "report this as a bug"
        )
    samples = {domain: _sample(model, t[0]) for domain, t in texts.items()}
    return {
        "bits_per_byte": bits,
        "routed_share": shares,
        "samples": samples,
        "opt_out": {"expert": LEAVER, "logits_bit_identical_to_never_merged": True, "tokens_compared": len(tokens)},
        "artefacts": {name: str(path) for name, path in paths.items()},
        "scored_bytes": {domain: sum(len(text.encode()) for text in t) for domain, t in texts.items()},
    }


def _sample(model, text: str) -> dict:
    prompt = model.tokenizer.decode(model.tokenizer.encode(text)[:24])
    return {"prompt": prompt, "continuation": model.generate(prompt, max_new_tokens=32, temperature=0.7, top_p=0.9)}


def _show(results: dict, root: pathlib.Path) -> None:
    bits, shares = results["bits_per_byte"], results["routed_share"]
    columns = list(bits["merged"])
    print("\nHeld-out bits per byte (lower is better)\n")
    print("\n".join(table(["", *columns], [[row, *values.values()] for row, values in bits.items()])))
    print("\nRouted share of each expert in the merged model, by domain\n")
    experts = list(shares["public"]["share"])
    print("\n".join(table(["domain", *experts], [[d, *s["share"].values()] for d, s in shares.items()])))
    print("\n... and by layer\n")
    by_layer = [[f"{d}, layer {i}", *layer.values()] for d, s in shares.items() for i, layer in enumerate(s["layers"])]
    print("\n".join(table(["", *experts], by_layer)))
    print("\nSample continuations of held-out text (temperature 0.7, top-p 0.9)\n")
    for domain, sample in results["samples"].items():
        print(f"[{domain}] {sample['prompt']!r} -> {sample['continuation']!r}")
    print(f"\nWithout {LEAVER}: logits bit-identical to a model that never had it, on {results['opt_out']['tokens_compared']}"
          " tokens.")  # fmt: skip
    print(f"Artefacts: {', '.join(results['artefacts'].values())}; table: {root / 'results.json'}; each party's folder: "
          f"{root / 'public'}, {root / 'owners'}/NAME. The commands above, run in those folders, do each step by hand.")  # fmt: skip
    print(f"Took {results['seconds']} s.")


def _here(*argv: str) -> None:
    """Runs a verb in this process, showing the command."""
    from flexmoe_jax.cli.main import main

    print(f"$ flexmoe {' '.join(argv)}", flush=True)
    code = main(list(argv))
    if code:
        raise FlexMoEError(f"flexmoe {argv[0]} ended with exit code {code}", "see its message above")


def _party(home: pathlib.Path, *argv: str) -> None:
    """Runs a verb as a process of its own inside `home`, showing the command."""
    print(f"$ (cd {home} && flexmoe {' '.join(argv)})", flush=True)
    code = subprocess.run([sys.executable, "-m", "flexmoe_jax.cli.main", *argv], cwd=home, check=False).returncode
    if code:
        raise FlexMoEError(f"flexmoe {argv[0]} in {home} ended with exit code {code}", "see its message above")


def _experiment(name: str) -> pathlib.Path:
    """An experiment file: beside the package in a checkout, inside it when installed from a wheel."""
    package = pathlib.Path(__file__).resolve().parents[1]
    places = (package.parent / "experiments" / name, package / "_experiments" / name)
    return next(place for place in places if place.exists())
