"""Two owners train an expert each, beside the same public model; the experts are merged and asked together.

    python examples/train_two_owners.py

works on what `make quickstart` left (`--public FOLDER --owner NAME=FOLDER` name others), takes a minute with 20 steps,
and prints how the public model and the merged one continue a prompt:

    math: runs/two_owners/math/run/package
    news: runs/two_owners/news/run/package
    public: ...
    public, math, news: ...
"""

import argparse
import pathlib

import flexmoe_jax as fm


def train_owner(owner: str, documents: pathlib.Path, public: pathlib.Path, home: pathlib.Path, steps: int):
    """What an owner does on its own machine, with the public release `public`; only the package leaves it."""
    home.mkdir(parents=True, exist_ok=True)
    fm.embed(documents, home / "domain.json", count=64)
    run = fm.RunConfig(
        owner=owner,
        data=documents,
        public=public / "model",
        public_data=public / "documents",  # what is not the owner's: the router learns to tell them apart
        public_fraction=0.25,
        router_contrast=0.1,
        domain_vector=home / "domain.json",
        out=home / "run",
        steps=steps,
        batch_size=8,
        seq_len=fm.load(public / "model").config.max_seq_len,
        optimizer=fm.OptimizerConfig(lr=1.5e-3, warmup_steps=10, weight_decay=0.1),
    )
    return fm.train(run)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--public", type=pathlib.Path, default="runs/quickstart/public/release")
    p.add_argument("--owner", action="append", metavar="NAME=FOLDER", help="an owner's documents; given twice or more")
    p.add_argument("--out", type=pathlib.Path, default="runs/two_owners")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--prompt", default="The answer is")
    args = p.parse_args()
    owners = args.owner or [f"{name}=runs/quickstart/owners/{name}/data" for name in ("math", "news")]
    packages = []
    for name, _, documents in (owner.partition("=") for owner in owners):
        packages.append(train_owner(name, pathlib.Path(documents), args.public, args.out / name, args.steps))
        print(f"{name}: {packages[-1]}")
    if not (args.out / "model").exists():
        fm.merge(args.public / "model", packages, args.out / "model", top_k=2)
    model = fm.load(args.out / "model")
    for experts in (("public",), model.experts):
        print(f"{', '.join(experts)}: {model.generate(args.prompt, experts=experts, max_new_tokens=24)!r}")


if __name__ == "__main__":
    main()
