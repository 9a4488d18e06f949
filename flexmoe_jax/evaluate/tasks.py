"""Runs tasks: the score of one task over its examples."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate import answers, programs
from flexmoe_jax.evaluate.lm import LM
from flexmoe_jax.evaluate.suites import CHOICE, EXACT_MATH, EXACT_NUMBER, F1, PROGRAM, Example, Task

_SCORES = {F1: answers.f1, EXACT_NUMBER: answers.same_number, EXACT_MATH: answers.same_formula}
_METRICS = {F1: "f1", EXACT_NUMBER: "exact match", EXACT_MATH: "exact match", PROGRAM: "pass@1"}


@dataclasses.dataclass(frozen=True)
class Result:
    """`score` is the mean over `examples`, `error` its standard error (NaN for one example).

    Scores are between 0 and 1, higher is better; for the metric `bits per byte` lower is better.
    """

    task: str
    metric: str
    score: float
    error: float
    examples: int


def run_task(
    lm: LM, task: Task, examples: Sequence[Example], *, gold: bool = False, allow_code_execution: bool = False
) -> Result:
    """Scores one task.

    With `gold`: the bits per byte of the gold answers, which distinguish small models that answer nothing right yet.
    ConfigError as of `check_allowed`.
    """
    check_allowed(task, gold, allow_code_execution)
    if gold:
        return _result(task, "bits per byte", _bits_per_byte(lm, examples))
    if task.kind == CHOICE:
        return _result(task, examples[0].metric, _choose(lm, examples))
    return _result(task, _METRICS[task.kind], _generate(lm, task, examples))


def check_allowed(task: Task, gold: bool, allow_code_execution: bool) -> None:
    """ConfigError if the task runs generated code, unless that is allowed or only `gold` answers are scored."""
    if task.kind == PROGRAM and not gold and not allow_code_execution:
        raise ConfigError(
            f"{task.name} runs what the model writes",
            "give --allow-code-execution on a machine where nothing can be lost, or --gold to score the gold answers",
        )


def _choose(lm: LM, examples: Sequence[Example]) -> list[float]:
    flat = [pair for example in examples for pair in example.requests]
    values = iter(lm.loglikelihoods([lm.encode_pair(*pair) for pair in flat]))
    scores = []
    for example in examples:
        log_p = [next(values)[0] for _ in example.requests]
        texts = [continuation.strip() for _, continuation in example.requests]
        scores.append(float(answers.best_choice(log_p, texts, example.metric) == example.gold))
    return scores


def _bits_per_byte(lm: LM, examples: Sequence[Example]) -> list[float]:
    pairs = [e.requests[e.gold if len(e.requests) > 1 else 0] for e in examples]
    found = lm.loglikelihoods([lm.encode_pair(*pair) for pair in pairs])
    return [-log_p / math.log(2) / len(c.encode()) for (log_p, _), (_, c) in zip(found, pairs, strict=True)]


def _generate(lm: LM, task: Task, examples: Sequence[Example]) -> list[float]:
    stops, longest = examples[0].stops, examples[0].max_new_tokens
    longest = min(longest, lm.run.config.max_seq_len // 2)
    texts = lm.continue_until([e.requests[0][0] for e in examples], stops, longest)
    if task.kind == PROGRAM:
        build = programs.humaneval_program if task.name == "humaneval" else programs.mbpp_program
        return [float(programs.passes(build(text, e.doc))) for text, e in zip(texts, examples, strict=True)]
    return [_SCORES[task.kind](text, e.gold) for text, e in zip(texts, examples, strict=True)]


def _result(task: Task, metric: str, scores: list[float]) -> Result:
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan
    return Result(task.name, metric, float(np.mean(scores)), error, len(scores))
