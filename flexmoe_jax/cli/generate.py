"""`flexmoe generate`: continue a prompt, or a conversation, with any subset of experts."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flexmoe_jax.cli.common import ExistingPath, add_json, emit, names, parser
from flexmoe_jax.errors import LINE_ENDS, printable
from flexmoe_jax.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE_ABOVE_ZERO

if TYPE_CHECKING:
    from flexmoe_jax.api import Model


def generate(argv: list[str]) -> int:
    """Prints the prompt and its continuation, as it comes; with --chat only the answers."""
    example = 'flexmoe generate runs/quickstart/model --prompt "The" --experts public,news'
    p = parser("generate", "Continues a prompt, or answers the turns of a conversation.", example)
    p.add_argument("model", action=ExistingPath, help="a model directory")
    p.add_argument("--prompt", help="text to continue; with --chat the user's turn")
    what = "answer turns with the model's chat template: --prompt, or every line of standard input"
    p.add_argument("--chat", action="store_true", help=what)
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
    if args.prompt is None and not args.chat:
        p.error("the following arguments are required: --prompt (or --chat)")
    from flexmoe_jax import load

    model, chosen = load(args.model), names(args.experts)
    model = model if chosen is None else model.select(chosen)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    options |= {"top_k": args.top_k, "top_p": args.top_p}
    if args.chat:
        return _chat(model, (sys.stdin if args.prompt is None else [args.prompt]), args.json, options)
    pieces = model.stream(args.prompt, **options)
    if args.json:
        emit({"prompt": args.prompt, "continuation": "".join(pieces)}, [], True)
        return 0
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(printable(piece, keep=LINE_ENDS), end="", flush=True)
    print()
    return 0


def _chat(model: "Model", lines: Iterable[str], as_json: bool, options: dict[str, Any]) -> int:
    """Answers every line as the user's next turn."""
    turns: list[dict[str, str]] = []
    for line in lines:
        turns.append({"role": "user", "content": line.removesuffix("\n")})
        answer = ""
        for piece in model.stream(turns, **options):
            answer += piece
            if not as_json:
                print(printable(piece, keep=LINE_ENDS), end="", flush=True)
        turns.append({"role": "assistant", "content": answer})
        if not as_json:
            print(flush=True)
    if as_json:
        emit({"messages": turns}, [], True)
    return 0
