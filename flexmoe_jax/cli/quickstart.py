"""`flexmoe quickstart`: the whole life of a FlexMoE model on one machine, on real text.

Every party's work is done by the command a person would type, printed as it runs. Each owner's commands run in
processes of their own, in a folder that holds the owner's data and a copy of the public release (the public model and
public documents), and nothing else.
"""

import pathlib
import shutil
import subprocess
import sys
import time

from flexmoe_jax.artifacts.sealed import write_json
from flexmoe_jax.cli.common import parser, table
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.evaluate.perplexity import describe, heldout_texts

OWNERS = ("code", "math", "news")
LEAVER = "news"
TOP_K = "2"


def quickstart(argv: list[str]) -> int:
    """Trains, merges, evaluates, opts out; prints the table and writes `results.json`."""
    p = parser("quickstart", __doc__.split("\n\n")[0], "flexmoe quickstart --out runs/quickstart")
    p.add_argument(
        "--out", default="runs/quickstart", help="folder for everything this makes; a second run goes on in it"
    )
    p.add_argument("--seed", type=int, default=0, help="of initial weights and data order")
    p.add_argument("--override", action="append", default=[], metavar="KEY=VALUE",
                   help="a configuration key for all trainings, for example steps=20")  # fmt: skip
    p.add_argument("--embed-count", type=int, default=64, help="documents in each party's domain embedding")
    p.add_argument("--eval-bytes", type=int, default=24_000, help="held-out text per domain")
    args = p.parse_args(argv)
    began = time.monotonic()
    root = pathlib.Path(args.out)
    overrides = [f"--config.{o}" for o in (f"seed={args.seed}", *args.override)]
    _prepare_data(root)
    release = _train_public(root / "public", args.embed_count, overrides)
    packages = {
        owner: _train_owner(root / "owners" / owner, owner, release, args.embed_count, overrides) for owner in OWNERS
    }
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
        _copy(root / "mix" / domain, home / "data")


def _train_public(home: pathlib.Path, embed_count: int, overrides: list[str]) -> pathlib.Path:
    """The public release: the model, and the documents it was trained on."""
    _embed(home, embed_count)
    _party(home, "pretrain", f"--config={_experiment('quickstart_public.py')}", *overrides)
    release = home / "release"
    _copy(home / "run" / "model", release / "model")
    _copy(home / "data", release / "documents")
    return release


def _train_owner(home: pathlib.Path, owner: str, release: pathlib.Path, embed_count: int, overrides) -> pathlib.Path:
    """The hand-over of the public release is a copy: the owner's processes never look outside `home`."""
    _copy(release, home / "release")
    _embed(home, embed_count)
    _party(home, "train", f"--config={_experiment('quickstart_expert.py')}:{owner}", *overrides)
    return home / "run" / "package"


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder, whole or not at all; one that is already there stays."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.copytree(source, partial, dirs_exist_ok=True)
        partial.rename(target)


def _embed(home: pathlib.Path, count: int) -> None:
    if not (home / "domain.json").exists():
        _party(home, "embed", "data", "--out", "domain.json", "--count", str(count))


def _compose(root: pathlib.Path, release: pathlib.Path, packages: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    """Merges all, opts the leaver out into a second directory, and merges a model that never had the leaver."""
    models = {name: root / name for name in ("model", f"model_without_{LEAVER}", f"model_never_{LEAVER}")}
    for path in models.values():
        shutil.rmtree(path, ignore_errors=True)
    full, opted_out, never = map(str, models.values())

    def merge(out: str, owners):
        experts = [part for owner in owners for part in ("--expert", str(packages[owner]))]
        _here("merge", "--public", str(release / "model"), *experts, "--top-k", TOP_K, "--out", out)

    merge(full, OWNERS)
    merge(never, [owner for owner in OWNERS if owner != LEAVER])
    _here("optout", full, "--expert", LEAVER, "--out", opted_out)
    return models


def _evaluate(root: pathlib.Path, paths: dict[str, pathlib.Path], max_bytes: int) -> dict:
    """Bits per byte of every row on every domain's held-out text, routed shares, samples, and the opt-out proof."""
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
        "scoring": {"seq_len": model.config.max_seq_len, "stride": model.config.max_seq_len // 2, "top_k": model.top_k},
        "scored_bytes": {domain: sum(len(text.encode()) for text in t) for domain, t in texts.items()},
    }


def _sample(model, text: str) -> dict:
    prompt = model.tokenizer.decode(model.tokenizer.encode(text)[:24])
    return {"prompt": prompt, "continuation": model.generate(prompt, max_new_tokens=32, temperature=0.7, top_p=0.9)}


def _show(results: dict, root: pathlib.Path) -> None:
    bits, shares = results["bits_per_byte"], results["routed_share"]
    columns = list(bits["merged"])
    scoring = "windows of {seq_len} tokens with stride {stride}, top-{top_k}".format(**results["scoring"])
    print(f"\nHeld-out bits per byte (lower is better); {scoring}\n")
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
    compared, places = results["opt_out"]["tokens_compared"], ", ".join(results["artefacts"].values())
    print(f"\nWithout {LEAVER}: logits bit-identical to a model that never had it, on {compared} tokens.")
    print(f"Artefacts: {places}; the table as {root / 'results.json'}.")
    print(f"Each party's folder: {root / 'public'}, {root / 'owners'}/NAME. The commands above do each step by hand.")
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
