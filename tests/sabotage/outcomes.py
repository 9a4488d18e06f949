"""A pytest plugin: writes what became of every test into the file $SABOTAGE_OUTCOMES, and whose package was tested."""

import json
import os
import pathlib
import traceback

import pytest

TESTS = pathlib.Path(__file__).parent.parent

# A test that fails by one of these has noticed a broken promise. NameError, TypeError, .. only say that code is broken.
NOTICED = {"AssertionError", "Failed", "FlexMoEError"}
_failed: dict[str, bool] = {}
_passed: set[str] = set()


def noticed(error: BaseException) -> bool:
    """Whether an exception says that a promise is broken; of a group, whether all of its exceptions do.

    So does one in the test's own code, which takes something for what it should be: a row that is not there.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(map(noticed, error.exceptions))
    if NOTICED & {kind.__name__ for kind in type(error).__mro__}:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = bool(frames) and pathlib.Path(frames[-1].f_code.co_filename).is_relative_to(TESTS)
    return own and isinstance(error, LookupError | ValueError)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        _failed[item.nodeid] = report.when == "call" and noticed(call.excinfo.value)
    elif report.passed and report.when == "call":
        _passed.add(item.nodeid)
    return report


def pytest_sessionfinish():
    import flexmoe_jax

    content = {"package": flexmoe_jax.__file__, "passed": sorted(_passed - {*_failed}), "failed": _failed}
    pathlib.Path(os.environ["SABOTAGE_OUTCOMES"]).write_text(json.dumps(content), encoding="utf-8")
