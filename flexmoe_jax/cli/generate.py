"""`flexmoe generate`: continue a prompt with any subset of experts."""

from flexmoe_jax.cli.common import ExistingPath, add_json, emit, names, parser
from flexmoe_jax.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE_ABOVE_ZERO


def generate(argv: list[str]) -> int:
    """Prints the prompt and its continuation, as it comes."""
    example = 'flexmoe generate runs/quickstart/model --prompt "The" --experts public,news'
    p = parser("generate", "Continues a prompt.", example)
    p.add_argument("model", action=ExistingPath, help="a model directory")
    p.add_argument("--prompt", required=True, help="text to continue")
    p.add_argument("--experts", help="comma-separated names; all by default")
    p.add_argument("--max-new-tokens", type=COUNT, default=64, help="longest continuation; 64 by default")
    p.add_argument("--temperature", type=NOT_NEGATIVE, default=0.0, help="0 (default) is greedy")
    p.add_argument("--top-k", type=COUNT, help="sample from the k likeliest tokens")
    p.add_argument(
        "--top-p", type=SHARE_ABOVE_ZERO, help="sample from the smallest set of tokens of at least this probability"
    )
    p.add_argument("--seed", type=SEED, default=0, help="of sampling; 0 by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax import load

    pieces = load(args.model).stream(
        args.prompt,
        experts=names(args.experts),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.json:
        emit({"prompt": args.prompt, "continuation": "".join(pieces)}, [], True)
        return 0
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
