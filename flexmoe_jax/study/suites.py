"""Scores on the paper's tasks of the models that a study compares: what training kept, beside what it taught."""

import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence

from flexmoe_jax.api import Model
from flexmoe_jax.evaluate.suites import CHOICE, Task, find_tasks, load_examples
from flexmoe_jax.evaluate.tasks import run_task
from flexmoe_jax.files import write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.study.scoring import Bench, soup_of
from flexmoe_jax.study.sharing import every, once
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.workshop import folder_name
from flexmoe_jax.tree import PUBLIC

log = logging.getLogger(__name__)

FORM = "rc0"  # without examples, which would take five times as long
ACCURACY, GOLD = "accuracy", "gold_bits_per_byte"

Scores = dict[str, dict[str, dict[str, float]]]  # {system: {task: {measure: score}}}


def score_suites(bench: Bench) -> Scores:
    """Scores of the public model, the method, the soup and the dense experts on the tasks of `config.suites`.

    Accuracy of tasks with choices, bits per byte of the gold answers of all. Kept in `suites/`, a file for each system
    and task.
    """
    config = bench.config
    tasks = [task for suite in filter(None, config.suites.split(",")) for task in find_tasks(suite)]
    dense = [system.name for system in systems(config) if system.name.startswith("dense ")]

    @functools.lru_cache(maxsize=1)
    def model_of(name: str) -> Model:
        return soup_of(bench, [PUBLIC, *dense]) if name == "soup" else bench.load(bench.artifacts.models[name])

    def score(name: str, task: Task, path: pathlib.Path) -> None:
        lm, examples = model_of(name).lm(), load_examples(task, config.suite_items, FORM)
        scores = {GOLD: run_task(lm, task, examples, gold=True).score}
        if task.kind == CHOICE:
            scores[ACCURACY] = run_task(lm, task, examples).score
        write_json(path, scores)
        log.info(f"scored {name} on {task.name}")

    def score_tasks(name: str) -> dict[str, dict[str, float]]:
        home = bench.home.parent if name == PUBLIC else bench.home  # one public model for all seeds
        paths = {task: home / "suites" / folder_name(name) / f"{task.name}.json" for task in tasks}
        every(functools.partial(once, path, functools.partial(score, name, task)) for task, path in paths.items())
        return {task.name: parse_json(read_bytes(path), path) for task, path in paths.items()}

    names = (PUBLIC, METHOD, "soup", *dense) if tasks else ()
    return dict(zip(names, every(functools.partial(score_tasks, name) for name in names), strict=True))


def by_seed(seeds: Sequence[Scores]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{system: {task: {measure: score with each seed}}}."""
    return {
        name: {
            task: {measure: [scores[name][task][measure] for scores in seeds] for measure in measures}
            for task, measures in tasks.items()
        }
        for name, tasks in seeds[0].items()
    }


def suite_table(suites: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> tuple[list[str], list[list]]:
    """(header, rows) of a table: for each system the mean accuracy over tasks with choices, and every task's gold bits.

    Means over seeds.
    """
    columns = next(iter(suites.values()))
    rows: list[list] = []
    for name, tasks in suites.items():
        chosen = [score for measures in tasks.values() for score in measures.get(ACCURACY, ())]
        golds = [sum(tasks[task][GOLD]) / len(tasks[task][GOLD]) for task in columns]
        rows.append([name, sum(chosen) / len(chosen) if chosen else float("nan"), *golds])
    return ["", ACCURACY, *columns], rows
