"""A model as benchmarks call it: log-likelihoods of continuations, and text until a stop string; batched.

Legend: B rows, T tokens, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.decoder import Decoder, decode, hidden_states, logits, prefill
from flexmoe_jax.model.generate import stream
from flexmoe_jax.model.precision import exact
from flexmoe_jax.progress import track
from flexmoe_jax.tree import Params

# Lengths are rounded up to multiples of these, so that few shapes are compiled.
_CONTEXT_STEP, _CONTINUATION_STEP = 64, 16


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A model as benchmarks call it: `params` with stacked experts on the devices, and the `Decoder` `run`.

    Continuations of the same context are scored together: they share its keys and values, so that a question with four
    answers costs almost the same as with one.
    """

    run: Decoder
    params: Params
    tokenizer: Tokenizer
    batch_size: int = 8

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of (context, continuation), split where the context's own tokens end.

        As in lm-evaluation-harness, trailing spaces of the context move to the continuation, and an empty context is
        the token that starts a text.
        """
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            return [self.tokenizer.start_id], self.tokenizer.encode(continuation)
        whole, first = self.tokenizer.encode_prompt(context + continuation), self.tokenizer.encode_prompt(context)
        return first, whole[len(first) :]

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether it is the greedy continuation) of each continuation.

        `pairs` are token ids of (context, continuation). If both exceed the model's length, the context loses tokens on
        the left. DataError for an empty context or continuation, or a continuation that is too long by itself.
        """
        limit = self.run.config.max_seq_len + 1
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation or len(continuation) >= limit:
                raise DataError(
                    f"request {i} has a context of {len(context)} tokens and a continuation of {len(continuation)}, "
                    f"the model reads {self.run.config.max_seq_len}",
                    "give at least one token of each, and a continuation that fits",
                )
            longest = limit - len(continuation)
            groups.setdefault(tuple(context[-longest:]), []).append(i)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(groups, key=len, reverse=True)
        single = [(prefix, groups[prefix][0]) for prefix in order if len(groups[prefix]) == 1]
        with track("scoring", len(pairs), "continuations") as advance:
            for start in range(0, len(single), self.batch_size):
                some = single[start : start + self.batch_size]
                rows = [([*prefix], pairs[i][1]) for prefix, i in some]
                for (_, i), result in zip(some, self._score_rows(rows), strict=True):
                    results[i] = result
                advance(len(some))
            for prefix in order:
                members = groups[prefix]
                if len(members) > 1:
                    shared = self._score_shared([*prefix], [pairs[i][1] for i in members])
                    for i, result in zip(members, shared, strict=True):
                        results[i] = result
                    advance(len(members))
        return results

    def continue_until(
        self, prompts: Sequence[str | list[int]], stops: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Greedy continuations of texts or token ids, each cut before the first of `stops` or of the tokenizer's.

        A prompt that leaves no room for `max_new_tokens` loses tokens on the left. DataError if `max_new_tokens` fill
        the model's length.
        """
        room = self.run.config.max_seq_len - max_new_tokens
        if room < 1:
            raise DataError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's {self.run.config.max_seq_len}",
                f"ask for at most {self.run.config.max_seq_len - 1}",
            )
        # After a text spaces are kept; after ids a continuation is a text of its own, as in lm-evaluation-harness.
        before = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else [] for prompt in prompts]
        rows = [self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        ids = [row[-room:] for row in rows]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        texts = [""] * len(ids)
        with track("generating", len(ids), "prompts") as advance:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                made = self._generate([ids[i] for i in some], [before[i] for i in some], stops, max_new_tokens)
                for i, text in zip(some, made, strict=True):
                    texts[i] = text
                advance(len(some))
        return texts

    def _generate(
        self, prompts: list[list[int]], before: list[list[int]], stops: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        rows: list[list[int]] = [[] for _ in prompts]
        texts: dict[int, str] = {}
        steps = stream(
            dataclasses.replace(self.run, dispatch="sparse"),  # sparse decoding reads weights in place
            self.params,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
        )
        with contextlib.closing(steps):  # type: ignore[type-var]
            for tokens in steps:
                for row, token in tokens.items():
                    if row not in texts:
                        rows[row].append(token)
                        text = self.tokenizer.continuation(rows[row], before[row])
                        if any(stop in text for stop in stops):
                            texts[row] = text
                if len(texts) == len(prompts):
                    break
        whole = [self.tokenizer.continuation(*pair) for pair in zip(rows, before, strict=True)]
        return [cut(texts.get(i, text), stops) for i, text in enumerate(whole)]

    def _score_rows(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores rows with different contexts, in one batch padded to `batch_size`."""
        width = _round_up(max(len(context) + len(c) - 1 for context, c in rows), _CONTEXT_STEP)
        tokens_BT = np.zeros((self.batch_size, width), np.int32)
        targets_BT = np.full((self.batch_size, width), -1, np.int32)
        for b, (context, continuation) in enumerate(rows):
            whole = context + continuation
            tokens_BT[b, : len(whole) - 1] = whole[:-1]
            targets_BT[b, len(context) - 1 : len(whole) - 1] = continuation
        sums, greedy = _whole(self.run, self.params, tokens_BT, targets_BT)
        return _results(sums, greedy, len(rows))

    def _score_shared(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Scores several continuations of one context, whose keys and values are computed once."""
        longest = _round_up(max(map(len, continuations)), _CONTINUATION_STEP)
        before = _round_up(max(len(context) - 1, 1), _CONTEXT_STEP)
        tokens_1T = np.zeros((1, before), np.int32)
        tokens_1T[0, : len(context) - 1] = context[:-1]
        tokens_BT = np.zeros((len(continuations), longest), np.int32)
        targets_BT = np.full(tokens_BT.shape, -1, np.int32)
        for b, continuation in enumerate(continuations):
            tokens_BT[b, : len(continuation)] = [context[-1], *continuation[:-1]]
            targets_BT[b, : len(continuation)] = continuation
        cache = _prefill(self.run, before + longest, self.params, tokens_1T)
        sums, greedy = _after(self.run, self.params, cache, len(context) - 1, tokens_BT, targets_BT)
        return _results(sums, greedy, len(continuations))


def cut(text: str, stops: Sequence[str]) -> str:
    """The part of `text` before the first of `stops`."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@functools.partial(jax.jit, static_argnums=0)
@exact
def _whole(run: Decoder, params: Params, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _sums(run, params, hidden_states(run, params, tokens_BT)[0], targets_BT)


@functools.partial(jax.jit, static_argnums=(0, 1))
@exact
def _prefill(run: Decoder, length: int, params: Params, tokens_1T: jax.Array) -> Params:
    return prefill(run, params, tokens_1T, length)[1]


@functools.partial(jax.jit, static_argnums=0)
@exact
def _after(
    run: Decoder, params: Params, cache: Params, start: int, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    B, T = tokens_BT.shape
    cache = jax.tree.map(lambda a: jnp.broadcast_to(a, (a.shape[0], B, *a.shape[2:])), cache)
    positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
    return _sums(run, params, decode(run, params, tokens_BT, positions_BT, cache)[0], targets_BT)


def _sums(run: Decoder, params: Params, x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of log-probabilities of the targets that are not -1 [B], whether all of them are the likeliest [B])."""

    def of_row(_, row):
        x_TD, target_T = row
        logits_TV = logits(run, params, x_TD)
        picked_T = jnp.take_along_axis(logits_TV, jnp.maximum(target_T, 0)[:, None], axis=-1)[:, 0]
        log_p_T = picked_T - jax.nn.logsumexp(logits_TV, axis=-1)
        counts_T = target_T >= 0
        likeliest = ((logits_TV.argmax(-1) == target_T) | ~counts_T).all()
        return None, (jnp.where(counts_T, log_p_T, 0.0).sum(), likeliest)

    return jax.lax.scan(of_row, None, (x_BTD, targets_BT))[1]  # logits of one row at a time


def _results(sums: jax.Array, greedy: jax.Array, count: int) -> list[tuple[float, bool]]:
    pairs = zip(np.asarray(sums)[:count], np.asarray(greedy)[:count], strict=True)
    return [(float(s), bool(g)) for s, g in pairs]


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
