"""An owner leaves a merged model, and three checks show that nothing of its expert is left.

    python examples/opt_out_and_verify.py

works on what `make quickstart` left (`--model`, `--public`, `--package` and `--expert` name other things), takes
seconds, changes nothing but the new folder --out, and prints:

    left: public, code, math; top-2
    certificate: runs/opt_out/news-left.json
    17 checks of the model and its certificate: all passed
    a model that never had news: the same digest, the same logits on 64 tokens
"""

import argparse
import pathlib

import numpy as np

import flexmoe_jax as fm


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=pathlib.Path, default="runs/quickstart/model", help="a merged model; it stays")
    p.add_argument("--public", type=pathlib.Path, default="runs/quickstart/public/release/model")
    p.add_argument("--package", type=pathlib.Path, action="append", help="the packages of the owners who stay")
    p.add_argument("--expert", default="news", help="the owner who leaves")
    p.add_argument("--out", type=pathlib.Path, default="runs/opt_out", help="new folder")
    args = p.parse_args()
    owners = pathlib.Path("runs/quickstart/owners")
    packages = args.package or [owners / name / "run" / "package" for name in ("code", "math")]
    args.out.mkdir(parents=True)

    certificate = args.out / f"{args.expert}-left.json"
    left = fm.opt_out(args.model, args.expert, args.out / "left", certificate=certificate)
    print(f"left: {', '.join(left.experts)}; top-{left.top_k}")
    print(f"certificate: {certificate}")

    checks = fm.verify(left.path, certificate=certificate)
    failed = [f"{check.subject}: {check.detail}" for check in checks if not check.ok]
    print(f"{len(checks)} checks of the model and its certificate: {'; '.join(failed) or 'all passed'}")

    never = fm.merge(args.public, packages, args.out / "never", top_k=left.wanted_top_k)
    ours, theirs = fm.load(left.path), fm.load(never.path)
    tokens = np.arange(min(64, ours.config.max_seq_len))
    same = np.array_equal(ours.logits(tokens), theirs.logits(tokens))
    print(
        f"a model that never had {args.expert}: {'the same' if left.digest == never.digest else 'ANOTHER'} digest, "
        f"{'the same' if same else 'OTHER'} logits on {len(tokens)} tokens"
    )


if __name__ == "__main__":
    main()
