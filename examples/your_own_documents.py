"""Your own documents: an expert of a folder of .txt or .jsonl files, beside the quickstart's public model.

    python examples/your_own_documents.py FOLDER --steps 100

needs 20 documents or more: lines {"text": ..} of .jsonl files, or, where there is none, .txt files. It works on the
public model that `make quickstart` left (`--public` names another), takes a minute or two, and prints held-out bits per
byte, where lower is better; a tenth of the documents is held out:

    27 documents to train on, 3 held out
    package: runs/mine/run/package
    public alone: 2.931 bits per byte
    with mine: 2.604 bits per byte
"""

import argparse
import json
import pathlib

import flexmoe_jax as fm


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("documents", type=pathlib.Path, help="a folder of .txt, .jsonl[.gz|.zst] or .parquet files")
    p.add_argument("--name", default="mine", help="of the owner, and of the expert in every model")
    p.add_argument("--public", type=pathlib.Path, default="runs/quickstart/public/release")
    p.add_argument("--out", type=pathlib.Path, default="runs/mine")
    p.add_argument("--steps", type=int, default=100)
    args = p.parse_args()

    texts = [document.text for document in fm.read_documents(args.documents)]
    heldout, train = texts[::10], [text for n, text in enumerate(texts) if n % 10]
    data = args.out / "documents"
    data.mkdir(parents=True, exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train))
    print(f"{len(train)} documents to train on, {len(heldout)} held out")

    fm.embed(data, args.out / "domain.json", count=1000)
    public = fm.load(args.public / "model")
    run = fm.RunConfig(
        owner=args.name,
        data=data,
        public=args.public / "model",
        public_data=args.public / "documents",
        public_fraction=0.25,
        router_contrast=0.1,
        domain_vector=args.out / "domain.json",
        out=args.out / "run",
        steps=args.steps,
        batch_size=8,
        seq_len=public.config.max_seq_len,
        optimizer=fm.OptimizerConfig(lr=1.5e-3, warmup_steps=10, weight_decay=0.1),
    )
    package = fm.train(run)
    print(f"package: {package}")
    if not (args.out / "model").exists():
        fm.merge(args.public / "model", [package], args.out / "model")
    for name, model in (("public alone", public), (f"with {args.name}", fm.load(args.out / "model"))):
        print(f"{name}: {model.score(heldout).bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
