"""What is said of a study follows from its intervals, and says what could not have been seen."""

import dataclasses

import pytest

from flexmoe_jax.study import claims
from flexmoe_jax.study.intervals import Interval
from flexmoe_jax.study.results import MEAN, Kind, Results
from flexmoe_jax.study.systems import METHOD
from tests.study import tiny


def changed(results: Results, name: str, against: Interval, column: str = MEAN) -> Results:
    """With another difference of one system from the method."""
    systems = [
        dataclasses.replace(s, against_method={**s.against_method, column: against}) if s.name == name else s
        for s in results.systems
    ]
    return dataclasses.replace(results, systems=systems)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Interval(0.3, 0.1, 0.5, 0.4), "FlexMoE beats the public model (0.300)."),
        (Interval(-0.3, -0.5, -0.1, 0.4), "FlexMoE loses to the public model (0.300)."),
        (Interval(0.3, -0.1, 0.7, 0.8), "No difference is seen to the public model (0.800 could have been seen)."),
    ],
)
def test_a_system_beats_another_only_where_the_interval_says_so(difference, said):
    results = changed(tiny.results(), "public", difference)
    pair = [system for system in results.systems if system.name in (METHOD, "public")]
    assert claims.differences(dataclasses.replace(results, systems=pair), Kind.BASELINE) == [said]


def test_systems_that_see_their_text_are_told_apart_and_counted():
    said = claims.headline(tiny.results())
    blind, seeing = said.split("Of the systems that see the text they score")
    assert "it beats the public model (0.500); it loses to unrestricted 2x (0.100)." in blind
    assert "BTM" not in blind
    assert seeing.startswith(" (\N{DAGGER}), it beats 1 (by 0.100).")


def test_an_ablation_without_an_effect_says_what_could_have_been_seen():
    results = changed(tiny.results(), "no bias", Interval(0.001, -0.01, 0.012, 0.016))
    found = claims.differences(results, Kind.ABLATION)
    assert found == ["No difference is seen to no bias (0.016 could have been seen)."]


def test_a_small_difference_is_not_called_zero():
    found = claims.differences(changed(tiny.results(), "no bias", Interval(0.0002, 0.0001, 0.0003, 0.1)), Kind.ABLATION)
    assert found == ["FlexMoE beats no bias (under 0.0005)."]


def test_regret_is_told_owner_by_owner():
    against_public, against_hybrid, public = claims.regret_sentences(tiny.results())
    assert against_public == (
        "Against the public model alone it is better on the text of code (0.200); worse on the text of news (0.040)."
    )
    assert against_hybrid == (
        "Against the owner's own hybrid it is worse on the text of code (0.050); "
        "no different, as far as seen, on that of news (0.025 could have been seen)."
    )
    assert public == "On public text it loses 15.0%."  # 0.3 of 2.0


@pytest.mark.parametrize(
    ("low", "high", "state"), [(-0.1, -0.05, "missed"), (-0.03, -0.01, "met"), (-0.1, -0.01, "open"), (0.1, 0.2, "met")]
)
def test_a_goal_is_met_or_missed_only_where_the_whole_interval_is(low, high, state):
    """The best dense expert has 2.0 bits per byte, of which 2% are 0.04."""
    first = tiny.results()
    oracle = dataclasses.replace(first.public, name=claims.ORACLE)
    results = dataclasses.replace(first, systems=[*first.systems, oracle])
    results = changed(results, claims.ORACLE, Interval((low + high) / 2, low, high, 0.1), "news")
    states = {"met": ["code (-25.0%)"], "missed": [], "open": []}
    states[state].append(f"news ({-(low + high) / 4:+.1%})")
    said = ", ".join(f"{word} on {' and '.join(names)}" for word, names in states.items() if names)
    assert claims.goals(results)[0] == f"The goal of within 2% of the best dense expert is {said}."


def test_what_was_measured_otherwise_is_warned_of():
    results = tiny.results()
    assert claims.warnings(results) == []
    old = changed(results, "public", Interval(0.5, 0.4, 0.6))
    assert "too narrow" in claims.warnings(old)[0]
    assert "could have been seen" not in claims.differences(old, Kind.BASELINE)[0]
    one = dataclasses.replace(results, config={**results.config, "seeds": 1})
    assert claims.warnings(one)[0].startswith("One seed")
    few = dataclasses.replace(
        results, documents={**results.documents, "news": {"documents": 9, "groups": 2, "bytes": 1}}
    )
    assert claims.warnings(few) == [
        "The text of news is of fewer than three groups of documents: its own intervals are too narrow."
    ]


def test_results_of_before_give_the_merged_models_regret_from_its_differences():
    new = tiny.results()
    hybrids = [dataclasses.replace(s, name=f"hybrid {s.experts[1]}") for s in new.systems if len(s.experts) == 2]
    old = dataclasses.replace(new, regret=[], systems=[*new.systems, *hybrids])
    rows = {row.owner: row for row in old.joined}
    assert set(rows) == {"public", "code", "news"}
    assert {row.model for row in rows.values()} == {METHOD}
    against = rows["code"].against_public  # 1.5 - 2.0, the other way round than in `against_method`
    assert dataclasses.astuple(against) == pytest.approx((-0.5, -0.52, -0.49, 0.025))
    assert rows["code"].against_hybrid.value == pytest.approx(1.5 - 1.7)
    assert rows["public"].against_hybrid is None


def test_an_opt_out_that_is_not_exact_is_told():
    results = tiny.results()
    assert claims.opting_out(results).startswith("Opting out is exact: 2 of 2")
    results.opting_out[0]["news"]["equal"] = False
    assert claims.opting_out(results).startswith("Opting out is NOT exact: 1 of 2")
