"""The paper's tasks from the wheel: gold answers are right, others are wrong, and programs run within limits."""

import dataclasses
import itertools
import time

import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate import answers, programs
from flexmoe_jax.evaluate.suites import CHOICE, PROGRAM, TASKS, WHEEL, availability, find_tasks, load_examples
from flexmoe_jax.evaluate.tasks import _SCORES, run_task

BY_NAME = {task.name: task for task in TASKS}


@dataclasses.dataclass
class Oracle:
    """An LM with given answers: `likes(context, continuation)` is a log-probability, `text(prompt)` a text."""

    likes: object = None
    text: object = None
    run = type("R", (), {"config": type("C", (), {"max_seq_len": 4096})})

    def encode_pair(self, context, continuation):
        return context, continuation

    def loglikelihoods(self, pairs):
        return [(self.likes(*pair), False) for pair in pairs]

    def continue_until(self, prompts, stops, max_new_tokens):
        return [self.text(prompt) for prompt in prompts]


def test_the_papers_31_tasks_are_listed_in_its_groups():
    """Each task has a source in the wheel or states what it needs."""
    groups: dict[str, int] = {}
    for task in TASKS:
        groups[task.group] = groups.get(task.group, 0) + 1
        assert bool(task.source) == (task.where == WHEEL) != bool(task.remedy)
    assert groups == {
        "mc9": 9,
        "gen5": 5,
        "mmlu": 1,
        "mmlu_pro": 1,
        "agieval": 1,
        "bbh": 1,
        "math2": 2,
        "newsg": 1,
        "poemg": 1,
        "sciriff5": 5,
        "code4": 4,
    }
    assert len(TASKS) == 31
    assert sum(task.where == WHEEL for task in TASKS) == 19
    assert [row[0] for row in availability()] == list(groups)


@pytest.mark.parametrize(
    ("name", "message"), [("mc8", "did you mean 'mc9'"), ("bbh", "--tasks bbh"), ("newsg", "judge model")]
)
def test_a_task_that_cannot_run_is_refused_with_what_it_needs(name, message):
    with pytest.raises(ConfigError, match=message):
        find_tasks(name)


@pytest.mark.parametrize(
    ("name", "form"),
    [("arc_easy", "rc"), ("openbookqa", "rc0"), ("arc_challenge", "mc"), ("winogrande", "rc"), ("mmlu", "mc")],
)
def test_a_model_that_prefers_the_right_choices_scores_1_and_one_that_prefers_others_0(name, form):
    examples = load_examples(BY_NAME[name], 30, form)
    assert len(examples) == 30
    right = {pair for e in examples for pair in [e.requests[e.gold]]}

    def per_char(sign):
        return Oracle(lambda context, answer: sign * ((context, answer) in right) * 1e6)

    assert run_task(per_char(1), BY_NAME[name], examples).score == 1
    assert run_task(per_char(-1), BY_NAME[name], examples).score == 0
    result = run_task(per_char(-1), BY_NAME[name], examples, gold=True)
    assert (result.metric, result.examples) == ("bits per byte", 30)
    assert result.score > 0


def test_choices_are_compared_per_character_if_the_task_has_that_metric():
    assert answers.best_choice([-3.0, -4.0], ["ab", "abcd"], "acc_raw") == 0
    assert answers.best_choice([-3.0, -4.0], ["ab", "abcd"], "acc_per_char") == 1
    assert {load_examples(BY_NAME[n], 1)[0].metric for n in ("boolq", "winogrande")} == {"acc_raw"}
    assert load_examples(BY_NAME["arc_easy"], 1)[0].metric == "acc_per_char"


