"""`flexmoe generate`: continue a prompt with any subset of experts."""

from flexmoe_jax.cli.common import names, parser


def generate(argv: list[str]) -> int:
    """Prints the prompt and its continuation, as it comes."""
    p = parser(
        "generate", "Continues a prompt.", 'flexmoe generate runs/quickstart/model --prompt "The" --experts public,news'
    )
    p.add_argument("model", help="a model directory")
    p.add_argument("--prompt", required=True, help="text to continue")
    p.add_argument("--experts", help="comma-separated names; all by default")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    p.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    p.add_argument("--top-p", type=float, help="sample from the smallest set of tokens of at least this mass")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
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
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
