"""Every fault of the list applies, a sample of them is caught, and the runner says so of those that are not."""

import ast
import collections
import dataclasses

import pytest

from flexmoe_jax.errors import DataError
from tests.sabotage import runner
from tests.sabotage.fault import Fault
from tests.sabotage.faults import FAULTS
from tests.sabotage.outcomes import noticed
from tests.sabotage.runner import CAUGHT, PACKAGE, ROOT, SURVIVED, Outcomes, run

SAMPLE = (  # quick ones
    "without an expert is with it",
    "a text that is cut is scored on an end of text",
    "BTM's temperature multiplies",
)
ORDER = "tests/test_tree.py::test_canonical_order_is_public_then_alphabetical"
SELF_TEST = {
    Fault("a remedy has other words", "tree.py", '"give exactly one trunk"', '"give a trunk"', ORDER): SURVIVED,
    Fault("code that cannot run", "tree.py", "sorted(names, key", "sortd(names, key", ORDER): "the test breaks down",
    Fault("text that is not there", "tree.py", "no such text", "", ORDER): "does not apply: tree.py has 0 times",
    Fault("code that is no Python", "tree.py", "sorted(names, key", "sorted names, key", ORDER): "does not apply",
}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """{fault: what became of it} of the sample and the self-test, run together."""
    chosen = [fault for fault in FAULTS if fault.what in SAMPLE]
    return {verdict.fault.what: verdict.outcome for verdict in run([*chosen, *SELF_TEST])}


def test_every_fault_applies_and_names_a_test():
    tests: dict[str, set[str]] = {}
    for fault in FAULTS:
        fault.applied((ROOT / PACKAGE / fault.file).read_text())
        file, _, name = fault.test.partition("::")
        if file not in tests:
            tests[file] = {
                node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")
            }
        assert name.partition("[")[0] in tests[file], fault.test
    assert not [what for what, count in collections.Counter(fault.what for fault in FAULTS).items() if count > 1]
    assert len(FAULTS) > 100


def test_a_sample_is_caught(verdicts):
    assert {what: verdicts[what] for what in SAMPLE} == dict.fromkeys(SAMPLE, CAUGHT)


def test_a_fault_that_no_test_notices_survives_and_code_that_does_not_run_is_not_caught(verdicts):
    for fault, expected in SELF_TEST.items():
        assert verdicts[fault.what].startswith(expected), fault.what


@pytest.mark.parametrize(("failed", "why"), [({}, "does not run (said)"), ({ORDER: True}, "fails")])
def test_a_test_that_is_missing_or_fails_without_a_fault_catches_nothing(monkeypatch, failed, why):
    clean, broken = Outcomes(frozenset(), failed, "said", 1), Outcomes(frozenset(), {ORDER: True}, "", 1)
    monkeypatch.setattr(runner, "tests_on_copy", lambda tests, fault: broken if fault else clean)
    (verdict,) = run([dataclasses.replace(FAULTS[0], test=ORDER)])
    assert verdict.outcome == f"the test {why} without the fault"


def test_only_a_broken_promise_is_noticed():
    for error in (AssertionError(), DataError("what"), pytest.fail.Exception("did not raise")):
        assert noticed(error)
        assert noticed(BaseExceptionGroup("of hypothesis", [error]))
        assert not noticed(BaseExceptionGroup("of hypothesis", [error, NameError()]))
    for other in (NameError(), TypeError(), ValueError(), ImportError(), SyntaxError()):
        assert not noticed(other)
    with pytest.raises(KeyError) as here:
        {}["not there"]
    with pytest.raises(KeyError) as elsewhere:
        collections.ChainMap({})["not there"]  # raised in code of Python
    assert noticed(here.value)
    assert not noticed(elsewhere.value)