@pytest.mark.parametrize("name", ["squad", "naturalqs", "triviaqa", "drop", "gsm8k", "math"])
def test_gold_answers_are_right_and_others_wrong(name):
    task, examples = BY_NAME[name], load_examples(BY_NAME[name], 100)
    gold = {e.requests[0][0]: e.requests[0][1] for e in examples}
    if name == "drop":  # the wheel has a list of spans in Python's notation: (' swedish',)
        gold = {e.requests[0][0]: e.gold[0] for e in examples}
    scores = [_SCORES[task.kind](gold[e.requests[0][0]], e.gold) for e in examples]
    # MATH: a few solutions box another answer than the answer field, or in a notation that is not normalized.
    assert sum(scores) >= (93 if name == "math" else 100)
    shifted = [_SCORES[task.kind](gold[e.requests[0][0]], o.gold) for e, o in itertools.pairwise(examples)]
    assert sum(shifted) < 15
    assert run_task(Oracle(text=gold.get), task, examples).score == pytest.approx(sum(scores) / 100)


@pytest.mark.parametrize(("name", "least"), [("humaneval", 6), ("mbpp", 6)])
def test_gold_programs_pass_and_others_fail(name, least):
    task, examples = BY_NAME[name], load_examples(BY_NAME[name], 6)
    gold = {e.requests[0][0]: answers_cut(e.requests[0][1]) for e in examples}
    assert run_task(Oracle(text=gold.get), task, examples, allow_code_execution=True).score * 6 >= least
    wrong = Oracle(text=lambda _: "    return None\n" if name == "humaneval" else "x = 1")
    assert run_task(wrong, task, examples, allow_code_execution=True).score == 0


def answers_cut(text: str) -> str:
    return text.removesuffix("```")


def test_a_generated_whole_function_counts_as_a_completion():
    example = load_examples(BY_NAME["humaneval"], 1)[0]
    whole = example.doc["prompt"] + example.requests[0][1]
    assert programs.passes(programs.humaneval_program(whole, example.doc))


def test_code_runs_only_if_it_is_allowed():
    for name in ("humaneval", "mbpp"):
        with pytest.raises(ConfigError, match="runs what the model writes"):
            run_task(Oracle(text=lambda _: ""), BY_NAME[name], load_examples(BY_NAME[name], 1))
    assert [t.kind for t in find_tasks("code4")] == [PROGRAM, PROGRAM]


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "exit()",
        "assert False",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(4 << 20))",
        "while True: pass",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "import os\nassert 'FLEXMOE_CACHE' in os.environ or len(os.environ) > 8",
    ],
)
def test_programs_that_fail_exit_early_or_exceed_a_limit_do_not_pass(program):
    start = time.perf_counter()
    assert not programs.passes(program, seconds=1)
    assert time.perf_counter() - start < 10


def test_a_program_that_runs_to_its_end_passes():
    assert programs.passes("import math\nassert math.sqrt(4) == 2")


def test_a_larger_sample_only_adds_examples():
    small, large = (load_examples(BY_NAME["openbookqa"], n) for n in (10, 40))
    assert large[:10] == small
    assert load_examples(BY_NAME["openbookqa"], None)[:40] == large


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        ("So 3 + 4 = 7.", "7", True),
        ("It is $1,250 in all", "1250", True),
        ("-3 and then 12.50", "12.5", True),
        ("no number", "7", False),
        ("7 apples, then 8", "7", False),
    ],
)
def test_the_last_number_of_an_answer_counts(text, gold, same):
    assert answers.same_number(text, [gold]) == same


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        (r"The final answer is $\frac12$. I hope it is correct.", r"\frac{1}{2}", True),
        (r"so $\boxed{\dfrac{1}{2}}$ it is", r"\frac{1}{2}", True),
        (r"\boxed{ 3,000 \text{ cm} }", "3000", True),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
        (r"we get $x = 2$ and then $5$", "5", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", False),
    ],
)
def test_the_final_formula_counts_in_any_notation_but_without_algebra(text, gold, same):
    assert answers.same_formula(text, [gold]) == same


def test_f1_ignores_case_articles_and_punctuation_and_takes_the_closest_gold_answer():
    assert answers.f1("The Barack Obama!", ["barack obama"]) == 1
    assert answers.f1("Obama", ["Barack Obama", "Michelle"]) == pytest.approx(2 / 3)
    assert answers.f1("", ["x"]) == 0


def test_every_choice_task_is_scored_by_choice():
    assert {task.kind for task in find_tasks("mc9")} == {CHOICE}
