"""Results are read back as they were written, one system a line, and nothing else is taken for them."""

import dataclasses
import json
import pathlib

import pytest

from flexmoe_jax.cli.reproduce import lines, varied_lines
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.study.results import MARK_MEANS, Kind, json_lines, read_results, write_results
from tests.study import tiny

PUBLISHED = sorted((pathlib.Path(__file__).parents[2] / "results").glob("*.jsonl"))


def test_a_file_has_a_line_for_the_study_and_one_for_each_system(tmp_path):
    studies = [tiny.results("owner_steps-1"), tiny.results("owner_steps-2")]
    write_results(tmp_path / "owner_steps.jsonl", studies)
    assert read_results(tmp_path / "owner_steps.jsonl") == studies
    written = [json.loads(line) for line in (tmp_path / "owner_steps.jsonl").read_text().splitlines()]
    assert [line["study"] for line in written] == ["owner_steps-1"] * 9 + ["owner_steps-2"] * 9
    assert [line.get("name") for line in written] == [None, *tiny.SYSTEMS] * 2
    assert [line.get("format") for line in written[::9]] == ["flexmoe-study-1"] * 2


def changed(line: int, **changes: object) -> list[dict]:
    """The lines of a good file with one line changed; a key that is None is left out."""
    good = json_lines(tiny.results())
    good[line] = {key: value for key, value in {**good[line], **changes}.items() if value is not None}
    return good


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (0, {"format": "flexmoe-study-0"}, "has the format 'flexmoe-study-0'"),
        (0, {"curves": None}, "'curves' is missing"),
        (0, {"curves": [{"system": "x"}]}, "line 1 is not a line of results"),
        (0, {"extra": 1}, "'extra' is not known"),
        (0, {"regret": [{"model": "x"}]}, "line 1 is not a line of results"),
        (1, {"bits_per_byte": None}, "line 2 is not a line of results"),
        (1, {"bits_per_byte": {"public": {"value": 1}}}, "line 2 is not a line of results"),
        (1, {"bits_per_byte": {}}, "bits_per_byte has no 'mean'"),
        (2, {"against_method": {}}, "against_method has no 'mean'"),
        (2, {"kind": "other"}, "'other' is not a valid Kind"),
        (2, {"extra": 1}, "line 3 is not a line of results"),
        (2, {"study": "another"}, "not of the study"),
        (2, {"kind": "method"}, "has 2 methods"),
        (2, {"name": "x"}, "not 1 method and 'public'"),
    ],
)
def test_a_line_that_is_not_a_result_is_refused(line, changes, message, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, changed(line, **changes))))
    with pytest.raises(ArtifactError, match=message):
        read_results(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "x", '{"config": {}, "bits_per_byte": {}}'])
def test_a_file_that_is_not_results_is_refused(content, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"results\.jsonl"):
        read_results(path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_are_readable(path):
    for study in read_results(path):
        assert lines(study)[0].startswith("held-out bits per byte")


def test_what_older_files_hold_of_the_four_way_task_is_passed_over(tmp_path):
    old = json_lines(tiny.results())
    old[0]["choice_items"] = {"news": 6}
    for line in old[1:]:
        line["choice"] = {"news": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, old)))
    assert read_results(tmp_path / "results.jsonl") == [tiny.results()]


def test_older_files_without_marks_and_regret_are_marked(tmp_path):
    old = json_lines(tiny.results())
    del old[0]["regret"]
    for line in old[1:]:
        del line["sees_text"], line["chosen"]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, old)))
    assert read_results(tmp_path / "results.jsonl") == [dataclasses.replace(tiny.results(), regret=[])]


def test_varied_studies_are_told_apart_by_their_value():
    found = {path.stem: [study.study for study in read_results(path)] for path in PUBLISHED}
    assert found["owner_steps"] == ["owner_steps-25", "owner_steps-50", "owner_steps-100"]
    assert len(PUBLISHED) == 7


def test_the_terminal_groups_systems_by_kind():
    table = lines(tiny.results())
    headings = [line for line in table if line in {kind.heading for kind in Kind}]
    assert headings == [kind.heading for kind in Kind]
    assert [line.split("  ")[0] for line in table[table.index(Kind.BASELINE.heading) + 1 :][:3]] == [
        "unrestricted 2x",
        "BTM \N{DAGGER}",
        "public",
    ]
    assert [line for line in table if line.startswith("\N{DAGGER}")] == [MARK_MEANS]


def test_a_varied_table_has_the_method_and_all_baselines():
    table = varied_lines("owner_steps", {"25": tiny.results(), "50": tiny.results()})
    assert table[0].split("  ")[0] == "mean bits per byte, owner_steps"
    assert [name for name in tiny.SYSTEMS if name in table[0]] == ["FlexMoE", "public", "BTM", "unrestricted 2x"]
    assert table[2].split()[:3] == ["25", "1.500", "2.000"]
    assert table[2].split()[-1] == "30.0%"  # the mean of 0.5 and 0.1 over layers


def test_public_text_of_several_sources_is_shown_source_by_source_and_as_a_whole():
    one = tiny.results()
    assert (one.domains, one.public_text) == ([*tiny.DOMAINS], "public")
    several = dataclasses.replace(one, documents={**one.documents, "academic": {"documents": 1, "bytes": 1}})
    assert several.domains == ["public", "academic", "public text", "code", "news", "code + news"]
    assert several.public_text == "public text"
