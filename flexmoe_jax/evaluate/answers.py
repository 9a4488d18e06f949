"""Scores of single answers: the best choice, overlap with a gold answer, the same number, the same formula."""

import collections
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_FINAL = re.compile(r"final answer is\s*(.*?)(?:\.\s*I hope it is correct|\.?\s*$)", re.DOTALL | re.IGNORECASE)
_UNITS = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\\[!,;: ]|\\(?:left|right|displaystyle)\b|[$\s]|\\?%|\^\\circ")


def best_choice(log_p: Sequence[float], choices: Sequence[str], metric: str) -> int:
    """The index of the choice with the highest log-probability; with the metric `acc_per_char`, per character.

    Metrics: OLMES, arXiv 2406.08446.
    """
    scores = list(log_p)
    if metric == "acc_per_char":
        scores = [value / max(len(choice), 1) for value, choice in zip(log_p, choices, strict=True)]
    return scores.index(max(scores))


def f1(answer: str, golds: Sequence[str]) -> float:
    """F1 of words, 0 to 1, with the closest gold answer, as in SQuAD: ignores articles, case and punctuation."""
    return max((_f1(_words(answer), _words(gold)) for gold in golds), default=0.0)


def same_number(answer: str, golds: Sequence[str]) -> float:
    """1 if the last number of `answer` equals the last number of a gold answer, else 0."""
    return float(any(_last_number(answer) == _last_number(gold) is not None for gold in golds))


def same_formula(answer: str, golds: Sequence[str]) -> float:
    """1 if the final answer equals a gold answer in normalized notation, else 0. No algebra: 1/2 is not 0.5."""
    return float(any(_formula(final_answer(answer)) == _formula(gold) for gold in golds))


def final_answer(text: str) -> str:
    """The text after "The final answer is", else in the last \\boxed{}, else in the last formula between dollars."""
    if found := _FINAL.findall(text):
        return found[-1]
    if (at := text.rfind(r"\boxed{")) >= 0:
        depth, start = 0, at + len(r"\boxed")
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + 1 : i]
    parts = text.split("$")
    return parts[-2] if len(parts) > 2 else text


def _words(text: str) -> list[str]:
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return _ARTICLES.sub(" ", text).split()


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((collections.Counter(answer) & collections.Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _formula(text: str) -> str:
    text = _UNITS.sub("", text).rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
